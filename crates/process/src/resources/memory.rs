//! The address space: its mappings, their files, their flags. Contents are pages and go their own
//! way ([`crate::pages`]).

use crate::resources::shared::{self, SharedObjects};
use crate::target::{Stat, Target};
use crate::{ProcessError, Refusal};
use outlive_linux::maps::{Mapping, VmFlags};
use outlive_linux::remote::{Arg, Batch, CallId, Results};
use outlive_state_tree::{StateNode, StateValue};
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// An address space.
#[derive(StateNode, Clone, Debug, PartialEq, Eq)]
#[state(compatible = "outlive,memory-v1")]
pub struct MemoryState {
    /// `start_code`, `end_code`, `start_stack`, `start_data`, `end_data`, `start_brk`,
    /// `arg_start`, `arg_end`, `env_start`, `env_end` (`proc_pid_stat(5)`).
    pub layout: Vec<u64>,
    /// End of the heap (`brk(2)`).
    pub brk: u64,
    /// The auxiliary vector, as the kernel shows it.
    pub auxiliary_vector: Vec<u8>,
    /// How memory is locked that will be mapped: the flags of `mlockall(2)`, 0 for not at all.
    pub lock_future: u32,
    /// Guard regions: start and end addresses in turn.
    pub guards: Vec<u64>,
    /// The files that are mapped.
    #[state(children)]
    pub files: Vec<MappedFile>,
    /// The mappings in address order.
    #[state(children)]
    pub areas: Vec<Area>,
}

/// A mapping.
#[derive(StateNode, Clone, Debug, PartialEq, Eq)]
#[state(compatible = "outlive,area-v1")]
pub struct Area {
    /// Address of the first byte.
    pub start: u64,
    /// Address one past the last byte.
    pub end: u64,
    /// Protection: 1 read, 2 write, 4 execute.
    pub protection: u32,
    /// What lies below the pages.
    pub kind: AreaKind,
    /// Its flags as the two-letter codes of `VmFlags` in `smaps` (`proc_pid_smaps(5)`).
    pub flags: Vec<String>,
    /// Index of the file.
    pub file: Option<u32>,
    /// The space of shared memory.
    pub space: Option<u32>,
    /// Offset into the file or the shared memory, bytes.
    pub offset: u64,
    /// Name given with `PR_SET_VMA_ANON_NAME`.
    pub label: Option<Vec<u8>>,
}

/// What lies below the pages of a mapping.
#[derive(StateValue, Clone, Copy, Debug, PartialEq, Eq)]
pub enum AreaKind {
    /// Zeros, private.
    Anonymous,
    /// A file, private: pages that were written are our own.
    PrivateFile,
    /// A file, shared: its pages belong to the file.
    SharedFile,
    /// Memory that several processes may share.
    SharedMemory,
    /// A System V segment, or a part of it.
    Segment,
    /// Memory that several processes may share, mapped private: pages that were written are our own.
    PrivateMemory,
    /// Code that the kernel gives.
    Vdso,
    /// Data that the kernel gives to that code.
    Vvar,
    /// Further such data.
    VvarVclock,
}

/// A file that is mapped.
#[derive(StateNode, Clone, Debug, PartialEq, Eq)]
#[state(compatible = "outlive,mapped-file-v1")]
pub struct MappedFile {
    /// Its path.
    pub path: Vec<u8>,
    /// Its device.
    pub device: u64,
    /// Its inode.
    pub inode: u64,
    /// Its length, bytes.
    pub size: u64,
    /// When its contents last changed, nanoseconds since the Unix epoch.
    pub modified_ns: i64,
    /// The build ID of an ELF file.
    pub build_id: Option<Vec<u8>>,
    /// It is mapped shared, and may be written through the mapping.
    pub writable: bool,
    /// The space that holds its contents, where the epoch does.
    pub contents: Option<u32>,
    /// Its mode, owner and group, with which it is made again.
    pub access: Vec<u32>,
}

impl MemoryState {
    /// Nothing: of a process that has the address space of another one.
    #[must_use]
    pub fn of_another() -> Self {
        Self {
            layout: vec![0; LAYOUT],
            brk: 0,
            auxiliary_vector: Vec::new(),
            lock_future: 0,
            guards: Vec::new(),
            files: Vec::new(),
            areas: Vec::new(),
        }
    }
}

impl Area {
    /// Whether its own pages belong into the epoch.
    #[must_use]
    pub fn has_pages(&self) -> bool {
        matches!(
            self.kind,
            AreaKind::Anonymous | AreaKind::PrivateFile | AreaKind::PrivateMemory
        )
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// Whether it has no bytes, which only a hostile image can say.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The flags in their typed form; an image is checked for unknown ones before.
    #[must_use]
    pub fn vm_flags(&self) -> VmFlags {
        VmFlags::from_codes(&self.flags).unwrap_or_default()
    }
}

/// What a mapping is; the error names a sort that cannot be saved.
pub fn kind_of(m: &Mapping, flags: VmFlags) -> Result<AreaKind, &'static str> {
    match m.name.as_slice() {
        b"[vdso]" => return Ok(AreaKind::Vdso),
        b"[vvar]" => return Ok(AreaKind::Vvar),
        b"[vvar_vclock]" => return Ok(AreaKind::VvarVclock),
        _ => {}
    }
    let unsupported = [
        (VmFlags::HUGETLB, "explicit huge pages (hugetlbfs)"),
        (VmFlags::IO, "device memory"),
        (VmFlags::PFN, "memory of a device"),
        (VmFlags::SHADOW_STACK, "a shadow stack"),
        (VmFlags::SYNC, "a synchronous DAX mapping"),
        (VmFlags::DROPPABLE, "droppable memory"),
        (VmFlags::MIXED, "memory of a device"),
    ];
    // Execute-only memory is made with such a key by the kernel itself, and made so again.
    if flags.has(VmFlags::PROTECTION_KEY) && m.prot != 4 {
        return Err("memory with a protection key (pkey_mprotect)");
    }
    // Both at once are ours: a program's own userfaultfd would be refused as a descriptor.
    if flags.has(VmFlags::MISSING) && !flags.has(VmFlags::WRITE_PROTECT) {
        return Err("memory that the program's own userfaultfd serves");
    }
    if let Some((_, what)) = unsupported.iter().find(|(flag, _)| flags.has(*flag)) {
        return Err(what);
    }
    let starts = |prefix: &[u8]| m.name.starts_with(prefix);
    match m.shared {
        _ if m.inode == 0 && !m.shared => Ok(AreaKind::Anonymous),
        true if shared::Sort::of(m) == Some(shared::Sort::Segment) => Ok(AreaKind::Segment),
        true if shared::Sort::of(m).is_some() => Ok(AreaKind::SharedMemory),
        false if shared::Sort::of(m).is_some() => Ok(AreaKind::PrivateMemory),
        _ if starts(b"/secretmem") => Err("secret memory"),
        _ if starts(b"/[aio]") => Err("an asynchronous I/O context"),
        _ if starts(b"anon_inode:") => Err("memory of a kernel object"),
        _ if !starts(b"/") => Err("memory of an unknown sort"),
        true => Ok(AreaKind::SharedFile),
        false => Ok(AreaKind::PrivateFile),
    }
}

/// Words of the layout.
pub const LAYOUT: usize = 10;

/// Questions to the leading thread.
pub fn ask(batch: &mut Batch) -> CallId {
    batch.push(libc::SYS_brk, [Arg::Value(0)])
}

/// What is remembered of mapped files from epoch to epoch: their build IDs.
pub type BuildIds = std::collections::HashMap<(u64, u64, i64), Option<Vec<u8>>>;

/// Describes the address space of a stopped process. `mappings` has neither our arena nor
/// `[vsyscall]` in it.
pub fn collect(
    target: &Target,
    mappings: &[(Mapping, VmFlags)],
    guards: &[(u64, u64)],
    build_ids: &mut BuildIds,
    shared: &mut SharedObjects,
    asked: CallId,
    answers: &Results,
) -> Result<MemoryState, ProcessError> {
    let stat = Stat::read(target.pid).map_err(|e| target.kernel("reading its stat", e))?;
    let brk = answers
        .value(asked)
        .map_err(|e| target.kernel("asking for its heap", e))?;
    let mut files = Files {
        target,
        list: Vec::new(),
        build_ids,
    };
    let mut areas = Vec::with_capacity(mappings.len());
    for (m, flags) in mappings {
        let flags = known_or_writable(m, *flags);
        let kind = kind_of(m, flags)
            .map_err(|what| ProcessError::Refused(vec![refusal(target, m, what)]))?;
        let file = match kind {
            AreaKind::PrivateFile | AreaKind::SharedFile => Some(files.index_of(m, flags, shared)?),
            _ => None,
        };
        let space = match kind {
            AreaKind::SharedMemory | AreaKind::PrivateMemory | AreaKind::Segment => {
                Some(shared.space_of(target, m, flags)?)
            }
            _ => None,
        };
        let label = m
            .name
            .strip_prefix(b"[anon:")
            .and_then(|n| n.strip_suffix(b"]"));
        areas.push(Area {
            start: m.start,
            end: m.end,
            protection: m.prot,
            kind,
            flags: flags
                .without(
                    VmFlags::WRITE_PROTECT
                        .with(VmFlags::MISSING)
                        .with(VmFlags::MAY_READ),
                )
                .without(VmFlags::PROTECTION_KEY)
                .codes(),
            file,
            space,
            offset: m.offset,
            label: label.map(<[u8]>::to_vec),
        });
    }
    Ok(MemoryState {
        layout: stat.layout.to_vec(),
        brk,
        auxiliary_vector: target.proc_file("auxv")?,
        lock_future: 0,
        guards: guards.iter().flat_map(|&(s, e)| [s, e]).collect(),
        files: files.list,
        areas,
    })
}

/// A new mapping of shared memory, of which no flags are known yet, may be made writable.
fn known_or_writable(m: &Mapping, flags: VmFlags) -> VmFlags {
    if flags.has(VmFlags::MAY_READ) || shared::Sort::of(m).is_none() {
        flags
    } else {
        flags.with(VmFlags::MAY_WRITE.with(VmFlags::SHARED))
    }
}

/// Whether the file below a mapping must be opened for writing to map it again. Of a new mapping
/// no flags are known yet, but whether it can be written.
fn may_write_file(m: &Mapping, flags: VmFlags) -> bool {
    m.shared && (flags.has(VmFlags::MAY_WRITE) || m.prot & 2 != 0)
}

/// A refusal that names a mapping.
#[must_use]
pub fn refusal(target: &Target, m: &Mapping, what: &str) -> Refusal {
    let name = String::from_utf8_lossy(&m.name);
    let place = format!("address {:x}-{:x}", m.start, m.end);
    let what = if name.is_empty() {
        what.to_owned()
    } else {
        format!("{what} ({name})")
    };
    target.refusal(place, what, "this sort of memory cannot be saved yet")
}

struct Files<'a> {
    target: &'a Target,
    list: Vec<MappedFile>,
    build_ids: &'a mut BuildIds,
}

impl Files<'_> {
    fn index_of(
        &mut self,
        m: &Mapping,
        flags: VmFlags,
        shared: &mut SharedObjects,
    ) -> Result<u32, ProcessError> {
        let writable = may_write_file(m, flags);
        if let Some(at) = self
            .list
            .iter()
            .position(|f| f.inode == m.inode && f.path == m.name)
        {
            self.list[at].writable |= writable;
            self.keep_contents(at, m, shared)?;
            return Ok(at as u32);
        }
        let file = self.describe(m, writable)?;
        self.list.push(file);
        let at = self.list.len() - 1;
        self.keep_contents(at, m, shared)?;
        Ok(at as u32)
    }

    fn keep_contents(
        &mut self,
        at: usize,
        m: &Mapping,
        shared: &mut SharedObjects,
    ) -> Result<(), ProcessError> {
        let file = &mut self.list[at];
        if file.writable && file.size <= shared::MAX_FILE {
            file.contents = Some(shared.space_of(self.target, m, VmFlags::default())?);
        }
        Ok(())
    }

    fn describe(&mut self, m: &Mapping, writable: bool) -> Result<MappedFile, ProcessError> {
        let refuse = |what: &str| ProcessError::Refused(vec![refusal(self.target, m, what)]);
        let path = Path::new(std::ffi::OsStr::from_bytes(&m.name));
        let meta = std::fs::metadata(path)
            .map_err(|e| refuse(&format!("a mapped file is not there: {e}")))?;
        if meta.ino() != m.inode {
            return Err(refuse("a mapped file was replaced by another one"));
        }
        if !meta.is_file() {
            return Err(refuse("memory of a device"));
        }
        let modified_ns = modified_ns(&meta);
        let key = (meta.dev(), meta.ino(), modified_ns);
        let build_id = self
            .build_ids
            .entry(key)
            .or_insert_with(|| build_id(path))
            .clone();
        Ok(MappedFile {
            path: m.name.clone(),
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.size(),
            modified_ns,
            build_id,
            writable,
            contents: None,
            access: vec![meta.mode() & 0o7777, meta.uid(), meta.gid()],
        })
    }
}

/// When the contents of a file last changed.
#[must_use]
pub fn modified_ns(meta: &std::fs::Metadata) -> i64 {
    meta.mtime()
        .saturating_mul(1_000_000_000)
        .saturating_add(meta.mtime_nsec())
}

/// Whether the file that lies at the recorded path now can stand for the one that was mapped.
/// Returns it opened. A file whose contents the epoch holds may look like anything, and is made
/// again where it is gone; its path is then added to `made`.
pub fn reopen(file: &MappedFile, keep: bool, made: &mut Vec<PathBuf>) -> Result<File, String> {
    let shown = String::from_utf8_lossy(&file.path).into_owned();
    let path = Path::new(std::ffi::OsStr::from_bytes(&file.path));
    let mut options = std::fs::OpenOptions::new();
    options.read(true).write(file.writable);
    let opened = match options.open(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && file.contents.is_some() => {
            let new = make_again(file, path, options.create_new(true).mode(0o600));
            new.inspect(|_| made.push(path.to_owned()))
        }
        opened => opened,
    };
    let opened = opened.map_err(|e| format!("the mapped file {shown} cannot be opened: {e}"))?;
    let meta = opened.metadata().map_err(|e| format!("{shown}: {e}"))?;
    if !meta.is_file() {
        return Err(format!("{shown} was a regular file and is none any more"));
    }
    let same_build = file.build_id.is_some() && file.build_id == build_id(path);
    let same = meta.size() == file.size && modified_ns(&meta) == file.modified_ns;
    let contents = file.contents.is_some() && !keep;
    if same || same_build || contents || (keep && meta.size() >= file.size) {
        Ok(opened)
    } else {
        Err(format!(
            "the mapped file {shown} is not the one that was mapped (length, time and build ID differ)"
        ))
    }
}

fn make_again(
    file: &MappedFile,
    path: &Path,
    options: &std::fs::OpenOptions,
) -> std::io::Result<File> {
    let new = options.open(path)?;
    if let [mode, owner, group] = file.access[..] {
        // Without the right to give files away it stays ours.
        let _ = std::os::unix::fs::fchown(&new, Some(owner), Some(group));
        new.set_permissions(std::fs::Permissions::from_mode(mode & 0o7777))?;
    }
    Ok(new)
}

/// The GNU build ID of a 64-bit little-endian ELF file: the `NT_GNU_BUILD_ID` note in one of its
/// `PT_NOTE` segments (`elf(5)`). `None` for everything else.
fn build_id(path: &Path) -> Option<Vec<u8>> {
    const MAX_NOTES: u64 = 64 * 1024;
    let file = File::open(path).ok()?;
    let mut header = [0u8; 64];
    file.read_exact_at(&mut header, 0).ok()?;
    if !header.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let u16_at =
        |b: &[u8], at: usize| Some(u16::from_le_bytes(b.get(at..at + 2)?.try_into().ok()?));
    let u32_at =
        |b: &[u8], at: usize| Some(u32::from_le_bytes(b.get(at..at + 4)?.try_into().ok()?));
    let u64_at =
        |b: &[u8], at: usize| Some(u64::from_le_bytes(b.get(at..at + 8)?.try_into().ok()?));
    let (table, count) = (u64_at(&header, 32)?, u16_at(&header, 56)?);
    for i in 0..u64::from(count) {
        let mut segment = [0u8; 56];
        file.read_exact_at(&mut segment, table.checked_add(i * 56)?)
            .ok()?;
        if u32_at(&segment, 0)? != 4 {
            continue;
        }
        let (offset, size) = (u64_at(&segment, 8)?, u64_at(&segment, 32)?);
        let mut notes = vec![0u8; size.min(MAX_NOTES) as usize];
        file.read_exact_at(&mut notes, offset).ok()?;
        let mut rest = notes.as_slice();
        while rest.len() >= 12 {
            let (name, desc, sort) = (u32_at(rest, 0)?, u32_at(rest, 4)?, u32_at(rest, 8)?);
            let at = 12 + (name as usize).next_multiple_of(4);
            let end = at.checked_add(desc as usize)?;
            if sort == 3 && rest.get(12..16) == Some(b"GNU\0") {
                return rest.get(at..end).map(<[u8]>::to_vec);
            }
            rest = rest.get(end.next_multiple_of(4)..)?;
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file that was mapped a moment before the stop is mapped again as it was.
    #[test]
    fn a_mapping_that_can_be_written_needs_no_flags_to_tell() {
        let mapping = |shared, prot| Mapping {
            start: 0x1000,
            end: 0x2000,
            prot,
            shared,
            offset: 0,
            device: (8, 1),
            inode: 7,
            name: b"/file".to_vec(),
        };
        let unknown = VmFlags::default();
        assert!(may_write_file(&mapping(true, 3), unknown));
        assert!(may_write_file(&mapping(true, 1), VmFlags::MAY_WRITE));
        assert!(!may_write_file(&mapping(true, 1), unknown));
        assert!(!may_write_file(&mapping(false, 3), VmFlags::MAY_WRITE));
    }

    #[test]
    fn a_shell_has_a_build_id_and_a_text_file_has_none() {
        let id = build_id(Path::new("/bin/sh")).unwrap();
        assert!(id.len() >= 8);
        assert_eq!(build_id(Path::new("/etc/passwd")), None);
        assert_eq!(build_id(Path::new("/nowhere")), None);
    }
}
