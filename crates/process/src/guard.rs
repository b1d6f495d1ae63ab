//! A guard over the private memory of one process: synchronous write protection. Whoever writes to
//! a protected page waits until the guard's thread has lifted the protection.
//!
//! # What it is for
//! - *Copying behind*: pages that were protected at a stop are copied while the program runs again.
//!   A write to one that is not copied yet waits until it is.
//! - *A hard bound*: the guard knows at every instant how many pages may have been written since they
//!   were last protected ([`Guard::dirty`]). Beyond a limit ([`Guard::set_limit`]) writers are held,
//!   and whoever takes epochs is told ([`Guard::pressure`]), until the next stop.
//!
//! # Rules
//! - Which pages were written is asked of the page map, never of what the guard noted: memory that
//!   was given back, moved or mapped anew comes without a fault.
//! - A page that is copied behind must have been protected from the stop until after it was read:
//!   this is asked of the page map after the read, and whether it is still a page of the program's
//!   own and not of the file below. Where it was not (the program gave memory back),
//!   the epoch fails, and what it took is handed over again.
//! - Pages are read by the process ID, and protection is asked of the address space that the guard
//!   began with. A process that began another program has left that one, which may live on through
//!   others: so it is asked after each read whether our foothold is still there.
//! - A process that ends before it is copied behind takes the epoch with it. So nothing is left behind
//!   of one that came lately, nor for a while of any but the root after one took an epoch.
//! - The guard's thread waits for nobody but for room for copies, which whoever writes the epoch
//!   makes without the program. From the beginning of a stop until its end nobody is held, and none
//!   while it is waited for processes that are about to begin a program of their own.
//! - If this process dies, the kernel lifts the protection of everything.
//!
//! # A strict guard
//! One whose tracker guards holes, too ([`WriteTracker::guards_holes`]), so that who touches memory for
//! the first time waits as well, wherever that is: no page tables are made for what is not touched. A
//! hole is filled with the page of zeros, and the next ones where the program goes on in a row; all of
//! them count as dirty. What nobody guards yet is looked for all the time ([`watch`]).
//!
//! - Nothing of a running program is read as another process reads it (`process_vm_readv(2)`): that
//!   would wait for the guard where there is a hole. `/proc/PID/mem` says that there is none.
//!
//! # What it does not count
//! Without strictness: memory mapped since the last stop, or used for the first time in mappings that
//! are mostly holes (holes are not protected there, which would cost page tables); and private mappings
//! of files, which the kernel guards asynchronously only: these are taken at every stop. With and
//! without: a call of the kernel that writes much (`read(2)`) may go beyond the limit during a stop.

mod watch;

pub use watch::Exposure;

use crate::ProcessError;
use crate::interval::IntervalSet;
use crate::pages::Span;
use crate::strategy::Granularity;
use outlive_epoch::{PAGE_SIZE, PageSink, Run, SpaceId};
use outlive_linux::Errno;
use outlive_linux::memory;
use outlive_linux::pagemap::{self, Pagemap, Query};
use outlive_linux::remote::Arena;
use outlive_linux::thread::Urgent;
use outlive_linux::userfault::{Fault, WriteTracker};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use watch::Watch;

const PAGE: u64 = PAGE_SIZE as u64;
/// Pages that are copied behind in one go: a writer waits for no longer than that.
const CHUNK: u64 = 64;
/// Pages that the guard itself has copied and that nobody has taken yet, at most.
const COPIES: usize = 16 << 10;
/// Holes that are filled at once where the program goes on in a row, pages.
const MOST_FILLED: u64 = 64;
/// How often pages are read that were swapped out again meanwhile.
const READS: u32 = 3;
/// Pages of the program's own that are in memory and protected. What the page map calls swapped may
/// be a page that was given back, above a file: right after it was read it is in memory.
const PROTECTED: Query = Query {
    all_of: pagemap::PRESENT | pagemap::FILE | pagemap::WRITTEN,
    inverted: pagemap::FILE | pagemap::WRITTEN,
    any_of: 0,
    report: 0,
    protect: false,
    registered_only: false,
};

/// A guard, with its thread. Dropping it ends the thread; protection ends with the descriptor.
#[derive(Debug)]
pub struct Guard {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
pub(crate) struct Shared {
    pid: u32,
    /// Where the foothold lies by which its address space is known.
    foothold: u64,
    tracker: Arc<WriteTracker>,
    /// Pages whose protection is lifted together.
    unit: u64,
    /// Wakes the thread.
    wake: OwnedFd,
    /// Readable while writers are held.
    pressure: OwnedFd,
    state: Mutex<State>,
    /// There is room for copies.
    room: Condvar,
}

#[derive(Debug)]
pub(crate) struct State {
    pagemap: Pagemap,
    ending: bool,
    /// Pages of the last stop that are not copied yet.
    behind: IntervalSet,
    /// Copies of such pages, made because somebody writes to them.
    copies: Vec<(u64, [u8; PAGE_SIZE])>,
    /// Address of a page whose contents at the stop are lost.
    lost: Option<u64>,
    /// Pages whose protection was lifted since.
    dirty: IntervalSet,
    dirty_count: u64,
    limit: Option<u64>,
    /// Nobody is held.
    open: bool,
    held: Vec<Fault>,
    /// Where the last hole that was filled ends, and how many pages were filled at once.
    filled: (u64, u64),
    /// Of a strict guard: what nobody guards.
    watch: Option<Watch>,
}

impl Guard {
    /// A guard over a process that has a foothold at an address, by its tracker, which must be
    /// synchronous.
    pub fn new(
        (pid, foothold): (u32, u64),
        tracker: Arc<WriteTracker>,
        granularity: Granularity,
    ) -> Result<Self, Errno> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let state = State {
            pagemap: Pagemap::open(pid)?,
            ending: false,
            behind: IntervalSet::default(),
            copies: Vec::new(),
            lost: None,
            dirty: IntervalSet::default(),
            dirty_count: 0,
            limit: None,
            open: true,
            held: Vec::new(),
            filled: (0, 0),
            watch: tracker
                .guards_holes()
                .then(|| Watch::new(pid))
                .transpose()?,
        };
        let shared = Arc::new(Shared {
            pid,
            foothold,
            tracker,
            unit: u64::from(granularity.pages()),
            wake: eventfd(0, flags)?,
            pressure: eventfd(0, flags)?,
            state: Mutex::new(state),
            room: Condvar::new(),
        });
        let served = shared.clone();
        let thread = std::thread::Builder::new().name("outlive-guard".into());
        let thread = thread.spawn(move || served.serve()).map_err(|e| {
            e.raw_os_error()
                .map_or(Errno::AGAIN, Errno::from_raw_os_error)
        })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    pub(crate) fn shared(&self) -> Arc<Shared> {
        self.shared.clone()
    }

    /// Pages that may have been written since they were last protected, as of now.
    #[must_use]
    pub fn dirty(&self) -> u64 {
        self.shared.lock().dirty_count
    }

    /// Holds writers beyond so many dirty pages; `None`: never. A strict guard looks from now on for
    /// what nobody guards; `relatives` are processes that somebody does.
    pub fn set_limit(&self, pages: Option<u64>, relatives: &BTreeSet<u32>) {
        let mut state = self.shared.lock();
        let began = pages.is_some() && state.limit.is_none();
        state.limit = pages;
        state.watch_begins(relatives);
        self.shared.release(&mut state);
        drop(state);
        if began {
            signal(&self.shared.wake);
        }
    }

    /// Of a strict guard: what may be written at any time and nobody can guard, as of now.
    #[must_use]
    pub fn exposure(&self) -> Exposure {
        self.shared.lock().exposure()
    }

    /// Finds out what [`Guard::exposure`] says.
    pub fn expose(&self) {
        let mut state = self.shared.lock();
        if state.watch.is_some() {
            self.shared.look_closely(&mut state);
        }
    }

    /// Of a strict guard: the most pages that may have been dirty at once since this was asked, with
    /// what became exposed since the limit was set.
    #[must_use]
    pub fn most_dirty(&self) -> u64 {
        self.shared.lock().take_peak()
    }

    /// Readable while writers are held: an epoch is wanted.
    #[must_use]
    pub fn pressure(&self) -> BorrowedFd<'_> {
        self.shared.pressure.as_fd()
    }

    /// Whether nobody is to be held, which must be so during a stop: a thread that is held within the
    /// kernel cannot be stopped.
    pub fn open(&self, open: bool) {
        let mut state = self.shared.lock();
        state.open = open;
        self.shared.release(&mut state);
    }

    /// What was to be copied behind is not wanted any more. Says whether some of it was lost.
    pub fn abandon(&self) -> bool {
        self.shared.abandon()
    }

    /// What the last stop left to be copied.
    #[must_use]
    pub fn behind(&self, space: SpaceId, has_relatives: bool) -> Behind {
        Behind {
            shared: self.shared.clone(),
            space,
            has_relatives,
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        {
            let mut state = self.shared.lock();
            (state.ending, state.open) = (true, true);
            if let Some((first, _)) = state.behind.first(1) {
                state.lost = Some(first * PAGE);
            }
            state.behind.clear();
            self.shared.release(&mut state);
        }
        self.shared.room.notify_all();
        signal(&self.shared.wake);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Adds one to an eventfd.
fn signal(fd: &OwnedFd) {
    // It cannot be full.
    let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
}

impl Shared {
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn serve(&self) {
        // Whoever is held waits for this thread; and what is not found in time is not bounded.
        let _urgent = self.tracker.guards_holes().then(Urgent::begin);
        loop {
            let mut set = [
                PollFd::new(&*self.tracker, PollFlags::IN),
                PollFd::new(&self.wake, PollFlags::IN),
            ];
            let wait = self.next_look().map(|until| Timespec {
                tv_sec: i64::try_from(until.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(until.subsec_nanos()),
            });
            let _ = poll(&mut set, wait.as_ref());
            let _ = rustix::io::read(&self.wake, &mut [0u8; 8]);
            {
                let mut state = self.lock();
                if state.ending {
                    return;
                }
                if state.limit.is_some() {
                    self.look(&mut state);
                }
            }
            // Gone together with the process: only the end is to be waited for.
            let Ok(faults) = self.tracker.faults() else {
                std::thread::sleep(std::time::Duration::from_millis(1));
                continue;
            };
            let mut state = self.lock();
            for fault in faults {
                state = self.room_for_copies(state);
                self.admit(&mut state, fault);
            }
        }
    }

    fn room_for_copies<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let full = |s: &mut State| s.copies.len() >= COPIES && !s.ending;
        let waited = self.room.wait_while(state, full);
        waited.unwrap_or_else(|e| e.into_inner())
    }

    /// Lets a writer through, or holds it.
    fn admit(&self, state: &mut State, fault: Fault) {
        let unit = if fault.missing { 1 } else { self.unit };
        let room = state.room();
        if state.open || room >= unit {
            match fault.missing {
                true => self.fill(state, fault.at, room),
                false => self.lift(state, fault.at),
            }
        } else {
            state.held.push(fault);
            signal(&self.pressure);
        }
    }

    /// Fills a hole, and those behind it where the program goes on in a row.
    fn fill(&self, state: &mut State, at: u64, room: u64) {
        let page = at / PAGE;
        let in_a_row = page == state.filled.0;
        let pages = if in_a_row { state.filled.1 * 2 } else { 1 };
        let pages = pages.clamp(1, MOST_FILLED.min(room.max(1)));
        let fill = |pages: u64| self.tracker.fill((page * PAGE, (page + pages) * PAGE));
        // It may reach beyond the mapping.
        let (done, pages) = match fill(pages) {
            Err(Errno::NOENT) if pages > 1 => (fill(1), 1),
            done => (done, pages),
        };
        match done {
            // Another thread was first; or nothing is there, marked as protected.
            Ok(0) => self.lift(state, at),
            Ok(bytes) => {
                let end = page + bytes / PAGE;
                state.note_admitted((page, end));
                state.filled = (end, pages);
            }
            Err(_) => {
                let _ = self.tracker.wake((page * PAGE, (page + 1) * PAGE));
            }
        }
    }

    /// Lets those through who were held and need not be any more.
    fn release(&self, state: &mut State) {
        let _ = rustix::io::read(&self.pressure, &mut [0u8; 8]);
        for fault in std::mem::take(&mut state.held) {
            self.admit(state, fault);
        }
    }

    /// Lifts the protection of a page and of those in its unit, after they are copied.
    fn lift(&self, state: &mut State, at: u64) {
        let page = at / PAGE;
        let first = page / self.unit * self.unit;
        let unit = (first, first + self.unit);
        let wanted: Vec<(u64, u64)> = state.behind.within(unit.0, unit.1).collect();
        for (start, end) in wanted {
            let mut bytes = vec![0; ((end - start) * PAGE) as usize];
            if self.copy(state, (start, end), &mut bytes, false) {
                let (pages, _) = bytes.as_chunks::<PAGE_SIZE>();
                state.copies.extend((start..).zip(pages.iter().copied()));
            }
        }
        state.note_admitted(unit);
        let lift = |(s, e): (u64, u64)| self.tracker.protect((s * PAGE, e * PAGE), false);
        // A unit may reach beyond what is registered; and a mapping may be gone, whose writer then
        // only has to be woken.
        if lift(unit).is_err() && lift((page, page + 1)).is_err() {
            let _ = self.tracker.wake((page * PAGE, (page + 1) * PAGE));
        }
    }

    /// Reads pages as they were at the stop, which then are no longer to be copied. Where that is
    /// not possible, they are lost.
    fn copy(&self, state: &mut State, span: Span, out: &mut [u8], slowly: bool) -> bool {
        let (start, end) = (span.0 * PAGE, span.1 * PAGE);
        state.behind.remove(span.0, span.1);
        let mut good = false;
        for _ in 0..READS {
            good = self.read(start, out, slowly || self.tracker.guards_holes())
                && Arena::is_stamped(self.pid, self.foothold)
                && state.are_protected((start, end));
            if good {
                break;
            }
        }
        if !good {
            state.lost = Some(start);
        }
        good
    }

    fn read(&self, start: u64, out: &mut [u8], slowly: bool) -> bool {
        if slowly {
            let mem = File::open(format!("/proc/{}/mem", self.pid));
            mem.is_ok_and(|mem| mem.read_exact_at(out, start).is_ok())
        } else {
            memory::read_exact(self.pid, start, out).is_ok()
        }
    }

    fn abandon(&self) -> bool {
        let mut state = self.lock();
        state.behind.clear();
        state.copies = Vec::new();
        self.room.notify_all();
        state.lost.take().is_some()
    }
}

impl State {
    /// Whether these are all there, of the program's own, and protected.
    fn are_protected(&mut self, (start, end): Span) -> bool {
        let mut protected = 0;
        let asked = self
            .pagemap
            .scan(start, end, PROTECTED, |r| protected += r.end - r.start);
        asked.is_ok() && protected == end - start
    }

    /// How many more pages may become dirty.
    fn room(&self) -> u64 {
        let grown = self.watch.as_ref().map_or(0, Watch::grown);
        let dirty = self.dirty_count + grown;
        self.limit
            .map_or(u64::MAX, |most| most.saturating_sub(dirty))
    }

    /// A writer goes on. Its fault will be counted, and one for each other page that it may write now:
    /// of no more of them than count as dirty because of it.
    fn note_admitted(&mut self, span: (u64, u64)) {
        let before = self.dirty_count;
        self.note_dirty(span);
        let new = self.dirty_count - before;
        if let Some(watch) = &mut self.watch {
            watch.expect(new.max(1));
        }
    }

    fn note_dirty(&mut self, (start, end): (u64, u64)) {
        let known: u64 = self.dirty.within(start, end).map(|(s, e)| e - s).sum();
        self.dirty.insert(start, end);
        self.dirty_count += end - start - known;
    }

    /// These were protected again.
    pub(crate) fn note_clean(&mut self, spans: &[Span]) {
        for &(start, end) in spans {
            let removed = self.dirty.remove(start / PAGE, end / PAGE);
            self.dirty_count -= removed.iter().map(|(s, e)| e - s).sum::<u64>();
        }
    }

    /// All pages are protected: nothing is dirty. So many pages above files, which cannot be written,
    /// are taken at every stop all the same.
    pub(crate) fn all_clean(&mut self, fixed: u64) {
        self.watch_ends();
        if let Some(watch) = &mut self.watch {
            watch.fixed = fixed;
        }
        self.dirty.clear();
        self.dirty_count = 0;
    }

    /// These, which are protected, are to be copied when the program runs again.
    pub(crate) fn copy_behind(&mut self, spans: &[Span]) {
        for &(start, end) in spans {
            self.behind.insert(start / PAGE, end / PAGE);
        }
    }
}

/// Pages of a stop that are copied while the program runs again.
#[derive(Debug)]
pub struct Behind {
    shared: Arc<Shared>,
    space: SpaceId,
    has_relatives: bool,
}

impl Behind {
    /// Hands all of them to a sink.
    pub fn write(&self, sink: &mut dyn PageSink) -> Result<(), ProcessError> {
        let mut buffer = vec![0; (CHUNK * PAGE) as usize];
        loop {
            let mut state = self.shared.lock();
            let copies = std::mem::take(&mut state.copies);
            self.shared.room.notify_all();
            let next = state.behind.first(CHUNK);
            if let Some((start, end)) = next {
                let out = &mut buffer[..((end - start) * PAGE) as usize];
                self.shared
                    .copy(&mut state, (start, end), out, self.has_relatives);
            }
            let lost = state.lost;
            drop(state);
            if let Some(at) = lost {
                return Err(self.lost(at));
            }
            for (page, bytes) in &copies {
                sink.put(self.run((*page, page + 1))?, bytes)?;
            }
            match next {
                Some(span) => {
                    let bytes = ((span.1 - span.0) * PAGE) as usize;
                    sink.put(self.run(span)?, &buffer[..bytes])?;
                }
                None if copies.is_empty() => return Ok(()),
                None => {}
            }
        }
    }

    fn run(&self, (start, end): (u64, u64)) -> Result<Run, ProcessError> {
        Run::new(self.space, start, end - start)
            .ok_or_else(|| ProcessError::Image(format!("pages {start:x}-{end:x}")))
    }

    fn lost(&self, at: u64) -> ProcessError {
        ProcessError::GivenBack {
            pid: self.shared.pid,
            address: at,
        }
    }
}

impl Drop for Behind {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.behind.clear();
        state.copies = Vec::new();
        self.shared.room.notify_all();
    }
}
