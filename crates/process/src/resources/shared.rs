//! Memory that several processes share: anonymous shared mappings (`MAP_SHARED | MAP_ANONYMOUS`),
//! and files that are mapped shared and writable.
//!
//! Anonymous shared memory is a file of the kernel's own that has no name. It is read through
//! `/proc/PID/map_files`, and made again as a memfd, which differs only in the name that `maps`
//! shows. A mapped file is used as memory: stores to it happen all the time and leave no trace but
//! its contents. So these are kept in the epoch, up to [`MAX_FILE`], and put back at a restore,
//! whatever has become of the file since; it is made again where it is gone.
//!
//! # How changes are found
//! Any process may write to it, by any mapping, and end before the next epoch: page tables do not
//! tell. So every page is compared, by a 128-bit hash, with what the epochs so far hold. That
//! reads all of it at each look, also at the stop.
//!
//! # What is not known
//! Whether a process outside the subject has mapped it too. If so, they share it no more after a
//! restore.

use crate::ProcessError;
use crate::pages::Residue;
use crate::target::Target;
use outlive_epoch::{PAGE_SIZE, PageSink, Run, SpaceId};
use outlive_linux::maps::Mapping;
use outlive_state_tree::StateNode;
use rustix::fs::{MemfdFlags, SeekFrom, ftruncate, memfd_create, seek};
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use xxhash_rust::xxh3::xxh3_128;

/// The name of the memfds that stand for shared memory in a restored program.
const NAME: &str = "outlive-shared";
/// Spaces of shared memory have this bit, those of processes have not.
const SHARED_SPACE: u32 = 1 << 31;
/// The largest mapped file whose contents are kept, bytes. A larger one must not have changed.
pub const MAX_FILE: u64 = 256 << 20;
/// Bytes looked at in one go.
const PIECE: usize = 1 << 20;

/// All shared memory of a subject.
#[derive(StateNode, Clone, Debug, Default, PartialEq, Eq)]
#[state(compatible = "outlive,shared-memory-v1")]
pub struct SharedState {
    /// The memories.
    #[state(children)]
    pub memories: Vec<SharedMemory>,
}

/// One memory that several processes may share.
#[derive(StateNode, Clone, Debug, PartialEq, Eq)]
#[state(compatible = "outlive,shared-contents-v1")]
pub struct SharedMemory {
    /// The space of its pages, by which areas refer to it.
    pub space: u32,
    /// Its length, bytes.
    pub size: u64,
    /// It is a mapped file, described with the mappings.
    pub is_file: bool,
}

/// Whether a shared mapping is of this sort.
#[must_use]
pub fn is_anonymous(m: &Mapping) -> bool {
    m.shared
        && (m.name == b"/dev/zero (deleted)"
            || m.name == format!("/memfd:{NAME} (deleted)").as_bytes())
}

/// What is known of one memory from epoch to epoch.
#[derive(Debug)]
struct Known {
    space: u32,
    file: File,
    is_file: bool,
    /// Hashes of the pages that the epochs so far hold.
    pages: HashMap<u64, u128>,
    /// Somebody maps it at this epoch.
    mapped: bool,
}

/// All shared memory of a tracked program.
#[derive(Debug, Default)]
pub struct SharedObjects {
    known: HashMap<((u32, u32), u64), Known>,
    made: u32,
    buffer: Vec<u8>,
}

/// Takes changed pages.
trait Changes {
    fn changed(&mut self, run: Run, bytes: &[u8]) -> Result<(), ProcessError>;
    fn gone(&mut self, run: Run) -> Result<(), ProcessError>;
}

impl Changes for &mut dyn PageSink {
    fn changed(&mut self, run: Run, bytes: &[u8]) -> Result<(), ProcessError> {
        Ok(self.put(run, bytes)?)
    }

    fn gone(&mut self, run: Run) -> Result<(), ProcessError> {
        Ok(self.absent(run)?)
    }
}

impl Changes for Residue {
    fn changed(&mut self, run: Run, bytes: &[u8]) -> Result<(), ProcessError> {
        self.runs.push(run);
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    fn gone(&mut self, run: Run) -> Result<(), ProcessError> {
        self.absent.push(run);
        Ok(())
    }
}

impl SharedObjects {
    /// A new round: what nobody names until its end is mapped no more.
    pub fn begin(&mut self) {
        self.known.values_mut().for_each(|k| k.mapped = false);
    }

    /// The space of the memory that lies below a mapping.
    pub fn space_of(&mut self, target: &Target, m: &Mapping) -> Result<u32, ProcessError> {
        let is_file = !is_anonymous(m);
        let key = (m.device, m.inode);
        if let Some(known) = self.known.get_mut(&key) {
            known.mapped = true;
            return Ok(known.space);
        }
        let path = if is_file {
            OsStr::from_bytes(&m.name).into()
        } else {
            let name = format!("/proc/{}/map_files/{:x}-{:x}", target.pid, m.start, m.end);
            PathBuf::from(name)
        };
        let file = File::open(&path)
            .map_err(|e| target.kernel(format!("opening {}", path.display()), e))?;
        let space = SHARED_SPACE | self.made;
        self.made += 1;
        self.known.insert(
            key,
            Known {
                space,
                file,
                is_file,
                pages: HashMap::new(),
                mapped: true,
            },
        );
        Ok(space)
    }

    /// Hands changed pages to a sink while the program runs.
    pub fn copy(&mut self, mut sink: &mut dyn PageSink) -> Result<(), ProcessError> {
        let buffer = &mut self.buffer;
        self.known
            .values_mut()
            .try_for_each(|k| k.look(buffer, &mut sink))
    }

    /// Takes changed pages, and describes what is mapped, while the program stands still.
    pub fn take(&mut self) -> Result<(SharedState, Residue), ProcessError> {
        let mut residue = Residue::default();
        let buffer = &mut self.buffer;
        let mut memories = Vec::new();
        for known in self.known.values_mut() {
            if known.mapped {
                known.look(buffer, &mut residue)?;
                memories.push(SharedMemory {
                    space: known.space,
                    size: known.size()?,
                    is_file: known.is_file,
                });
            } else {
                known.drop_all(&mut residue)?;
            }
        }
        self.known.retain(|_, k| k.mapped);
        memories.sort_by_key(|m| m.space);
        Ok((SharedState { memories }, residue))
    }

    /// What was taken as saved is not.
    pub fn forget(&mut self) {
        self.known.values_mut().for_each(|k| k.pages.clear());
    }
}

impl Known {
    fn failed(&self, what: &str, source: std::io::Error) -> ProcessError {
        let what = format!("{what} shared memory");
        ProcessError::Kernel {
            pid: 0,
            what,
            source,
        }
    }

    fn size(&self) -> Result<u64, ProcessError> {
        Ok(self
            .file
            .metadata()
            .map_err(|e| self.failed("asking for the length of", e))?
            .len())
    }

    fn run(&self, first: u64, count: u64) -> Result<Run, ProcessError> {
        Run::new(SpaceId(self.space), first, count)
            .ok_or_else(|| ProcessError::Image(format!("page {first} of shared memory")))
    }

    /// Compares every page that exists with what is known, and hands on what differs.
    fn look(
        &mut self,
        buffer: &mut Vec<u8>,
        changes: &mut impl Changes,
    ) -> Result<(), ProcessError> {
        buffer.resize(PIECE, 0);
        let size = self.size()?;
        let mut seen = HashMap::with_capacity(self.pages.len());
        let mut at = 0;
        while let Some((start, end)) = self.next_data(at, size)? {
            at = start;
            while at < end {
                let want = buffer.len().min((end - at) as usize);
                let piece = &mut buffer[..want];
                self.file
                    .read_exact_at(piece, at)
                    .map_err(|e| self.failed("reading", e))?;
                for (i, page) in piece.chunks_exact(PAGE_SIZE).enumerate() {
                    let index = at / PAGE_SIZE as u64 + i as u64;
                    let hash = xxh3_128(page);
                    if self.pages.remove(&index) != Some(hash) {
                        changes.changed(self.run(index, 1)?, page)?;
                    }
                    seen.insert(index, hash);
                }
                at += want as u64;
            }
        }
        // What is left was there before and is not any more.
        let gone = std::mem::replace(&mut self.pages, seen);
        gone.keys()
            .try_for_each(|&index| changes.gone(self.run(index, 1)?))
    }

    fn drop_all(&mut self, changes: &mut impl Changes) -> Result<(), ProcessError> {
        let gone = std::mem::take(&mut self.pages);
        gone.keys()
            .try_for_each(|&index| changes.gone(self.run(index, 1)?))
    }

    /// The next range, whole pages, that is no hole.
    fn next_data(&self, from: u64, size: u64) -> Result<Option<(u64, u64)>, ProcessError> {
        if from >= size {
            return Ok(None);
        }
        let page = PAGE_SIZE as u64;
        let start = match seek(&self.file, SeekFrom::Data(from)) {
            Ok(start) => start / page * page,
            Err(rustix::io::Errno::NXIO) => return Ok(None),
            Err(e) => return Err(self.failed("looking through", e.into())),
        };
        let end = seek(&self.file, SeekFrom::Hole(start))
            .map_err(|e| self.failed("looking through", e.into()))?;
        Ok(Some((
            start,
            end.next_multiple_of(page).min(size.next_multiple_of(page)),
        )))
    }
}

/// Makes the memories again, empty, by their spaces. An image is hostile: spaces are unique, and
/// never those of processes.
pub fn recreate(state: &SharedState) -> Result<HashMap<u32, (File, u64)>, ProcessError> {
    let mut made = HashMap::new();
    for memory in state.memories.iter().filter(|m| !m.is_file) {
        let twice = made.contains_key(&memory.space);
        if memory.space & SHARED_SPACE == 0 || twice || memory.size > i64::MAX as u64 {
            return Err(ProcessError::Image(format!(
                "shared memory {:x} makes no sense",
                memory.space
            )));
        }
        let failed = |e: rustix::io::Errno| ProcessError::Kernel {
            pid: 0,
            what: "making shared memory".into(),
            source: e.into(),
        };
        let fd = memfd_create(NAME, MemfdFlags::CLOEXEC).map_err(failed)?;
        ftruncate(&fd, memory.size).map_err(failed)?;
        made.insert(memory.space, (File::from(fd), memory.size));
    }
    Ok(made)
}

/// A mapped file with the contents that it is to have. Nothing is written before
/// [`FileContents::apply`].
#[derive(Debug)]
pub struct FileContents {
    file: File,
    size: u64,
    pages: HashMap<u64, Vec<u8>>,
}

impl FileContents {
    /// A file that is to be all zero, as yet.
    pub fn new(file: File, size: u64) -> Result<Self, ProcessError> {
        if size > MAX_FILE {
            return Err(ProcessError::Image(format!(
                "a mapped file of {size} bytes"
            )));
        }
        Ok(Self {
            file,
            size,
            pages: HashMap::new(),
        })
    }

    /// Notes contents, whole pages from this offset on.
    pub fn note(&mut self, at: u64, bytes: &[u8]) {
        for (i, page) in bytes.chunks(PAGE_SIZE).enumerate() {
            let index = at / PAGE_SIZE as u64 + i as u64;
            if index * (PAGE_SIZE as u64) < self.size {
                self.pages.insert(index, page.to_vec());
            }
        }
    }

    /// Gives the file its contents; what is right already is not written.
    pub fn apply(&self) -> std::io::Result<()> {
        self.file.set_len(self.size)?;
        let (zeros, mut now) = ([0u8; PAGE_SIZE], [0u8; PAGE_SIZE]);
        for at in (0..self.size).step_by(PAGE_SIZE) {
            let len = PAGE_SIZE.min((self.size - at) as usize);
            let wanted = self
                .pages
                .get(&(at / PAGE_SIZE as u64))
                .map_or(&zeros[..], Vec::as_slice);
            self.file.read_exact_at(&mut now[..len], at)?;
            if now[..len] != wanted[..len.min(wanted.len())] {
                self.file
                    .write_all_at(&wanted[..len.min(wanted.len())], at)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(file: File) -> Known {
        Known {
            space: SHARED_SPACE,
            file,
            is_file: false,
            pages: HashMap::new(),
            mapped: true,
        }
    }

    fn changes(known: &mut Known) -> (Vec<u64>, Vec<u64>) {
        let mut residue = Residue::default();
        known.look(&mut Vec::new(), &mut residue).unwrap();
        let firsts = |runs: &[Run]| runs.iter().map(Run::first).collect();
        (firsts(&residue.runs), firsts(&residue.absent))
    }

    #[test]
    fn only_what_changed_is_taken() {
        let state = SharedState {
            memories: vec![SharedMemory {
                space: SHARED_SPACE,
                size: 10 * 4096,
                is_file: false,
            }],
        };
        let (file, _) = recreate(&state).unwrap().remove(&SHARED_SPACE).unwrap();
        file.write_all_at(&[1; 2 * 4096], 3 * 4096).unwrap();
        let mut known = object(file);
        assert_eq!(changes(&mut known), (vec![3, 4], vec![]));
        assert_eq!(changes(&mut known), (vec![], vec![]));
        known.file.write_all_at(&[2], 4 * 4096 + 7).unwrap();
        assert_eq!(changes(&mut known), (vec![4], vec![]));
        let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&known.file, punch, 3 * 4096, 4096).unwrap();
        assert_eq!(changes(&mut known), (vec![], vec![3]));
    }

    #[test]
    fn a_file_gets_its_contents_back() {
        let mut file = tempfile();
        file.write_all_at(b"changed since, and longer than it was", 0)
            .unwrap();
        let mut contents = FileContents::new(file.try_clone().unwrap(), 5000).unwrap();
        contents.note(4096, &[7; PAGE_SIZE]);
        contents.apply().unwrap();
        let mut text = Vec::new();
        std::io::Read::read_to_end(&mut file, &mut text).unwrap();
        assert_eq!(text, [[0; 4096].to_vec(), [7; 904].to_vec()].concat());
        assert!(FileContents::new(file, MAX_FILE + 1).is_err());
    }

    fn tempfile() -> File {
        File::from(memfd_create("test", MemfdFlags::CLOEXEC).unwrap())
    }

    #[test]
    fn hostile_spaces_are_refused() {
        let one = |space, size| SharedMemory {
            space,
            size,
            is_file: false,
        };
        for memories in [
            vec![one(1, 4096)],
            vec![one(SHARED_SPACE, 1), one(SHARED_SPACE, 2)],
            vec![one(SHARED_SPACE, u64::MAX)],
        ] {
            assert!(recreate(&SharedState { memories }).is_err());
        }
    }
}
