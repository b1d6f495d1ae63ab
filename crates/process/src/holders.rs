//! Whose memory the pages of an epoch are, told from the state trees of that epoch: for messages about
//! pages that are damaged.
//!
//! # Rules
//! - Whatever can be read is used: a tree that is lost too, or makes no sense, takes away the names that
//!   it would have given, and nothing else.
//! - Trees are hostile: they are read within bounds, and say nothing but what is shown.

use crate::image::{self, ThreadsState, group, kinds};
use crate::resources::memory::MemoryState;
use crate::resources::shared::{Origin, SharedState};
use outlive_epoch::{EpochReader, PAGE_SIZE, Run};
use std::collections::BTreeMap;

/// Holders that are named of one run, at most.
const NAMED: usize = 8;

/// A process that has something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its process ID, as it sees it itself.
    pub pid: u32,
    /// Its name; empty where that is lost as well.
    pub program: String,
    /// Where it has it, if that is memory.
    pub address: Option<u64>,
}

/// A part of an address space that shows memory which has a space of its own.
#[derive(Clone, Copy, Debug)]
struct View {
    pid: u32,
    start: u64,
    end: u64,
    /// What of that memory is at `start`, bytes.
    offset: u64,
}

/// What the trees of one epoch say of who has what.
#[derive(Debug, Default)]
pub struct Holders {
    programs: BTreeMap<u32, String>,
    views: BTreeMap<u32, Vec<View>>,
    files: BTreeMap<u32, String>,
}

impl Holders {
    /// Reads them.
    #[must_use]
    pub fn of(reader: &dyn EpochReader) -> Self {
        let mut holders = Self::default();
        for name in reader.groups() {
            let Some((pid, kind)) = process_of(&name) else {
                continue;
            };
            let program = holders.programs.entry(pid).or_default();
            match kind {
                kinds::THREADS => {
                    let threads = image::get::<ThreadsState>(reader, &group(kind, pid));
                    if let Some(leader) = threads.ok().and_then(|t| t.threads.into_iter().next()) {
                        *program = String::from_utf8_lossy(&leader.comm).into_owned();
                    }
                }
                kinds::MEMORY => {
                    if let Ok(memory) = image::get::<MemoryState>(reader, &group(kind, pid)) {
                        holders.note(pid, &memory);
                    }
                }
                _ => {}
            }
        }
        if let Ok(shared) = image::get::<SharedState>(reader, image::SHARED) {
            for memory in shared.memories {
                if let Origin::WrittenFile(file) = memory.origin {
                    holders.name(memory.space, &file.path);
                }
            }
        }
        holders
    }

    fn note(&mut self, pid: u32, memory: &MemoryState) {
        for area in &memory.areas {
            let file = area.file.and_then(|i| memory.files.get(i as usize));
            let contents = file.and_then(|file| file.contents);
            if let (Some(space), Some(file)) = (contents, file) {
                self.name(space, &file.path);
            }
            let view = View {
                pid,
                start: area.start,
                end: area.end,
                offset: area.offset,
            };
            if let Some(space) = area.space.or(contents) {
                self.views.entry(space).or_default().push(view);
            }
        }
    }

    fn name(&mut self, space: u32, path: &[u8]) {
        let path = String::from_utf8_lossy(path).into_owned();
        self.files.entry(space).or_insert(path);
    }

    /// Who has these pages: the process whose address space they are of, or those that see them.
    #[must_use]
    pub fn of_pages(&self, run: Run) -> Vec<Holder> {
        if self.programs.contains_key(&run.space().0) {
            return vec![self.holder(run.space().0, Some(run.address()))];
        }
        let views = self.views.get(&run.space().0);
        let seen = views.into_iter().flatten().filter_map(|view| {
            let last = run.address() + (run.bytes() - PAGE_SIZE as u64);
            let into = run.address().saturating_sub(view.offset);
            let address = view.start.checked_add(into)?;
            (last >= view.offset && address < view.end)
                .then(|| self.holder(view.pid, Some(address)))
        });
        seen.take(NAMED).collect()
    }

    /// Whose state tree this group is.
    #[must_use]
    pub fn of_group(&self, name: &str) -> Option<Holder> {
        process_of(name).map(|(pid, _)| self.holder(pid, None))
    }

    /// The file whose contents are the pages of this run.
    #[must_use]
    pub fn file(&self, run: Run) -> Option<&str> {
        self.files.get(&run.space().0).map(String::as_str)
    }

    fn holder(&self, pid: u32, address: Option<u64>) -> Holder {
        let program = self.programs.get(&pid).cloned().unwrap_or_default();
        Holder {
            pid,
            program,
            address,
        }
    }
}

/// Which process a group is of, and the kind of its state.
fn process_of(name: &str) -> Option<(u32, &str)> {
    let (pid, kind) = name.strip_prefix("process-")?.split_once('/')?;
    Some((pid.parse().ok()?, kind))
}

#[cfg(test)]
mod tests {
    use super::*;
    use outlive_epoch::SpaceId;

    #[test]
    fn pages_are_told_by_who_sees_them() {
        const SHARED: u32 = 1 << 31 | 5;
        let mut holders = Holders {
            programs: [(12, "sleep".to_owned()), (13, String::new())].into(),
            ..Holders::default()
        };
        let view = |pid, start, offset| View {
            pid,
            start,
            end: start + 0x4000,
            offset,
        };
        holders.views.insert(
            SHARED,
            vec![view(12, 0x10_0000, 0), view(13, 0x20_0000, 0x3000)],
        );
        let run = |space, first, count| Run::new(SpaceId(space), first, count).unwrap();
        let at = |run| {
            let of = holders.of_pages(run).into_iter();
            of.map(|h| (h.pid, h.program, h.address.unwrap()))
                .collect::<Vec<_>>()
        };
        let sleep = |address| (12, "sleep".to_owned(), address);
        assert_eq!(at(run(12, 7, 1)), [sleep(0x7000)]);
        assert_eq!(at(run(14, 7, 1)), []);
        assert_eq!(at(run(SHARED, 2, 1)), [sleep(0x10_2000)]);
        let both = (13, String::new(), 0x20_0000);
        assert_eq!(at(run(SHARED, 2, 2)), [sleep(0x10_2000), both]);
        assert_eq!(at(run(SHARED, 9, 1)), []);
        let of = holders.of_group("process-12/threads").unwrap();
        assert_eq!((of.pid, of.address), (12, None));
        assert_eq!(holders.of_group("process-x/threads"), None);
        assert_eq!(holders.of_group("subject"), None);
    }
}
