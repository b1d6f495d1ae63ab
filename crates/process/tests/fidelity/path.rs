//! What a stop costs this process whatever was written: how often it allocates, and which system calls it
//! makes, counted by an allocator and by a tracer of our own.
//!
//! # Safety
//! The allocator hands on to the system's. `ptrace` and `waitpid` are called with numbers and pointers to
//! live, large enough local values, of a child that this test has started.
#![allow(unsafe_code)]

use crate::support::{Program, adopt_orphans, alone, may_run};
use outlive_epoch::{
    Acked, EpochFacts, EpochId, EpochWriter, PAGE_SIZE, PageSink, Run, StoreError,
};
use outlive_process::{Strategy, TrackOptions, Tracked};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// Counts what a thread allocates.
pub struct Counting;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

fn count() {
    let _ = COUNT.try_with(|count| count.set(count.get() + 1));
}

/// How often this thread allocated, or made longer what it had.
fn counted() -> u64 {
    COUNT.with(Cell::get)
}

// SAFETY: everything is the system's but the counter, which allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as the caller has it.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as the caller has it.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as the caller has it.
        unsafe { System.realloc(at, layout, size) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as the caller has it.
        unsafe { System.dealloc(at, layout) }
    }
}

/// An epoch that keeps nothing.
struct Nothing;

impl PageSink for Nothing {
    fn put(&mut self, _: Run, _: &[u8]) -> Result<(), StoreError> {
        Ok(())
    }

    fn absent(&mut self, _: Run) -> Result<(), StoreError> {
        Ok(())
    }
}

impl EpochWriter for Nothing {
    fn id(&self) -> EpochId {
        EpochId(1)
    }

    fn zero(&mut self, _: Run) -> Result<(), StoreError> {
        Ok(())
    }

    fn tree(&mut self, _: &str, _: &[u8]) -> Result<(), StoreError> {
        Ok(())
    }

    fn commit(self: Box<Self>, _: EpochFacts) -> Result<Acked, StoreError> {
        Err(StoreError::Full {
            place: "nowhere".into(),
            needed: 1,
        })
    }
}

/// Pages that are written before a stop, and how far apart they are.
const WRITTEN: [(u64, u64); 5] = [(0, 1), (1000, 1), (100_000, 1), (1000, 2), (50_000, 2)];
/// Stops after each of these: what is kept from stop to stop has its size after the first.
const STOPS: usize = 3;
const MEMORY: &str = "400";

/// A program that sleeps, and where its memory is.
fn sleeper() -> (Program, Tracked, u64) {
    let program = Program::start("crowd", &["--memory", MEMORY]);
    let options = TrackOptions {
        strategy: Strategy::Incremental,
        // All is done by this thread.
        threads: 1,
        ..TrackOptions::default()
    };
    let tracked = Tracked::attach(program.pid, options).unwrap_or_else(|e| panic!("{e}"));
    let mappings = outlive_linux::maps::read(program.pid).expect("its mappings");
    let largest = mappings.iter().filter(|m| !m.shared && m.inode == 0);
    let largest = largest.max_by_key(|m| m.end - m.start).expect("its memory");
    assert!(largest.end - largest.start >= 400 << 20, "{largest:?}");
    (program, tracked, largest.start)
}

/// Writes to its memory, and stops it as a power event does: nothing is copied ahead. `mark` is called
/// before and after each stop, and after the epoch is written.
fn events(mark: &mut dyn FnMut(usize)) {
    let (program, mut tracked, start) = sleeper();
    let path = format!("/proc/{}/mem", program.pid);
    let memory = OpenOptions::new().write(true).open(path);
    let memory = memory.expect("its memory");
    for (at, (pages, apart)) in WRITTEN.into_iter().enumerate() {
        for stop in 0..STOPS {
            for page in 0..pages {
                // In the midst of a page, of which the program looks at the first word.
                let place = start + page * apart * PAGE_SIZE as u64 + 2048;
                memory.write_at(&[stop as u8 + 1], place).expect("a write");
            }
            mark(at);
            let stopped = tracked.stop(&mut Nothing, None);
            let (stopped, captured) = stopped.unwrap_or_else(|e| panic!("{e}"));
            mark(at);
            captured.write(&mut Nothing).expect("nobody refuses it");
            mark(at);
            stopped.resume().expect("it runs on");
            // The stack, and what the kernel writes of a thread, are no more than this.
            let taken = captured.residue_pages();
            assert!((pages..pages + 64).contains(&taken) || stop == 0, "{taken}");
        }
    }
    drop(tracked);
    program.must_report();
}

/// Hears when all threads stand, and notes what was allocated by then.
struct Listening;

thread_local! {
    static FROZEN: Cell<u64> = const { Cell::new(0) };
}

/// Whether something is this word, without making room for it.
struct Word(&'static str, bool);

impl std::fmt::Write for Word {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        let rest = self.0.strip_prefix(text);
        (self.0, self.1) = (rest.unwrap_or_default(), self.1 && rest.is_some());
        Ok(())
    }
}

impl Visit for Word {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() == "message" {
            let _ = std::fmt::write(self, format_args!("{value:?}"));
        }
    }
}

impl Subscriber for Listening {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("outlive_process::track")
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut word = Word("frozen", true);
        event.record(&mut word);
        if word.1 && word.0.is_empty() {
            FROZEN.set(counted());
        }
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// The least of what was counted of each.
fn least<T: Ord + Clone>(all: &BTreeMap<usize, Vec<T>>) -> Vec<T> {
    let least = |all: &Vec<T>| all.iter().min().expect("there were stops").clone();
    all.values().map(least).collect()
}

#[test]
fn a_stop_allocates_no_more_where_much_was_written() {
    let _alone = alone();
    if !may_run("a_stop_allocates_no_more_where_much_was_written") {
        return;
    }
    adopt_orphans();
    let (mut stops, mut writes) = (BTreeMap::new(), BTreeMap::new());
    let (mut part, mut before) = (0, 0);
    let mut note = |at| {
        let now = counted();
        match part % 3 {
            1 => stops
                .entry(at)
                .or_insert_with(Vec::new)
                .push(now - FROZEN.get()),
            2 => writes.entry(at).or_insert_with(Vec::new).push(now - before),
            _ => {}
        }
        part += 1;
        before = counted();
    };
    tracing::subscriber::with_default(Listening, || events(&mut note));
    let (stops, writes) = (least(&stops), least(&writes));
    println!("pages and how far apart: {WRITTEN:?}");
    println!("allocations of a stop: {stops:?}; of writing its epoch: {writes:?}");
    for ((pages, _), count) in WRITTEN.into_iter().zip(&stops) {
        // Lists grow by doubling.
        assert!(*count <= stops[0] + 64, "{pages} pages: {stops:?}");
    }
    for count in &writes {
        assert_eq!(*count, writes[0], "{writes:?}");
    }
}

/// A call that does nothing, by which a tracer knows where a stop begins and ends.
const MARK: libc::c_long = 0x0dd_ba11;

/// For [`calls_do_not_grow_with_the_pages`].
#[test]
#[ignore = "a child that a test starts and traces"]
fn child_that_is_counted() {
    // SAFETY: asks for the group of a process that is none.
    events(&mut |_| assert_eq!(unsafe { libc::syscall(libc::SYS_getpgid, MARK) }, -1));
}

fn ptrace(request: libc::c_uint, tid: i32, address: usize, data: usize) -> i64 {
    // SAFETY: see the module heading.
    unsafe { libc::ptrace(request, tid, address as *mut u8, data as *mut u8) }
}

/// The call that a thread is about to make, with its first argument.
fn call_of(tid: i32) -> Option<(i64, u64)> {
    let mut told = [0u64; 12];
    let size = std::mem::size_of_val(&told);
    let read = ptrace(
        libc::PTRACE_GET_SYSCALL_INFO,
        tid,
        size,
        told.as_mut_ptr() as usize,
    );
    let entry = read > 0 && told[0] as u8 == libc::PTRACE_SYSCALL_INFO_ENTRY;
    entry.then_some((told[3] as i64, told[4]))
}

/// Runs that child, and counts the calls between its marks.
fn counted_calls() -> Vec<BTreeMap<i64, u64>> {
    let mut command = Command::new(std::env::current_exe().expect("this test has a path"));
    command.args(["--ignored", "--exact", "path::child_that_is_counted"]);
    command.stdout(Stdio::null());
    // SAFETY: one call with numbers.
    unsafe {
        command.pre_exec(|| {
            libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
            Ok(())
        });
    }
    let child = command.spawn().expect("it starts").id().cast_signed();
    let mut parts: Vec<BTreeMap<i64, u64>> = Vec::new();
    let (mut began, mut marking, mut runs) = (false, 0, true);
    loop {
        let mut status = 0;
        // SAFETY: status is live.
        let tid = unsafe { libc::waitpid(-1, &raw mut status, libc::__WALL | libc::__WNOTHREAD) };
        assert!(tid > 0, "nobody is left");
        if !libc::WIFSTOPPED(status) {
            if tid == child {
                assert_eq!(status, 0, "the child failed");
                return parts;
            }
            continue;
        }
        let mut signal = libc::WSTOPSIG(status);
        if !began {
            let options =
                libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_EXITKILL;
            assert_eq!(ptrace(libc::PTRACE_SETOPTIONS, tid, 0, options as usize), 0);
            (began, signal) = (true, 0);
        } else if signal == libc::SIGTRAP | 0x80 {
            signal = 0;
            match call_of(tid) {
                Some((libc::SYS_getpgid, first)) if first == MARK as u64 => {
                    parts.push(BTreeMap::new());
                    (marking, runs) = (tid, true);
                }
                Some((call, first)) if tid == marking => {
                    let part = parts.last_mut().expect("it was marked");
                    let asks =
                        |what: libc::c_uint| call == libc::SYS_ptrace && first == u64::from(what);
                    // Until now the program ran, or ran again.
                    if asks(libc::PTRACE_SEIZE) && std::mem::take(&mut runs) {
                        part.clear();
                    }
                    runs |= asks(libc::PTRACE_DETACH);
                    *part.entry(call).or_default() += 1;
                }
                _ => {}
            }
        } else if status >> 16 != 0 || signal == libc::SIGSTOP {
            // A thread that it has made.
            signal = 0;
        }
        ptrace(libc::PTRACE_SYSCALL, tid, 0, signal as usize);
    }
}

/// Calls by which it is waited for threads, again and again: how many depends on how long it takes.
const WAITS: [i64; 7] = [
    libc::SYS_wait4,
    libc::SYS_waitid,
    libc::SYS_sched_yield,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_poll,
    libc::SYS_futex,
];
/// Of the allocator, which may give memory back and ask for it again.
const MEMORY_OF_OURS: [i64; 4] = [
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_brk,
    libc::SYS_mremap,
];

#[test]
fn calls_do_not_grow_with_the_pages() {
    let _alone = alone();
    if !may_run("calls_do_not_grow_with_the_pages") {
        return;
    }
    adopt_orphans();
    let parts = counted_calls();
    assert_eq!(parts.len(), WRITTEN.len() * STOPS * 3);
    let mut stops = BTreeMap::new();
    for (nth, part) in parts.iter().enumerate().filter(|(nth, _)| nth % 3 == 0) {
        let counts = |call: &i64| !WAITS.contains(call) && !MEMORY_OF_OURS.contains(call);
        let sum: u64 = part.iter().filter(|(c, _)| counts(c)).map(|(_, n)| n).sum();
        let all = stops.entry(nth / 3 / STOPS).or_insert_with(Vec::new);
        all.push((sum, part.clone()));
    }
    let stops = least(&stops);
    for ((pages, apart), (sum, calls)) in WRITTEN.into_iter().zip(&stops) {
        println!("{pages} pages, {apart} apart: {sum} calls: {calls:?}");
        // As many ranges as the kernel takes at once, and as many bytes as are read at once.
        let pieces = pages / 500 + 16;
        assert!(*sum <= stops[0].0 + pieces, "{pages} pages");
    }
}
