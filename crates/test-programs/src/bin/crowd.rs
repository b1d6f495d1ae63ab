//! A program with much of everything: threads that sleep, open descriptors, mappings, memory, and
//! a thread that writes to that memory at a chosen rate.
//!
//! `crowd [--threads N] [--descriptors N] [--mappings N] [--memory MB] [--dirty-rate MB/S]`
//!
//! It prints `ready PID` when everything is there. On SIGUSR1 it looks at everything, prints
//! `done PAGES`, the number of pages written since the beginning, and ends.
//!
//! # What it checks of itself
//! Each page begins with a word that tells its place and how often it was written; the word is
//! checked before it is written again. Descriptors are event counters, pipes, pairs of sockets and
//! files in turn, and each must give what was put into it. Each mapping holds its number. Each
//! thread must still be there.
//!
//! # Safety
//! Memory is that of mappings which are made here, and never given back.
#![allow(unsafe_code)]

use outlive_test_programs::{await_report_order, block, check, fail, mix, say};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::FromRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
/// Stacks of the threads, bytes.
const STACK: usize = 64 * 1024;
/// Bytes of a mapping of its own.
const PIECE: usize = 2 * PAGE;
/// How often the writing thread writes its share.
const TURN: Duration = Duration::from_millis(1);

static AWAKE: AtomicBool = AtomicBool::new(false);
static COUNTED: AtomicUsize = AtomicUsize::new(0);
static ENOUGH: AtomicBool = AtomicBool::new(false);
static WRITTEN: AtomicU64 = AtomicU64::new(0);

#[derive(Default)]
struct Options {
    threads: usize,
    descriptors: usize,
    mappings: usize,
    memory: usize,
    dirty_rate: usize,
}

impl Options {
    fn read() -> Self {
        let mut options = Self::default();
        let mut words = std::env::args().skip(1);
        while let Some(name) = words.next() {
            let value = words.next().and_then(|w| w.parse().ok());
            let Some(value) = value else {
                fail(&format!("{name} needs a number"));
            };
            match name.as_str() {
                "--threads" => options.threads = value,
                "--descriptors" => options.descriptors = value,
                "--mappings" => options.mappings = value,
                "--memory" => options.memory = value << 20,
                "--dirty-rate" => options.dirty_rate = value << 20,
                _ => fail(&format!("{name} is no option")),
            }
        }
        options
    }
}

/// Memory that is private and zero.
fn map(bytes: usize, prot: i32) -> *mut u8 {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping at an address that the kernel chooses.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), bytes, prot, flags, -1, 0) };
    check(at != libc::MAP_FAILED, || format!("mapping {bytes} bytes"));
    at.cast()
}

/// Raises the number of descriptors that may be open as far as it goes.
fn raise_limit() {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: limit is live.
    unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
        limit.rlim_cur = limit.rlim_max;
        libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
    }
}

/// Memory that is written to page by page, in rounds.
struct Pages {
    base: usize,
    count: usize,
}

impl Pages {
    fn new(bytes: usize) -> Self {
        let count = bytes / PAGE;
        let base = if count == 0 {
            0
        } else {
            map(count * PAGE, libc::PROT_READ | libc::PROT_WRITE) as usize
        };
        let pages = Self { base, count };
        for at in 0..count {
            let page = (base + at * PAGE) as *mut u64;
            for word in 0..PAGE / 8 {
                // SAFETY: the page lies in the mapping that was just made.
                unsafe { page.add(word).write(mix((at * PAGE + word) as u64)) };
            }
            pages.set(at, 0);
        }
        pages
    }

    fn word(&self, at: usize) -> *mut u64 {
        check(at < self.count, || format!("there is no page {at}"));
        (self.base + at * PAGE) as *mut u64
    }

    fn stamp(at: usize, round: u64) -> u64 {
        mix((at as u64) << 32 ^ round)
    }

    fn set(&self, at: usize, round: u64) {
        // SAFETY: `word` has checked that the page is one of ours.
        unsafe { self.word(at).write_volatile(Self::stamp(at, round)) };
    }

    fn expect(&self, at: usize, round: u64) {
        // SAFETY: `word` has checked that the page is one of ours.
        let found = unsafe { self.word(at).read_volatile() };
        check(found == Self::stamp(at, round), || {
            format!("page {at} does not hold what round {round} wrote")
        });
    }

    /// How often a page was written when so many writes are done.
    fn rounds(&self, at: usize, written: u64) -> u64 {
        let whole = written / self.count as u64;
        whole + u64::from((at as u64) < written % self.count as u64)
    }

    /// Writes at this rate, bytes a second, until it is enough.
    fn keep_writing(&self, rate: usize) {
        let began = Instant::now();
        let (mut at, mut round, mut written) = (0, 0, 0);
        while !ENOUGH.load(Ordering::SeqCst) {
            let due = began.elapsed().as_micros() * rate as u128 / 1_000_000 / PAGE as u128;
            let due = u64::try_from(due).unwrap_or(u64::MAX);
            // After a pause it goes on at its rate, and does not catch up.
            let turn = (rate / PAGE / 100).max(1) as u64;
            let upto = due.min(written + turn);
            while written < upto {
                self.expect(at, round);
                self.set(at, round + 1);
                at += 1;
                written += 1;
                if at == self.count {
                    (at, round) = (0, round + 1);
                }
            }
            WRITTEN.store(written, Ordering::SeqCst);
            if written >= due {
                std::thread::sleep(TURN);
            }
        }
    }
}

/// Two ends of which one holds what the other must give.
enum Open {
    Counter(File, u64),
    Pipe(File, File, u64),
    Pair(UnixStream, UnixStream, u64),
    File(File, u64),
}

impl Open {
    /// One of each sort in turn; gives how many descriptors it has.
    fn new(number: u64) -> (Self, usize) {
        let bytes = number.to_ne_bytes();
        let own = "the descriptors cannot be opened: see `ulimit -n`";
        match number % 4 {
            0 => {
                // SAFETY: the call takes no pointer; the descriptor is new and ours.
                let counter = unsafe {
                    let fd = libc::eventfd(0, libc::EFD_CLOEXEC);
                    check(fd >= 0, || own.to_owned());
                    File::from_raw_fd(fd)
                };
                let count = number + 1;
                let wrote = (&counter).write_all(&count.to_ne_bytes());
                check(wrote.is_ok(), || "an event counter".to_owned());
                (Self::Counter(counter, count), 1)
            }
            1 => {
                let mut ends = [0; 2];
                // SAFETY: `ends` has room for two; the descriptors are new and ours.
                let (read, mut write) = unsafe {
                    check(libc::pipe2(ends.as_mut_ptr(), 0) == 0, || own.to_owned());
                    (File::from_raw_fd(ends[0]), File::from_raw_fd(ends[1]))
                };
                check(write.write_all(&bytes).is_ok(), || "a pipe".to_owned());
                (Self::Pipe(read, write, number), 2)
            }
            2 => {
                let Ok((read, mut write)) = UnixStream::pair() else {
                    fail(own);
                };
                check(write.write_all(&bytes).is_ok(), || "a socket".to_owned());
                (Self::Pair(read, write, number), 2)
            }
            _ => {
                let Ok(mut file) = File::open("/proc/self/exe") else {
                    fail(own);
                };
                let sought = file.seek(SeekFrom::Start(number));
                check(sought.is_ok(), || "a file".to_owned());
                (Self::File(file, number), 1)
            }
        }
    }

    fn check(self) {
        let (found, wanted, what) = match self {
            Self::Counter(mut fd, n) => {
                let mut raw = [0; 8];
                let read = fd.read_exact(&mut raw).ok();
                (read.map(|()| u64::from_ne_bytes(raw)), n, "event counter")
            }
            Self::Pipe(read, write, n) => (all_behind(read, write), n, "pipe"),
            Self::Pair(read, write, n) => (all_behind(read, write), n, "socket"),
            Self::File(mut fd, n) => (fd.stream_position().ok(), n, "file"),
        };
        check(found == Some(wanted), || {
            format!("{what} {wanted} gives {found:?}")
        });
    }
}

/// The number that waits to be read, if nothing else does once the other end is closed.
fn all_behind(mut read: impl Read, write: impl Write) -> Option<u64> {
    drop(write);
    let mut all = Vec::new();
    read.read_to_end(&mut all).ok()?;
    Some(u64::from_ne_bytes(all.try_into().ok()?))
}

/// Mappings that the kernel cannot join: each has other rights than the one before.
fn mappings(count: usize) -> Vec<usize> {
    let whole = map(
        (count * PIECE).max(PAGE),
        libc::PROT_READ | libc::PROT_WRITE,
    ) as usize;
    let each = |n: usize| {
        let at = whole + n * PIECE;
        // SAFETY: the address lies in the mapping that was just made.
        unsafe {
            (at as *mut u64).write(n as u64);
            if n % 2 == 1 {
                libc::mprotect(at as *mut libc::c_void, PIECE, libc::PROT_READ);
            }
        }
        at
    };
    (0..count).map(each).collect()
}

fn sleep_until_awake() {
    while !AWAKE.load(Ordering::SeqCst) {
        std::thread::park();
    }
    COUNTED.fetch_add(1, Ordering::SeqCst);
}

fn main() {
    block(&[libc::SIGUSR1]);
    let options = Options::read();
    raise_limit();
    let pages: &'static Pages = Box::leak(Box::new(Pages::new(options.memory)));
    let mappings = mappings(options.mappings);
    let (mut open, mut descriptors) = (Vec::new(), 0);
    while descriptors < options.descriptors {
        let (one, count) = Open::new(open.len() as u64);
        descriptors += count;
        open.push(one);
    }
    let thread = || std::thread::Builder::new().stack_size(STACK);
    let spawn = |_| match thread().spawn(sleep_until_awake) {
        Ok(handle) => handle,
        Err(e) => fail(&format!("a thread cannot be made: {e}")),
    };
    let threads: Vec<_> = (0..options.threads).map(spawn).collect();
    let rate = options.dirty_rate;
    let writes = rate > 0 && pages.count > 0;
    let writer = writes.then(|| std::thread::spawn(move || pages.keep_writing(rate)));
    say(&format!("ready {}", std::process::id()));
    await_report_order();
    ENOUGH.store(true, Ordering::SeqCst);
    let stopped = writer.is_none_or(|w| w.join().is_ok());
    check(stopped, || "the writing thread".to_owned());
    let written = WRITTEN.load(Ordering::SeqCst);
    for at in 0..pages.count {
        pages.expect(at, pages.rounds(at, written));
    }
    for (n, &at) in mappings.iter().enumerate() {
        // SAFETY: the mapping was made by `mappings`, and can be read.
        let found = unsafe { (at as *const u64).read_volatile() };
        check(found == n as u64, || format!("mapping {n} holds {found}"));
    }
    open.into_iter().for_each(Open::check);
    AWAKE.store(true, Ordering::SeqCst);
    for handle in threads {
        handle.thread().unpark();
        check(handle.join().is_ok(), || "a thread".to_owned());
    }
    let counted = COUNTED.load(Ordering::SeqCst);
    check(counted == options.threads, || {
        format!("{counted} threads woke")
    });
    say(&format!("done {written}"));
}
