//! One of each: `zoo DIR` holds as many kinds of state as it can, changes part of it all the time,
//! and checks all of it every few milliseconds. `zoo DIR memory` has private memory alone, so that
//! it depends on no file.
//!
//! Each module makes its kinds and returns checks. A check is called again and again and fails
//! loudly when what it looks after is not as it left it.
#![allow(unsafe_code)]

mod descriptors;
mod memory;
mod nameless;
mod process;
mod threads;

use outlive_test_programs::{await_signal, block, fail, now, say, unblock};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Looks after one thing; it is given the number of the round.
pub(crate) struct Check {
    name: &'static str,
    look: Box<dyn FnMut(u64) + Send>,
}

/// Makes a check.
pub(crate) fn check(name: &'static str, look: impl FnMut(u64) + Send + 'static) -> Check {
    Check {
        name,
        look: Box::new(look),
    }
}

/// Longer than this no check may take, nanoseconds, however busy the machine is.
const STUCK: i64 = 60_000_000_000;

static ENDING: AtomicBool = AtomicBool::new(false);
static ROUNDS: AtomicU64 = AtomicU64::new(0);

fn main() {
    let Some(dir) = std::env::args_os().nth(1).map(PathBuf::from) else {
        fail("usage: zoo DIR")
    };
    // The alarm is for the worker alone: a wait for a signal is not restarted by any handler.
    let blocked = [
        process::QUEUED,
        process::READ,
        process::DRIVEN,
        process::TIMED,
    ];
    block(&[libc::SIGUSR1, libc::SIGALRM]);
    block(&blocked);
    let mut checks = memory::private();
    if std::env::args().nth(2).as_deref() != Some("memory") {
        checks.extend(memory::of_files(&dir));
        checks.extend(descriptors::all(&dir));
        checks.extend(nameless::all(&dir));
        checks.extend(process::all());
        checks.extend(threads::all());
    }
    let worker = std::thread::Builder::new()
        .name("worker".into())
        .stack_size(1 << 20);
    let worker = worker.spawn(move || work(checks));
    let Ok(worker) = worker else {
        fail("no thread")
    };
    say("ready");
    await_signal(libc::SIGUSR1);
    ENDING.store(true, Ordering::SeqCst);
    if worker.join().is_err() {
        fail("the worker panicked");
    }
    let rounds = ROUNDS.load(Ordering::SeqCst);
    say(&format!("rounds {rounds}"));
    if rounds == 0 {
        fail("no round was finished");
    }
}

fn work(mut checks: Vec<Check>) {
    unblock(&[libc::SIGALRM]);
    let mut last = now();
    for round in 0.. {
        for check in &mut checks {
            let begun = now();
            (check.look)(round);
            // A program that only just gets on is not well.
            if now() - begun > STUCK {
                fail(&format!(
                    "the check of {} took {} ns",
                    check.name,
                    now() - begun
                ));
            }
        }
        ROUNDS.fetch_add(1, Ordering::SeqCst);
        let this = now();
        if this < last {
            fail("CLOCK_MONOTONIC went backwards");
        }
        last = this;
        if ENDING.load(Ordering::SeqCst) {
            return;
        }
        std::thread::sleep(Duration::from_millis(3));
    }
}
