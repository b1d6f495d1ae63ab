//! Lets interrupted system calls go on with the time that was left, over any number of stops.
//! What is decided here rests on the pure rules of [`crate::waits`].

use crate::freeze::Held;
use crate::resources::thread::{call_of, interruption_of, limit_of};
use crate::target::{Status, Target};
use crate::waits::{self, Again, Call, Interruption, Limit, again, has_limit, restarts, timespec};
use outlive_linux::clock::now_ns;
use outlive_linux::memory;
use outlive_linux::ptrace::Registers;
use rustix::process::{PidfdGetfdFlags, pidfd_getfd};
use rustix::time::ClockId;
use std::collections::HashMap;

/// `-ERESTART_RESTARTBLOCK` in a result register.
const RESTART_BLOCK: u64 = -516i64 as u64;
/// `-EAGAIN` in a result register.
const EAGAIN: u64 = -11i64 as u64;

/// A call that was interrupted before, and when it ends.
#[derive(Clone, Copy, Debug)]
struct Known {
    call: Call,
    rip: u64,
    /// CLOCK_MONOTONIC of the host, nanoseconds; `None` where the call ends at a moment of its own.
    deadline_ns: Option<u64>,
    /// The kernel resumes it by its restart block.
    restarts: bool,
    /// Voluntary context switches of the thread when it went on.
    switches: u64,
}

/// What is remembered of the threads of a program between stops.
#[derive(Debug, Default)]
pub struct WaitBook {
    known: HashMap<u32, Known>,
}

/// Threads that sleep in a call with a limit, just before a stop: since when.
#[derive(Debug, Default)]
pub struct Sleepers(HashMap<u32, Sleeper>);

#[derive(Clone, Copy, Debug)]
struct Sleeper {
    call: Call,
    rip: u64,
    since_ns: u64,
    switches: u64,
    /// Its limit, where that lies in memory, nanoseconds.
    limit_ns: Option<u64>,
}

impl WaitBook {
    /// Looks at the threads of the running program.
    #[must_use]
    pub fn look(&self, target: &Target) -> Sleepers {
        let mut sleepers = HashMap::new();
        let Ok(threads) = target.threads() else {
            return Sleepers::default();
        };
        let mut offsets = ClockOffsets::default();
        for tid in threads {
            let Some((call, rip)) = sleeping_call(target.pid, tid) else {
                continue;
            };
            if !has_limit(&call) && !restarts(&call) {
                continue;
            }
            let Some(facts) = scheduler_facts(target.pid, tid) else {
                continue;
            };
            let Some(offset) = offsets.of(facts.processor) else {
                continue;
            };
            let since_ns = facts.ran_ns.saturating_add_signed(offset);
            let switches = facts.switches;
            sleepers.insert(
                tid,
                Sleeper {
                    call,
                    rip,
                    since_ns,
                    switches,
                    limit_ns: limit_in_memory(target, &call),
                },
            );
        }
        Sleepers(sleepers)
    }

    /// Whether a stopped thread was in a call that the kernel resumed by a restart block, and which
    /// one is not known: then it could not be made again. It is known if the thread was asleep when
    /// it was looked at.
    #[must_use]
    pub fn is_nameless(&self, held: &Held, sleepers: &Sleepers) -> bool {
        let mut copy = held.registers;
        let interrupted =
            call_of(&copy).number == libc::SYS_restart_syscall && copy.rax == RESTART_BLOCK;
        interrupted
            && !name_restarted(
                &mut copy,
                self.known.get(&held.tid),
                sleepers.0.get(&held.tid),
            )
    }

    /// Prepares a stopped thread to go on: an interrupted call is made again. Returns the time
    /// that was left of it, where it has a limit.
    pub fn prepare(
        &mut self,
        target: &Target,
        held: &mut Held,
        status: &Status,
        sleepers: &Sleepers,
    ) -> Option<u64> {
        let before = self.known.remove(&held.tid);
        let resumed = name_restarted(
            &mut held.registers,
            before.as_ref(),
            sleepers.0.get(&held.tid),
        );
        let interruption = interruption_of(&held.registers, status)?;
        let call = call_of(&held.registers);
        let limit = limit_of(interruption);
        let now = u64::try_from(now_ns(ClockId::Monotonic)).unwrap_or(0);
        let remaining_ns = remaining_ns(target, &call, interruption);
        let sleeper = sleepers
            .0
            .get(&held.tid)
            .filter(|s| s.call == call && s.rip == held.registers.rip)
            // It slept until the stop, which is the one switch since it was looked at: else this
            // may be a later call of the same form.
            .filter(|s| status.voluntary_switches == s.switches + 1)
            .filter(|s| s.limit_ns == limit_in_memory(target, &call) || remaining_ns.is_some());
        // A call that fell asleep after the deadline is a later one of the same form: at its
        // deadline a call that is made again does not sleep any more.
        let continued = before.filter(|k| {
            let still = |s: &Sleeper| {
                s.switches == k.switches + 1 && k.deadline_ns.is_none_or(|d| s.since_ns < d)
            };
            let same = k.call == call && k.rip == held.registers.rip;
            // What the kernel resumed shows as such, and what does not is a later call.
            same && if k.restarts {
                resumed
            } else {
                sleeper.is_some_and(still)
            }
        });
        let deadline_ns = match (remaining_ns, continued) {
            (Some(ns), _) => Some(now.saturating_add(ns)),
            (None, Some(k)) => k.deadline_ns,
            (None, None) => limit_ns(target, &call, limit).map(|ns| {
                let whole = now.saturating_add(ns);
                // What has ended cannot have been interrupted: it was an earlier call that slept.
                // As good as ended counts too, as exactly as this is known: rather late than early.
                let rest = sleeper.map(|s| s.since_ns.saturating_add(ns));
                let earliest = now.saturating_add(doubt_ns(limit));
                let rest = rest.filter(|end| (earliest..=whole).contains(end));
                // Whoever is told by us that the time is over must not be told too early either.
                let late = match limit {
                    Limit::SocketReceive | Limit::SocketSend => doubt_ns(limit),
                    _ => 0,
                };
                rest.map_or(whole, |end| whole.min(end.saturating_add(late)))
            }),
        };
        let left = deadline_ns.map(|d| d.saturating_sub(now));
        if let Interruption::Returned(limit) = interruption {
            held.go_on = made_again(target.pid, &held.go_on, limit, left);
        }
        let restarts = matches!(interruption, Interruption::RestartBlock(_));
        // A socket's call that is told so has returned: whatever sleeps next is a later one, which
        // looks the same.
        let told = left == Some(0) && matches!(limit, Limit::SocketReceive | Limit::SocketSend);
        if !told && (deadline_ns.is_some() || restarts) {
            let call = Call {
                number: call.number,
                ..call_of(&held.go_on)
            };
            let rip = held.registers.rip;
            self.known.insert(
                held.tid,
                Known {
                    call,
                    rip,
                    deadline_ns,
                    restarts,
                    switches: u64::MAX,
                },
            );
        }
        left
    }

    /// Whether a thread goes on with an interrupted call: [`WaitBook::going_on`] is to be called.
    #[must_use]
    pub fn waits(&self, tid: u32) -> bool {
        self.known.contains_key(&tid)
    }

    /// To be called right before such a thread goes on, with its status then.
    pub fn going_on(&mut self, tid: u32, status: &Status) {
        if let Some(known) = self.known.get_mut(&tid) {
            known.switches = status.voluntary_switches;
        }
    }
}

/// How exactly the end of a call is known that was seen asleep, nanoseconds. Sockets count in ticks
/// of up to 10 ms, of which the first is partly over.
fn doubt_ns(limit: Limit) -> u64 {
    match limit {
        Limit::SocketReceive | Limit::SocketSend => 20_000_000,
        _ => 5_000_000,
    }
}

/// A call that the kernel resumes by its restart block shows as `restart_syscall`, by which name it
/// could not be made again. Gives it back its own name, where that is known from an earlier stop or
/// was seen while it slept. Says whether it was such a call.
fn name_restarted(
    registers: &mut Registers,
    before: Option<&Known>,
    sleeper: Option<&Sleeper>,
) -> bool {
    let call = call_of(registers);
    if call.number != libc::SYS_restart_syscall {
        return false;
    }
    let rip = registers.rip;
    let known = before
        .filter(|k| k.rip == rip && k.call.number != libc::SYS_restart_syscall)
        .map(|k| k.call);
    let seen = sleeper.filter(|s| s.rip == rip).map(|s| s.call);
    let own = known.into_iter().chain(seen).find(|c| c.args == call.args);
    if let Some(own) = own {
        registers.orig_rax = own.number as u64;
    }
    own.is_some()
}

/// Which call a thread resumes that sleeps in `restart_syscall`: where it sleeps tells the sort
/// (`/proc/TID/wchan`). Sleeps proper go by no name there, and the two of them have no argument in
/// common: one begins with an address, one with the number of a clock.
fn restarted_call(pid: u32, tid: u32, args: &[u64; 6]) -> Option<i64> {
    const CLOCKS: u64 = 16;
    let place = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/wchan")).ok()?;
    match place.as_str() {
        "" | "0" => None,
        place if place.contains("poll") => Some(libc::SYS_poll),
        place if place.contains("futex") => Some(libc::SYS_futex),
        _ if args[0] < CLOCKS => Some(libc::SYS_clock_nanosleep),
        _ => Some(libc::SYS_nanosleep),
    }
}

/// The call that a sleeping thread is in, and where it returns to (`/proc/TID/syscall`).
fn sleeping_call(pid: u32, tid: u32) -> Option<(Call, u64)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/syscall")).ok()?;
    let mut words = text.split_whitespace();
    let number = words.next()?.parse().ok()?;
    let mut values =
        words.map(|w| u64::from_str_radix(w.trim_start_matches("0x"), 16).unwrap_or(0));
    let mut args = [0; 6];
    for arg in &mut args {
        *arg = values.next()?;
    }
    let rip = values.nth(1)?;
    let number = match number {
        libc::SYS_restart_syscall => restarted_call(pid, tid, &args)?,
        number => number,
    };
    Some((Call { number, args }, rip))
}

/// What the scheduler tells of a thread.
#[derive(Clone, Copy, Debug)]
struct SchedulerFacts {
    /// When it last ran, by the scheduler's clock of its processor, nanoseconds.
    ran_ns: u64,
    /// How often it went to sleep.
    switches: u64,
    /// The processor that it last ran on.
    processor: usize,
}

/// Reads `/proc/TID/sched` (missing in kernels without scheduler debugging) and the last processor
/// from `/proc/TID/stat`.
fn scheduler_facts(pid: u32, tid: u32) -> Option<SchedulerFacts> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/sched")).ok()?;
    let mut ran = None;
    let mut switches = None;
    for line in text.lines() {
        let Some((key, value)) = line.split_once(':') else {
            continue;
        };
        match key.trim() {
            "se.exec_start" => ran = milliseconds(value.trim()),
            "nr_voluntary_switches" => switches = value.trim().parse().ok(),
            _ => {}
        }
    }
    let stat = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/stat")).ok()?;
    // Field 39; the first one after the name is field 3.
    let processor = stat.rsplit(')').next()?.split_whitespace().nth(39 - 3)?;
    Some(SchedulerFacts {
        ran_ns: ran?,
        switches: switches?,
        processor: processor.parse().ok()?,
    })
}

/// `123.456789` milliseconds as nanoseconds.
fn milliseconds(text: &str) -> Option<u64> {
    let (whole, fraction) = text.split_once('.')?;
    let (whole, fraction): (u64, u64) = (whole.parse().ok()?, fraction.parse().ok()?);
    whole.checked_mul(1_000_000)?.checked_add(fraction)
}

/// By processor: what must be added to the scheduler's clock to get CLOCK_MONOTONIC, nanoseconds.
///
/// The clock of each processor leaves out the time that a hypervisor took from it, so that they
/// run apart by any amount. What was taken during a sleep makes the sleep look shorter, never
/// longer: a limit computed from it may pass late, and never early.
#[derive(Debug, Default)]
struct ClockOffsets(HashMap<usize, Option<i64>>);

impl ClockOffsets {
    /// The offset of a processor, measured there; `None` where this thread may not run there.
    fn of(&mut self, processor: usize) -> Option<i64> {
        *self
            .0
            .entry(processor)
            .or_insert_with(|| measure_on(processor))
    }
}

fn measure_on(processor: usize) -> Option<i64> {
    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
    let before = sched_getaffinity(None).ok()?;
    let mut only = CpuSet::new();
    if processor >= CpuSet::MAX_CPU {
        return None;
    }
    only.set(processor);
    sched_setaffinity(None, &only).ok()?;
    let me = rustix::thread::gettid().as_raw_nonzero().get() as u32;
    // After a sleep "last ran" is now.
    std::thread::sleep(std::time::Duration::from_nanos(1));
    let facts = scheduler_facts(std::process::id(), me);
    let now = now_ns(ClockId::Monotonic);
    sched_setaffinity(None, &before).ok()?;
    let facts = facts.filter(|f| f.processor == processor)?;
    Some(now - i64::try_from(facts.ran_ns).ok()?)
}

/// What is left of a sleep, where the kernel has written it at the interruption: to the place that
/// the program gave, which is often that of the limit itself.
fn remaining_ns(target: &Target, call: &Call, interruption: Interruption) -> Option<u64> {
    let relative = call.args[1] & 1 == 0;
    let address = match (interruption, call.number) {
        (Interruption::RestartBlock(_), libc::SYS_nanosleep) => call.args[1],
        (Interruption::RestartBlock(_), libc::SYS_clock_nanosleep) if relative => call.args[3],
        _ => 0,
    };
    (address != 0).then(|| read_timespec(target, address))?
}

/// The limit of a call, where that lies in memory.
fn limit_in_memory(target: &Target, call: &Call) -> Option<u64> {
    match waits::limit(call) {
        limit @ Limit::Timespec(_) => limit_ns(target, call, limit),
        _ => None,
    }
}

fn read_timespec(target: &Target, address: u64) -> Option<u64> {
    let mut raw = [0u8; 16];
    memory::read_exact(target.pid, address, &mut raw).ok()?;
    let (words, _) = raw.as_chunks::<8>();
    let [s, ns] = [words[0], words[1]].map(u64::from_ne_bytes);
    Some(s.saturating_mul(1_000_000_000).saturating_add(ns))
}

/// The whole limit of a call, nanoseconds; `None` where it has none.
fn limit_ns(target: &Target, call: &Call, limit: Limit) -> Option<u64> {
    match limit {
        Limit::None => None,
        Limit::Milliseconds(arg) => {
            let ms = call.args[arg] as i32;
            u64::try_from(ms).ok().map(|ms| ms * 1_000_000)
        }
        Limit::Timespec(arg) if call.args[arg] == 0 => None,
        Limit::Timespec(arg) => read_timespec(target, call.args[arg]),
        Limit::SocketReceive | Limit::SocketSend => {
            use rustix::net::sockopt::{Timeout, socket_timeout};
            let fd = i32::try_from(call.args[0]).ok()?;
            let socket = pidfd_getfd(&target.pidfd, fd, PidfdGetfdFlags::empty()).ok()?;
            let which = if limit == Limit::SocketReceive {
                Timeout::Recv
            } else {
                Timeout::Send
            };
            let limit = socket_timeout(&socket, which).ok()??;
            u64::try_from(limit.as_nanos()).ok()
        }
    }
}

/// Registers with which an interrupted call is made again.
#[must_use]
pub fn made_again(pid: u32, r: &Registers, limit: Limit, left_ns: Option<u64>) -> Registers {
    let mut r = *r;
    match again(limit, left_ns, r.rsp) {
        Again::TimedOut => {
            r.rax = EAGAIN;
            r.orig_rax = u64::MAX;
            return r;
        }
        Again::Argument { arg, value } => *argument(&mut r, arg) = value,
        Again::Timespec { arg, address, ns } => {
            // Where there is no room below the stack, the call waits the full time again.
            if memory::write(pid, address, &timespec(ns)).is_ok() {
                *argument(&mut r, arg) = address;
            }
        }
        Again::Plain => {}
    }
    r.rax = r.orig_rax;
    r.rip -= 2;
    r.orig_rax = u64::MAX;
    r
}

fn argument(r: &mut Registers, arg: usize) -> &mut u64 {
    match arg {
        0 => &mut r.rdi,
        1 => &mut r.rsi,
        2 => &mut r.rdx,
        3 => &mut r.r10,
        4 => &mut r.r8,
        _ => &mut r.r9,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scheduler_times_are_understood() {
        assert_eq!(milliseconds("564745.056045"), Some(564_745_056_045));
        assert_eq!(milliseconds("x"), None);
    }

    #[test]
    fn the_clock_of_a_processor_follows_the_monotonic_one() {
        let here = scheduler_facts(
            std::process::id(),
            rustix::thread::gettid().as_raw_nonzero().get() as u32,
        )
        .unwrap()
        .processor;
        let (a, b) = (measure_on(here).unwrap(), measure_on(here).unwrap());
        assert!((a - b).abs() < 1_000_000_000, "{a} {b}");
        assert_eq!(measure_on(100_000), None);
    }
}
