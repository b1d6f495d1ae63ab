//! Epoll instances with what they watch.
//!
//! Watches refer to open file descriptions under the number that was used when they were added,
//! so the restored process adds them itself once all numbers are in place.
//!
//! # What differs afterwards
//! An edge-triggered watch reports once more, and a one-shot watch that had fired may report an
//! error or a hang-up: the kernel adds those two to every watch.
//!
//! # What it refuses
//! A watch whose number was closed or reused while a duplicate keeps the watch alive: there is no
//! number left to add it by.

use super::context::{About, Around, CheckContext, CollectContext, RecreateContext, RemoteCall};
use super::probe::{Probe, failed};
use super::table::FdTable;
use super::{Description, Descriptor};
use crate::ProcessError;
use outlive_linux::kcmp;
use outlive_linux::remote::Arg;
use outlive_state_tree::StateNode;
use rustix::event::epoll;
use std::collections::HashSet;
use std::os::fd::OwnedFd;

/// Up to so many watches each is compared with its number by the kernel, which walks all of them
/// for it; beyond that only those whose inode says nothing.
const COMPARE_ALL: usize = 64;

/// An epoll instance. The three lists run in parallel.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,fd-epoll-v1")]
pub struct EpollState {
    /// Numbers that are watched.
    pub targets: Vec<u32>,
    /// What is waited for (`EPOLL…`).
    pub events: Vec<u32>,
    /// What the program gets back.
    pub data: Vec<u64>,
}

/// One line of `fdinfo`.
#[derive(Debug, PartialEq)]
struct Watch {
    target: u32,
    events: u32,
    data: u64,
    inode: u64,
}

/// Reads `N events: X data: X pos:N ino:X sdev:X`.
fn parse(line: &str) -> Option<Watch> {
    let mut words = line.split_whitespace();
    let target = words.next()?.parse().ok()?;
    let mut watch = Watch {
        target,
        events: 0,
        data: 0,
        inode: 0,
    };
    while let Some(word) = words.next() {
        let (key, value) = word.split_once(':')?;
        let value = if value.is_empty() {
            words.next()?
        } else {
            value
        };
        let hexadecimal = || u64::from_str_radix(value, 16).ok();
        match key {
            "events" => watch.events = hexadecimal()? as u32,
            "data" => watch.data = hexadecimal()?,
            "ino" => watch.inode = hexadecimal()?,
            _ => {}
        }
    }
    Some(watch)
}

fn refuse_watch(probe: &Probe<'_>, target: u32) -> ProcessError {
    probe.refuse(
        format!("epoll that still watches fd {target}, which was closed but has a duplicate"),
        "have the program remove descriptors from epoll before it closes them",
    )
}

impl Descriptor for EpollState {
    const NAME: &'static str = "epoll";

    fn claims(probe: &Probe<'_>, _: &Around) -> Result<bool, ProcessError> {
        Ok(probe.link == b"anon_inode:[eventpoll]")
    }

    fn collect(probe: &Probe<'_>, cx: &mut CollectContext<'_>) -> Result<Self, ProcessError> {
        let lines: Vec<&str> = probe
            .info
            .lines()
            .filter(|&(key, _)| key == "tfd")
            .map(|(_, line)| line)
            .collect();
        let mut state = Self {
            targets: vec![],
            events: vec![],
            data: vec![],
        };
        let mut seen = HashSet::new();
        for line in &lines {
            let watch = parse(line)
                .ok_or_else(|| probe.failed("understand fdinfo of", rustix::io::Errno::PROTO))?;
            let open = cx.around.inodes.get(&watch.target);
            let Some(&(inode, anonymous)) = open else {
                return Err(refuse_watch(probe, watch.target));
            };
            if inode != watch.inode || !seen.insert(watch.target) {
                return Err(refuse_watch(probe, watch.target));
            }
            if anonymous || lines.len() <= COMPARE_ALL {
                let (pid, target) = (cx.target.pid, watch.target);
                if kcmp::is_epoll_target(pid, target, probe.number, target, 0) != Ok(true) {
                    return Err(refuse_watch(probe, target));
                }
            }
            state.targets.push(watch.target);
            state.events.push(watch.events);
            state.data.push(watch.data);
        }
        Ok(state)
    }

    fn check(&self, about: &About, cx: &mut CheckContext<'_>) -> Result<(), ProcessError> {
        let bad = |what: String| {
            Err(ProcessError::Image(format!(
                "epoll fd {} {what}",
                about.number
            )))
        };
        if self.targets.len() != self.events.len() || self.targets.len() != self.data.len() {
            return bad("has lists of different lengths".into());
        }
        if let Some(target) = self.targets.iter().find(|&&t| !cx.numbers.contains(&t)) {
            return bad(format!("watches fd {target}, which is not open"));
        }
        Ok(())
    }

    fn recreate(&self, about: &About, cx: &mut RecreateContext) -> Result<OwnedFd, ProcessError> {
        epoll::create(epoll::CreateFlags::CLOEXEC)
            .map_err(|errno| failed(cx.pid, format!("make epoll fd {}", about.number), errno))
    }

    fn finish(&self, about: &About, table: &FdTable, calls: &mut Vec<RemoteCall>) {
        let streams: HashSet<u32> = table
            .descriptions
            .iter()
            .filter(|d| matches!(d.object, Description::Stream(_)))
            .flat_map(|d| d.numbers.iter().copied())
            .collect();
        let watches = self.targets.iter().zip(&self.events).zip(&self.data);
        for ((&target, &events), &data) in watches {
            // struct epoll_event is packed on x86-64.
            let mut event = Vec::with_capacity(12);
            event.extend_from_slice(&events.to_ne_bytes());
            event.extend_from_slice(&data.to_ne_bytes());
            calls.push(RemoteCall {
                number: libc::SYS_epoll_ctl,
                args: vec![
                    Arg::Value(about.number.into()),
                    Arg::Value(libc::EPOLL_CTL_ADD as u64),
                    Arg::Value(target.into()),
                    Arg::In(event),
                ],
                what: format!("watch fd {target} by epoll fd {}", about.number),
                // A stream may have been re-attached to a file, which cannot be watched.
                tolerate: if streams.contains(&target) {
                    &[libc::EPERM]
                } else {
                    &[]
                },
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn watches_are_read() {
        let line = "4 events:       19 data:         ffffffff00000004  pos:0 ino:2ac8 sdev:9";
        let watch = Watch {
            target: 4,
            events: 0x19,
            data: 0xffff_ffff_0000_0004,
            inode: 0x2ac8,
        };
        assert_eq!(parse(line), Some(watch));
        assert_eq!(parse(""), None);
        assert_eq!(parse("4 events:"), None);
        assert_eq!(parse("4 events: xyz"), None);
    }
}
