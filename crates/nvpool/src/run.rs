//! Runs of pages, and sets of them. Pure.

use std::collections::BTreeMap;

/// Bytes of a page, the smallest piece that is given out.
pub const PAGE: u64 = 4096;

/// Pages one after another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Run {
    /// The first.
    pub start: u64,
    /// How many; never 0 where a run is stored.
    pub len: u64,
}

impl Run {
    /// `len` pages from `start` on.
    #[must_use]
    pub fn new(start: u64, len: u64) -> Self {
        Self { start, len }
    }

    /// One past the last page.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.start + self.len
    }

    /// What both have.
    #[must_use]
    pub fn common(&self, other: Self) -> Option<Self> {
        let start = self.start.max(other.start);
        let end = self.end().min(other.end());
        (start < end).then(|| Self::new(start, end - start))
    }
}

/// Joins runs that touch; they are sorted by where they begin, and overlap nowhere.
pub fn merged(runs: impl IntoIterator<Item = Run>) -> Vec<Run> {
    let mut all: Vec<Run> = Vec::new();
    for run in runs {
        match all.last_mut() {
            Some(last) if last.end() == run.start => last.len += run.len,
            _ => all.push(run),
        }
    }
    all
}

/// A set of pages, as runs that neither touch nor overlap.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pages(BTreeMap<u64, u64>);

impl Pages {
    /// The runs, in order.
    pub fn runs(&self) -> impl DoubleEndedIterator<Item = Run> + '_ {
        self.0.iter().map(|(start, len)| Run::new(*start, *len))
    }

    /// How many pages.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.0.values().sum()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The runs that overlap or touch `run`.
    fn near(&self, run: Run) -> Vec<Run> {
        let before = self.0.range(..=run.end()).rev();
        let runs = before.map(|(start, len)| Run::new(*start, *len));
        runs.take_while(|near| near.end() >= run.start).collect()
    }

    /// The parts of `run` that are in the set, in order.
    #[must_use]
    pub fn within(&self, run: Run) -> Vec<Run> {
        let near = self.near(run);
        near.iter()
            .rev()
            .filter_map(|near| near.common(run))
            .collect()
    }

    /// Adds pages, of which some may be in the set already.
    pub fn add(&mut self, run: Run) {
        let (mut start, mut end) = (run.start, run.end());
        for near in self.near(run) {
            self.0.remove(&near.start);
            start = start.min(near.start);
            end = end.max(near.end());
        }
        if start < end {
            self.0.insert(start, end - start);
        }
    }

    /// Takes pages out, of which some may not be in the set.
    pub fn remove(&mut self, run: Run) {
        for near in self.near(run) {
            self.0.remove(&near.start);
            if near.start < run.start {
                let len = near.end().min(run.start) - near.start;
                self.0.insert(near.start, len);
            }
            if near.end() > run.end() {
                let start = near.start.max(run.end());
                self.0.insert(start, near.end() - start);
            }
        }
    }

    /// What has to be written over the rows (by first page) of `old` to make them these; `None` is a row
    /// that goes.
    #[must_use]
    pub fn rows_from(&self, old: &Self) -> Vec<(u64, Option<u64>)> {
        let gone = old.0.keys().filter(|start| !self.0.contains_key(start));
        let gone = gone.map(|start| (*start, None));
        let new = self
            .0
            .iter()
            .filter(|(start, len)| old.0.get(start) != Some(len));
        gone.chain(new.map(|(start, len)| (*start, Some(*len))))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn a_set_of_runs_is_a_set_of_pages(
            steps in proptest::collection::vec((any::<bool>(), 0u64..60, 1u64..12), 0..60),
        ) {
            let (mut pages, mut model) = (Pages::default(), BTreeSet::new());
            for (add, start, len) in steps {
                let (run, old) = (Run::new(start, len), pages.clone());
                if add {
                    pages.add(run);
                    model.extend(start..start + len);
                } else {
                    pages.remove(run);
                    model.retain(|page| !(start..start + len).contains(page));
                }
                let all: Vec<u64> = pages.runs().flat_map(|run| run.start..run.end()).collect();
                prop_assert_eq!(&all, &model.iter().copied().collect::<Vec<_>>());
                let runs: Vec<Run> = pages.runs().collect();
                prop_assert_eq!(&merged(runs.iter().copied()), &runs);
                let part: u64 = pages.within(run).iter().map(|part| part.len).sum();
                prop_assert_eq!(part, if add { len } else { 0 });
                let mut rows = old.0;
                for (start, len) in pages.rows_from(&Pages(rows.clone())) {
                    match len {
                        Some(len) => rows.insert(start, len),
                        None => rows.remove(&start),
                    };
                }
                prop_assert_eq!(&rows, &pages.0);
            }
        }
    }
}
