//! Clocks and time namespaces (`time_namespaces(7)`).

use rustix::time::{ClockId, clock_gettime};
use std::io;

/// Nanoseconds of a clock as this process sees it.
#[must_use]
pub fn now_ns(clock: ClockId) -> i64 {
    let t = clock_gettime(clock);
    t.tv_sec
        .saturating_mul(1_000_000_000)
        .saturating_add(t.tv_nsec)
}

/// How far CLOCK_BOOTTIME is ahead of CLOCK_MONOTONIC as this process sees them, nanoseconds: for as
/// long the machine slept. Read apart, the two would differ by what happened in between as well; this
/// is never more than the truth, and 0 where the clocks are the same.
#[must_use]
pub fn boottime_ahead_ns() -> i64 {
    let (boottime, after) = (now_ns(ClockId::Boottime), now_ns(ClockId::Monotonic));
    boottime.saturating_sub(after).max(0)
}

/// Nanoseconds of CLOCK_REALTIME since the Unix epoch.
#[must_use]
pub fn realtime_ns() -> u64 {
    u64::try_from(now_ns(ClockId::Realtime)).unwrap_or(0)
}

/// How far the clocks of a time namespace are ahead of the host's, nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TimeOffsets {
    /// CLOCK_MONOTONIC.
    pub monotonic_ns: i64,
    /// CLOCK_BOOTTIME.
    pub boottime_ns: i64,
}

/// CLOCK_MONOTONIC and CLOCK_BOOTTIME of the host at one moment, nanoseconds.
///
/// They differ by the time that the machine slept. Read one after the other they would differ by
/// what happened in between as well, and a program would find them so for ever.
#[must_use]
pub fn host_clocks(ours: &TimeOffsets) -> TimeOffsets {
    let boottime = now_ns(ClockId::Boottime).saturating_sub(ours.boottime_ns);
    let monotonic_ns = now_ns(ClockId::Monotonic).saturating_sub(ours.monotonic_ns);
    // Never more than the truth, and nothing where the machine never slept.
    let slept = boottime.saturating_sub(monotonic_ns).max(0);
    TimeOffsets {
        monotonic_ns,
        boottime_ns: monotonic_ns.saturating_add(slept),
    }
}

impl TimeOffsets {
    /// The offsets of the time namespace that a process lives in; zero where the kernel has no
    /// time namespaces.
    pub fn of(pid: u32) -> io::Result<Self> {
        // The file tells of the namespace for children, which differs from the process' own only
        // between an unshare and the next fork.
        match std::fs::read_to_string(format!("/proc/{pid}/timens_offsets")) {
            Ok(text) => Ok(Self::parse(&text)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(e) => Err(e),
        }
    }

    /// Whether the kernel has time namespaces.
    #[must_use]
    pub fn are_possible() -> bool {
        std::path::Path::new("/proc/self/timens_offsets").exists()
    }

    fn parse(text: &str) -> Self {
        let mut offsets = Self::default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let (Some(clock), Some(s), Some(ns)) = (words.next(), words.next(), words.next())
            else {
                continue;
            };
            let (Ok(s), Ok(ns)) = (s.parse::<i64>(), ns.parse::<i64>()) else {
                continue;
            };
            let value = s.saturating_mul(1_000_000_000).saturating_add(ns);
            match clock {
                "monotonic" => offsets.monotonic_ns = value,
                "boottime" => offsets.boottime_ns = value,
                _ => {}
            }
        }
        offsets
    }

    /// The text that `/proc/PID/timens_offsets` takes.
    #[must_use]
    pub fn render(&self) -> String {
        let line = |name: &str, ns: i64| {
            format!(
                "{name} {} {}\n",
                ns.div_euclid(1_000_000_000),
                ns.rem_euclid(1_000_000_000)
            )
        };
        line("monotonic", self.monotonic_ns) + &line("boottime", self.boottime_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clocks_of_the_host_go_together() {
        let ours = TimeOffsets::of(std::process::id()).unwrap();
        let (a, b) = (host_clocks(&ours), host_clocks(&ours));
        let slept = |c: &TimeOffsets| c.boottime_ns - c.monotonic_ns;
        assert!(slept(&a) >= 0 && b.monotonic_ns >= a.monotonic_ns);
        if slept(&a) == 0 {
            assert_eq!(slept(&b), 0);
        }
    }

    #[test]
    fn offsets_survive_the_text_form() {
        let o = TimeOffsets {
            monotonic_ns: -5_000_000_001,
            boottime_ns: 7,
        };
        assert_eq!(o.render(), "monotonic -6 999999999\nboottime 0 7\n");
        assert_eq!(TimeOffsets::parse(&o.render()), o);
        assert_eq!(
            TimeOffsets::parse("monotonic           0         0\nx"),
            TimeOffsets::default()
        );
    }
}
