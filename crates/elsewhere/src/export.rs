//! Epochs into a stream.

use crate::Passed;
use crate::frame::{Kind, Sender};
use outlive_epoch::{
    Content, EpochFacts, EpochId, EpochReader, Order, Run, StoreError, VisitError,
};
use outlive_epoch_store::{Increment, Reader, Store};
use std::io::Write;

/// Which epochs go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// All that the store holds.
    All,
    /// One, whole.
    One(EpochId),
}

/// Bytes of a tree in one frame.
const TREE_PART: usize = 1 << 20;

/// Writes epochs of a store, and what is known `about` their subject, to `out`, which errors call
/// `place`. A keeper may go on writing to the store meanwhile; epochs that it adds later are not
/// among them. `progress` hears how many bytes were written.
///
/// # Errors
/// What the store says, [`StoreError::Missing`] where there is no such epoch; what `out` says.
pub fn export(
    store: &Store,
    which: Which,
    about: &[u8],
    out: &mut dyn Write,
    place: &str,
    progress: &mut dyn FnMut(u64),
) -> Result<Passed, StoreError> {
    let mut export = Export {
        to: Sender::begin(out, place)?,
        passed: Passed::default(),
        progress,
    };
    export.to.frame(Kind::About, about, &[])?;
    let epochs = store.epochs();
    let count = match which {
        Which::One(id) => {
            let reader = store.epoch(Some(id))?;
            let known = epochs.iter().find(|epoch| epoch.id == id);
            let facts = known.map(|epoch| epoch.facts).unwrap_or_default();
            export.epoch(facts, &reader, &[], |_| true)?;
            1
        }
        Which::All => {
            for epoch in &epochs {
                let Increment {
                    reader,
                    absent,
                    whole,
                } = store.increment(epoch.id)?;
                let is_new = |group: &str| whole || reader.tree_origin(group) == Some(epoch.id);
                export.epoch(epoch.facts, &reader, &absent, is_new)?;
            }
            epochs.len() as u64
        }
    };
    let Export { to, mut passed, .. } = export;
    passed.bytes = to.end(count)?;
    Ok(passed)
}

struct Export<'a, 'p> {
    to: Sender<'a>,
    passed: Passed,
    progress: &'p mut dyn FnMut(u64),
}

impl Export<'_, '_> {
    fn epoch(
        &mut self,
        facts: EpochFacts,
        reader: &Reader,
        absent: &[Run],
        is_new: impl Fn(&str) -> bool,
    ) -> Result<(), StoreError> {
        let numbers = [reader.id().0, facts.taken_at_ns, facts.stop_us];
        self.to.frame(Kind::Epoch, &encode(&numbers), &[])?;
        let groups = reader.groups();
        for group in &groups {
            self.tree(group, reader, is_new(group))?;
        }
        self.to.runs(Kind::Absent, absent)?;
        let pages = self.pages(reader)?;
        let numbers = [pages, groups.len() as u64];
        self.to.frame(Kind::Commit, &encode(&numbers), &[])?;
        self.passed.epoch(reader.id().0);
        self.passed.pages += pages;
        Ok(())
    }

    fn tree(&mut self, group: &str, reader: &Reader, is_new: bool) -> Result<(), StoreError> {
        if !is_new {
            return self.to.frame(Kind::TreeSame, group.as_bytes(), &[]);
        }
        let tree = reader.tree(group)?.unwrap_or_default();
        let mut head = (group.len() as u16).to_le_bytes().to_vec();
        head.extend_from_slice(group.as_bytes());
        let (first, rest) = tree.split_at(tree.len().min(TREE_PART));
        self.to.frame(Kind::Tree, &head, first)?;
        for part in rest.chunks(TREE_PART) {
            self.to.frame(Kind::TreeMore, part, &[])?;
        }
        Ok(())
    }

    /// All pages that the reader has; gives how many have contents.
    fn pages(&mut self, reader: &Reader) -> Result<u64, StoreError> {
        let (mut zeros, mut count, mut failed) = (Vec::new(), 0, None);
        let walked = reader.pages_in(&reader.runs(), Order::Fastest, &mut |run, content| {
            let done = match content {
                Content::Zero => {
                    zeros.push(run);
                    Ok(())
                }
                Content::Bytes(bytes) => {
                    count += run.count();
                    self.to.pages(run, bytes)
                }
            };
            (self.progress)(self.to.bytes);
            done.map_err(|error| {
                failed = Some(error);
                VisitError::Visitor("the stream cannot be written".into())
            })
        });
        match (failed, walked) {
            (Some(error), _) | (None, Err(VisitError::Store(error))) => return Err(error),
            (None, Err(VisitError::Visitor(error))) => {
                return Err(StoreError::Misuse(error.to_string()));
            }
            (None, Ok(())) => {}
        }
        self.to.runs(Kind::Zero, &zeros)?;
        Ok(count)
    }
}

fn encode(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|n| n.to_le_bytes()).collect()
}
