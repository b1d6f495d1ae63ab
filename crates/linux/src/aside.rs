//! Threads that make a call in the place of another one ([`crate::remote::Batch::push_aside`]), where
//! their program is told to stop (SIGSTOP) in that moment.
//!
//! Nobody traces such a thread: so it stops like any other one, and also if the program was told to just
//! before it was made. Who waits for it cannot be reached by then.
//!
//! # Rules
//! - All other threads of the process are traced. Who is stopped, and is not, is such a thread.
//! - It is traced then, and goes on alone. Nothing is sent to the program: it is stopped as before once
//!   it is let go, until somebody tells it to continue.

use crate::ptrace::Running;
use std::time::{Duration, Instant};

/// A call that was made by then was not stopped.
const SOON: Duration = Duration::from_millis(1);
/// How often is looked for who is stopped.
const EVERY: Duration = Duration::from_millis(5);
/// How long it takes at most until one that made its call has ended.
const END: Duration = Duration::from_millis(100);

/// Those that were made in a process, as far as they had stopped.
#[derive(Debug)]
pub(crate) struct Aside {
    pid: u32,
    look: Instant,
    traced: Vec<Running>,
}

impl Aside {
    /// None yet, of a process in which a batch begins now.
    pub(crate) fn of(pid: u32) -> Self {
        Self {
            pid,
            look: Instant::now() + SOON,
            traced: Vec::new(),
        }
    }

    /// Lets those go on that have stopped.
    pub(crate) fn free(&mut self) {
        if Instant::now() >= self.look {
            let stopped = stopped(self.pid).into_iter();
            // One that was told to continue meanwhile may have ended.
            self.traced
                .extend(stopped.filter_map(|tid| Running::seize(tid, false).ok()));
            self.look = Instant::now() + EVERY;
        }
        self.send_on();
    }

    /// Each that stands goes on, each that has ended is forgotten.
    fn send_on(&mut self) {
        let on = |running: Running| match running.wait_interrupted(Instant::now()) {
            Ok(halted) => halted.resume().ok(),
            Err((running, _)) => running,
        };
        let traced = std::mem::take(&mut self.traced);
        self.traced = traced.into_iter().filter_map(on).collect();
    }

    /// Waits until those have ended that had stopped; their calls are made.
    pub(crate) fn end(mut self) {
        let deadline = Instant::now() + END;
        while !self.traced.is_empty() && Instant::now() < deadline {
            self.send_on();
            rustix::thread::sched_yield();
        }
    }
}

/// Threads of a process that are stopped, and not by a tracer.
fn stopped(pid: u32) -> Vec<u32> {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    let threads = threads.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let is_stopped = |tid: &u32| {
        let stat = std::fs::read(format!("/proc/{pid}/task/{tid}/stat"));
        stat.is_ok_and(|stat| state(&stat) == Some(b'T'))
    };
    threads.filter(is_stopped).collect()
}

/// The state in a line of `stat`: behind the name, in which anything may stand.
fn state(stat: &[u8]) -> Option<u8> {
    let name_ends = stat.iter().rposition(|b| *b == b')')?;
    stat.get(name_ends + 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ptrace::{Halted, Stop};
    use crate::remote::{Arena, Arg, Batch, Rescue};
    use crate::single::Site;
    use rustix::process::{Pid, Signal, kill_process};
    use std::process::{Child, Command};

    const SLOT: u64 = 64 << 10;

    #[test]
    fn the_state_stands_behind_any_name() {
        assert_eq!(state(b"7 (sleep) T 1 7"), Some(b'T'));
        assert_eq!(state(b"7 (a) T (b) t 1 7"), Some(b't'));
        assert_eq!(state(b"7 (sleep)"), None);
        assert_eq!(state(b""), None);
    }

    /// Also one that stands still is ended.
    struct Ended(Child);

    impl Drop for Ended {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn signal(child: &Child, signal: Signal) {
        kill_process(Pid::from_child(child), signal).unwrap();
    }

    fn await_state(child: &Child, wanted: u8) {
        let stat = format!("/proc/{}/stat", child.id());
        let deadline = Instant::now() + Duration::from_secs(10);
        while state(&std::fs::read(&stat).unwrap()) != Some(wanted) {
            assert!(Instant::now() < deadline, "never {}", char::from(wanted));
            std::thread::yield_now();
        }
    }

    /// A process that stands in a call of its own, with room for batches.
    fn with_arena(child: &Child) -> (Halted, Arena, Rescue) {
        let pid = child.id();
        await_state(child, b'S');
        let running = Running::seize(pid, true).unwrap();
        running.interrupt().unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        let halted = running.wait_interrupted(deadline).unwrap();
        let rescue = Rescue {
            registers: halted.registers().unwrap(),
            mask: halted.signal_mask().unwrap(),
        };
        let maps = crate::maps::read(pid).unwrap();
        let vdso = maps.iter().find(|m| m.name == b"[vdso]").unwrap().end;
        let site = Site::at_the_end_of(pid, vdso).unwrap();
        let length = Arena::length(1, SLOT);
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
        let map = [0, length, 3, flags, u64::MAX, 0];
        let (halted, base) = site.call(halted, libc::SYS_mmap, map, &rescue).unwrap();
        let arena = Arena::fill(pid, base.unwrap(), 1, SLOT).unwrap();
        let protect = [base.unwrap(), 4096, 5, 0, 0, 0];
        let (halted, done) = site
            .call(halted, libc::SYS_mprotect, protect, &rescue)
            .unwrap();
        done.unwrap();
        site.clear(pid).unwrap();
        (halted, arena, rescue)
    }

    fn let_go(mut halted: Halted, rescue: &Rescue) {
        halted.set_signal_mask(rescue.mask).unwrap();
        halted.set_registers(&rescue.registers).unwrap();
        halted.detach().unwrap();
    }

    #[test]
    fn a_call_aside_is_made_though_its_program_is_stopped_and_remains_so() {
        let child = Ended(Command::new("sleep").arg("100").spawn().unwrap());
        let (child, pid) = (&child.0, child.0.id());
        let (halted, arena, rescue) = with_arena(child);
        // With SIGSTOP in force: whoever is made now stops at once.
        let_go(halted, &rescue);
        signal(child, Signal::STOP);
        await_state(child, b'T');
        let running = Running::seize(pid, true).unwrap();
        let halted = running
            .wait(Instant::now() + Duration::from_secs(10))
            .unwrap();
        assert_eq!(halted.stop(), Stop::Event(libc::SIGSTOP));
        let mut batch = Batch::new();
        let before = batch.push(libc::SYS_gettid, []);
        let aside = [0, 1].map(|_| batch.push_aside(libc::SYS_gettid, []));
        let room = batch.push_aside(libc::SYS_getcwd, [Arg::Out(64), Arg::Value(64)]);
        let (halted, results) = arena.run(halted, batch, Some(&rescue)).unwrap();
        assert_eq!(results.value(before), Ok(pid.into()));
        let [first, second] = aside.map(|id| results.value(id).unwrap());
        assert!(first != u64::from(pid) && second != first && second != u64::from(pid));
        assert_eq!(results.out(room, 0)[0], b'/');
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        assert_eq!(threads.count(), 1, "those that were made have ended");
        let_go(halted, &rescue);
        await_state(child, b'T');
        signal(child, Signal::CONT);
        await_state(child, b'S');
    }
}
