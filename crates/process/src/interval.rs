//! Sets of page indexes as disjoint ranges.

use std::collections::BTreeMap;

/// A set of `u64` kept as disjoint, non-adjacent half-open ranges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IntervalSet {
    /// Start → end. Invariant: start < end, and each end is below the next start.
    ranges: BTreeMap<u64, u64>,
}

impl IntervalSet {
    /// Adds `start..end`.
    pub fn insert(&mut self, mut start: u64, mut end: u64) {
        if start >= end {
            return;
        }
        if let Some((&s, &e)) = self.ranges.range(..=start).next_back() {
            if e >= end {
                return;
            }
            if e >= start {
                start = s;
            }
        }
        while let Some((&s, &e)) = self.ranges.range(start..=end).next() {
            end = end.max(e);
            self.ranges.remove(&s);
        }
        self.ranges.insert(start, end);
    }

    /// Removes `start..end` and returns what of it was in the set.
    pub fn remove(&mut self, start: u64, end: u64) -> Vec<(u64, u64)> {
        let mut removed = Vec::new();
        if start >= end {
            return removed;
        }
        let first = self
            .ranges
            .range(..=start)
            .next_back()
            .filter(|&(_, &e)| e > start);
        let from = first.map_or(start, |(&s, _)| s);
        let hit: Vec<(u64, u64)> = self
            .ranges
            .range(from..end)
            .map(|(&s, &e)| (s, e))
            .collect();
        for (s, e) in hit {
            self.ranges.remove(&s);
            if s < start {
                self.ranges.insert(s, start);
            }
            if e > end {
                self.ranges.insert(end, e);
            }
            removed.push((s.max(start), e.min(end)));
        }
        removed
    }

    /// What of `start..end` is in the set, in order.
    pub fn within(&self, start: u64, end: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let before = self.ranges.range(..=start).next_back();
        let from = before.filter(|&(_, &e)| e > start).map_or(start, |b| *b.0);
        let hit = self.ranges.range(from..end.max(from));
        let cut = hit.map(move |(&s, &e)| (s.max(start), e.min(end)));
        cut.filter(|(s, e)| s < e)
    }

    /// What of `start..end` is in the set, as a set.
    pub fn clone_within(&self, start: u64, end: u64) -> Self {
        let ranges = self.within(start, end).collect();
        Self { ranges }
    }

    /// The first numbers of the set that follow each other, at most `most` of them.
    pub fn first(&self, most: u64) -> Option<(u64, u64)> {
        let (&start, &end) = self.ranges.first_key_value()?;
        Some((start, end.min(start.saturating_add(most))))
    }

    /// Whether nothing is in the set.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// The ranges in order.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.ranges.iter().map(|(&s, &e)| (s, e))
    }

    /// How many numbers are in the set.
    pub fn count(&self) -> u64 {
        self.iter().map(|(s, e)| e - s).sum()
    }

    /// Empties the set.
    pub fn clear(&mut self) {
        self.ranges.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn behaves_like_a_set(ops in prop::collection::vec((any::<bool>(), 0u64..60, 0u64..20), 0..60)) {
            let mut set = IntervalSet::default();
            let mut model = BTreeSet::new();
            for (add, start, len) in ops {
                let part: Vec<_> = set.clone_within(start, start + len).iter().collect();
                prop_assert_eq!(part, set.within(start, start + len).collect::<Vec<_>>());
                let within: Vec<u64> = set.within(start, start + len).flat_map(|(s, e)| s..e).collect();
                prop_assert_eq!(within, model.range(start..start + len).copied().collect::<Vec<_>>());
                prop_assert_eq!(set.first(1).map(|(s, _)| s), model.first().copied());
                prop_assert_eq!(set.is_empty(), model.is_empty());
                if add {
                    set.insert(start, start + len);
                    model.extend(start..start + len);
                } else {
                    let removed: Vec<u64> =
                        set.remove(start, start + len).into_iter().flat_map(|(s, e)| s..e).collect();
                    let expected: Vec<u64> = model.range(start..start + len).copied().collect();
                    prop_assert_eq!(removed, expected.clone());
                    for v in expected { model.remove(&v); }
                }
                let all: Vec<u64> = set.iter().flat_map(|(s, e)| s..e).collect();
                prop_assert_eq!(all, model.iter().copied().collect::<Vec<_>>());
                let ranges: Vec<_> = set.iter().collect();
                prop_assert!(ranges.windows(2).all(|w| w[0].1 < w[1].0));
                prop_assert_eq!(set.count(), model.len() as u64);
            }
        }
    }
}
