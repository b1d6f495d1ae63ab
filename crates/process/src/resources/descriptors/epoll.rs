//! Epoll instances with what they watch.
//!
//! Watches refer to open file descriptions under the number that was used when they were added,
//! so a restored process which has that number adds them itself once all numbers are in place. An
//! instance that several processes share may watch the same number several times, each process'
//! own.
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
use super::table::{FdTable, Holder};
use super::{Description, Descriptor};
use crate::ProcessError;
use outlive_linux::kcmp;
use outlive_linux::remote::Arg;
use outlive_state_tree::StateNode;
use rustix::event::epoll;
use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;

/// Up to so many watches each is compared with its number by the kernel, which walks all of them
/// for it; beyond that only those whose inode says nothing.
const COMPARE_ALL: usize = 64;

/// An epoll instance. The four lists run in parallel.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,fd-epoll-v1")]
pub struct EpollState {
    /// Processes that have both the instance and the watched number.
    pub processes: Vec<u32>,
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

/// A process that holds the instance, and what it watches under the number of the watch; the
/// `times`-th with that number in the kernel's list.
fn holder_of(watch: &Watch, times: u32, compare_all: bool, cx: &CollectContext<'_>) -> Option<u32> {
    let target = watch.target;
    let holds = |holder: &&Holder| {
        let open = cx.around.inodes.get(&(holder.process, target));
        open.is_some_and(|&(inode, anonymous)| {
            let certain = !anonymous && !compare_all && times == 0;
            let compare =
                || kcmp::is_epoll_target(holder.process, target, holder.number, target, times);
            inode == watch.inode && (certain || compare() == Ok(true))
        })
    };
    cx.holders.iter().find(holds).map(|holder| holder.process)
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
            processes: vec![],
            targets: vec![],
            events: vec![],
            data: vec![],
        };
        let mut seen: HashMap<u32, u32> = HashMap::new();
        let compare_all = lines.len() <= COMPARE_ALL || cx.processes().len() > 1;
        for line in &lines {
            let watch = parse(line)
                .ok_or_else(|| probe.failed("understand fdinfo of", rustix::io::Errno::PROTO))?;
            let times = seen.entry(watch.target).or_insert(0);
            let process = holder_of(&watch, *times, compare_all, cx)
                .ok_or_else(|| refuse_watch(probe, watch.target))?;
            *times += 1;
            state.processes.push(process);
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
        let lengths = [self.processes.len(), self.events.len(), self.data.len()];
        if lengths != [self.targets.len(); 3] {
            return bad("has lists of different lengths".into());
        }
        let itself = cx.table.descriptions.get(about.index);
        for (&process, &target) in self.processes.iter().zip(&self.targets) {
            if !cx.numbers.contains(&(process, target)) {
                return bad(format!("watches fd {target}, which is not open"));
            }
            if itself.and_then(|d| d.number_in(process)).is_none() {
                return bad(format!("is not open in pid {process}, which watches by it"));
            }
        }
        Ok(())
    }

    fn recreate(&self, about: &About, cx: &mut RecreateContext) -> Result<OwnedFd, ProcessError> {
        epoll::create(epoll::CreateFlags::CLOEXEC)
            .map_err(|errno| failed(cx.pid, format!("make epoll fd {}", about.number), errno))
    }

    fn rename(&mut self, name: &dyn Fn(u32) -> u32) {
        for process in &mut self.processes {
            *process = name(*process);
        }
    }

    fn finish(&self, about: &About, table: &FdTable, calls: &mut Vec<RemoteCall>) {
        let streams: HashSet<(u32, u32)> = table
            .descriptions
            .iter()
            .filter(|d| matches!(d.object, Description::Stream(_)))
            .flat_map(|d| d.holders.iter().map(|h| (h.process, h.number)))
            .collect();
        let places = self.processes.iter().zip(&self.targets);
        let watches = places.zip(self.events.iter().zip(&self.data));
        for ((&process, &target), (&events, &data)) in watches {
            let itself = table.descriptions.get(about.index);
            let Some(number) = itself.and_then(|d| d.number_in(process)) else {
                continue;
            };
            // struct epoll_event is packed on x86-64.
            let mut event = Vec::with_capacity(12);
            event.extend_from_slice(&events.to_ne_bytes());
            event.extend_from_slice(&data.to_ne_bytes());
            calls.push(RemoteCall {
                process,
                number: libc::SYS_epoll_ctl,
                args: vec![
                    Arg::Value(number.into()),
                    Arg::Value(libc::EPOLL_CTL_ADD as u64),
                    Arg::Value(target.into()),
                    Arg::In(event),
                ],
                what: format!("watch fd {target} by epoll fd {number}"),
                // A stream may have been re-attached to a file, which cannot be watched.
                tolerate: if streams.contains(&(process, target)) {
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
