//! POSIX timers (`timer_create(2)`): which there are is read from `/proc/PID/timers`, the time that
//! is left of each is asked of the process.
//!
//! They get their old IDs: Linux since 6.15 lets them be chosen; before, IDs are handed out in
//! order, so that others are made and removed until the right one comes.
//!
//! # What differs afterwards
//! - A timer of the clock of real time goes on with the time that was left; whether it was set to
//!   a time of day cannot be seen.
//! - A signal that was queued is queued again by itself: `timer_getoverrun` begins at 0.
//!
//! # What it refuses
//! A timer of a clock that is a device, and one of the processor time of a thread where it cannot
//! be seen of which.

use crate::freeze::{Held, remote_failed};
use crate::resources::signals::SIGINFO;
use crate::target::{Status, Target};
use crate::{ProcessError, Refusal};
use outlive_linux::Errno;
use outlive_linux::remote::{Arena, Arg, Batch};
use outlive_state_tree::{StateNode, StateValue};
use std::collections::BTreeSet;

const SECOND: u64 = 1_000_000_000;
/// How many timers are asked for by one batch; what is asked of each takes about 100 bytes.
const GROUP: usize = 256;
/// `CLOCK_THREAD_CPUTIME_ID`, and what the kernel makes of it: the processor time of "this" thread.
const OF_THREAD: [i32; 2] = [libc::CLOCK_THREAD_CPUTIME_ID, -2];
/// The highest ID up to which other timers are made and removed.
const MAX_PADDING: u32 = 1024;
/// `prctl(2)`: IDs of timers are chosen by the caller. On, off, and whether it is.
const RESTORE_IDS: u64 = 77;
const OFF: u64 = 0;
const ON: u64 = 1;
const ASK: u64 = 2;
/// `SI_TIMER`
const SI_TIMER: i32 = -2;

/// What happens when a timer fires.
#[derive(StateValue, Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notify {
    /// Nothing.
    Nothing,
    /// A signal for the process.
    Process,
    /// A signal for one thread.
    Thread,
}

/// A timer.
#[derive(StateNode, Clone, Debug, PartialEq, Eq)]
#[state(compatible = "outlive,posix-timer-v1")]
pub struct TimerState {
    /// Its ID.
    pub id: u32,
    /// The clock (`CLOCK_…`), as the program gave it.
    pub clock: i32,
    /// What happens when it fires.
    pub notify: Notify,
    /// Which thread gets the signal, where one does.
    pub thread: u32,
    /// The signal.
    pub signal: u32,
    /// What the signal carries.
    pub value: u64,
    /// Period, nanoseconds; 0 when it fires once.
    pub interval: u64,
    /// Time left, nanoseconds; 0 when it is not armed.
    pub remaining: u64,
}

/// Reads the list of the kernel: four lines a timer. What is left of each is not in it.
fn parse(text: &str) -> Option<Vec<TimerState>> {
    let mut all = Vec::new();
    let mut lines = text.lines().map(|line| line.split_once(": "));
    while let Some(line) = lines.next() {
        let ("ID", id) = line? else { return None };
        let ("signal", signal) = lines.next()?? else {
            return None;
        };
        let ("notify", notify) = lines.next()?? else {
            return None;
        };
        let ("ClockID", clock) = lines.next()?? else {
            return None;
        };
        let (signal, value) = signal.split_once('/')?;
        let (how, whom) = notify.split_once('/')?;
        let (whose, number) = whom.split_once('.')?;
        let notify = match (how, whose) {
            ("none", _) => Notify::Nothing,
            // A timer of `SIGEV_THREAD`: the kernel takes it for a signal.
            ("signal" | "thread", "pid") => Notify::Process,
            ("signal" | "thread", "tid") => Notify::Thread,
            _ => return None,
        };
        all.push(TimerState {
            id: id.trim().parse().ok()?,
            clock: clock.trim().parse().ok()?,
            notify,
            thread: if notify == Notify::Thread {
                number.trim().parse().ok()?
            } else {
                0
            },
            signal: signal.trim().parse().ok()?,
            value: u64::from_str_radix(value.trim(), 16).ok()?,
            interval: 0,
            remaining: 0,
        });
    }
    Some(all)
}

fn listed(target: &Target) -> Result<Vec<TimerState>, ProcessError> {
    let text = target.proc_record("timers")?;
    if text.is_empty() {
        return Ok(Vec::new());
    }
    let timers = parse(&String::from_utf8_lossy(&text)).ok_or_else(|| {
        target.kernel(
            "understanding its list of timers",
            std::io::Error::from(std::io::ErrorKind::InvalidData),
        )
    });
    let mut timers = timers?;
    if target.pid != target.id {
        // The kernel names threads as we see them.
        for timer in timers.iter_mut().filter(|t| t.notify == Notify::Thread) {
            let status = Status::read(target.pid, timer.thread);
            // One that has ended gets no signal; nobody else has its number here.
            timer.thread = status.map_or(0, |s| s.inner.tid);
        }
    }
    Ok(timers)
}

/// The thread whose processor time a timer of [`OF_THREAD`] counts, as far as it can be known. A
/// timer that tells a thread of its own time is the one use of it.
fn counts(timer: &TimerState) -> Option<u32> {
    (timer.notify == Notify::Thread).then_some(timer.thread)
}

/// A clock that is a device: the lower bits of a negative number say so (`clock_getcpuclockid(3)`).
fn is_device(clock: i32) -> bool {
    clock < 0 && clock & 7 == 3
}

/// The process or thread whose time a negative clock counts; 0 for the caller itself.
fn owner_of(clock: i32) -> Option<u32> {
    (clock < 0 && !is_device(clock)).then_some(!(clock >> 3) as u32)
}

/// Whether the process sees itself, or a thread of its own, with this ID.
fn is_own(target: &Target, id: u32) -> bool {
    let threads = target.threads().unwrap_or_default().into_iter();
    let mut inside = threads.filter_map(|tid| Some(Status::read(target.pid, tid).ok()?.inner.tid));
    id != 0 && (id == target.id || inside.any(|tid| tid == id))
}

fn refusals_of(target: &Target, timers: &[TimerState], alone: bool) -> Vec<Refusal> {
    let mut found = Vec::new();
    for timer in timers {
        let place = format!("timer {}", timer.id);
        if is_device(timer.clock) {
            let what = "POSIX timer (timer_create) by the clock of a device";
            found.push(target.refusal(place, what, "have the program use another clock"));
        } else if timer.notify == Notify::Thread && !is_own(target, timer.thread) {
            let what = "POSIX timer (timer_create) that tells a thread which has ended";
            found.push(target.refusal(place, what, "have the program delete the timer"));
        } else if owner_of(timer.clock).is_some_and(|id| id != 0 && !is_own(target, id)) {
            let what = "POSIX timer (timer_create) by the processor time of another process, or of \
                        a thread that has ended";
            found.push(target.refusal(place, what, "have the program use another clock"));
        } else if OF_THREAD.contains(&timer.clock) && counts(timer).is_none() && !alone {
            let what = "POSIX timer (timer_create) by the processor time of an unknown thread";
            let remedy = "have the program name the thread (pthread_getcpuclockid)";
            found.push(target.refusal(place, what, remedy));
        }
    }
    found
}

/// What of the timers of a process that runs could not be saved.
pub fn refusals(target: &Target) -> Result<Vec<Refusal>, ProcessError> {
    let alone = target.threads()?.len() == 1;
    Ok(refusals_of(target, &listed(target)?, alone))
}

fn nanoseconds(raw: &[u8]) -> u64 {
    let (words, _) = raw.as_chunks::<8>();
    match words {
        [seconds, rest, ..] => u64::from_ne_bytes(*seconds)
            .saturating_mul(SECOND)
            .saturating_add(u64::from_ne_bytes(*rest)),
        _ => 0,
    }
}

/// Takes the timers of a process that is stopped; `threads` are all its threads, the leading one
/// first.
pub fn collect(
    target: &Target,
    arena: &Arena,
    threads: &mut [Held],
) -> Result<Vec<TimerState>, ProcessError> {
    let mut timers = listed(target)?;
    let refused = refusals_of(target, &timers, threads.len() == 1);
    if !refused.is_empty() {
        return Err(ProcessError::Refused(refused));
    }
    for group in timers.chunks_mut(GROUP) {
        let mut batch = Batch::new();
        let asked: Vec<_> = group
            .iter()
            .map(|t| {
                let args = [Arg::Value(t.id.into()), Arg::Out(32)];
                batch.push(libc::SYS_timer_gettime, args)
            })
            .collect();
        let answers = threads[0]
            .run(arena, batch)
            .map_err(|e| remote_failed(target, e))?;
        for (timer, id) in group.iter_mut().zip(asked) {
            answers
                .value(id)
                .map_err(|e| target.kernel(format!("asking for timer {}", timer.id), e))?;
            let (interval, remaining) = answers.out(id, 1).split_at(16);
            timer.interval = nanoseconds(interval);
            timer.remaining = nanoseconds(remaining);
        }
    }
    timers.sort_unstable_by_key(|t| t.id);
    Ok(timers)
}

/// An image is hostile: IDs once and in order, signals and threads that exist.
pub fn validate(
    timers: &[TimerState],
    processes: &BTreeSet<u32>,
    threads: &BTreeSet<u32>,
) -> Result<(), ProcessError> {
    let mut last = None;
    for timer in timers {
        let numbered = last < Some(timer.id) && i32::try_from(timer.id).is_ok();
        last = Some(timer.id);
        let signal = timer.notify == Notify::Nothing || (1..=64).contains(&timer.signal);
        let thread = timer.notify != Notify::Thread || threads.contains(&timer.thread);
        let clock = match timer.clock {
            0..=3 | 7..=9 | 11 => true,
            n => owner_of(n)
                .is_some_and(|id| id == 0 || processes.contains(&id) || threads.contains(&id)),
        };
        if !(numbered && signal && thread && clock) {
            return Err(ProcessError::Image(format!(
                "timer {} makes no sense",
                timer.id
            )));
        }
    }
    Ok(())
}

fn sigevent(timer: &TimerState) -> Vec<u8> {
    let notify = match timer.notify {
        Notify::Nothing => libc::SIGEV_NONE,
        Notify::Process => libc::SIGEV_SIGNAL,
        Notify::Thread => libc::SIGEV_THREAD_ID,
    };
    let mut bytes = timer.value.to_ne_bytes().to_vec();
    bytes.extend_from_slice(&timer.signal.to_ne_bytes());
    bytes.extend_from_slice(&notify.to_ne_bytes());
    bytes.extend_from_slice(&timer.thread.to_ne_bytes());
    bytes.resize(64, 0);
    bytes
}

/// The question whether IDs can be chosen.
pub fn ask_for_choice(batch: &mut Batch) {
    let args = [RESTORE_IDS, ASK, 0, 0, 0].map(Arg::Value);
    batch.push(libc::SYS_prctl, args);
}

/// The threads, of those which a process has, that must make timers themselves.
#[must_use]
pub fn makers(timers: &[TimerState], leader: u32) -> BTreeSet<u32> {
    timers.iter().map(|t| maker(t, leader)).collect()
}

fn maker(timer: &TimerState, leader: u32) -> u32 {
    let own = OF_THREAD.contains(&timer.clock);
    let own = own.then(|| counts(timer)).flatten();
    own.unwrap_or(leader)
}

/// Adds the calls by which thread `tid` makes its timers, and what each is for. With `choice` the
/// kernel lets IDs be chosen.
pub fn recreate(
    timers: &[TimerState],
    (leader, tid): (u32, u32),
    choice: bool,
    batch: &mut Batch,
) -> Result<Vec<String>, ProcessError> {
    let mut what = Vec::new();
    let mut next = 0;
    let elsewhere = timers.iter().find(|t| maker(t, leader) != leader);
    if let Some(timer) = elsewhere.filter(|_| !choice) {
        return Err(too_old(leader, timer.id));
    }
    let switch = |to| [RESTORE_IDS, to, 0, 0, 0].map(Arg::Value);
    if choice {
        batch.push(libc::SYS_prctl, switch(ON));
        what.push("choosing IDs of timers".into());
    }
    for timer in timers.iter().filter(|t| maker(t, leader) == tid) {
        while !choice && next < timer.id {
            if timer.id > MAX_PADDING {
                return Err(too_old(leader, timer.id));
            }
            pad(next, batch);
            what.extend(["making a timer", "removing a timer"].map(String::from));
            next += 1;
        }
        next = timer.id.saturating_add(1);
        let args = [
            Arg::Value(timer.clock as i64 as u64),
            Arg::In(sigevent(timer)),
            Arg::In(timer.id.to_ne_bytes().to_vec()),
        ];
        batch.push(libc::SYS_timer_create, args);
        what.push(format!("making timer {}", timer.id));
        if timer.remaining != 0 || timer.interval != 0 {
            let times = [timer.interval, timer.remaining];
            let raw = times
                .iter()
                .flat_map(|t| [t / SECOND, t % SECOND])
                .flat_map(u64::to_ne_bytes)
                .collect();
            let id = Arg::Value(timer.id.into());
            let args = [id, Arg::Value(0), Arg::In(raw), Arg::Value(0)];
            batch.push(libc::SYS_timer_settime, args);
            what.push(format!("setting timer {}", timer.id));
        }
    }
    if choice {
        batch.push(libc::SYS_prctl, switch(OFF));
        what.push("choosing IDs of timers no more".into());
    }
    Ok(what)
}

fn too_old(pid: u32, id: u32) -> ProcessError {
    ProcessError::Kernel {
        pid,
        what: format!("timer {id} cannot get its ID from a Linux before 6.15"),
        source: Errno::NOSYS.into(),
    }
}

/// Uses an ID up.
fn pad(id: u32, batch: &mut Batch) {
    let nothing = TimerState {
        id,
        clock: libc::CLOCK_MONOTONIC,
        notify: Notify::Nothing,
        thread: 0,
        signal: 0,
        value: 0,
        interval: 0,
        remaining: 0,
    };
    let args = [
        Arg::Value(nothing.clock as u64),
        Arg::In(sigevent(&nothing)),
        Arg::Out(4),
    ];
    batch.push(libc::SYS_timer_create, args);
    batch.push(libc::SYS_timer_delete, [Arg::Value(id.into())]);
}

/// Whether the kernel lists the timers that were to be made.
pub fn are_there(target: &Target, wanted: &[TimerState]) -> Result<bool, ProcessError> {
    let mut found = listed(target)?;
    found.sort_unstable_by_key(|t| t.id);
    let bare = |t: &TimerState| TimerState {
        interval: 0,
        remaining: 0,
        ..t.clone()
    };
    Ok(found == wanted.iter().map(bare).collect::<Vec<_>>())
}

/// Whether this queued signal comes from a timer of which one is queued already: the kernel queues
/// one at a time, but one that was queued again by a restore is not the timer's own any more.
pub fn is_repeated(info: &[u8; SIGINFO], seen: &mut BTreeSet<u32>) -> bool {
    let word = |at: usize| [info[at], info[at + 1], info[at + 2], info[at + 3]];
    // siginfo_t: signal, errno, code, padding, ID of the timer.
    i32::from_ne_bytes(word(8)) == SI_TIMER && !seen.insert(u32::from_ne_bytes(word(16)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timer(id: u32) -> TimerState {
        TimerState {
            id,
            clock: 1,
            notify: Notify::Process,
            thread: 0,
            signal: 14,
            value: 0xfeed,
            interval: 0,
            remaining: 0,
        }
    }

    #[test]
    fn the_list_of_the_kernel_is_understood() {
        let text = "ID: 3\nsignal: 14/000000000000feed\nnotify: signal/pid.7\nClockID: 1\n\
                    ID: 9\nsignal: 0/0000000000000000\nnotify: none/pid.7\nClockID: -6\n\
                    ID: 10\nsignal: 64/00007f0000000001\nnotify: signal/tid.8\nClockID: 3\n";
        let found = parse(text).unwrap();
        assert_eq!(found[0], timer(3));
        assert_eq!((found[1].notify, found[1].clock), (Notify::Nothing, -6));
        assert_eq!((found[2].notify, found[2].thread), (Notify::Thread, 8));
        for cut in 1..text.len() {
            if parse(&text[..cut]).is_some_and(|all| all.len() == 3) {
                assert!(cut >= text.len() - 2, "{cut}");
            }
        }
        assert_eq!(parse("ID: 3\nsignal: 14\n"), None);
        assert_eq!(parse(""), Some(vec![]));
    }

    #[test]
    fn timers_that_make_no_sense_are_errors() {
        let judge = |timers: &[TimerState]| validate(timers, &[7].into(), &[7, 8].into()).is_ok();
        assert!(judge(&[timer(0), timer(5)]));
        assert!(!judge(&[timer(5), timer(5)]));
        assert!(!judge(&[timer(5), timer(4)]));
        assert!(!judge(&[timer(u32::MAX)]));
        let with = |change: fn(&mut TimerState)| {
            let mut one = timer(0);
            change(&mut one);
            judge(&[one])
        };
        assert!(!with(|t| t.signal = 0));
        assert!(!with(|t| t.signal = 65));
        assert!(with(|t| t.clock = 11));
        assert!(!with(|t| t.clock = 10));
        // The processor time of process 7, and of a stranger; a device.
        assert!(with(|t| t.clock = !7 << 3 | 2));
        assert!(!with(|t| t.clock = !9 << 3 | 2));
        assert!(!with(|t| t.clock = !7 << 3 | 3));
        let told = |t: &mut TimerState| (t.notify, t.thread) = (Notify::Thread, 8);
        assert!(with(told));
        assert!(!with(|t| t.notify = Notify::Thread));
    }

    #[test]
    fn ids_are_reached_in_order_where_they_cannot_be_chosen() {
        let mut batch = Batch::new();
        let what = recreate(&[timer(2), timer(4)], (7, 7), false, &mut batch).unwrap();
        let made: Vec<_> = what.iter().filter(|w| w.starts_with("making")).collect();
        assert_eq!(
            made,
            [
                "making a timer",
                "making a timer",
                "making timer 2",
                "making a timer",
                "making timer 4"
            ]
        );
        assert!(recreate(&[timer(u32::MAX / 2)], (7, 7), false, &mut batch).is_err());
        let what = recreate(&[timer(u32::MAX / 2)], (7, 7), true, &mut batch).unwrap();
        assert_eq!(what.len(), 3);
        let mut of_another = timer(0);
        (of_another.clock, of_another.notify, of_another.thread) = (-2, Notify::Thread, 8);
        assert!(recreate(&[of_another.clone()], (7, 7), false, &mut batch).is_err());
        assert_eq!(makers(&[timer(1), of_another], 7), [7, 8].into());
    }

    #[test]
    fn one_signal_of_a_timer_is_queued_again() {
        let mut info = [0; SIGINFO];
        info[8..12].copy_from_slice(&SI_TIMER.to_ne_bytes());
        let mut other = info;
        other[16] = 1;
        let by_hand = [0; SIGINFO];
        let mut seen = BTreeSet::new();
        let kept =
            [info, by_hand, other, info, by_hand, other].map(|info| !is_repeated(&info, &mut seen));
        assert_eq!(kept, [true, true, true, false, true, false]);
    }
}
