//! Vector registers, memory shared with a child, and timers, all of it checked all the time.
//!
//! `orchestra PACE`: a parent and its child take turns (a futex in memory that they share) and
//! both read a ledger there; two threads compute in vector registers and compare with a
//! computation without; one counts what a timer tells; an interval timer interrupts all of that.
//! Works until there is a file `finish`, counts its rounds in the file `progress` (one byte each),
//! waits PACE milliseconds after each, and writes their number to `result`.
//!
//! # Safety
//! The shared block is mapped before the child is made, is never unmapped, and is accessed through
//! atomics only. System calls get pointers to live values. The vector functions are called only
//! where the processor has what they need, which is asked before.
#![allow(unsafe_code)]

use outlive_test_programs::{
    block, check, clock_ns, expect, fail, mix, now, sys, timespec, unblock,
};
use std::io::Write;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// Cells in the ledger, 32 bytes each.
const CELLS: usize = 2048;

/// Nanoseconds between two ticks.
const TICK: i64 = 2_000_000;

/// The turn that ends the child.
const END: u32 = u32::MAX - 1;

/// The turn after which the child has found something wrong.
const BROKEN: u32 = u32::MAX;

/// What parent and child share.
struct Shared {
    /// Even: the parent's turn. Odd: the child's.
    turn: AtomicU32,
    /// What is handed over.
    value: AtomicU64,
    ledger: [[AtomicU64; 4]; CELLS],
}

static ALARMS: AtomicU64 = AtomicU64::new(0);

extern "C" fn alarm(_: libc::c_int) {
    ALARMS.fetch_add(1, Ordering::Relaxed);
}

fn share() -> &'static Shared {
    // SAFETY: a new mapping of whole pages, zeroed, which is a valid value of atomics.
    unsafe {
        let at = libc::mmap(
            std::ptr::null_mut(),
            size_of::<Shared>(),
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        check(at != libc::MAP_FAILED, || "no shared memory".into());
        &*at.cast::<Shared>()
    }
}

/// A cell as it must be: text, so that it can be recognised from outside.
fn cell(number: usize) -> [u64; 4] {
    let text = format!("cell {number:06} {:016x}    ", mix(number as u64));
    let mut words = [0; 4];
    for (word, bytes) in words.iter_mut().zip(text.as_bytes().chunks_exact(8)) {
        *word = bytes.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b));
    }
    words
}

/// What is wrong with a cell.
fn judge_cell(shared: &Shared, number: usize) -> Result<(), String> {
    let got: [u64; 4] = std::array::from_fn(|at| shared.ledger[number][at].load(Ordering::Relaxed));
    let wanted = cell(number);
    if got == wanted {
        return Ok(());
    }
    Err(format!("cell {number}: {got:x?}, not {wanted:x?}"))
}

fn check_cell(shared: &Shared, number: usize) {
    judge_cell(shared, number).unwrap_or_else(|wrong| fail(&wrong));
}

fn futex(word: &AtomicU32, operation: i32, value: u32) -> i64 {
    let at = std::ptr::from_ref(word) as usize;
    // SAFETY: the word is live; no time limit is given.
    unsafe {
        sys(
            libc::SYS_futex,
            [at, operation as usize, value as usize, 0, 0, 0],
        )
    }
}

/// Waits while the turn is this one; returns the new one.
fn await_turn(shared: &Shared, while_it_is: u32) -> u32 {
    loop {
        let turn = shared.turn.load(Ordering::Acquire);
        if turn != while_it_is {
            return turn;
        }
        let result = futex(&shared.turn, libc::FUTEX_WAIT, turn);
        let fine = [0, -i64::from(libc::EAGAIN), -i64::from(libc::EINTR)];
        check(fine.contains(&result), || format!("futex: {result}"));
    }
}

fn hand_over(shared: &Shared, turn: u32) {
    shared.turn.store(turn, Ordering::Release);
    futex(&shared.turn, libc::FUTEX_WAKE, 1);
}

/// The child's life: answers with what follows, and reads the ledger.
fn child(shared: &Shared) -> ! {
    let (mut turn, mut number) = (0, 0);
    loop {
        turn = await_turn(shared, turn);
        if turn == END {
            // SAFETY: does not return.
            unsafe { libc::_exit(7) };
        }
        let value = shared.value.load(Ordering::Relaxed);
        shared.value.store(mix(value), Ordering::Relaxed);
        for _ in 0..32 {
            if let Err(wrong) = judge_cell(shared, number) {
                hand_over(shared, BROKEN);
                fail(&wrong);
            }
            number = (number + 1) % CELLS;
        }
        turn += 1;
        hand_over(shared, turn);
    }
}

fn step(x: u64) -> u64 {
    let x = x ^ x << 13;
    let x = x ^ x >> 7;
    x ^ x << 17
}

/// Sixteen lanes in four registers, all of it kept there from the first step to the last.
#[target_feature(enable = "avx2")]
fn in_registers(lanes: &mut [u64; 16], steps: u32) {
    use std::arch::x86_64::{
        __m256i, _mm256_set_epi64x, _mm256_slli_epi64, _mm256_srli_epi64, _mm256_storeu_si256,
        _mm256_xor_si256,
    };
    let mut held = [_mm256_set_epi64x(0, 0, 0, 0); 4];
    for (register, four) in held.iter_mut().zip(lanes.chunks_exact(4)) {
        let lane = |at: usize| four[at] as i64;
        *register = _mm256_set_epi64x(lane(3), lane(2), lane(1), lane(0));
    }
    for _ in 0..steps {
        for register in &mut held {
            let x = _mm256_xor_si256(*register, _mm256_slli_epi64::<13>(*register));
            let x = _mm256_xor_si256(x, _mm256_srli_epi64::<7>(x));
            *register = _mm256_xor_si256(x, _mm256_slli_epi64::<17>(x));
        }
    }
    for (register, four) in held.iter().zip(lanes.chunks_exact_mut(4)) {
        // SAFETY: four numbers of 8 bytes are live; the store needs no alignment.
        unsafe { _mm256_storeu_si256(four.as_mut_ptr().cast::<__m256i>(), *register) };
    }
}

fn vectors(seed: u64, rounds: &AtomicU64) {
    let mut lanes: [u64; 16] = std::array::from_fn(|lane| mix(seed + lane as u64));
    let has = is_x86_feature_detected!("avx2");
    loop {
        let mut wanted = lanes;
        wanted.iter_mut().for_each(|lane| {
            *lane = (0..20_000).fold(*lane, |x, _| step(x));
        });
        if has {
            // SAFETY: the processor has these registers.
            unsafe { in_registers(&mut lanes, 20_000) };
        } else {
            lanes = wanted;
        }
        check(lanes == wanted, || {
            format!("vector lanes: {lanes:x?}, not {wanted:x?}")
        });
        rounds.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Counts the ticks of a timer, which must not outrun the clock.
fn timer(ticks: &AtomicU64) {
    let begun = now();
    let real = clock_ns(libc::CLOCK_BOOTTIME);
    // SAFETY: the specification is live.
    let fd = unsafe {
        let fd = libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_CLOEXEC);
        let spec = libc::itimerspec {
            it_interval: timespec(TICK),
            it_value: timespec(TICK),
        };
        let result = libc::timerfd_settime(fd, 0, &raw const spec, std::ptr::null_mut());
        check(fd >= 0 && result == 0, || "no timer".into());
        fd
    };
    let (mut last, mut last_real) = (begun, real);
    loop {
        let mut count = 0u64;
        let at = &raw mut count as usize;
        // SAFETY: eight live bytes.
        let got = unsafe { sys(libc::SYS_read, [fd as usize, at, 8, 0, 0, 0]) };
        if got == -i64::from(libc::EINTR) {
            continue;
        }
        check(got == 8 && count > 0, || {
            format!("a tick of {got} bytes: {count}")
        });
        let all = ticks.fetch_add(count, Ordering::Relaxed) + count;
        let (time, time_real) = (now(), clock_ns(libc::CLOCK_BOOTTIME));
        check(time > last && time_real > last_real, || {
            "time ran backwards".into()
        });
        let most = (time - begun) / TICK;
        check(all <= most as u64, || {
            format!("{all} ticks, at most {most}")
        });
        (last, last_real) = (time, time_real);
    }
}

fn start_alarms() {
    let handler: extern "C" fn(libc::c_int) = alarm;
    let every = libc::timeval {
        tv_sec: 0,
        tv_usec: 3_000,
    };
    let spec = libc::itimerval {
        it_interval: every,
        it_value: every,
    };
    // SAFETY: the handler touches an atomic only; all pointers are to live values.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_RESTART;
        let none = std::ptr::null_mut();
        expect(
            "sigaction",
            libc::sigaction(libc::SIGALRM, &raw const action, none).into(),
            0,
        );
        let set = [
            libc::ITIMER_REAL as usize,
            &raw const spec as usize,
            0,
            0,
            0,
            0,
        ];
        expect("setitimer", sys(libc::SYS_setitimer, set), 0);
    }
}

fn write(file: &str, append: bool) -> std::fs::File {
    let mut options = std::fs::OpenOptions::new();
    let opened = options.create(true).write(true).append(append).open(file);
    opened.unwrap_or_else(|error| fail(&format!("{file}: {error}")))
}

fn counter() -> &'static AtomicU64 {
    Box::leak(Box::new(AtomicU64::new(0)))
}

fn main() {
    let pace = std::env::args()
        .nth(1)
        .and_then(|n| n.parse().ok())
        .unwrap_or(1);
    let shared = share();
    for (number, words) in shared.ledger.iter().enumerate() {
        for (word, value) in words.iter().zip(cell(number)) {
            word.store(value, Ordering::Relaxed);
        }
    }
    // SAFETY: no thread was started yet.
    let pid = unsafe { libc::fork() };
    match pid {
        0 => child(shared),
        ..0 => fail("no child"),
        _ => {}
    }
    let (one, two, ticks) = (counter(), counter(), counter());
    block(&[libc::SIGALRM]);
    std::thread::spawn(|| vectors(1, one));
    std::thread::spawn(|| vectors(100, two));
    std::thread::spawn(|| timer(ticks));
    unblock(&[libc::SIGALRM]);
    start_alarms();
    let mut progress = write("progress", true);
    let (mut turn, mut rounds, mut value) = (0, 0u64, 1u64);
    while !std::path::Path::new("finish").exists() {
        shared.value.store(value, Ordering::Relaxed);
        hand_over(shared, turn + 1);
        turn = await_turn(shared, turn + 1);
        check(turn.is_multiple_of(2), || {
            format!("turn {turn} is not ours")
        });
        value = mix(value);
        let got = shared.value.load(Ordering::Relaxed);
        check(got == value, || {
            format!("round {rounds}: {got:x}, not {value:x}")
        });
        check_cell(shared, (rounds % CELLS as u64) as usize);
        rounds += 1;
        check(progress.write(b"x").is_ok_and(|n| n == 1), || {
            "progress".into()
        });
        std::thread::sleep(Duration::from_millis(pace));
    }
    (0..CELLS).for_each(|number| check_cell(shared, number));
    hand_over(shared, END);
    let mut status = 0;
    // SAFETY: the status is live.
    let waited = unsafe { libc::waitpid(pid, &raw mut status, 0) };
    check(waited == pid && libc::WEXITSTATUS(status) == 7, || {
        format!("the child ended with {status:x}")
    });
    for (what, count) in [
        ("vectors", one),
        ("vectors", two),
        ("ticks", ticks),
        ("alarms", &ALARMS),
    ] {
        check(count.load(Ordering::Relaxed) > 0, || format!("no {what}"));
    }
    check(writeln!(write("result", false), "{rounds}").is_ok(), || {
        "result".into()
    });
}
