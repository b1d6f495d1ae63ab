//! Progress of what takes longer than a second, shown on a terminal only.
//!
//! # Rules
//! - Nothing is shown in the first second, nothing where standard error is no terminal, and what
//!   was shown is removed before anything else is said.
//! - No thread is made: a restore must not have one beside it.

use indicatif::{ProgressBar, ProgressStyle};
use outlive_epoch::{
    Acked, Content, EpochFacts, EpochId, EpochReader, EpochWriter, Order, PageSink, Run,
    StoreError, VisitError,
};
use std::cell::{Cell, RefCell};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// How long an operation may take before its progress is shown.
const PATIENCE: Duration = Duration::from_secs(1);

/// A bar that appears when it is worth it and removes itself.
pub struct Progress {
    verb: &'static str,
    began: Instant,
    shown: bool,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// A bar that says what is done: `verifying`.
    pub fn new(verb: &'static str) -> Self {
        Self {
            verb,
            began: Instant::now(),
            shown: std::io::stderr().is_terminal(),
            bar: None,
        }
    }

    /// So many bytes of so many are done.
    pub fn at(&mut self, done: u64, all: u64) {
        if !self.shown || self.began.elapsed() < PATIENCE {
            return;
        }
        let all = all.max(done);
        let bar = self.bar.get_or_insert_with(|| bar(self.verb, all));
        bar.set_length(all);
        bar.set_position(done);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

fn bar(verb: &str, all: u64) -> ProgressBar {
    let bar = ProgressBar::new(all);
    let looks =
        format!("{verb} [{{bar:40}}] {{decimal_bytes}} of {{decimal_total_bytes}}, {{eta}} left");
    if let Ok(style) = ProgressStyle::with_template(&looks) {
        bar.set_style(style);
    }
    bar
}

/// Bytes of these runs.
pub fn bytes(runs: &[Run]) -> u64 {
    runs.iter().map(Run::bytes).fold(0, u64::saturating_add)
}

/// An epoch whose pages are counted as they are read.
pub struct Watched<'a> {
    reader: Box<dyn EpochReader + 'a>,
    progress: RefCell<Progress>,
    /// Bytes so far, in however many walks.
    done: Cell<u64>,
}

impl<'a> Watched<'a> {
    /// Watches a restore.
    pub fn new(reader: Box<dyn EpochReader + 'a>) -> Self {
        Self {
            reader,
            progress: RefCell::new(Progress::new("restoring")),
            done: Cell::new(0),
        }
    }
}

impl EpochReader for Watched<'_> {
    fn id(&self) -> EpochId {
        self.reader.id()
    }

    fn groups(&self) -> Vec<String> {
        self.reader.groups()
    }

    fn tree(&self, group: &str) -> Result<Option<Vec<u8>>, StoreError> {
        self.reader.tree(group)
    }

    fn runs(&self) -> Vec<Run> {
        self.reader.runs()
    }

    fn pages_in(
        &self,
        wanted: &[Run],
        order: Order,
        visit: &mut dyn FnMut(Run, Content<'_>) -> Result<(), VisitError>,
    ) -> Result<(), VisitError> {
        let all = bytes(&self.reader.runs());
        let mut progress = self.progress.borrow_mut();
        self.reader.pages_in(wanted, order, &mut |run, content| {
            visit(run, content)?;
            self.done.set(self.done.get().saturating_add(run.bytes()));
            progress.at(self.done.get(), all);
            Ok(())
        })
    }
}

/// A writer whose pages are counted as they are written.
pub struct Counted<'a> {
    writer: Box<dyn EpochWriter + 'a>,
    progress: Progress,
    done: u64,
    all: u64,
}

impl<'a> Counted<'a> {
    /// Watches an epoch that is expected to have so many bytes.
    pub fn new(writer: Box<dyn EpochWriter + 'a>, all: u64) -> Self {
        Self {
            writer,
            progress: Progress::new("writing"),
            done: 0,
            all,
        }
    }
}

impl PageSink for Counted<'_> {
    fn put(&mut self, run: Run, bytes: &[u8]) -> Result<(), StoreError> {
        self.writer.put(run, bytes)?;
        self.done = self.done.saturating_add(run.bytes());
        self.progress.at(self.done, self.all);
        Ok(())
    }

    fn absent(&mut self, run: Run) -> Result<(), StoreError> {
        self.writer.absent(run)
    }
}

impl EpochWriter for Counted<'_> {
    fn id(&self) -> EpochId {
        self.writer.id()
    }

    fn tree(&mut self, group: &str, fdt: &[u8]) -> Result<(), StoreError> {
        self.writer.tree(group, fdt)
    }

    fn zero(&mut self, run: Run) -> Result<(), StoreError> {
        self.writer.zero(run)
    }

    fn hurry(&mut self) {
        self.writer.hurry();
    }

    fn commit(self: Box<Self>, facts: EpochFacts) -> Result<Acked, StoreError> {
        let Self {
            writer, progress, ..
        } = *self;
        let acked = writer.commit(facts);
        drop(progress);
        acked
    }
}
