//! The few facts of `/proc` that tell one process from another.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs;

/// The number of a process here, and the one that it sees itself: they differ where it lives in a
/// PID namespace of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pids {
    /// Here.
    pub pid: u32,
    /// There.
    pub ns_pid: u32,
}

impl Pids {
    /// Of a process with this number here; of one that is gone they are taken to be equal.
    #[must_use]
    pub fn of(pid: u32) -> Self {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let ns_pid = innermost(&status).unwrap_or(pid);
        Self { pid, ns_pid }
    }
}

impl fmt::Display for Pids {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.pid)?;
        if self.pid != self.ns_pid {
            write!(f, " ({} in its PID namespace)", self.ns_pid)?;
        }
        Ok(())
    }
}

/// The last field of the line `NSpid`, which tells the numbers of a process from the namespace of
/// this `/proc` inwards.
fn innermost(status: &str) -> Option<u32> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("NSpid:"))?;
    line.split_ascii_whitespace().next_back()?.parse().ok()
}

/// Start time of a process in clock ticks since boot; `None` where it is gone or a zombie.
#[must_use]
pub fn start_time(pid: u32) -> Option<u64> {
    parse_stat(&fs::read(format!("/proc/{pid}/stat")).ok()?)
}

/// The process group of a process; 0 where it is one that this PID namespace does not know, `None`
/// where the process is gone.
#[must_use]
pub fn group(pid: u32) -> Option<u32> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    let after = stat.iter().rposition(|b| *b == b')')? + 1;
    let text = std::str::from_utf8(stat.get(after..)?).ok()?;
    text.split_ascii_whitespace().nth(2)?.parse().ok()
}

/// Whether a process has ended and was not reaped yet, so that its number is still taken.
#[must_use]
pub fn lingers(pid: u32) -> bool {
    fs::read(format!("/proc/{pid}/stat")).is_ok_and(|stat| parse_stat(&stat).is_none())
}

/// Pages of a process that are in memory; `None` where it is gone.
#[must_use]
pub fn resident_pages(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    text.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// The command line of a process, lossily as text.
#[must_use]
pub fn command(pid: u32) -> Option<Vec<String>> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let bytes = bytes.strip_suffix(b"\0").unwrap_or(&bytes);
    if bytes.is_empty() {
        return None;
    }
    Some(
        bytes
            .split(|b| *b == 0)
            .map(|a| String::from_utf8_lossy(a).into_owned())
            .collect(),
    )
}

/// What names this boot; empty where the kernel does not say.
#[must_use]
pub fn boot_id() -> String {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    text.trim().to_owned()
}

/// Fields of `/proc/PID/stat` after the name, which may hold anything: the state is the first,
/// the start time the twentieth.
fn parse_stat(stat: &[u8]) -> Option<u64> {
    let after = stat.iter().rposition(|b| *b == b')')? + 1;
    let text = std::str::from_utf8(stat.get(after..)?).ok()?;
    let mut fields = text.split_ascii_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// The children of this process, however they became that.
#[must_use]
pub fn children() -> Vec<u32> {
    let mut all = Vec::new();
    for task in std::fs::read_dir("/proc/self/task")
        .into_iter()
        .flatten()
        .flatten()
    {
        let text = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
        all.extend(
            text.split_whitespace()
                .filter_map(|word| word.parse::<u32>().ok()),
        );
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_time_is_found_behind_a_misleading_name() {
        let rest = "1 1 1 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 4242 99 100";
        let stat = format!("17 (a) Z 9 9) S {rest}");
        assert_eq!(parse_stat(stat.as_bytes()), Some(4242));
        assert_eq!(parse_stat(format!("17 (a) Z {rest}").as_bytes()), None);
        assert_eq!(parse_stat(b"17 (a"), None);
        assert_eq!(parse_stat(b"17 (a) S 1 1"), None);
        assert!(start_time(std::process::id()).is_some());
    }

    #[test]
    fn both_numbers_are_told_where_they_differ() {
        let status = "Name:\tx\nNStgid:\t700\t7\nNSpid:\t700\t7\n";
        assert_eq!(innermost(status), Some(7));
        assert_eq!(innermost("Name:\tx\n"), None);
        let me = Pids::of(std::process::id());
        assert_eq!(me.to_string(), std::process::id().to_string());
        let other = Pids { ns_pid: 7, ..me };
        assert!(
            other.to_string().ends_with(" (7 in its PID namespace)"),
            "{other}"
        );
    }

    #[test]
    fn a_child_that_ended_lingers_until_it_is_reaped() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id();
        let id = rustix::process::Pid::from_child(&child);
        let ended = rustix::process::WaitIdOptions::EXITED | rustix::process::WaitIdOptions::NOWAIT;
        rustix::process::waitid(rustix::process::WaitId::Pid(id), ended).unwrap();
        assert!(lingers(pid));
        assert_eq!(start_time(pid), None);
        child.wait().unwrap();
        assert!(!lingers(pid));
        assert!(!lingers(std::process::id()));
    }
}
