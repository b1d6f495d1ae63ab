//! Memory that is used for the first time, over and over, as fast as it goes: `mapper WHAT…`, of
//! `maps` (mapped, written and unmapped), `brk` (the heap grows and shrinks), `holes` (pages here and
//! there in a large mapping, given back and used again), `file` (a private mapping of a file),
//! `child` (a process that holds memory, and ends) and `burst` (much at once). With `twin` a child does
//! the same all the time. What was written is looked at. Ends at SIGUSR1.
//!
//! # Safety
//! Every mapping is owned by one loop, which unmaps it once; addresses lie within it. The child makes
//! system calls and writes to memory of its own.
#![allow(unsafe_code)]

use outlive_test_programs::{
    Random, await_report_order, block, check, ending, expect, good, mix, say,
};
use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};

const PAGE: usize = 4096;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
const ANONYMOUS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
/// Mappings that are there at once, and pages of each at most.
const MAPPINGS: usize = 8;
const MOST: u64 = 300;
/// Pages of the large mapping, of the file, and of the heap at most.
const LARGE: usize = 1 << 18;
const FILE: usize = 64;
const HEAP: usize = 1000;
/// Pages of a child.
const OWN: usize = 3000;
/// Pages of a burst.
const BURST: usize = 8192;

static END: AtomicBool = AtomicBool::new(false);

fn map(pages: usize, how: i32, fd: i32) -> usize {
    // SAFETY: a fresh mapping at a place of the kernel's choice.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), pages * PAGE, RW, how, fd, 0) };
    good("mmap", at as i64) as usize
}

fn unmap(at: usize, pages: usize) {
    // SAFETY: its owner uses it no more.
    let gone = unsafe { libc::munmap(at as *mut _, pages * PAGE) };
    expect("munmap", gone.into(), 0);
}

fn write(at: usize, value: u64) {
    // SAFETY: within a mapping of the caller's.
    unsafe { (at as *mut u64).write_volatile(mix(value ^ at as u64)) };
}

fn look(at: usize, value: u64) {
    // SAFETY: the same.
    let found = unsafe { (at as *const u64).read_volatile() };
    let expected = mix(value ^ at as u64);
    check(found == expected, || {
        format!("at {at:x}: {found:x}, not {expected:x}")
    });
}

fn maps(random: &mut Random, held: &mut Vec<(usize, usize, u64)>) {
    let (pages, value) = (1 + random.below(MOST) as usize, random.next_u64());
    let at = map(pages, ANONYMOUS, -1);
    (0..pages).for_each(|page| write(at + page * PAGE, value));
    held.push((at, pages, value));
    if held.len() > MAPPINGS {
        let (at, pages, value) = held.swap_remove(random.below(MAPPINGS as u64) as usize);
        (0..pages).for_each(|page| look(at + page * PAGE, value));
        unmap(at, pages);
    }
}

/// The heap ends at `top`, and began so many pages below.
fn brk(random: &mut Random, (top, pages): &mut (usize, usize)) {
    let grow = random.below(64) as usize;
    let (new, shrink) = match *pages + grow > HEAP {
        true => (*top - *pages * PAGE, true),
        false => (*top + grow * PAGE, false),
    };
    // SAFETY: nothing but this loop uses the heap beyond where it began.
    let set = unsafe { libc::syscall(libc::SYS_brk, new) };
    expect("brk", set, new as i64);
    if shrink {
        (*top, *pages) = (new, 0);
        return;
    }
    (*top..new).step_by(PAGE).for_each(|at| write(at, 1));
    (*top, *pages) = (new, *pages + grow);
}

fn holes(random: &mut Random, large: usize) {
    let page = random.below(LARGE as u64) as usize;
    write(large + page * PAGE, 2);
    look(large + page * PAGE, 2);
    if random.below(500) == 0 {
        let from = large + random.below(LARGE as u64 / 2) as usize * PAGE;
        // SAFETY: half of the mapping at most.
        let advised =
            unsafe { libc::madvise(from as *mut _, LARGE / 2 * PAGE, libc::MADV_DONTNEED) };
        expect("madvise", advised.into(), 0);
    }
}

fn child(random: &mut Random) {
    // SAFETY: the child has this thread only, and neither allocates nor locks.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let at = map(OWN, ANONYMOUS, -1);
        (0..OWN).for_each(|page| write(at + page * PAGE, 3));
        let wait = libc::timespec {
            tv_sec: 0,
            tv_nsec: random.below(20_000_000) as i64,
        };
        // SAFETY: the time is live; the second call does not return.
        unsafe {
            libc::nanosleep(&raw const wait, std::ptr::null_mut());
            libc::_exit(0);
        }
    }
    let child = good("fork", child.into()) as i32;
    let mut status = 0;
    // SAFETY: status is live.
    let ended = unsafe { libc::waitpid(child, &raw mut status, 0) };
    expect("waitpid", ended.into(), child.into());
    expect("the status of a child", status.into(), 0);
}

/// Maps, writes and unmaps much, as fast as it goes.
fn burst(random: &mut Random) {
    let (at, value) = (map(BURST, ANONYMOUS, -1), random.next_u64());
    (0..BURST).for_each(|page| write(at + page * PAGE, value));
    (0..BURST).for_each(|page| look(at + page * PAGE, value));
    unmap(at, BURST);
}

/// A child that does this until it is killed.
fn twin(what: &[String]) -> i32 {
    // SAFETY: there is no other thread.
    let child = good("fork", unsafe { libc::fork() }.into()) as i32;
    if child == 0 {
        work(what);
    }
    child
}

/// Ends a twin, which must be there.
fn end_twin(child: i32) {
    let mut status = 0;
    // SAFETY: status is live.
    let ended = unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG) };
    expect("the end of the twin", ended.into(), 0);
    // SAFETY: it is our child, and status is live.
    unsafe {
        libc::kill(child, libc::SIGKILL);
        libc::waitpid(child, &raw mut status, 0);
    }
}

fn work(what: &[String]) {
    let has = |name: &str| what.iter().any(|w| w == name);
    let mut random = Random::new(what.len() as u64);
    let mut held = Vec::with_capacity(MAPPINGS + 1);
    // SAFETY: no address: asks where the heap ends.
    let mut heap = (unsafe { libc::syscall(libc::SYS_brk, 0) } as usize, 0);
    heap.0 = heap.0.next_multiple_of(PAGE);
    let large = map(LARGE, ANONYMOUS, -1);
    let mut how = OpenOptions::new();
    let file = how
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(format!("below-{}", std::process::id()));
    let file = file.unwrap_or_else(|e| panic!("{e}"));
    let long = file.set_len((FILE * PAGE) as u64);
    check(long.is_ok(), || format!("set_len: {long:?}"));
    let mut above = map(FILE, libc::MAP_PRIVATE, file.as_raw_fd());
    while !END.load(Ordering::Relaxed) {
        if has("maps") {
            maps(&mut random, &mut held);
        }
        if has("brk") {
            brk(&mut random, &mut heap);
        }
        if has("holes") {
            (0..50).for_each(|_| holes(&mut random, large));
        }
        if has("file") {
            let page = above + random.below(FILE as u64) as usize * PAGE;
            write(page, 4);
            look(page, 4);
            if random.below(100) == 0 {
                unmap(above, FILE);
                above = map(FILE, libc::MAP_PRIVATE, file.as_raw_fd());
            }
        }
        if has("child") {
            child(&mut random);
        }
        if has("burst") {
            burst(&mut random);
        }
    }
}

fn main() {
    let what: Vec<String> = std::env::args().skip(1).collect();
    block(&[libc::SIGUSR1, libc::SIGCHLD]);
    let twin = what.iter().any(|w| w == "twin").then(|| twin(&what));
    let worker = std::thread::spawn(move || work(&what));
    say("ready");
    await_report_order();
    ending();
    END.store(true, Ordering::Relaxed);
    if worker.join().is_err() {
        std::process::exit(1);
    }
    twin.into_iter().for_each(end_twin);
}
