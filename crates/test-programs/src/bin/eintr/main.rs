//! Sits in blocking system calls, one thread for each, and takes every return that the manual page
//! does not promise as a failure: above all EINTR, since no handler interrupts anything here, and
//! a time limit that ends too early or far too late.
//!
//! `eintr [--sockets] [CALL …]` takes part of the calls, or all of them; `--sockets` adds those
//! on sockets of kinds that may not be saved. `ready` is followed by what must be removed in the
//! end: the System V semaphores and message queue.
#![allow(unsafe_code)]

mod timed;
mod woken;

use outlive_test_programs::{Random, await_report_order, block, fail, good, now, say, sys};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Later than this after its limit no call may return, nanoseconds. A stop may come every few
/// milliseconds and the machine may be busy, but a call that begins anew each time never ends.
const LATE: i64 = 60_000_000_000;

/// The number of times that each call came back as it should.
struct Count {
    name: String,
    rounds: Arc<AtomicU64>,
}

fn main() {
    let mut wanted: Vec<String> = std::env::args().skip(1).collect();
    let sockets = wanted.iter().any(|w| w == "--sockets");
    wanted.retain(|w| w != "--sockets");
    let takes = |name: &str| wanted.is_empty() || wanted.iter().any(|w| w == name);
    // Everything that is waited for is blocked: nothing is ever handled behind a call's back.
    block(&[
        libc::SIGUSR1,
        woken::WAITED,
        woken::SUSPENDED,
        libc::SIGUSR2,
    ]);
    let ids = Ids::new();
    let mut counts = Vec::new();
    for call in timed::all(&ids, sockets)
        .into_iter()
        .filter(|c| takes(c.name))
    {
        counts.push(spawn(call.name, move |rounds| time_it(&call, &rounds)));
    }
    let all: Vec<woken::Woken> = woken::all(&ids)
        .into_iter()
        .filter(|w| takes(w.name))
        .collect();
    let mut wakes = Vec::new();
    for woken::Woken { name, wake, wait } in all {
        let (tell_tid, tid) = std::sync::mpsc::channel();
        counts.push(spawn(name, move |rounds| {
            // SAFETY: gettid takes no argument.
            let tid = unsafe { libc::gettid() };
            if tell_tid.send(tid).is_err() {
                fail("the starting thread is gone");
            }
            for number in 0.. {
                wait(number);
                rounds.fetch_add(1, Ordering::Relaxed);
            }
        }));
        let Ok(tid) = tid.recv() else {
            fail("a thread did not start")
        };
        wakes.push((tid, wake));
    }
    if counts.is_empty() {
        fail("no such call");
    }
    std::thread::spawn(move || wake_all(&wakes));
    say(&format!(
        "ready sem {} sem {} msg {}",
        ids.limited, ids.woken, ids.queue
    ));
    await_report_order();
    report(&counts);
    outlive_test_programs::ending();
    ids.remove();
}

/// System V objects: they belong to no process.
pub(crate) struct Ids {
    pub(crate) limited: i32,
    pub(crate) woken: i32,
    pub(crate) queue: i32,
}

impl Ids {
    fn new() -> Self {
        // SAFETY: only numbers are passed.
        let (limited, woken, queue) = unsafe {
            let flags = libc::IPC_CREAT | 0o600;
            (
                libc::semget(libc::IPC_PRIVATE, 1, flags),
                libc::semget(libc::IPC_PRIVATE, 2, flags),
                libc::msgget(libc::IPC_PRIVATE, flags),
            )
        };
        for id in [limited, woken, queue] {
            let _ = good("making a System V object", id.into());
        }
        Self {
            limited,
            woken,
            queue,
        }
    }

    fn remove(&self) {
        // SAFETY: IPC_RMID ignores the further argument.
        unsafe {
            libc::semctl(self.limited, 0, libc::IPC_RMID);
            libc::semctl(self.woken, 0, libc::IPC_RMID);
            libc::msgctl(self.queue, libc::IPC_RMID, std::ptr::null_mut());
        }
    }
}

fn spawn(name: &str, work: impl FnOnce(Arc<AtomicU64>) + Send + 'static) -> Count {
    let rounds = Arc::new(AtomicU64::new(0));
    let theirs = rounds.clone();
    let builder = std::thread::Builder::new()
        .name(name.into())
        .stack_size(128 * 1024);
    if builder.spawn(move || work(theirs)).is_err() {
        fail("a thread could not be made");
    }
    Count {
        name: name.into(),
        rounds,
    }
}

fn time_it(call: &timed::Timed, rounds: &AtomicU64) -> ! {
    let mut random = Random::new(call.name.len() as u64);
    loop {
        let limit = call
            .fixed
            .unwrap_or(50_000_000 + random.below(250_000_000) as i64);
        let begun = now();
        let result = (call.call)(limit, begun + limit);
        let took = now() - begun;
        let name = call.name;
        if result != call.expected {
            fail(&format!(
                "{name} returned {result} after {took} of {limit} ns"
            ));
        }
        if took < limit - call.grain {
            fail(&format!(
                "{name} returned after {took} ns, before its limit of {limit} ns"
            ));
        }
        if took > limit + LATE {
            fail(&format!(
                "{name} returned after {took} ns, its limit was {limit} ns"
            ));
        }
        rounds.fetch_add(1, Ordering::Relaxed);
    }
}

fn wake_all(wakes: &[(i32, woken::Wake)]) -> ! {
    let mut random = Random::new(1);
    for number in 0.. {
        let pause = libc::timespec {
            tv_sec: 0,
            tv_nsec: random.below(30_000_000) as i64,
        };
        // SAFETY: pause is live.
        let r = unsafe {
            sys(
                libc::SYS_nanosleep,
                [&raw const pause as usize, 0, 0, 0, 0, 0],
            )
        };
        outlive_test_programs::expect("the waker's nanosleep", r, 0);
        for (tid, wake) in wakes {
            wake(number, *tid);
        }
    }
    loop {
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn report(counts: &[Count]) {
    let mut stuck = Vec::new();
    for count in counts {
        let rounds = count.rounds.load(Ordering::Relaxed);
        say(&format!("{} {rounds}", count.name));
        if rounds == 0 {
            stuck.push(count.name.as_str());
        }
    }
    if !stuck.is_empty() {
        fail(&format!("no progress in: {}", stuck.join(" ")));
    }
}
