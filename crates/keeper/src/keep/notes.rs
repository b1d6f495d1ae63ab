//! What the loop counts, on its way into the table: see [`crate::table`].

use super::Keeper;
use crate::epoch::Program;
use crate::table::{Counts, Table, Totals};

impl<P: Program> Keeper<'_, P> {
    /// Has what is counted written into the subject's table.
    #[must_use]
    pub fn with_table(mut self, table: Table) -> Self {
        self.table = Some(table);
        self
    }

    /// What the table shows.
    pub(super) fn totals(&self) -> Option<Totals> {
        self.table.as_ref().and_then(Table::totals)
    }

    /// An epoch begins: the table leaves the medium alone.
    pub(super) fn hush(&self) {
        if let Some(table) = &self.table {
            table.epoch_begins();
        }
    }

    /// Tells the table of violations that were seen while no epoch was taken, once for each interval. (When they are
    /// written is up to the table.)
    pub(super) fn note_violations(&mut self) {
        if self.watch.violations() > self.noted {
            self.note();
        }
    }

    /// Tells the table what was counted so far.
    pub(super) fn note(&mut self) {
        self.noted = self.watch.violations();
        let Some(table) = &self.table else {
            return;
        };
        let budget = self.watch.status(self.now());
        let counts = Counts {
            epochs: self.status.committed,
            bytes_written: self.watch.wear().bytes(),
            failures: self.status.failures,
            abandoned: self.status.abandoned,
            ..Counts::default()
        };
        let counts = counts.with(budget.as_ref(), self.watch.events);
        table.tell(counts, self.status.last_failure.as_deref());
    }
}
