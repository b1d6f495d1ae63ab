//! Users, groups, capabilities and the switches that go with them, thread by thread.

use crate::target::Status;
use outlive_linux::remote::{Arg, Batch};
use outlive_state_tree::StateNode;

/// Credentials of a thread (`credentials(7)`, `capabilities(7)`).
#[derive(StateNode, Clone, Debug, Default, PartialEq, Eq)]
#[state(compatible = "outlive,credentials-v1")]
pub struct Credentials {
    /// Real, effective, saved and file system user.
    pub users: Vec<u32>,
    /// Real, effective, saved and file system group.
    pub groups: Vec<u32>,
    /// Supplementary groups.
    pub supplementary: Vec<u32>,
    /// Capabilities: inheritable, permitted, effective, bounding, ambient.
    pub capabilities: Vec<u64>,
    /// `PR_SET_NO_NEW_PRIVS`.
    pub no_new_privs: bool,
}

impl Credentials {
    /// Credentials out of a status file.
    #[must_use]
    pub fn of(status: &Status) -> Self {
        Self {
            users: status.uid.to_vec(),
            groups: status.gid.to_vec(),
            supplementary: status.groups.clone(),
            capabilities: status.caps.to_vec(),
            no_new_privs: status.no_new_privs,
        }
    }

    /// Whether an image's values have the form that [`recreate`] needs.
    #[must_use]
    pub fn is_well_formed(&self) -> bool {
        self.users.len() == 4
            && self.groups.len() == 4
            && self.capabilities.len() == 5
            && self.supplementary.len() <= 65536
    }
}

const CAP_VERSION_3: u32 = 0x2008_0522;

/// Adds the calls that change credentials from `now` to `state`; none where they are equal.
/// Requires [`Credentials::is_well_formed`]. Order: groups before users, because a user without
/// privilege may not change groups; bounding set while we may; the rest of the capabilities last,
/// because changing users resets them (`PR_SET_KEEPCAPS` holds the permitted ones over it).
pub fn recreate(state: &Credentials, now: &Credentials, batch: &mut Batch) {
    let v = |n: u32| Arg::Value(u64::from(n));
    if state.supplementary != now.supplementary {
        let list: Vec<u8> = state
            .supplementary
            .iter()
            .flat_map(|g| g.to_ne_bytes())
            .collect();
        batch.push(
            libc::SYS_setgroups,
            [v(state.supplementary.len() as u32), Arg::In(list)],
        );
    }
    let prctl =
        |op: libc::c_int, arg: u64| [Arg::Value(op as u64), Arg::Value(arg), v(0), v(0), v(0)];
    for bit in (0..64).filter(|b| now.capabilities[3] & !state.capabilities[3] & 1 << b != 0) {
        batch.push(libc::SYS_prctl, prctl(libc::PR_CAPBSET_DROP, bit));
    }
    if state.groups != now.groups {
        let g = &state.groups;
        batch.push(libc::SYS_setresgid, [v(g[0]), v(g[1]), v(g[2])]);
        batch.push(libc::SYS_setfsgid, [v(g[3])]);
    }
    let users_change = state.users != now.users;
    if users_change {
        let u = &state.users;
        batch.push(libc::SYS_prctl, prctl(libc::PR_SET_KEEPCAPS, 1));
        batch.push(libc::SYS_setresuid, [v(u[0]), v(u[1]), v(u[2])]);
        batch.push(libc::SYS_setfsuid, [v(u[3])]);
        batch.push(libc::SYS_prctl, prctl(libc::PR_SET_KEEPCAPS, 0));
    }
    if users_change || state.capabilities[..3] != now.capabilities[..3] {
        let c = &state.capabilities;
        let half = |n: u64, high: bool| (if high { n >> 32 } else { n }) as u32;
        let mut header = CAP_VERSION_3.to_ne_bytes().to_vec();
        header.extend_from_slice(&0u32.to_ne_bytes());
        let mut data = Vec::with_capacity(24);
        for high in [false, true] {
            for set in [c[2], c[1], c[0]] {
                data.extend_from_slice(&half(set, high).to_ne_bytes());
            }
        }
        batch.push(libc::SYS_capset, [Arg::In(header), Arg::In(data)]);
    }
    for bit in (0..64).filter(|b| state.capabilities[4] & 1 << b != 0) {
        let raise = libc::PR_CAP_AMBIENT_RAISE as u64;
        let args = [
            Arg::Value(libc::PR_CAP_AMBIENT as u64),
            Arg::Value(raise),
            Arg::Value(bit),
            v(0),
            v(0),
        ];
        batch.push(libc::SYS_prctl, args);
    }
    if state.no_new_privs && !now.no_new_privs {
        batch.push(libc::SYS_prctl, prctl(libc::PR_SET_NO_NEW_PRIVS, 1));
    }
}
