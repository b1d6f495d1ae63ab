//! Flags of mappings, which only `smaps` tells, at the price of a walk over all page tables (about
//! 10 ms for 600 MB). So they are read while the program runs, and not at every epoch.
//!
//! # A known limit
//! `madvise` and `mlock` on whole mappings leave no trace but these flags. They are read again
//! whenever mappings changed, at the two epochs after that, and every [`MAX_AGE`]; a later change
//! of flags alone can therefore be missing from the epochs of that time. That future memory is to
//! be locked (`MCL_FUTURE`) is seen when a process is first looked at, and policies of memory nodes
//! (`mbind(2)`) only then.

use crate::ProcessError;
use crate::target::Target;
use outlive_linux::maps::{self, Mapping, Reader, VmFlags};
use std::time::{Duration, Instant};

/// Flags are read again after this time in any case.
const MAX_AGE: Duration = Duration::from_secs(5);
/// After a change of mappings flags are read at so many further epochs: a program maps first and
/// advises then.
const SETTLE: u8 = 2;

/// The mappings of a process with their flags as they were read last.
#[derive(Debug, Default)]
pub struct FlagsCache {
    known: Vec<(Mapping, VmFlags)>,
    read_at: Option<Instant>,
    unsettled: u8,
    /// Counts how often other flags were read than before.
    version: u64,
}

impl FlagsCache {
    /// Reads the flags again if that is called for. The program runs.
    pub fn refresh(&mut self, target: &Target, maps: &mut Reader) -> Result<(), ProcessError> {
        let failed = |e| target.kernel("reading its mappings", e);
        let old = self.read_at.is_none_or(|at| at.elapsed() > MAX_AGE);
        if !old && self.unsettled == 0 {
            let now = maps.read().map_err(failed)?;
            if now.iter().eq(self.known.iter().map(|(m, _)| m)) {
                return Ok(());
            }
            self.unsettled = SETTLE + 1;
        }
        self.unsettled = self.unsettled.saturating_sub(1);
        let known = maps::read_with_flags(target.pid).map_err(failed)?;
        if known != self.known {
            self.known = known;
            self.version += 1;
        }
        self.read_at = Some(Instant::now());
        Ok(())
    }

    /// As long as this is the same, the same mappings are given the same flags.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The flags of the mapping at an address, as they were read last.
    #[must_use]
    pub fn at(&self, address: u64) -> VmFlags {
        let at = self.known.partition_point(|(k, _)| k.end <= address);
        let found = self.known.get(at).filter(|(k, _)| k.start <= address);
        found.map_or(VmFlags::default(), |(_, flags)| *flags)
    }

    /// Where the mapping of this name lay when flags were read last.
    #[must_use]
    pub fn place_of(&self, name: &[u8]) -> Option<(u64, u64)> {
        let found = self.known.iter().find(|(m, _)| m.name == name);
        found.map(|(m, _)| (m.start, m.end))
    }

    /// Gives flags to the mappings found at the stop: those of the mapping that lay there when the
    /// flags were read, which is the same one or one that it was split from or grew out of.
    pub fn assign<'a>(
        &mut self,
        now: impl IntoIterator<Item = &'a Mapping>,
    ) -> Vec<(Mapping, VmFlags)> {
        let known = &self.known;
        let mut changed = false;
        let flags_of = |m: &Mapping, changed: &mut bool| {
            let at = known.partition_point(|(k, _)| k.end <= m.start);
            match known.get(at) {
                Some((k, flags)) if k.start < m.end && same_sort(k, m) => {
                    *changed |= k != m;
                    *flags
                }
                _ => {
                    *changed = true;
                    VmFlags::default()
                }
            }
        };
        let assigned = now
            .into_iter()
            .map(|m| (m.clone(), flags_of(m, &mut changed)))
            .collect();
        if changed {
            self.unsettled = SETTLE;
        }
        assigned
    }
}

fn same_sort(a: &Mapping, b: &Mapping) -> bool {
    a.shared == b.shared && a.inode == b.inode && a.device == b.device
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(start: u64, end: u64) -> Mapping {
        Mapping {
            start,
            end,
            prot: 3,
            shared: false,
            offset: 0,
            device: (0, 0),
            inode: 0,
            name: Vec::new(),
        }
    }

    #[test]
    fn a_split_mapping_keeps_its_flags_and_a_new_one_has_none() {
        let mut cache = FlagsCache {
            known: vec![(mapping(10, 20), VmFlags::HUGEPAGE)],
            ..FlagsCache::default()
        };
        let flags: Vec<bool> = cache
            .assign(&[mapping(10, 14), mapping(14, 20), mapping(30, 40)])
            .into_iter()
            .map(|(_, f)| f.has(VmFlags::HUGEPAGE))
            .collect();
        assert_eq!(flags, [true, true, false]);
        assert_eq!(cache.unsettled, SETTLE);
    }
}
