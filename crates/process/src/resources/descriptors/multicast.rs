//! Multicast groups of sockets.
//!
//! The kernel lists the groups of each interface (`/proc/net/igmp`, `/proc/net/igmp6`), but not
//! those of a socket; it only says whether a socket is in a given one. So each is asked for.
//!
//! # What it refuses
//! Groups that a socket joined for some senders only.

use super::context::About;
use super::probe::Probe;
use crate::ProcessError;
use outlive_linux::sockopt::{self, Membership};
use outlive_state_tree::StateNode;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, OwnedFd};

/// A multicast group that a socket is in.
#[derive(StateNode, Debug, Clone, PartialEq, Eq)]
#[state(compatible = "outlive,multicast-group-v1")]
pub struct GroupState {
    /// The name of the interface.
    pub interface: Vec<u8>,
    /// The address, 4 or 16 bytes in network order.
    pub address: Vec<u8>,
}

impl GroupState {
    fn address(&self) -> Option<IpAddr> {
        let v4 = || <[u8; 4]>::try_from(&self.address[..]).map(|a| IpAddr::from(Ipv4Addr::from(a)));
        let v6 =
            || <[u8; 16]>::try_from(&self.address[..]).map(|a| IpAddr::from(Ipv6Addr::from(a)));
        v4().or_else(|_| v6()).ok().filter(IpAddr::is_multicast)
    }

    /// For messages.
    pub(crate) fn shown(&self) -> String {
        let address = self.address().map_or("?".into(), |a| a.to_string());
        format!("{address} on {}", String::from_utf8_lossy(&self.interface))
    }

    /// An image is hostile: it must be a group.
    pub(crate) fn check(&self, about: &About) -> Result<(), ProcessError> {
        if self.address().is_some() {
            return Ok(());
        }
        let number = about.number;
        Err(ProcessError::Image(format!(
            "a multicast group of fd {number} is none"
        )))
    }

    /// Joins it.
    pub(crate) fn join(&self, socket: &OwnedFd) -> Result<(), String> {
        let interfaces = list().unwrap_or_default();
        let number = interface_number(&self.interface, &interfaces);
        let (number, group) = number
            .zip(self.address())
            .ok_or_else(|| "there is no such interface".to_owned())?;
        sockopt::join(socket.as_fd(), number, group).map_err(|errno| errno.to_string())
    }
}

/// A group that some socket of this host is in.
#[derive(Debug, PartialEq, Eq)]
struct Known {
    number: u32,
    interface: Vec<u8>,
    group: IpAddr,
}

fn interface_number(name: &[u8], known: &[Known]) -> Option<u32> {
    let listed = known.iter().find(|k| k.interface == name).map(|k| k.number);
    listed.or_else(|| {
        let name = std::str::from_utf8(name)
            .ok()
            .filter(|n| !n.contains('/') && ![".", ".."].contains(n))?;
        let text = std::fs::read_to_string(format!("/sys/class/net/{name}/ifindex")).ok()?;
        text.trim().parse().ok()
    })
}

fn list() -> std::io::Result<Vec<Known>> {
    let mut all = parse_v4(&std::fs::read_to_string("/proc/net/igmp")?);
    // A host without IP version 6 has no such file.
    all.extend(parse_v6(
        &std::fs::read_to_string("/proc/net/igmp6").unwrap_or_default(),
    ));
    Ok(all)
}

/// `number name : …` for an interface, and its groups in the lines below, in the byte order of the
/// host.
fn parse_v4(text: &str) -> Vec<Known> {
    let mut found = Vec::new();
    let mut current = None;
    for line in text.lines().skip(1) {
        let mut words = line.split_whitespace();
        let Some(first) = words.next() else { continue };
        if line.starts_with(char::is_whitespace) {
            if let (Ok(group), Some((number, interface))) =
                (u32::from_str_radix(first, 16), &current)
            {
                let group = IpAddr::from(Ipv4Addr::from(group.to_ne_bytes()));
                found.push(Known {
                    number: *number,
                    interface: Vec::clone(interface),
                    group,
                });
            }
        } else if let (Ok(number), Some(name)) = (first.parse(), words.next()) {
            // A long name leaves no room before the colon.
            let name = name.trim_end_matches(':');
            current = Some((number, name.as_bytes().to_vec()));
        }
    }
    // Every interface is in this one by itself.
    found.retain(|k| k.group != IpAddr::from(Ipv4Addr::new(224, 0, 0, 1)));
    found
}

/// `number name group …`
fn parse_v6(text: &str) -> Vec<Known> {
    let line = |line: &str| {
        let mut words = line.split_whitespace();
        let number = words.next()?.parse().ok()?;
        let interface = words.next()?.as_bytes().to_vec();
        let group = u128::from_str_radix(words.next()?, 16).ok()?;
        let group = IpAddr::from(Ipv6Addr::from(group.to_be_bytes()));
        Some(Known {
            number,
            interface,
            group,
        })
    };
    text.lines().filter_map(line).collect()
}

/// The groups that a socket is in.
pub(crate) fn collect(probe: &Probe<'_>) -> Result<Vec<GroupState>, ProcessError> {
    let all = list().map_err(|e| ProcessError::Kernel {
        pid: probe.target.pid,
        what: "reading the multicast groups of this host".into(),
        source: e,
    })?;
    let socket = probe.duplicate()?;
    let mut groups = Vec::new();
    for known in all {
        let found = sockopt::membership(socket, known.number, known.group)
            .map_err(|errno| probe.failed("ask for the multicast groups of", errno))?;
        match found {
            Membership::None => {}
            Membership::Whole => groups.push(GroupState {
                interface: known.interface,
                address: match known.group {
                    IpAddr::V4(group) => group.octets().to_vec(),
                    IpAddr::V6(group) => group.octets().to_vec(),
                },
            }),
            Membership::Filtered => {
                let what = format!(
                    "socket in multicast group {} for some senders only",
                    known.group
                );
                return Err(probe.refuse(what, "have the program join the whole group"));
            }
        }
    }
    Ok(groups)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_of_interfaces_are_understood() {
        let text = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n\
            1\tlo        :     1      V3\n\t\t\t\tC70000E0     1 0:00000000\t\t0\n\
            \t\t\t\t010000E0     1 0:00000000\t\t0\n2\teth0      :     0      V3\n";
        let known = parse_v4(text);
        assert_eq!(known.len(), 1);
        assert_eq!((known[0].number, &known[0].interface[..]), (1, &b"lo"[..]));
        assert_eq!(known[0].group, "224.0.0.199".parse::<IpAddr>().unwrap());
        let known =
            parse_v6("1    lo              ff020000000000000000000000000001     1 0000000C 0\nx\n");
        assert_eq!(known[0].group, "ff02::1".parse::<IpAddr>().unwrap());
        assert_eq!(known.len(), 1);
    }
}
