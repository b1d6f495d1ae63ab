//! Clocks that must never run backwards, read in every way there is: `clocks [realtime]`.
//!
//! Threads read clocks without pause through the C library, which keeps the addresses of the
//! kernel's functions for it (the vDSO); another looks these functions up again and again, as a
//! library does that is loaded late; others sleep by absolute times and by a timer; one keeps
//! changing memory by a rule that can be checked, and looks at memory that is hidden in between.
//! With `realtime`, that clock must not run backwards either, which holds where nobody sets it.
//!
//! Every half second it says `tick N mono A boot B real C worked D`, times in nanoseconds.
//!
//! # Safety
//! Calls get live values of the types that they expect, or nothing. The kernel's object is read by
//! its own tables.
#![allow(unsafe_code)]

use outlive_test_programs::{
    await_report_order, block, check, clock_ns, expect, fail, good, mix, now, say, sys, timespec,
};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

/// How often each kind of work was done.
static READ: AtomicU64 = AtomicU64::new(0);
static COARSE: AtomicU64 = AtomicU64::new(0);
static LOOKED_UP: AtomicU64 = AtomicU64::new(0);
static SLEPT: AtomicU64 = AtomicU64::new(0);
static RANG: AtomicU64 = AtomicU64::new(0);
static WORKED: AtomicU64 = AtomicU64::new(0);

/// Words of the memory that is worked on: 2 MiB.
const WORDS: usize = 256 * 1024;

fn main() {
    block(&[libc::SIGUSR1]);
    let realtime = std::env::args().nth(1).as_deref() == Some("realtime");
    let mut clocks = vec![libc::CLOCK_MONOTONIC, libc::CLOCK_BOOTTIME];
    if realtime {
        clocks.push(libc::CLOCK_REALTIME);
    }
    let coarse = libc::CLOCK_MONOTONIC_COARSE;
    thread::spawn(move || read_clocks(&clocks));
    thread::spawn(move || read_now_and_then(coarse));
    thread::spawn(look_up);
    thread::spawn(sleep_to_times);
    thread::spawn(ring);
    thread::spawn(work);
    thread::spawn(tick);
    say("ready");
    await_report_order();
    let works = [
        ("read", &READ),
        ("coarse", &COARSE),
        ("looked up", &LOOKED_UP),
        ("slept", &SLEPT),
        ("rang", &RANG),
        ("worked", &WORKED),
    ];
    for (what, count) in works {
        let before = count.load(Ordering::SeqCst);
        // For ever, if it does not go on.
        while count.load(Ordering::SeqCst) == before {
            thread::sleep(std::time::Duration::from_millis(5));
        }
        say(&format!("{what} {}", count.load(Ordering::SeqCst)));
    }
    std::process::exit(0);
}

/// Reads clocks in turn without pause.
fn read_clocks(clocks: &[libc::clockid_t]) {
    let mut last: Vec<i64> = clocks.iter().map(|&c| clock_ns(c)).collect();
    loop {
        for (last, &clock) in last.iter_mut().zip(clocks) {
            let read = clock_ns(clock);
            check(read >= *last, || {
                format!("clock {clock} went from {last} to {read}")
            });
            *last = read;
        }
        let (monotonic, boottime) = (now(), clock_ns(libc::CLOCK_BOOTTIME));
        check(boottime >= monotonic, || {
            format!("{boottime} ns since the boot, of them {monotonic} awake")
        });
        let mut resolution = timespec(0);
        // SAFETY: the place is live.
        let results = unsafe {
            (
                libc::clock_getres(libc::CLOCK_MONOTONIC, &raw mut resolution),
                libc::sched_getcpu(),
            )
        };
        check(results.0 == 0 && results.1 >= 0, || format!("{results:?}"));
        READ.fetch_add(1, Ordering::Relaxed);
    }
}

/// Reads a clock that needs no time source, and `time`, and does other things in between.
fn read_now_and_then(clock: libc::clockid_t) {
    let mut last = clock_ns(clock);
    let mut noise = 0u64;
    loop {
        for _ in 0..2000 {
            noise = mix(noise);
        }
        let read = clock_ns(clock);
        check(read >= last, || {
            format!("clock {clock} went from {last} to {read} ({noise})")
        });
        last = read;
        // SAFETY: no place is given.
        let seconds = unsafe { libc::time(std::ptr::null_mut()) };
        check(seconds > 1_600_000_000, || format!("it is {seconds}"));
        COARSE.fetch_add(1, Ordering::Relaxed);
    }
}

type ClockGettime = unsafe extern "C" fn(libc::clockid_t, *mut libc::timespec) -> libc::c_int;

/// Finds the kernel's object where the auxiliary vector says that it is, and the function in it.
fn look_up() {
    let mut last = now();
    loop {
        // SAFETY: asks for a number.
        let base = unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) } as usize;
        check(base != 0, || "there is no vDSO".into());
        let function = vdso_function(base, b"__vdso_clock_gettime");
        let mut t = timespec(0);
        // SAFETY: the symbol with this name has this type.
        let function: ClockGettime = unsafe { std::mem::transmute(function) };
        // SAFETY: t is live.
        let r = unsafe { function(libc::CLOCK_MONOTONIC, &raw mut t) };
        expect("the vDSO's clock_gettime", i64::from(r), 0);
        let read = t.tv_sec * 1_000_000_000 + t.tv_nsec;
        check(read >= last, || format!("from {last} to {read}"));
        last = read;
        LOOKED_UP.fetch_add(1, Ordering::Relaxed);
        thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// The address of a function in the ELF object at `base`, by its dynamic section (`elf(5)`).
fn vdso_function(base: usize, name: &[u8]) -> usize {
    // SAFETY: the kernel maps a whole, valid object there; all places come from its own tables.
    unsafe {
        let word = |at: usize| (at as *const u64).read_unaligned() as usize;
        let half = |at: usize| usize::from((at as *const u16).read_unaligned());
        let int = |at: usize| (at as *const u32).read_unaligned() as usize;
        let (table, count) = (base + word(base + 32), half(base + 56));
        let (mut load, mut dynamic) = (None, 0);
        for i in 0..count {
            let at = table + i * 56;
            match int(at) {
                1 if load.is_none() => load = Some(base + word(at + 8) - word(at + 16)),
                2 => dynamic = base + word(at + 8),
                _ => {}
            }
        }
        let slide = load.unwrap_or(base);
        let entry = |tag: usize| {
            let mut at = dynamic;
            while word(at) != tag {
                if word(at) == 0 {
                    fail("the vDSO lacks a table");
                }
                at += 16;
            }
            slide.wrapping_add(word(at + 8))
        };
        let (strings, symbols) = (entry(5), entry(6));
        // The names lie behind the symbols.
        let mut at = symbols;
        while at < strings {
            let of = (strings + int(at)) as *const libc::c_char;
            if std::ffi::CStr::from_ptr(of).to_bytes() == name {
                return slide.wrapping_add(word(at + 8));
            }
            at += 24;
        }
    }
    fail("the vDSO lacks a function")
}

/// Sleeps until absolute times.
fn sleep_to_times() {
    let mut until = now();
    loop {
        until += 20_000_000;
        let t = timespec(until);
        // SAFETY: t is live.
        let r = unsafe {
            let (clock, absolute) = (libc::CLOCK_MONOTONIC, libc::TIMER_ABSTIME);
            libc::clock_nanosleep(clock, absolute, &raw const t, std::ptr::null_mut())
        };
        expect("clock_nanosleep", i64::from(r), 0);
        check(now() >= until, || "it woke early".into());
        SLEPT.fetch_add(1, Ordering::Relaxed);
    }
}

/// Waits for a timer that rings at intervals.
fn ring() {
    const INTERVAL: i64 = 30_000_000;
    // SAFETY: the specification is live.
    let fd = unsafe {
        let fd = libc::timerfd_create(libc::CLOCK_BOOTTIME, libc::TFD_CLOEXEC);
        let spec = libc::itimerspec {
            it_interval: timespec(INTERVAL),
            it_value: timespec(INTERVAL),
        };
        let set = libc::timerfd_settime(fd, 0, &raw const spec, std::ptr::null_mut());
        expect("timerfd_settime", i64::from(set), 0);
        good("timerfd_create", i64::from(fd)) as usize
    };
    let (begun, mut rings) = (clock_ns(libc::CLOCK_BOOTTIME), 0u64);
    loop {
        let mut count = 0u64;
        // SAFETY: count is live and 8 bytes long.
        let r = unsafe { sys(libc::SYS_read, [fd, &raw mut count as usize, 8, 0, 0, 0]) };
        expect("reading the timer", r, 8);
        rings += count;
        let elapsed = clock_ns(libc::CLOCK_BOOTTIME) - begun;
        let due = elapsed / INTERVAL + 1;
        check(rings as i64 <= due, || {
            format!("{rings} rings in {elapsed} ns")
        });
        RANG.fetch_add(1, Ordering::Relaxed);
    }
}

/// Changes memory, generation by generation.
fn work() {
    let hidden = hide();
    let mut words: Vec<u64> = (0..WORDS as u64).map(mix).collect();
    for generation in 0.. {
        for (i, word) in words.iter_mut().enumerate() {
            let wanted = mix(i as u64).wrapping_add(generation);
            check(*word == wanted, || {
                format!("word {i} is {word:x} in generation {generation}, not {wanted:x}")
            });
            *word = word.wrapping_add(1);
        }
        protect(hidden, libc::PROT_READ);
        // SAFETY: mapped, readable, and never unmapped.
        let word = unsafe { hidden.read_volatile() };
        check(word == HIDDEN, || format!("hidden memory holds {word:x}"));
        protect(hidden, libc::PROT_NONE);
        WORKED.fetch_add(1, Ordering::Relaxed);
    }
}

const HIDDEN: u64 = 0x6869_6464_656e_2121;

/// A page with contents that nobody may look at.
fn hide() -> *const u64 {
    let (rw, sort) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    );
    // SAFETY: a fresh mapping, which is written within its length.
    let at = unsafe {
        let at = libc::mmap(std::ptr::null_mut(), 4096, rw, sort, -1, 0);
        check(at != libc::MAP_FAILED, || "mmap failed".into());
        at.cast::<u64>().write(HIDDEN);
        at.cast::<u64>().cast_const()
    };
    protect(at, libc::PROT_NONE);
    at
}

fn protect(at: *const u64, protection: i32) {
    // SAFETY: a mapping of this length that only this thread uses.
    let r = unsafe { libc::mprotect(at.cast_mut().cast(), 4096, protection) };
    expect("mprotect", r.into(), 0);
}

fn tick() {
    for n in 0u64.. {
        say(&format!(
            "tick {n} mono {} boot {} real {} worked {}",
            now(),
            clock_ns(libc::CLOCK_BOOTTIME),
            clock_ns(libc::CLOCK_REALTIME),
            WORKED.load(Ordering::SeqCst),
        ));
        thread::sleep(std::time::Duration::from_millis(500));
    }
}
