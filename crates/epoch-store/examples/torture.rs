//! The trials of `tests/torture.rs` for as long as one likes: `torture MINUTES SEED`.
//!
//! Prints the seed, what was tried, and each violation with the seed of its life; two runs with
//! the same seed lead the same lives in the same order. Ends with 1 where anything was violated.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

#[path = "../tests/common/mod.rs"]
mod common;

use common::trials::{Tally, Trial};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Cuts tried at each boundary, at most, in turn: many shallow lives, and some deep ones.
const WIDTHS: [usize; 8] = [24, 24, 24, 96, 24, 24, 96, 4096];
/// Violations after which it is enough.
const ENOUGH: usize = 20;

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let mut number = || args.next().and_then(|arg| arg.parse::<u64>().ok());
    let (Some(minutes), Some(seed)) = (number(), number()) else {
        eprintln!("usage: torture MINUTES SEED [ONE]");
        return ExitCode::from(2);
    };
    if let Some(one) = number() {
        println!("life {one} of seed {seed}");
        println!("{:?}", trial(seed, one).all());
        return ExitCode::SUCCESS;
    }
    println!("seed {seed}, for {minutes} min");
    std::panic::set_hook(Box::new(|_| {}));
    let until = Instant::now() + Duration::from_secs(60 * minutes);
    let (next, tally, violations) = (
        AtomicU64::new(0),
        Mutex::new(Tally::default()),
        Mutex::new(Vec::new()),
    );
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while Instant::now() < until && violations.lock().unwrap().len() < ENOUGH {
                    let life = next.fetch_add(1, Ordering::Relaxed);
                    match catch_unwind(AssertUnwindSafe(|| trial(seed, life).all())) {
                        Ok(more) => tally.lock().unwrap().add(&more),
                        Err(panic) => {
                            let what = said(&*panic);
                            println!("VIOLATION in life {life} of seed {seed}: {what}");
                            violations.lock().unwrap().push(life);
                        }
                    }
                }
            });
        }
    });
    let (tally, violations) = (
        tally.into_inner().unwrap(),
        violations.into_inner().unwrap(),
    );
    report(&tally, violations.len());
    ExitCode::from(u8::from(!violations.is_empty()))
}

fn trial(seed: u64, life: u64) -> Trial {
    let width = WIDTHS[(life % WIDTHS.len() as u64) as usize];
    Trial::new(seed.wrapping_mul(1 << 20).wrapping_add(life), width)
}

fn said(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| Some((*panic.downcast_ref::<&str>()?).to_owned()))
        .unwrap_or_else(|| "a panic without words".to_owned())
}

fn report(tally: &Tally, violations: usize) {
    println!("{} lives", tally.lives);
    println!("{} states after a power cut", tally.cuts);
    println!("{} states after a power cut in recovery", tally.recoveries);
    println!(
        "{} states after a power cut behind a killed writer",
        tally.kills
    );
    println!(
        "{} states after {} errors",
        tally.after_errors, tally.errors
    );
    println!("{} lies of the medium", tally.lies);
    println!("{} changed bits, sectors and blocks", tally.flips);
    println!(
        "{} of all these were alike to one before, and not compared again",
        tally.alike
    );
    println!("{} states tried, {violations} violations", tally.states());
}
