//! Shared memory from epoch to epoch: which there is, and what of it changed.
//!
//! # How changes are found
//! Any process may write to it, by any mapping, and end before the next epoch: page tables do not
//! tell. So every page is compared, by a 128-bit hash, with what the epochs so far hold. That
//! reads all of it at each look, also at the stop. A deleted file that nobody in the subject can
//! write to is looked at once, a file with a name that is not mapped when its [`Stamp`] may have
//! changed.
//!
//! What was handed on and got into no epoch is owed: it is handed on again, whatever its hash. It
//! may be owed several times over before that.

use super::nameless::{self, DeletedState, MemfdState};
use super::written::{self, Stamp, WrittenFileState};
use super::{
    AnonymousState, MAX_FILE, MappedFileState, Origin, SHARED_SPACE, SegmentState, SharedMemory,
    SharedState, Sort,
};
use crate::interval::IntervalSet;
use crate::residue::Residue;
use crate::resources::descriptors::Probe;
use crate::resources::memory;
use crate::resources::system_v::Members;
use crate::target::Target;
use crate::{ProcessError, Refusal};
use outlive_epoch::{PAGE_SIZE, PageSink, Run, SpaceId};
use outlive_linux::clock::realtime_ns;
use outlive_linux::maps::{Mapping, VmFlags};
use outlive_linux::sysv::{self, Segment};
use rustix::fs::{OFlags, SeekFrom, seek};
use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::{File, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use xxhash_rust::xxh3::xxh3_128;

/// Bytes looked at in one go.
const PIECE: usize = 1 << 20;

/// What to do about memory that is not saved.
const REMEDY: &str = "have the program close and unmap it, or use a file with a name";

/// Device and inode, as the kernel prints them, and the sort: inode numbers of the kernel's own
/// files mean nothing beyond it.
type Key = ((u32, u32), u64, Sort);

/// What is known of one memory from epoch to epoch.
#[derive(Debug)]
struct Known {
    space: u32,
    file: File,
    sort: Sort,
    /// The name that the kernel shows.
    name: Vec<u8>,
    /// Hashes of the pages that the epochs so far hold.
    pages: HashMap<u64, u128>,
    /// Indexes of pages that are to be handed on again.
    owed: IntervalSet,
    /// How many mappings of it there are at this epoch.
    mappings: u64,
    /// Somebody has it at this epoch …
    used: bool,
    /// … and can write to it.
    writable: bool,
    /// How it looked when it was looked at last, where that tells of later changes.
    looked_at: Option<Stamp>,
    /// Whether its file system keeps exact times.
    exact: bool,
    /// A file that is only open, and how it looked when it was described.
    described: Option<(Stamp, WrittenFileState)>,
}

/// All shared memory of a tracked program.
#[derive(Debug, Default)]
pub struct SharedObjects {
    known: HashMap<Key, Known>,
    /// Where a mapping and a descriptor name the same file by different devices.
    aliases: HashMap<Key, Key>,
    made: u32,
    buffer: Vec<u8>,
    /// The largest file that is kept because it is open for writing, bytes.
    files_limit: u64,
    /// Files with a name that are not kept, because of where they are.
    elsewhere: HashSet<Key>,
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
    /// Keeps files up to so many bytes, at most [`MAX_FILE`], that are open for writing.
    #[must_use]
    pub fn with_files(limit: u64) -> Self {
        Self {
            files_limit: limit.min(MAX_FILE),
            ..Self::default()
        }
    }

    /// A new round: what nobody names until its end is in use no more.
    pub fn begin(&mut self) {
        for known in self.known.values_mut() {
            (known.used, known.writable, known.mappings) = (false, false, 0);
        }
    }

    /// The space of the memory that lies below a mapping.
    pub fn space_of(
        &mut self,
        target: &Target,
        m: &Mapping,
        flags: VmFlags,
    ) -> Result<u32, ProcessError> {
        let sort = Sort::of(m).unwrap_or(Sort::Named);
        let writable = m.shared && (flags.has(VmFlags::MAY_WRITE) || m.prot & 2 != 0);
        let key = (m.device, m.inode, sort);
        if let Some(space) = self.known_space(key, writable, 1) {
            return Ok(space);
        }
        let path = if sort == Sort::Named {
            OsStr::from_bytes(&m.name).into()
        } else {
            let name = format!("/proc/{}/map_files/{:x}-{:x}", target.pid, m.start, m.end);
            PathBuf::from(name)
        };
        let failed = |e| target.kernel(format!("opening {}", path.display()), e);
        let file = File::open(&path).map_err(failed)?;
        let meta = file.metadata().map_err(failed)?;
        self.add(key, (file, meta), &m.name, (writable, 1), &|what| {
            memory::refusal(target, m, what)
        })
    }

    /// The space of the memory that a descriptor leads to.
    pub(crate) fn space_of_descriptor(
        &mut self,
        probe: &Probe<'_>,
        sort: Sort,
    ) -> Result<u32, ProcessError> {
        let stat = probe.stat()?;
        let writable = !probe.has(OFlags::PATH) && probe.access() != OFlags::RDONLY.bits();
        let device = (stat.stx_dev_major, stat.stx_dev_minor);
        let key = (device, stat.stx_ino, sort);
        if let Some(space) = self.known_space(key, writable, 0) {
            return Ok(space);
        }
        let file = probe.reopen(OFlags::RDONLY).map(File::from);
        let file = file.map_err(|e| probe.failed("open", e))?;
        let meta = file.metadata().map_err(|e| {
            let errno = rustix::io::Errno::from_io_error(&e).unwrap_or(rustix::io::Errno::IO);
            probe.failed("look at", errno)
        })?;
        self.add(key, (file, meta), &probe.link, (writable, 0), &|what| {
            refusal(probe, what)
        })
    }

    /// The space of a file with a name that a descriptor leads to; `None` where its contents are
    /// not kept.
    pub(crate) fn space_of_written(
        &mut self,
        probe: &Probe<'_>,
    ) -> Result<Option<u32>, ProcessError> {
        let stat = probe.stat()?;
        let device = (stat.stx_dev_major, stat.stx_dev_minor);
        let key = (device, stat.stx_ino, Sort::Named);
        let too_large = self.files_limit == 0 || stat.stx_size > self.files_limit;
        if too_large || self.elsewhere.contains(&key) {
            return Ok(None);
        }
        if let Some(space) = self.known_space(key, true, 0) {
            let true_key = self.aliases.get(&key).unwrap_or(&key);
            if let Some(known) = self.known.get_mut(true_key)
                && known.name != probe.link
            {
                known.name.clone_from(&probe.link);
            }
            return Ok(Some(space));
        }
        let kept = self.known.values().filter(|k| k.is_only_open()).count();
        if kept >= written::most() {
            return Ok(None);
        }
        let opened = probe.reopen(OFlags::RDONLY).map(File::from);
        let opened = opened.ok().filter(|file| written::is_local(file).is_some());
        let Some((file, meta)) = opened.and_then(|f| f.metadata().ok().map(|m| (f, m))) else {
            self.elsewhere.insert(key);
            return Ok(None);
        };
        self.add(key, (file, meta), &probe.link, (true, 0), &|what| {
            refusal(probe, what)
        })
        .map(Some)
    }

    fn known_space(&mut self, key: Key, writable: bool, mappings: u64) -> Option<u32> {
        let key = self.aliases.get(&key).unwrap_or(&key);
        let known = self.known.get_mut(key)?;
        known.used = true;
        known.writable |= writable;
        known.mappings += mappings;
        Some(known.space)
    }

    fn add(
        &mut self,
        key: Key,
        (file, meta): (File, Metadata),
        name: &[u8],
        (writable, mappings): (bool, u64),
        refuse: &dyn Fn(&str) -> Refusal,
    ) -> Result<u32, ProcessError> {
        if matches!(key.2, Sort::Memfd | Sort::Deleted | Sort::Segment) {
            nameless::judge(name, &meta)
                .map_err(|what| ProcessError::Refused(vec![refuse(what)]))?;
        }
        let device = (rustix::fs::major(meta.dev()), rustix::fs::minor(meta.dev()));
        let true_key = (device, meta.ino(), key.2);
        if true_key != key {
            self.aliases.insert(key, true_key);
            if let Some(space) = self.known_space(true_key, writable, mappings) {
                return Ok(space);
            }
        }
        let space = SHARED_SPACE | self.made;
        self.made += 1;
        let known = Known {
            space,
            exact: written::is_local(&file) == Some(true),
            described: None,
            file,
            sort: key.2,
            name: name.to_vec(),
            pages: HashMap::new(),
            owed: IntervalSet::default(),
            mappings,
            used: true,
            writable,
            looked_at: None,
        };
        self.known.insert(true_key, known);
        Ok(space)
    }

    /// Hands changed pages of those memories to a sink that are `due`, while the program runs: it is
    /// asked with whether the epochs so far hold nothing of a memory.
    pub fn copy(
        &mut self,
        mut sink: &mut dyn PageSink,
        due: impl Fn(bool) -> bool,
    ) -> Result<(), ProcessError> {
        let buffer = &mut self.buffer;
        self.known
            .values_mut()
            .filter(|known| due(known.looked_at.is_none()))
            .filter(|known| !known.is_only_open() || known.pages.is_empty())
            .try_for_each(|k| k.look(buffer, &mut sink, false).map(drop))
    }

    /// Adds the System V segments of the program that nobody has mapped.
    pub fn add_segments(&mut self, segments: &[Segment]) -> Result<(), ProcessError> {
        for segment in segments {
            let id = segment.object.id;
            let inode = u64::from(id.cast_unsigned());
            let known = self
                .known
                .keys()
                .find(|k| (k.1, k.2) == (inode, Sort::Segment));
            if let Some(&key) = known {
                self.known_space(key, false, 0);
                continue;
            }
            let opened = sysv::open_segment(id, segment.size, false)
                .and_then(|file| file.metadata().map(|meta| (file, meta)));
            let opened = match opened {
                Ok(opened) => opened,
                // Removed meanwhile by somebody else.
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => continue,
                Err(e) => return Err(super::failed("opening System V shared memory", e)),
            };
            let device = opened.1.dev();
            let device = (rustix::fs::major(device), rustix::fs::minor(device));
            let name = format!("/SYSV{:08x}", segment.object.key);
            let refuse = |what: &str| Refusal {
                pid: segment.creator,
                program: String::new(),
                place: name.clone(),
                what: what.into(),
                remedy: REMEDY.into(),
            };
            self.add(
                (device, inode, Sort::Segment),
                opened,
                name.as_bytes(),
                (false, 0),
                &refuse,
            )?;
        }
        Ok(())
    }

    /// Takes changed pages, and describes what is in use, while the program stands still.
    /// `segments` are all that the machine has.
    pub fn take(
        &mut self,
        segments: &[Segment],
        root: &Target,
        members: &Members,
    ) -> Result<(SharedState, Residue), ProcessError> {
        let of_segment = |key: &Key, known: &Known| {
            let listed = segments
                .iter()
                .find(|s| u64::from(s.object.id.cast_unsigned()) == key.1);
            let listed = listed.ok_or_else(|| {
                let gone = std::io::Error::from_raw_os_error(libc::EIDRM);
                known.failed("listing", gone)
            })?;
            let state = SegmentState::collect(listed, known.mappings, root, members)?;
            Ok::<_, ProcessError>((Origin::Segment(state), listed.size))
        };
        let mut residue = Residue::default();
        let buffer = &mut self.buffer;
        let mut memories = Vec::new();
        for (key, known) in &mut self.known {
            if known.used {
                let size = known.look(buffer, &mut residue, true)?;
                let (origin, size) = match known.origin() {
                    Ok(Some(origin)) => (origin, size),
                    Ok(None) => of_segment(key, known)?,
                    Err(e) => return Err(known.failed("describing", e)),
                };
                memories.push(SharedMemory {
                    space: known.space,
                    size,
                    origin,
                });
            } else {
                known.drop_all(&mut residue)?;
            }
        }
        self.known.retain(|_, k| k.used);
        let known = &self.known;
        self.aliases.retain(|_, to| known.contains_key(to));
        memories.sort_by_key(|m| m.space);
        Ok((SharedState { memories }, residue))
    }

    /// Pages that were handed over got into no epoch: those that are still there are handed over
    /// again.
    pub fn owe(&mut self, pages: &[Run]) {
        for run in pages {
            let mut all = self.known.values_mut();
            let Some(known) = all.find(|known| SpaceId(known.space) == run.space()) else {
                continue;
            };
            known.looked_at = None;
            known.owed.insert(run.first(), run.end());
        }
    }

    /// What was taken as saved is not.
    pub fn forget(&mut self) {
        for known in self.known.values_mut() {
            known.pages.clear();
            known.owed.clear();
            known.looked_at = None;
        }
    }
}

fn refusal(probe: &Probe<'_>, what: &str) -> Refusal {
    Refusal {
        pid: probe.target.pid,
        program: probe.target.program.to_owned(),
        place: format!("fd {}", probe.number),
        what: format!("{what} ({})", probe.shown()),
        remedy: REMEDY.into(),
    }
}

impl Known {
    fn failed(&self, what: &str, source: std::io::Error) -> ProcessError {
        let what = format!("{what} shared memory ({})", self.name.escape_ascii());
        super::failed(&what, source)
    }

    fn stamp(&self) -> Result<Stamp, ProcessError> {
        let meta = self.file.metadata();
        let meta = meta.map_err(|e| self.failed("asking for the length of", e))?;
        Ok(Stamp::of(&meta))
    }

    /// A file with a name that nobody of the program has mapped.
    fn is_only_open(&self) -> bool {
        self.sort == Sort::Named && self.mappings == 0
    }

    /// Whether it is as it was when it was looked at last.
    fn is_unchanged(&self, stamp: Stamp) -> bool {
        let only_read = self.sort == Sort::Deleted && !self.writable;
        (only_read || self.is_only_open()) && self.looked_at == Some(stamp)
    }

    /// What it is; `None` for a segment, which its file does not describe.
    fn origin(&mut self) -> std::io::Result<Option<Origin>> {
        Ok(Some(match self.sort {
            Sort::Segment => return Ok(None),
            Sort::Anonymous => Origin::Anonymous(AnonymousState {}),
            Sort::Named if self.is_only_open() => Origin::WrittenFile(self.described()?),
            Sort::Named => Origin::MappedFile(MappedFileState {}),
            Sort::Memfd => Origin::Memfd(MemfdState::collect(&self.name, &self.file)?),
            Sort::Deleted => Origin::Deleted(DeletedState::collect(&self.name, &self.file)?),
        }))
    }

    /// The file, which is asked for no more while it is unchanged.
    fn described(&mut self) -> std::io::Result<WrittenFileState> {
        if let Some((stamp, state)) = &self.described
            && self.looked_at == Some(*stamp)
            && state.path == self.name
        {
            return Ok(state.clone());
        }
        let state = WrittenFileState::collect(&self.name, &self.file)?;
        self.described = self.looked_at.map(|stamp| (stamp, state.clone()));
        Ok(state)
    }

    fn run(&self, first: u64, count: u64) -> Result<Run, ProcessError> {
        Run::new(SpaceId(self.space), first, count)
            .ok_or_else(|| ProcessError::Image(format!("page {first} of shared memory")))
    }

    /// Compares every page that exists with what is known, and hands on what differs or is owed.
    /// The program may be `standing`. Returns how long it is.
    fn look(
        &mut self,
        buffer: &mut Vec<u8>,
        changes: &mut impl Changes,
        standing: bool,
    ) -> Result<u64, ProcessError> {
        let stamp = self.stamp()?;
        if self.is_unchanged(stamp) {
            return Ok(stamp.size);
        }
        let now = i64::try_from(realtime_ns()).unwrap_or(0);
        let tells = standing && stamp.is_certain(self.exact, now);
        self.looked_at = (!self.is_only_open() || tells).then_some(stamp);
        let owed = std::mem::take(&mut self.owed);
        buffer.resize(PIECE, 0);
        let size = stamp.size;
        let mut seen = HashMap::with_capacity(self.pages.len());
        let mut at = 0;
        while let Some((start, end)) = self.next_data(at, size)? {
            at = start;
            while at < end {
                let want = buffer.len().min((end - at) as usize);
                let piece = &mut buffer[..want];
                self.read(piece, at)
                    .map_err(|e| self.failed("reading", e))?;
                for (i, page) in piece.chunks_exact(PAGE_SIZE).enumerate() {
                    let index = at / PAGE_SIZE as u64 + i as u64;
                    let hash = xxh3_128(page);
                    let is_owed = owed.within(index, index + 1).next().is_some();
                    if self.pages.remove(&index) != Some(hash) || is_owed {
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
            .try_for_each(|&index| changes.gone(self.run(index, 1)?))?;
        Ok(size)
    }

    /// Fills the buffer; beyond the end of the file there are zeros.
    fn read(&self, mut buffer: &mut [u8], mut at: u64) -> std::io::Result<()> {
        while !buffer.is_empty() {
            match self.file.read_at(buffer, at) {
                Ok(0) => {
                    buffer.fill(0);
                    break;
                }
                Ok(n) => {
                    buffer = &mut buffer[n..];
                    at += n as u64;
                }
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create};

    fn object() -> Known {
        Known {
            space: SHARED_SPACE,
            file: File::from(memfd_create("test", MemfdFlags::CLOEXEC).unwrap()),
            sort: Sort::Anonymous,
            name: b"test".to_vec(),
            pages: HashMap::new(),
            owed: IntervalSet::default(),
            mappings: 1,
            used: true,
            writable: true,
            looked_at: None,
            exact: true,
            described: None,
        }
    }

    fn changes(known: &mut Known) -> (Vec<u64>, Vec<u64>) {
        let mut residue = Residue::default();
        known.look(&mut Vec::new(), &mut residue, true).unwrap();
        let firsts = |runs: &[Run]| runs.iter().map(Run::first).collect();
        (firsts(&residue.runs), firsts(&residue.absent))
    }

    #[test]
    fn only_what_changed_is_taken() {
        let mut known = object();
        known.file.set_len(10 * 4096 + 5).unwrap();
        known.file.write_all_at(&[1; 2 * 4096], 3 * 4096).unwrap();
        assert_eq!(changes(&mut known), (vec![3, 4], vec![]));
        assert_eq!(changes(&mut known), (vec![], vec![]));
        known.file.write_all_at(&[2], 4 * 4096 + 7).unwrap();
        known.file.write_all_at(&[2], 10 * 4096 + 3).unwrap();
        assert_eq!(changes(&mut known), (vec![4, 10], vec![]));
        let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&known.file, punch, 3 * 4096, 4096).unwrap();
        assert_eq!(changes(&mut known), (vec![], vec![3]));
    }

    /// A page is written once after it was handed on, and both are given up.
    #[test]
    fn what_is_owed_twice_is_taken() {
        let mut known = object();
        known.file.write_all_at(&[1; 4 * 4096], 0).unwrap();
        assert_eq!(changes(&mut known).0, [0, 1, 2, 3]);
        known.file.write_all_at(&[2], 4096).unwrap();
        assert_eq!(changes(&mut known).0, [1]);
        let key = ((0, 1), 7, Sort::Anonymous);
        let mut objects = SharedObjects::default();
        objects.known.insert(key, known);
        let runs = [(1, 2), (1, 1)].map(|(first, n)| Run::new(SpaceId(SHARED_SPACE), first, n));
        for run in runs {
            objects.owe(&[run.unwrap()]);
        }
        let known = objects.known.get_mut(&key).unwrap();
        assert_eq!(changes(known), (vec![1, 2], vec![]));
        assert_eq!(changes(known), (vec![], vec![]));
    }

    #[test]
    fn what_is_owed_and_is_no_more_is_absent() {
        let mut known = object();
        known.file.write_all_at(&[1; 3 * 4096], 0).unwrap();
        changes(&mut known);
        known.owed.insert(1, 3);
        known.file.set_len(2 * 4096).unwrap();
        assert_eq!(changes(&mut known), (vec![1], vec![2]));
    }

    #[test]
    fn a_file_that_is_only_open_is_looked_at_again_when_it_may_have_changed() {
        let mut known = object();
        (known.sort, known.mappings) = (Sort::Named, 0);
        known.file.write_all_at(&[1; 2 * 4096], 0).unwrap();
        assert_eq!(changes(&mut known), (vec![0, 1], vec![]));
        assert!(known.looked_at.is_some());
        known.file.write_all_at(&[2], 5000).unwrap();
        assert_eq!(changes(&mut known), (vec![1], vec![]));
        known.pages.clear();
        assert_eq!(changes(&mut known), (vec![], vec![]), "it was not read");
        // Who looks while the program runs has seen nothing for certain.
        known.file.write_all_at(&[3], 5000).unwrap();
        let mut ahead = Residue::default();
        known.look(&mut Vec::new(), &mut ahead, false).unwrap();
        assert_eq!((ahead.runs.len(), known.looked_at), (2, None));
        // Nor where times are not exact and the clock did not tick.
        known.exact = false;
        assert_eq!(changes(&mut known), (vec![], vec![]));
        assert_eq!(known.looked_at, None);
        (known.exact, known.mappings) = (true, 1);
        changes(&mut known);
        known.pages.clear();
        assert_eq!(
            changes(&mut known).0,
            [0, 1],
            "what is mapped is always read"
        );
    }

    #[test]
    fn a_deleted_file_is_looked_at_again_when_somebody_can_write_to_it() {
        let mut known = object();
        (known.sort, known.writable) = (Sort::Deleted, false);
        known.file.write_all_at(&[1; 4096], 0).unwrap();
        assert_eq!(changes(&mut known), (vec![0], vec![]));
        known.pages.clear();
        assert_eq!(changes(&mut known), (vec![], vec![]));
        known.writable = true;
        assert_eq!(changes(&mut known), (vec![0], vec![]));
    }
}
