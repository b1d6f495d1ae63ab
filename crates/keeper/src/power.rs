//! What a keeper hears while it is busy, and what it does at a power event.
//!
//! # Rules
//! - An event is `SIGPWR` or a request. It takes an epoch at once: no copying while the program runs
//!   comes before the stop. One that is noticed before a running epoch has let the program go on
//!   takes that epoch.
//! - When all is durable the program stays frozen. With a hold-up budget it waits until that has
//!   passed: if the mains are back before (another `SIGPWR`, a request), the program goes on as if
//!   nothing had been; else it is ended. Without a budget it is ended at once.
//! - Whoever else tells of the event before it is over is answered with it: the same outage is no
//!   second event. That the mains are back counts if it was said after the event, also while its
//!   epoch was being taken.
//! - Meanwhile only questions about the state are answered; everything else waits.

use crate::KeeperError;
use crate::control::{Asker, Control, Reply, Request, Status};
use crate::epoch::{Fate, Hooks, Taken};
use outlive_linux::clock;
use outlive_linux::signals::{Received, SignalQueue};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::Signal;
use rustix::time::{ClockId, Timespec};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::time::Duration;

/// What came of a power event, for whoever asked for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PowerReport {
    /// From the event (as it was sent, where that is told) until everything was durable,
    /// microseconds.
    pub event_us: u64,
    /// The budget, microseconds, where there is one.
    pub budget_us: Option<u64>,
    /// Whether the program went on.
    pub went_on: bool,
    /// How long the program stood still in all, microseconds.
    pub stood_us: u64,
}

/// Something that was heard.
#[derive(Debug)]
pub enum Heard {
    /// A signal.
    Signal(Received),
    /// A request, and who waits for its answer.
    Request(Request, Asker),
}

impl Heard {
    fn is_event(&self) -> bool {
        match self {
            Self::Signal(received) => received.signal == Signal::POWER.as_raw(),
            Self::Request(request, _) => matches!(request, Request::Power { .. }),
        }
    }

    fn is_mains_back(&self) -> bool {
        match self {
            Self::Signal(received) => received.signal == Signal::POWER.as_raw(),
            Self::Request(..) => self.says_back(),
        }
    }

    /// Answers whoever said that the mains are back.
    fn acknowledge(self) {
        if let Self::Request(_, asker) = self {
            asker.answer(&Reply::Heard);
        }
    }

    fn says_back(&self) -> bool {
        matches!(self, Self::Request(Request::PowerBack, _))
    }
}

/// Where a keeper hears from.
pub struct Ears<'a> {
    /// Signals.
    pub signals: &'a mut SignalQueue,
    /// Requests.
    pub control: &'a mut Control,
    /// What was heard and is not dealt with.
    pub inbox: VecDeque<Heard>,
}

impl Ears<'_> {
    /// Takes everything that has arrived.
    ///
    /// # Errors
    /// What the operating system says of the queue of signals.
    pub fn listen(&mut self) -> Result<(), KeeperError> {
        let wrap = KeeperError::io("read the signal queue");
        loop {
            match self.signals.take() {
                Ok(Some(signal)) => self.inbox.push_back(Heard::Signal(signal)),
                Ok(None) => break,
                Err(error) => return Err(wrap(error)),
            }
        }
        let requests = self.control.requests().into_iter();
        self.inbox
            .extend(requests.map(|(request, asker)| Heard::Request(request, asker)));
        Ok(())
    }

    /// Waits until there is something to hear, at most so long.
    fn wait(&self, longest: Duration) {
        let timeout = Timespec {
            tv_sec: i64::try_from(longest.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(longest.subsec_nanos()),
        };
        let mut set = self.control.poll_set();
        set.push(PollFd::new(&*self.signals, PollFlags::IN));
        // A wait that was cut short is begun again by the caller.
        let _ = poll(&mut set, Some(&timeout));
    }
}

/// A power event.
#[derive(Debug)]
pub struct Event {
    askers: Vec<Asker>,
    /// A simulation: after how long the mains are back.
    mains_back_after: Option<u64>,
    /// When it came, nanoseconds of the monotonic clock.
    pub at: u64,
}

/// How far back the sender's clock is believed, nanoseconds.
const BELIEVED: u64 = 3_600_000_000_000;

/// The monotonic clock, nanoseconds.
#[must_use]
pub fn monotonic_ns() -> u64 {
    u64::try_from(clock::now_ns(ClockId::Monotonic)).unwrap_or(0)
}

impl Event {
    /// The event that something heard is, or it back.
    ///
    /// # Errors
    /// What was heard, where it is no event.
    pub fn of(heard: Heard) -> Result<Self, Heard> {
        let now = monotonic_ns();
        match heard {
            Heard::Signal(s) if s.signal == Signal::POWER.as_raw() => Ok(Self {
                askers: Vec::new(),
                mains_back_after: None,
                at: now,
            }),
            Heard::Request(
                Request::Power {
                    mains_back_after_us,
                    at_ns,
                },
                asker,
            ) => Ok(Self {
                askers: vec![asker],
                mains_back_after: mains_back_after_us.map(|us| us.saturating_mul(1000)),
                at: at_ns
                    .filter(|at| *at <= now && now - at < BELIEVED)
                    .unwrap_or(now),
            }),
            other => Err(other),
        }
    }

    /// Another one tells of the same event. It came when the first of them says; where one of them
    /// does not know after how long the mains are back, nobody does.
    fn join(&mut self, other: Self) {
        self.askers.extend(other.askers);
        let longer = |(a, b): (u64, u64)| a.max(b);
        let back = self.mains_back_after.zip(other.mains_back_after);
        self.mains_back_after = back.map(longer);
        self.at = self.at.min(other.at);
    }

    /// Answers all who asked for it.
    pub fn answer(self, reply: &Reply) {
        for asker in self.askers {
            asker.answer(reply);
        }
    }
}

/// Who is asked during an epoch: knows of the event, where there is one.
pub struct Desk<'a, 'b> {
    /// Where it hears from.
    pub ears: &'a mut Ears<'b>,
    /// The event that this epoch is for.
    pub event: Option<Event>,
    /// The budget, nanoseconds.
    pub budget: Option<u64>,
    /// How long the program may be stopped.
    pub longest_stop: Option<Duration>,
    /// Whether there is no hold-up budget, for which the bytes that are not durable are counted.
    pub patient: bool,
    /// What is answered meanwhile, but for what changes with the event.
    pub status: &'a Status,
    /// When everything was durable, where it was.
    pub durable: Option<u64>,
}

impl Hooks for Desk<'_, '_> {
    fn longest_stop(&self) -> Option<Duration> {
        self.longest_stop
    }

    fn patient(&self) -> bool {
        self.patient
    }

    fn urgent(&mut self) -> bool {
        // What cannot be heard now is heard of by the loop.
        let _ = self.ears.listen();
        let inbox = &mut self.ears.inbox;
        let found = inbox.iter().position(Heard::is_event);
        if let Some(at) = found.filter(|_| self.event.is_none()) {
            let after = inbox.split_off(at + 1);
            self.event = inbox.pop_back().and_then(|heard| Event::of(heard).ok());
            // Said before the event, that is no news.
            let (old, other): (VecDeque<_>, VecDeque<_>) =
                inbox.drain(..).partition(Heard::says_back);
            *inbox = other;
            inbox.extend(after);
            old.into_iter().for_each(Heard::acknowledge);
        }
        self.event.is_some()
    }

    fn decide(&mut self, _: &Taken) -> Fate {
        self.durable = Some(monotonic_ns());
        loop {
            // What cannot be heard is not waited for.
            let hears = self.ears.listen().is_ok();
            let is_over = self.is_over();
            let Some(event) = &self.event else {
                return Fate::RunsOn;
            };
            let until = |ns: u64| event.at.saturating_add(ns);
            let (fate, until) = match (event.mains_back_after, self.budget) {
                (None, None) => return Fate::Ended,
                (Some(back), Some(budget)) if back > budget => (Fate::Ended, until(budget)),
                (Some(back), _) => (Fate::RunsOn, until(back)),
                (None, Some(budget)) => (Fate::Ended, until(budget)),
            };
            if is_over {
                return Fate::RunsOn;
            }
            let left = until.saturating_sub(monotonic_ns());
            if left == 0 || !hears {
                return fate;
            }
            self.ears.wait(Duration::from_nanos(left));
        }
    }
}

impl Desk<'_, '_> {
    /// Whether the mains are back, by what was heard since the event; questions are answered, and
    /// whoever tells of the event too joins it. Without an event everything is left to the loop.
    fn is_over(&mut self) -> bool {
        let Some(event) = &mut self.event else {
            return false;
        };
        let (mut back, mut said) = (false, false);
        for heard in std::mem::take(&mut self.ears.inbox) {
            if heard.is_mains_back() {
                (back, said) = (true, said | heard.says_back());
                heard.acknowledge();
                continue;
            }
            match heard {
                Heard::Request(Request::Status, asker) => {
                    let frozen = true;
                    let status = Status {
                        frozen,
                        ..self.status.clone()
                    };
                    asker.answer(&Reply::Status(Box::new(status)));
                }
                // After it was said that the mains are back, it is the next outage. (A signal says
                // nothing of that: signals are heard before requests.)
                heard if said => self.ears.inbox.push_back(heard),
                heard => match Event::of(heard) {
                    Ok(same) => event.join(same),
                    Err(other) => self.ears.inbox.push_back(other),
                },
            }
        }
        back
    }
}

/// Keeps this process in memory, with what it allocates later: at an event nothing is to be fetched
/// from a disk. A matter of speed, so a refusal is no error; where only some memory may be locked,
/// none is, since further allocations would fail.
pub(crate) fn lock_memory() {
    use rustix::mm::{MlockAllFlags, mlockall};
    use rustix::process::{Resource, getrlimit};
    let unlimited = getrlimit(Resource::Memlock).current.is_none();
    if unlimited || may_lock() {
        let _ = mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT);
    }
}

/// Whether this process has `CAP_IPC_LOCK`.
fn may_lock() -> bool {
    const IPC_LOCK: u32 = 14;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let mask = line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> IPC_LOCK & 1 == 1)
}
