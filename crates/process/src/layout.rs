//! The mappings of an address space from stop to stop: mostly nothing changed.
//!
//! # Rules
//! - The text of `/proc/PID/maps` is read anew each time. Where it is byte for byte the last one, and no
//!   other flags were read since, all that was made of it is the same.
//! - The file stands for one address space: who began another program (`execve(2)`) has none left in it.

use crate::ProcessError;
use crate::flags::FlagsCache;
use crate::pages::PrivateArea;
use crate::target::Target;
use outlive_linux::maps::{Mapping, Reader, VmFlags};
use std::sync::Arc;

/// What is known of the mappings.
#[derive(Debug, Default)]
pub struct Layout {
    reader: Option<Reader>,
    /// The text that the rest was made of, and which flags were known.
    of: Option<(Arc<[Mapping]>, u64)>,
    mappings: Vec<(Mapping, VmFlags)>,
    areas: Vec<PrivateArea>,
}

impl Layout {
    /// Who reads the mappings.
    pub fn reader(&mut self, target: &Target) -> Result<&mut Reader, ProcessError> {
        if self.reader.is_none() {
            let opened = Reader::open(target.pid);
            self.reader = Some(opened.map_err(|e| target.kernel("reading its mappings", e))?);
        }
        self.reader.as_mut().ok_or_else(|| ProcessError::Gone {
            pid: target.pid,
            what: "nobody reads its mappings".into(),
        })
    }

    /// Reads them anew, but for a range of our own.
    pub fn read(
        &mut self,
        target: &Target,
        ours: (u64, u64),
        flags: &mut FlagsCache,
    ) -> Result<(), ProcessError> {
        let read = self.reader(target)?.read();
        let now = read.map_err(|e| target.kernel("reading its mappings", e))?;
        let same = |(all, version): &(Arc<[Mapping]>, u64)| {
            Arc::ptr_eq(all, &now) && *version == flags.version()
        };
        if self.of.as_ref().is_some_and(same) {
            return Ok(());
        }
        self.areas = private_areas(&now, Some(ours));
        self.mappings = flags.assign(now.iter().filter(|m| !is_within(m, ours)));
        self.of = Some((now, flags.version()));
        Ok(())
    }

    /// The mappings as they were read last, with their flags.
    #[must_use]
    pub fn mappings(&self) -> &[(Mapping, VmFlags)] {
        &self.mappings
    }

    /// The private ones.
    #[must_use]
    pub fn areas(&self) -> &[PrivateArea] {
        &self.areas
    }
}

impl Layout {
    /// Bytes of the private mappings.
    #[must_use]
    pub fn private_bytes(&self) -> u64 {
        self.areas.iter().map(|a| a.span.1 - a.span.0).sum()
    }
}

fn is_within(m: &Mapping, (base, length): (u64, u64)) -> bool {
    m.start >= base && m.end <= base + length
}

/// The private mappings, whose pages belong into epochs, but for a range of our own.
#[must_use]
pub fn private_areas(mappings: &[Mapping], ours: Option<(u64, u64)>) -> Vec<PrivateArea> {
    let mut areas = Vec::with_capacity(mappings.len());
    let mut beside = false;
    for m in mappings {
        let own = ours.is_some_and(|range| is_within(m, range));
        let private = !own && !m.shared && !m.name.starts_with(b"[v");
        if private {
            areas.push(PrivateArea {
                span: (m.start, m.end),
                readable: m.prot & 1 != 0,
                anonymous: m.inode == 0,
                writable: m.prot & 2 != 0,
                beside,
            });
        }
        beside = private;
    }
    areas
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(start: u64, shared: bool) -> Mapping {
        Mapping {
            start,
            end: start + 10,
            prot: 3,
            shared,
            offset: 0,
            device: (0, 0),
            inode: 0,
            name: Vec::new(),
        }
    }

    #[test]
    fn areas_are_beside_each_other_if_no_other_mapping_lies_between() {
        let all = [10, 20, 50, 60, 80, 90, 110].map(|start| mapping(start, start == 60));
        let areas = private_areas(&all, Some((80, 10)));
        let found: Vec<(u64, bool)> = areas.iter().map(|a| (a.span.0, a.beside)).collect();
        let expected = [
            (10, false),
            (20, true),
            (50, true),
            (90, false),
            (110, true),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn a_layout_is_read_once_and_again_where_something_changed() {
        let target = Target::open(std::process::id()).unwrap();
        let (mut layout, mut flags) = (Layout::default(), FlagsCache::default());
        layout.read(&target, (0, 0), &mut flags).unwrap();
        let before = layout.areas().len();
        assert_eq!(
            before,
            layout
                .mappings()
                .iter()
                .filter(|(m, _)| !m.shared && !m.name.starts_with(b"[v"))
                .count()
        );
        let many: Vec<_> = (0..50)
            .map(|_| outlive_linux::area::Area::new(8192).unwrap())
            .collect();
        layout.read(&target, (0, 0), &mut flags).unwrap();
        assert!(layout.areas().len() >= before + many.len());
        let known = flags.version();
        flags
            .refresh(&target, layout.reader(&target).unwrap())
            .unwrap();
        assert!(flags.version() > known);
        layout.read(&target, (0, 0), &mut flags).unwrap();
        let stack = layout
            .mappings()
            .iter()
            .find(|(m, _)| m.name == b"[stack]")
            .unwrap();
        assert!(
            stack.1.has(VmFlags::GROWS_DOWN),
            "flags that were read since"
        );
    }
}
