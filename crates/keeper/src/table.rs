//! The table of subjects: what keepers counted, in a resilient heap that outlives them.
//!
//! All that brings a program back is in its epochs. The table has what they do not tell and what would
//! be lost with a keeper: how often a budget was not kept, what became of power events, how many epochs
//! failed, why the last of them did, how much was written. Each subject has its row in a heap of its own, the
//! file `table.heap` of its directory: a heap has one writer, and each subject has one keeper.
//!
//! # Rules
//! - The table never hinders keeping. A thread of its own writes it, from the newest figures it was told;
//!   the keeper does not wait for it before its end. Whatever becomes of the file, no command fails.
//! - What is shown is durable: it is shown after the transaction that holds it. So totals never go back,
//!   whoever is killed and whenever.
//! - What is rare (failures, violations, also between two epochs and after the last, events) is written [`SOON`] after the last time at the earliest; all
//!   else [`LATER`] after it.
//! - The medium is the epochs' first: a transaction is begun when an epoch has just ended, or, where none ends for
//!   [`GRACE`] after it was due, between two of them. Never during one, which a power event may wait for.
//! - Nothing else depends on it. A file that is gone is begun anew, and so is one that cannot be read,
//!   which is put aside as `table.heap.aside`; both are logged. Where the system refuses (a full disk, a medium
//!   that cannot be written), the next figures are tried again.
//! - What is in the file is hostile: its length is bounded, the heap checks its values, and sums saturate.

use crate::budget::keeping::{BudgetStatus, Events};
use crate::keep::now_ns;
use crate::subject::{Lock, Subject};
use resilient_heap::{Error, Heap, Options, PString, Persist, WrittenFile};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Name of the file.
const FILE: &str = "table.heap";
/// Name of a file that could not be read.
const ASIDE: &str = "table.heap.aside";
/// Longest file that is read, bytes.
const LARGEST: usize = 1 << 20;
/// Longest text that is kept, bytes.
const LONGEST_TEXT: usize = 512;
/// From one transaction to the next where something rare happened, at least.
pub const SOON: Duration = Duration::from_secs(1);
/// From one transaction to the next otherwise.
pub const LATER: Duration = Duration::from_secs(10);
/// How long the end of an epoch is waited for when a transaction is due.
pub const GRACE: Duration = Duration::from_secs(1);
/// Memory for the stack of the thread that writes, bytes; a keeper with a hold-up budget locks its memory.
const STACK: usize = 512 << 10;
/// How long somebody who only reads the file is waited for.
const PATIENCE: Duration = Duration::from_millis(500);

/// What is counted, by one keeper or by all of a subject.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, Persist)]
#[repr(C)]
pub struct Counts {
    /// Epochs that were committed.
    pub epochs: u64,
    /// Bytes that were written for them.
    pub bytes_written: u64,
    /// Epochs that failed.
    pub failures: u64,
    /// Epochs that were given up because the program would have been stopped for too long.
    pub abandoned: u64,
    /// Intervals in which the budget may not have been kept at some instant.
    pub violations: u64,
    /// How long it may not have been kept, nanoseconds.
    pub violated_ns: u64,
    /// How long the program was held during epochs, nanoseconds.
    pub held_ns: u64,
    /// Power events that the program outlived.
    pub events: u64,
    /// Those of them that took longer than the budget, or failed.
    pub events_late: u64,
    /// The longest of them, nanoseconds.
    pub event_longest_ns: u64,
}

impl Counts {
    /// With what the budget and power events say.
    #[must_use]
    pub fn with(self, budget: Option<&BudgetStatus>, events: Events) -> Self {
        Self {
            violations: budget.map_or(0, |b| b.violations),
            violated_ns: budget.map_or(0, |b| b.violated_ns),
            held_ns: budget.map_or(0, |b| b.held_ns),
            events: events.count,
            events_late: events.late,
            event_longest_ns: events.longest_ns,
            ..self
        }
    }

    /// These and what came after them.
    #[must_use]
    pub fn and(self, later: Self) -> Self {
        Self {
            epochs: self.epochs.saturating_add(later.epochs),
            bytes_written: self.bytes_written.saturating_add(later.bytes_written),
            failures: self.failures.saturating_add(later.failures),
            abandoned: self.abandoned.saturating_add(later.abandoned),
            violations: self.violations.saturating_add(later.violations),
            violated_ns: self.violated_ns.saturating_add(later.violated_ns),
            held_ns: self.held_ns.saturating_add(later.held_ns),
            events: self.events.saturating_add(later.events),
            events_late: self.events_late.saturating_add(later.events_late),
            event_longest_ns: self.event_longest_ns.max(later.event_longest_ns),
        }
    }

    /// What changes rarely.
    fn rare(&self) -> [u64; 4] {
        [self.failures, self.abandoned, self.violations, self.events]
    }
}

/// What all keepers of a subject counted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// When the table was begun, nanoseconds since the Unix epoch.
    pub since_ns: u64,
    /// When it was written, nanoseconds since the Unix epoch.
    pub time_ns: u64,
    /// How many keepers there were.
    pub keepers: u64,
    /// What they counted, together.
    #[serde(flatten)]
    pub counts: Counts,
    /// Why the last epoch failed that did.
    pub last_failure: Option<String>,
}

/// A subject in the table.
#[derive(Persist)]
#[repr(C)]
struct Row<'h> {
    since_ns: u64,
    time_ns: u64,
    keepers: u64,
    counts: Counts,
    last_failure: PString<'h>,
}

type RowHeap = Heap<Row<'static>>;

/// What the table says of the subject in `dir`, which no keeper has; nothing where there is no table, or
/// none that can be read.
#[must_use]
pub fn read(dir: &Path) -> Option<Totals> {
    let path = dir.join(FILE);
    let copy = WrittenFile::copy(&path, LARGEST);
    let heap = copy.and_then(|copy| options().open::<Row<'static>>(copy, |_| Err(Error::NotAHeap)));
    match heap.and_then(|heap| totals(&heap)) {
        Ok(totals) => Some(totals),
        Err(error) => {
            tracing::debug!("{}: {error}", path.display());
            None
        }
    }
}

/// Lets the next keeper of a subject begin to count anew. For the holder of the lock.
pub fn forget(subject: &Subject, _lock: &Lock) {
    let path = subject.dir().join(FILE);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            tracing::warn!("{} cannot be removed: {error}", path.display());
        }
        _ => {}
    }
}

fn options() -> Options {
    Options::default().zone_pages(16).log_pages(4)
}

fn open(path: &Path) -> Result<RowHeap, Error> {
    let begun = Instant::now();
    let memory = loop {
        match WrittenFile::open(path, LARGEST) {
            Err(error) if is_locked(&error) && begun.elapsed() < PATIENCE => {
                std::thread::sleep(PATIENCE / 50);
            }
            other => break other?,
        }
    };
    let heap = options().open::<Row<'static>>(memory, |_| {
        Ok(Row {
            since_ns: now_ns(),
            time_ns: 0,
            keepers: 0,
            counts: Counts::default(),
            last_failure: PString::empty(),
        })
    })?;
    // Bytes that are no text are found here.
    totals(&heap)?;
    Ok(heap)
}

fn is_locked(error: &Error) -> bool {
    let busy = Errno::WOULDBLOCK.raw_os_error();
    matches!(error, Error::Memory { what: "lock", code } if *code == busy)
}

/// Whether another file would serve where this one does not.
fn is_of_the_file(error: &Error) -> bool {
    match error {
        Error::Memory { what, .. } => *what == "read",
        _ => true,
    }
}

/// Opens the heap; one that cannot be read is put aside.
fn open_or_anew(path: &Path) -> Result<RowHeap, Error> {
    match open(path) {
        Err(error) if is_of_the_file(&error) => {
            tracing::warn!(
                "{} cannot be read, is put aside, and counting begins anew: {error}",
                path.display()
            );
            fs::rename(path, path.with_file_name(ASIDE)).map_err(|error| Error::Memory {
                what: "rename",
                code: error.raw_os_error().unwrap_or(0),
            })?;
            open(path)
        }
        other => other,
    }
}

fn totals(heap: &RowHeap) -> Result<Totals, Error> {
    heap.read(|row, at| {
        let text = row.last_failure.as_str(at)?;
        Ok(Totals {
            since_ns: row.since_ns,
            time_ns: row.time_ns,
            keepers: row.keepers,
            counts: row.counts,
            last_failure: Some(text).filter(|t| !t.is_empty()).map(str::to_owned),
        })
    })
}

fn put(heap: &mut RowHeap, totals: &Totals) -> Result<(), Error> {
    let text = totals.last_failure.as_deref().unwrap_or_default();
    let text = beginning(text);
    heap.write(|row, tx| {
        row.since_ns = totals.since_ns;
        row.time_ns = totals.time_ns;
        row.keepers = totals.keepers;
        row.counts = totals.counts;
        if row.last_failure.as_str(tx)? != text {
            row.last_failure = PString::new(tx, text)?;
        }
        Ok(())
    })
}

/// As much of a text as is kept.
fn beginning(text: &str) -> &str {
    let ends = text.char_indices().map(|(at, c)| at + c.len_utf8());
    let end = ends.take_while(|end| *end <= LONGEST_TEXT).last();
    text.get(..end.unwrap_or(0)).unwrap_or_default()
}

/// What one keeper counted so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Told {
    counts: Counts,
    last_failure: Option<String>,
}

/// The row of a subject, for its keeper.
#[derive(Debug)]
pub struct Table {
    desk: Arc<Desk>,
    writer: Option<JoinHandle<()>>,
}

/// Where keeper and writer meet.
#[derive(Debug)]
struct Desk {
    papers: Mutex<Papers>,
    changed: Condvar,
}

#[derive(Debug)]
struct Papers {
    told: Told,
    shown: Option<Totals>,
    /// What was tried last, and when; or, before anything was, when the keeper began.
    tried: (Option<Told>, Instant),
    /// An epoch ended when something was due, and no other has begun since.
    now: bool,
    /// An epoch is being taken.
    busy: bool,
    /// The writer waits for whatever comes, not for a time.
    parked: bool,
    closed: bool,
}

impl Papers {
    /// From when on something is to be written; nothing where all was tried.
    fn due(&self) -> Option<Instant> {
        let (last, at) = &self.tried;
        match last {
            None => Some(*at),
            Some(last) if *last == self.told => None,
            Some(last) if last.counts.rare() != self.told.counts.rare() => Some(*at + SOON),
            Some(_) => Some(*at + LATER),
        }
    }
}

impl Table {
    /// Opens the row of a subject, or begins it. Where that cannot be, there are no totals.
    #[must_use]
    pub fn open(subject: &Subject, _lock: &Lock) -> Self {
        Self::open_at(subject.dir().join(FILE))
    }

    pub(crate) fn open_at(path: PathBuf) -> Self {
        let desk = Arc::new(Desk {
            papers: Mutex::new(Papers {
                told: Told::default(),
                shown: None,
                tried: (None, Instant::now()),
                now: false,
                busy: false,
                parked: false,
                closed: false,
            }),
            changed: Condvar::new(),
        });
        let theirs = Arc::clone(&desk);
        let thread = std::thread::Builder::new().name("outlive-table".into());
        let writer = thread
            .stack_size(STACK)
            .spawn(move || serve(&theirs, path))
            .inspect_err(|error| tracing::warn!("no thread for the table: {error}"))
            .ok();
        Self { desk, writer }
    }

    /// An epoch begins, which the table is not to disturb; it lasts until the keeper tells what it counted.
    pub fn epoch_begins(&self) {
        let mut papers = self.desk.papers();
        (papers.busy, papers.now) = (true, false);
    }

    /// The keeper counted so much since it began. Nothing disturbs it now.
    pub fn tell(&self, counts: Counts, last_failure: Option<&str>) {
        let mut papers = self.desk.papers();
        papers.told.counts = counts;
        if papers.told.last_failure.as_deref() != last_failure {
            papers.told.last_failure = last_failure.map(str::to_owned);
        }
        let due = papers.due();
        papers.now = due.is_some_and(|due| due <= Instant::now());
        papers.busy = false;
        if papers.now || (papers.parked && due.is_some()) {
            self.desk.changed.notify_one();
        }
    }

    /// The totals that are durable; nothing where there are none.
    #[must_use]
    pub fn totals(&self) -> Option<Totals> {
        self.desk.papers().shown.clone()
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        self.desk.papers().closed = true;
        self.desk.changed.notify_one();
        if let Some(writer) = self.writer.take() {
            // Where it panicked, the file is as it was before.
            let _ = writer.join();
        }
    }
}

impl Desk {
    fn papers(&self) -> MutexGuard<'_, Papers> {
        self.papers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until there is something to write that was not tried before, and it is due; nothing when
    /// all is done.
    fn next(&self) -> Option<Told> {
        let mut papers = self.papers();
        loop {
            let now = Instant::now();
            let left = papers.due().map(|due| {
                let grace = if papers.now { Duration::ZERO } else { GRACE };
                (due + grace).saturating_duration_since(now)
            });
            papers = match left {
                None if papers.closed => return None,
                Some(_) if papers.closed => return Some(papers.told.clone()),
                Some(left) if left.is_zero() && !papers.busy => {
                    papers.now = false;
                    return Some(papers.told.clone());
                }
                Some(left) if !papers.busy => {
                    let woken = self.changed.wait_timeout(papers, left);
                    woken.unwrap_or_else(PoisonError::into_inner).0
                }
                _ => {
                    papers.parked = true;
                    let woken = self.changed.wait(papers);
                    woken.unwrap_or_else(PoisonError::into_inner)
                }
            };
            papers.parked = false;
        }
    }
}

/// Writes what is told until the keeper is done.
fn serve(desk: &Desk, path: PathBuf) {
    let mut file = RowFile {
        path,
        heap: None,
        was: None,
        before: None,
        refused: false,
    };
    while let Some(told) = desk.next() {
        let written = file.write(&told);
        let mut papers = desk.papers();
        papers.tried = (Some(told), Instant::now());
        papers.shown = written.or(papers.shown.take());
    }
}

/// The file that has the name: device, inode, and length in bytes.
type Named = (u64, u64, u64);

/// The heap of a row.
struct RowFile {
    path: PathBuf,
    heap: Option<RowHeap>,
    /// The file after the last transaction.
    was: Option<Named>,
    /// What there was when this keeper began, and this keeper.
    before: Option<Totals>,
    /// It was said that the table cannot be written.
    refused: bool,
}

impl RowFile {
    /// The totals with what this keeper counted, when they are durable; nothing where that cannot be.
    fn write(&mut self, told: &Told) -> Option<Totals> {
        match self.attempt(told) {
            Ok(totals) => {
                self.refused = false;
                Some(totals)
            }
            Err(error) => {
                // What is wrong with it is found out when it is opened again.
                self.heap = None;
                if !std::mem::replace(&mut self.refused, true) {
                    tracing::warn!("{} cannot be written: {error}", self.path.display());
                }
                None
            }
        }
    }

    fn attempt(&mut self, told: &Told) -> Result<Totals, Error> {
        if self.heap.is_some() && self.named() != self.was {
            let path = self.path.display();
            tracing::warn!("{path} is gone, or another one, or was cut: it is opened again");
            self.heap = None;
        }
        let heap = match self.heap.take() {
            Some(heap) => heap,
            None => open_or_anew(&self.path)?,
        };
        let heap = self.heap.insert(heap);
        let before = match self.before.take() {
            Some(before) => before,
            None => {
                let found = totals(heap)?;
                let keepers = found.keepers.saturating_add(1);
                Totals { keepers, ..found }
            }
        };
        let before = self.before.insert(before);
        let totals = Totals {
            time_ns: now_ns(),
            counts: before.counts.and(told.counts),
            last_failure: told.last_failure.clone().or(before.last_failure.clone()),
            since_ns: before.since_ns,
            keepers: before.keepers,
        };
        put(heap, &totals)?;
        self.was = self.named();
        Ok(totals)
    }

    fn named(&self) -> Option<Named> {
        let found = fs::symlink_metadata(&self.path).ok()?;
        Some((found.dev(), found.ino(), found.len()))
    }
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
