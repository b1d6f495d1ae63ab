//! Pages that a process does not have yet: where they are wanted, and where the epoch has them.
//!
//! Pure. Both are the same address until the program moves a mapping (`mremap(2)`).

use std::collections::BTreeMap;

/// Missing pages that lie beside each other, here and in the epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Address of the first.
    pub start: u64,
    /// Address behind the last.
    pub end: u64,
    /// Address under which the epoch has the first.
    pub origin: u64,
}

impl Part {
    /// What of it lies in a range; `None` where nothing does.
    #[must_use]
    pub fn within(self, start: u64, end: u64) -> Option<Self> {
        let (from, to) = (self.start.max(start), self.end.min(end));
        (from < to).then(|| Self {
            start: from,
            end: to,
            origin: self.origin + (from - self.start),
        })
    }
}

/// All missing pages of one address space.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pending {
    /// By the first address: the address behind the last one, and the origin of the first.
    parts: BTreeMap<u64, (u64, u64)>,
}

impl Pending {
    /// These pages are missing. Nothing else may be missing there.
    pub fn insert(&mut self, part: Part) {
        self.parts.insert(part.start, (part.end, part.origin));
    }

    /// Bytes that are missing.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.parts.iter().map(|(start, (end, _))| end - start).sum()
    }

    /// Everything that is missing, in order.
    pub fn all(&self) -> impl Iterator<Item = Part> + '_ {
        self.parts
            .iter()
            .map(|(&start, &(end, origin))| Part { start, end, origin })
    }

    /// What is missing of a range, in order.
    #[must_use]
    pub fn parts(&self, start: u64, end: u64) -> Vec<Part> {
        if start >= end {
            return Vec::new();
        }
        let whole = |(&start, &(end, origin)): (&u64, &(u64, u64))| Part { start, end, origin };
        let before = self.parts.range(..start).next_back();
        let rest = self.parts.range(start..end);
        let all = before.into_iter().chain(rest).map(whole);
        all.filter_map(|part| part.within(start, end)).collect()
    }

    /// The pages that are missing around this one, which is missing.
    #[must_use]
    pub fn around(&self, address: u64) -> Option<Part> {
        let (&start, &(end, origin)) = self.parts.range(..=address).next_back()?;
        (address < end).then_some(Part { start, end, origin })
    }

    /// Nothing of a range is missing any more. Returns what was.
    pub fn remove(&mut self, start: u64, end: u64) -> Vec<Part> {
        let hit = self.parts(start, end);
        for part in &hit {
            let whole = self.around(part.start);
            let Some(whole) = whole else { continue };
            self.parts.remove(&whole.start);
            let rest = [
                whole.within(whole.start, part.start),
                whole.within(part.end, whole.end),
            ];
            rest.into_iter().flatten().for_each(|r| self.insert(r));
        }
        hit
    }

    /// A range was moved to another place, in the place of what was missing there.
    pub fn moved(&mut self, from: u64, to: u64, length: u64) {
        let taken = self.remove(from, from.saturating_add(length));
        self.remove(to, to.saturating_add(length));
        for part in taken {
            let at = |address: u64| to + (address - from);
            self.insert(Part {
                start: at(part.start),
                end: at(part.end),
                origin: part.origin,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn flat(pending: &Pending) -> BTreeMap<u64, u64> {
        let pages = |p: Part| (p.start..p.end).map(move |a| (a, p.origin + (a - p.start)));
        pending.all().flat_map(pages).collect()
    }

    proptest! {
        /// Compares with a plain map of single addresses.
        #[test]
        fn it_is_a_map_of_addresses(
            parts in prop::collection::vec((1u64..9, 1u64..9), 0..6),
            ops in prop::collection::vec((0u64..80, 0u64..80, 0u64..30, prop::bool::ANY), 0..30),
        ) {
            let (mut pending, mut at) = (Pending::default(), 0);
            for (gap, length) in parts {
                at += gap;
                pending.insert(Part { start: at, end: at + length, origin: at });
                at += length;
            }
            let mut model = flat(&pending);
            for (from, to, length, moves) in ops {
                let taken: Vec<_> = model.range(from..from + length).map(|(&a, &o)| (a, o)).collect();
                let seen: BTreeMap<u64, u64> = pending
                    .parts(from, from + length)
                    .into_iter()
                    .flat_map(|p| (p.start..p.end).map(move |a| (a, p.origin + (a - p.start))))
                    .collect();
                prop_assert_eq!(seen, taken.iter().copied().collect());
                model.retain(|a, _| !(from..from + length).contains(a));
                if moves {
                    // The kernel moves nothing onto itself.
                    let to = if to + length <= from || from + length <= to { to } else { from + length };
                    pending.moved(from, to, length);
                    model.retain(|a, _| !(to..to + length).contains(a));
                    model.extend(taken.into_iter().map(|(a, o)| (a - from + to, o)));
                } else {
                    pending.remove(from, from + length);
                }
                prop_assert_eq!(&flat(&pending), &model);
                prop_assert_eq!(pending.bytes(), model.len() as u64);
                for a in 0..130 {
                    let around = pending.around(a).and_then(|p| p.within(a, a + 1));
                    prop_assert_eq!(around.map(|p| p.origin), model.get(&a).copied());
                }
            }
        }
    }
}
