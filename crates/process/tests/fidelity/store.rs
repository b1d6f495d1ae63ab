//! A store of epochs in memory, written for the tests alone: the simplest thing that obeys the
//! seam. Every epoch is a full map of its pages, so that any of them can be restored, and spoilt.

use outlive_epoch::{
    Acked, Content, EpochFacts, EpochId, EpochReader, EpochWriter, Order, PAGE_SIZE, PageSink, Run,
    SpaceId, StoreError, VisitError,
};
use std::collections::BTreeMap;
use std::sync::Arc;

type Page = Arc<[u8; PAGE_SIZE]>;

/// One committed epoch. A page that is not in the map is absent.
#[derive(Clone, Default)]
pub struct Epoch {
    id: u64,
    trees: BTreeMap<String, Vec<u8>>,
    pub pages: BTreeMap<(SpaceId, u64), Page>,
    /// How many pages of each space were handed over for it.
    pub put: BTreeMap<SpaceId, usize>,
}

/// All committed epochs of a subject.
#[derive(Default)]
pub struct Store {
    pub epochs: Vec<Epoch>,
}

/// The next epoch.
pub struct Writer<'a> {
    store: &'a mut Store,
    pub epoch: Epoch,
}

impl Store {
    pub fn begin(&mut self) -> Box<Writer<'_>> {
        let pages = self
            .epochs
            .last()
            .map(|e| e.pages.clone())
            .unwrap_or_default();
        let id = self.epochs.len() as u64 + 1;
        let epoch = Epoch {
            id,
            trees: BTreeMap::new(),
            pages,
            put: BTreeMap::new(),
        };
        Box::new(Writer { store: self, epoch })
    }

    pub fn newest(&self) -> &Epoch {
        self.epochs.last().expect("an epoch was committed")
    }
}

impl Epoch {
    /// Puts another tree in the place of one.
    pub fn replace(&mut self, group: &str, fdt: Vec<u8>) {
        let before = self.trees.insert(group.into(), fdt);
        assert!(before.is_some(), "there is no group {group}");
    }
}

/// A sink that keeps nothing.
pub struct Nowhere;

impl PageSink for Nowhere {
    fn put(&mut self, _: Run, _: &[u8]) -> Result<(), StoreError> {
        Ok(())
    }

    fn absent(&mut self, _: Run) -> Result<(), StoreError> {
        Ok(())
    }
}

impl PageSink for Writer<'_> {
    fn put(&mut self, run: Run, bytes: &[u8]) -> Result<(), StoreError> {
        let (pages, rest) = bytes.as_chunks::<PAGE_SIZE>();
        assert!(
            rest.is_empty() && pages.len() as u64 == run.count(),
            "a run and its bytes differ"
        );
        *self.epoch.put.entry(run.space()).or_default() += pages.len();
        for (index, page) in (run.first()..).zip(pages) {
            self.epoch
                .pages
                .insert((run.space(), index), Arc::new(*page));
        }
        Ok(())
    }

    fn absent(&mut self, run: Run) -> Result<(), StoreError> {
        let range = (run.space(), run.first())..(run.space(), run.end());
        let gone: Vec<_> = self.epoch.pages.range(range).map(|(&key, _)| key).collect();
        for key in gone {
            self.epoch.pages.remove(&key);
        }
        Ok(())
    }
}

impl EpochWriter for Writer<'_> {
    fn id(&self) -> EpochId {
        EpochId(self.epoch.id)
    }

    fn zero(&mut self, run: Run) -> Result<(), StoreError> {
        let zeros = vec![0; PAGE_SIZE * run.count() as usize];
        self.put(run, &zeros)
    }

    fn tree(&mut self, group: &str, fdt: &[u8]) -> Result<(), StoreError> {
        let before = self.epoch.trees.insert(group.into(), fdt.to_vec());
        assert!(before.is_none(), "the group {group} was written twice");
        Ok(())
    }

    fn commit(self: Box<Self>, _: EpochFacts) -> Result<Acked, StoreError> {
        let pages = self.epoch.pages.len() as u64;
        let acked = Acked {
            epoch: EpochId(self.epoch.id),
            bytes_written: 0,
            pages,
            saved_bytes: 0,
        };
        self.store.epochs.push(self.epoch);
        Ok(acked)
    }
}

impl EpochReader for Epoch {
    fn id(&self) -> EpochId {
        EpochId(self.id)
    }

    fn groups(&self) -> Vec<String> {
        self.trees.keys().cloned().collect()
    }

    fn tree(&self, group: &str) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.trees.get(group).cloned())
    }

    fn runs(&self) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        for &(space, index) in self.pages.keys() {
            let joined = runs
                .last()
                .filter(|r| r.space() == space && r.end() == index)
                .and_then(|r| Run::new(space, r.first(), r.count() + 1));
            match joined {
                Some(run) => *runs.last_mut().expect("joined to the last one") = run,
                None => runs.push(Run::new(space, index, 1).expect("one page")),
            }
        }
        runs
    }

    fn pages_in(
        &self,
        wanted: &[Run],
        _: Order,
        visit: &mut dyn FnMut(Run, Content<'_>) -> Result<(), VisitError>,
    ) -> Result<(), VisitError> {
        let keys = wanted
            .iter()
            .map(|r| (r.space(), r.first())..(r.space(), r.end()));
        for (&(space, index), page) in keys.flat_map(|keys| self.pages.range(keys)) {
            let run = Run::new(space, index, 1).expect("one page");
            let zero = **page == [0; PAGE_SIZE];
            visit(
                run,
                if zero {
                    Content::Zero
                } else {
                    Content::Bytes(page.as_slice())
                },
            )?;
        }
        Ok(())
    }
}
