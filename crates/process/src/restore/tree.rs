//! Making the empty processes of a tree: IDs, parents, sessions, process groups, and the ones that
//! had ended already.
//!
//! # Order
//! A process inherits its session from its parent, and can only begin one of its own. So for each
//! process: first the children that are in the session which it inherited itself, then its own
//! session, then the other children. Process groups come last, leaders before their members.

use super::saved::{Saved, SavedProcess};
use super::stub::{Step, Stub, step};
use super::{space, system_v};
use crate::ProcessError;
use outlive_linux::clock::TimeOffsets;
use outlive_linux::maps::Mapping;
use outlive_linux::pid_namespace::PidNamespace;
use outlive_linux::remote::Arg;
use std::collections::BTreeMap;

/// Free bytes behind working memory that steps may use.
pub const ASIDE: u64 = 8 << 20;

/// Where the processes are made.
#[derive(Clone, Copy)]
pub enum Place<'a> {
    /// In the caller's PID namespace, and in a time namespace with these offsets.
    Here(TimeOffsets),
    /// In a PID namespace made for them.
    In(&'a PidNamespace),
}

impl Place<'_> {
    /// A process whose parent is not in the tree: the root is our child everywhere; the others are
    /// those of a namespace's init, which has processes whose parents have ended.
    fn parentless(self, id: u32, saved: &Saved, arena_at: u64) -> Result<Stub, ProcessError> {
        match self {
            Self::Here(time) => Stub::new(id, time, arena_at),
            Self::In(namespace) if id == saved.subject.root_process => {
                Stub::new_in(namespace, id, arena_at)
            }
            Self::In(namespace) => Stub::orphan_in(namespace, (id, saved.unused_id()), arena_at),
        }
    }
}

/// Makes all processes, in the order of the epoch. `before_children` is called with each, and its
/// place in that order, before its children are made as copies of it.
pub fn make(
    saved: &Saved,
    ours: &[Mapping],
    place: Place<'_>,
    before_children: &mut dyn FnMut(usize, &mut Stub) -> Result<(), ProcessError>,
) -> Result<Vec<Stub>, ProcessError> {
    let memories: Vec<_> = saved.processes.iter().map(|p| &p.memory).collect();
    let room = (Stub::arena_length() + ASIDE).saturating_add(system_v::longest(saved));
    let hole = space::find_hole(&memories, ours, room)?;
    let mut stubs = BTreeMap::new();
    for parentless in saved.processes.iter().filter(|p| p.process.parent == 0) {
        let pid = parentless.process.pid;
        stubs.insert(pid, place.parentless(pid, saved, hole)?);
    }
    // Parents stand before their children, so each is there when its turn comes.
    for (at, process) in saved.processes.iter().enumerate() {
        if let Some(stub) = stubs.get_mut(&process.process.pid) {
            before_children(at, stub)?;
        }
        children(saved, process, &mut stubs)?;
    }
    groups(saved, &mut stubs)?;
    let in_order = saved.subject.processes.iter().map(|pid| {
        stubs
            .remove(pid)
            .ok_or_else(|| ProcessError::Image(format!("process {pid} has no parent")))
    });
    in_order.collect()
}

fn children(
    saved: &Saved,
    process: &SavedProcess,
    stubs: &mut BTreeMap<u32, Stub>,
) -> Result<(), ProcessError> {
    let pid = process.process.pid;
    let leads = process.process.sid == pid;
    let of_this = |p: &&SavedProcess| p.process.parent == pid;
    // A child that leads a session of its own may come from either.
    let later = |p: &&SavedProcess| leads && p.process.sid == pid;
    let parent = stubs
        .get_mut(&pid)
        .ok_or_else(|| ProcessError::Image(format!("process {pid} has no parent")))?;
    let mut made = Vec::new();
    for child in saved.processes.iter().filter(of_this).filter(|p| !later(p)) {
        made.push(parent.child(child.process.pid, child.process.exit_signal)?);
    }
    if leads {
        parent.steps(vec![step(libc::SYS_setsid, [], "beginning a session")])?;
    }
    for child in saved.processes.iter().filter(of_this).filter(later) {
        made.push(parent.child(child.process.pid, child.process.exit_signal)?);
    }
    for zombie in saved.subject.zombies.iter().filter(|z| z.parent == pid) {
        parent
            .child(zombie.pid, libc::SIGCHLD as u32)?
            .become_zombie(zombie.status)?;
    }
    if saved.subject.zombies.iter().any(|z| z.parent == pid) {
        // What the ended children told their parent is in the epoch, if it is still to be told.
        let chld = 1u64 << (libc::SIGCHLD - 1);
        let args = [
            Arg::In(chld.to_ne_bytes().to_vec()),
            Arg::Value(0),
            Arg::In(vec![0; 16]),
            Arg::Value(8),
        ];
        let mut forget = Step::new(libc::SYS_rt_sigtimedwait, args, "forgetting a signal");
        forget.tolerate = &[libc::EAGAIN];
        parent.steps(vec![forget])?;
    }
    stubs.extend(made.into_iter().map(|stub| (stub.target.id, stub)));
    Ok(())
}

/// Process groups whose leaders are in the tree. A process of another group stays in the one that
/// it inherits.
fn groups(saved: &Saved, stubs: &mut BTreeMap<u32, Stub>) -> Result<(), ProcessError> {
    for leaders in [true, false] {
        for p in saved.processes.iter().map(|p| &p.process) {
            let leads = p.pgid == p.pid;
            let known = stubs.contains_key(&p.pgid);
            // A session's leader leads a group already.
            if leads != leaders || !known || p.sid == p.pid {
                continue;
            }
            if let Some(stub) = stubs.get_mut(&p.pid) {
                let args = [0, u64::from(p.pgid)];
                stub.steps(vec![step(
                    libc::SYS_setpgid,
                    args,
                    "joining a process group",
                )])?;
            }
        }
    }
    Ok(())
}
