//! What a power event allocates, from the moment at which the program stands until everything is durable: as
//! much at each one, counted in all of this process.
//!
//! It needs root, as every capture by number does here.
//!
//! # Safety
//! The allocator hands on to the system's; `close_range` is called with numbers.
#![allow(unsafe_code)]
#![allow(
    clippy::expect_used,
    reason = "a test that finds what it relies on missing has failed"
)]

use outlive_epoch_store::Store;
use outlive_keeper::epoch::{self, Fate, Hooks, Manner, Taken};
use outlive_process::{Strategy, TrackOptions, Tracked};
use std::alloc::{GlobalAlloc, Layout, System};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

struct Counting;

static COUNT: AtomicU64 = AtomicU64::new(0);
/// The count when all threads stood.
static FROZEN: AtomicU64 = AtomicU64::new(0);

#[global_allocator]
static COUNTING: Counting = Counting;

// SAFETY: everything is the system's but the counter, which allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as the caller has it.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as the caller has it.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as the caller has it.
        unsafe { System.realloc(at, layout, size) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as the caller has it.
        unsafe { System.dealloc(at, layout) }
    }
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

/// Hears when all threads stand.
struct Listening;

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
            FROZEN.store(COUNT.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// An event, after which the mains come back at once.
struct Outage(Vec<u64>);

impl Hooks for Outage {
    fn urgent(&mut self) -> bool {
        true
    }

    fn decide(&mut self, _: &Taken) -> Fate {
        let now = COUNT.load(Ordering::Relaxed);
        self.0.push(now - FROZEN.load(Ordering::Relaxed));
        Fate::RunsOn
    }
}

struct Sleeper(Child);

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn an_event_allocates_as_much_as_the_one_before() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED 1 test: an_event_allocates_as_much_as_the_one_before: needs root");
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let mut command = Command::new("sleep");
    command
        .arg("1000")
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    // SAFETY: one call with numbers. What this process got from whoever runs the tests is none of the
    // program's.
    unsafe {
        command.pre_exec(|| {
            let cloexec = libc::CLOSE_RANGE_CLOEXEC.cast_signed();
            libc::close_range(3, libc::c_uint::MAX, cloexec);
            Ok(())
        });
    }
    let program = Sleeper(command.stderr(Stdio::null()).spawn().expect("it starts"));
    let asleep = || {
        let call = std::fs::read_to_string(format!("/proc/{}/syscall", program.0.id()));
        call.is_ok_and(|c| c.starts_with(&format!("{} ", libc::SYS_clock_nanosleep)))
    };
    while !asleep() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    let options = TrackOptions {
        strategy: Strategy::Incremental,
        ..TrackOptions::default()
    };
    let mut tracked = Tracked::attach(program.0.id(), options).expect("it can be kept");
    let mut store = Store::create(dir.path().join("epochs")).expect("a store");
    let mut outage = Outage(Vec::with_capacity(16));
    for _ in 0..12 {
        // What the keeper does between epochs.
        while store
            .write_ahead(1 << 20)
            .expect("space written ahead")
            .more
        {}
        let writer = store.begin_event().expect("an epoch");
        let taken = tracing::subscriber::with_default(Listening, || {
            epoch::take(&mut tracked, writer, Manner::Event, &mut outage, &mut false)
        });
        let (_, fate) = taken.expect("it is durable");
        assert_eq!(fate, Fate::RunsOn);
    }
    tracked.detach().expect("detaching");
    println!("allocations from frozen to durable: {:?}", outage.0);
    let (first, settled) = outage.0.split_at(4);
    let most = settled.iter().max().expect("there were events");
    let least = settled.iter().min().expect("there were events");
    assert!(
        most - least <= 32 && most <= &(first[0] + 32),
        "{:?}",
        outage.0
    );
}
