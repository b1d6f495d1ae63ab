//! Timers as descriptors (`timerfd_create(2)`).
//!
//! A timer goes on with the time that was left, but one that was set to a wall-clock time keeps
//! that time: it fires at once if the time passed while the program was away.

use super::Descriptor;
use super::context::{About, Around, CheckContext, CollectContext, RecreateContext};
use super::probe::{Probe, failed};
use crate::ProcessError;
use outlive_state_tree::StateNode;
use rustix::io::Errno;
use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
    timerfd_create, timerfd_gettime, timerfd_settime,
};
use std::os::fd::{AsFd, OwnedFd};

/// A timer.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,fd-timerfd-v1")]
pub struct TimerFdState {
    /// The clock (`CLOCK_…`).
    pub clock: u32,
    /// Expirations that were not read yet.
    pub ticks: u64,
    /// How it was set (`TFD_TIMER_…`).
    pub settings: u32,
    /// Time left, nanoseconds; 0 when it is not armed.
    pub remaining: u64,
    /// Period, nanoseconds; 0 when it fires once.
    pub interval: u64,
    /// For a timer set to a wall-clock time: that time, nanoseconds since 1970.
    pub deadline: Option<u64>,
}

const NANOSECONDS: u64 = 1_000_000_000;

fn clock_of(number: u32) -> Option<TimerfdClockId> {
    match number {
        0 => Some(TimerfdClockId::Realtime),
        1 => Some(TimerfdClockId::Monotonic),
        7 => Some(TimerfdClockId::Boottime),
        8 => Some(TimerfdClockId::RealtimeAlarm),
        9 => Some(TimerfdClockId::BoottimeAlarm),
        _ => None,
    }
}

fn is_wall_clock(number: u32) -> bool {
    matches!(number, 0 | 8)
}

/// Reads `(seconds, nanoseconds)`.
fn parse_time(text: &str) -> Option<u64> {
    let (seconds, nanoseconds) = text
        .strip_prefix('(')?
        .strip_suffix(')')?
        .split_once(", ")?;
    let seconds: u64 = seconds.parse().ok()?;
    seconds
        .checked_mul(NANOSECONDS)?
        .checked_add(nanoseconds.parse().ok()?)
}

fn timespec(nanoseconds: u64) -> Timespec {
    Timespec {
        tv_sec: (nanoseconds / NANOSECONDS) as i64,
        tv_nsec: (nanoseconds % NANOSECONDS) as i64,
    }
}

impl Descriptor for TimerFdState {
    const NAME: &'static str = "timerfd";

    fn claims(probe: &Probe<'_>, _: &Around) -> Result<bool, ProcessError> {
        Ok(probe.link == b"anon_inode:[timerfd]")
    }

    fn collect(probe: &Probe<'_>, _: &mut CollectContext<'_>) -> Result<Self, ProcessError> {
        let time = |key: &str| {
            let found = probe.info.field(key).and_then(parse_time);
            found.ok_or_else(|| probe.failed(&format!("find `{key}` in fdinfo of"), Errno::PROTO))
        };
        let mut state = Self {
            clock: probe.number_field("clockid", 10)? as u32,
            ticks: probe.number_field("ticks", 10)?,
            settings: probe.number_field("settime flags", 8)? as u32,
            remaining: time("it_value")?,
            interval: time("it_interval")?,
            deadline: None,
        };
        if state.remaining == 0 && state.interval != 0 && state.ticks != 0 {
            // A repeated timer that has expired stands until somebody looks, and only then are the
            // expirations counted that were due meanwhile. Looking is what a read does, too.
            let now = timerfd_gettime(probe.duplicate()?)
                .map_err(|errno| probe.failed("ask for the time left of", errno))?;
            let left = now.it_value;
            state.remaining = (left.tv_sec as u64)
                .saturating_mul(NANOSECONDS)
                .saturating_add(left.tv_nsec as u64);
            let ticks = probe
                .info_now()?
                .field("ticks")
                .and_then(|t| t.parse().ok());
            state.ticks = ticks.unwrap_or(state.ticks);
        }
        let absolute = state.settings & TimerfdTimerFlags::ABSTIME.bits() != 0;
        if absolute && is_wall_clock(state.clock) && state.remaining != 0 {
            let now = clock_gettime(ClockId::Realtime);
            let now = (now.tv_sec as u64).saturating_mul(NANOSECONDS) + now.tv_nsec as u64;
            state.deadline = now.checked_add(state.remaining);
        }
        Ok(state)
    }

    fn check(&self, about: &About, _: &mut CheckContext<'_>) -> Result<(), ProcessError> {
        let wrong = clock_of(self.clock).is_none()
            || (self.deadline.is_some() && !is_wall_clock(self.clock));
        if wrong {
            let clock = self.clock;
            return Err(ProcessError::Image(format!(
                "timer fd {} runs by clock {clock}, which cannot be",
                about.number
            )));
        }
        Ok(())
    }

    fn recreate(&self, about: &About, cx: &mut RecreateContext) -> Result<OwnedFd, ProcessError> {
        let make = || {
            let clock = clock_of(self.clock).ok_or(Errno::INVAL)?;
            let fd = timerfd_create(clock, TimerfdFlags::CLOEXEC)?;
            let (value, flags) = match self.deadline {
                Some(deadline) => {
                    let known = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
                    (
                        deadline,
                        TimerfdTimerFlags::from_bits_truncate(self.settings) & known,
                    )
                }
                None => (self.remaining, TimerfdTimerFlags::empty()),
            };
            let it_interval = timespec(self.interval);
            timerfd_settime(
                &fd,
                flags,
                &Itimerspec {
                    it_interval,
                    it_value: timespec(value),
                },
            )?;
            if self.ticks != 0 {
                outlive_linux::descriptors::timerfd_set_ticks(fd.as_fd(), self.ticks)?;
            }
            Ok(fd)
        };
        make().map_err(|errno| failed(cx.pid, format!("make timer fd {}", about.number), errno))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read() {
        assert_eq!(parse_time("(3, 5)"), Some(3_000_000_005));
        assert_eq!(parse_time("(18446744073709551615, 0)"), None);
        assert_eq!(parse_time("3, 5"), None);
    }
}
