//! Making the address space: mappings first, then contents, then protections, seals and locks.

use super::heirs::{Heritage, first_protection};
use super::lazy::at_once;
use super::stub::{Step, Stub, step};
use crate::ProcessError;
use crate::resources::memory::{Area, AreaKind, LAYOUT, MappedFile, MemoryState};
use crate::resources::shared::{FileContents, Memories, Memory};
use crate::target::Target;
use outlive_epoch::{Content, EpochReader, Order, PAGE_SIZE, Run, SpaceId, VisitError};
use outlive_linux::maps::{self, Mapping, VmFlags};
use outlive_linux::memory;
use outlive_linux::remote::{Arg, Batch};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

const PAGE: u64 = PAGE_SIZE as u64;
/// Highest address of user space with four-level page tables.
const TOP: u64 = 0x7fff_ffff_f000;
/// Bytes from which a run is populated beforehand.
const WORTH_POPULATING: u64 = 64 * 1024;
/// Calls that fit into one batch.
const MAX_POPULATED: usize = 4096;
const MADV_POPULATE_WRITE: u64 = 23;
const MADV_GUARD_INSTALL: u64 = 102;
const SYS_MSEAL: i64 = 462;
const PR_SET_VMA: u64 = 0x5356_4d41;

/// An image is hostile: areas must be whole pages, in order, disjoint and below the top; every
/// reference must lead somewhere.
pub fn validate(state: &MemoryState) -> Result<(), ProcessError> {
    let bad = |what: String| Err(ProcessError::Image(format!("memory: {what}")));
    let mut last = PAGE;
    for a in &state.areas {
        if a.start % PAGE != 0
            || a.end % PAGE != 0
            || a.start < last
            || a.end <= a.start
            || a.end > TOP
        {
            return bad(format!(
                "area {:x}-{:x} is out of order or range",
                a.start, a.end
            ));
        }
        last = a.end;
        if VmFlags::from_codes(&a.flags).is_none() {
            return bad(format!("area {:x} has unknown flags", a.start));
        }
        let needs_file = matches!(a.kind, AreaKind::PrivateFile | AreaKind::SharedFile);
        let file = a.file.and_then(|f| state.files.get(f as usize));
        if needs_file != a.file.is_some() || needs_file != file.is_some() {
            return bad(format!("area {:x} refers to no file", a.start));
        }
        if a.protection > 7 || a.offset % PAGE != 0 {
            return bad(format!(
                "area {:x} has a wrong protection or offset",
                a.start
            ));
        }
    }
    if state.layout.len() != LAYOUT || !state.guards.len().is_multiple_of(2) {
        return bad("fields of a wrong length".into());
    }
    Ok(())
}

/// An address where `length` bytes are free in this process (of which the new ones are copies)
/// and in all saved layouts, away from anything that may grow.
pub fn find_hole(
    states: &[&MemoryState],
    ours: &[Mapping],
    length: u64,
) -> Result<u64, ProcessError> {
    const MARGIN: u64 = 16 << 20;
    if length > TOP {
        return Err(ProcessError::Image("memory: a segment is too long".into()));
    }
    let areas = states.iter().flat_map(|s| &s.areas);
    let mut taken: Vec<(u64, u64)> = areas.map(|a| (a.start, a.end)).collect();
    taken.extend(ours.iter().map(|m| (m.start, m.end)));
    taken.sort_unstable();
    let mut free_from = 0x1_0000_0000;
    for (start, end) in taken {
        if start > free_from && start - free_from >= length + 2 * MARGIN {
            break;
        }
        free_from = free_from.max(end);
    }
    let at = (free_from + MARGIN).next_multiple_of(PAGE);
    if at + length > TOP {
        return Err(ProcessError::Image(
            "memory: no room for working memory".into(),
        ));
    }
    Ok(at)
}

/// The mappings that the kernel gives to every process.
pub fn kernel_kind(m: &Mapping) -> Option<AreaKind> {
    match m.name.as_slice() {
        b"[vdso]" => Some(AreaKind::Vdso),
        b"[vvar]" => Some(AreaKind::Vvar),
        b"[vvar_vclock]" => Some(AreaKind::VvarVclock),
        _ => None,
    }
}

/// Has the new process forget what it inherited of restartable sequences: the kernel ends a process
/// whose registration lies in memory that is gone.
pub fn forget_rseq(stub: &mut Stub) -> Result<(), ProcessError> {
    let halted = stub.threads[0].halted().ok();
    match halted.and_then(|h| h.rseq().ok().flatten()) {
        None => Ok(()),
        Some(r) => {
            let args = [r.address, u64::from(r.size), 1, u64::from(r.signature)];
            let steps = vec![step(libc::SYS_rseq, args, "unregistering rseq")];
            stub.steps(steps).map(drop)
        }
    }
}

/// Empties the address space, but for working memory, what is kept of the parent's, and what the
/// kernel gave, which moves to its place.
pub fn clear(
    stub: &mut Stub,
    state: &MemoryState,
    heritage: Option<&Heritage>,
) -> Result<(), ProcessError> {
    forget_rseq(stub)?;
    let (arena, length) = stub.arena.range();
    let pid = stub.target.pid;
    let all = maps::read(pid).map_err(|e| stub.target.kernel("reading its mappings", e))?;
    let mut steps = Vec::new();
    let ours: Vec<&Mapping> = all
        .iter()
        .filter(|m| m.start < arena || m.end > arena + length)
        .collect();
    for m in ours.iter().filter(|m| kernel_kind(m).is_none()) {
        let whole = || vec![(m.start, m.end)];
        for (start, end) in heritage.map_or_else(whole, |h| h.outside(m.start, m.end)) {
            let args = [start, end - start];
            steps.push(step(libc::SYS_munmap, args, "emptying the address space"));
        }
    }
    stub.steps(steps)?;
    move_kernel_areas(stub, state, &ours)
}

/// In two moves, by way of a free place, because old and new places may overlap.
fn move_kernel_areas(
    stub: &mut Stub,
    state: &MemoryState,
    ours: &[&Mapping],
) -> Result<(), ProcessError> {
    let (arena, length) = stub.arena.range();
    let mut away = Vec::new();
    let mut home = Vec::new();
    // Behind working memory there is a margin that nothing uses.
    let mut aside = arena + length + (4 << 20);
    for m in ours {
        let Some(kind) = kernel_kind(m) else { continue };
        let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
        let len = m.len();
        match state.areas.iter().find(|a| a.kind == kind) {
            Some(area) => {
                let what = "moving what the kernel maps";
                away.push(step(
                    libc::SYS_mremap,
                    [m.start, len, len, flags, aside],
                    what,
                ));
                home.push(step(
                    libc::SYS_mremap,
                    [aside, len, len, flags, area.start],
                    what,
                ));
                aside += len;
            }
            None => away.push(step(libc::SYS_munmap, [m.start, len], "unmapping the vDSO")),
        }
    }
    away.append(&mut home);
    stub.steps(away).map(drop)
}

/// Runs of pages that the epoch holds, clipped to the areas that take pages.
struct Clip<'a> {
    areas: Vec<&'a Area>,
}

impl<'a> Clip<'a> {
    fn new(state: &'a MemoryState) -> Self {
        Self {
            areas: state.areas.iter().filter(|a| a.has_pages()).collect(),
        }
    }

    /// The parts of `start..end` that lie in areas, each with its area.
    fn parts(&self, start: u64, end: u64) -> impl Iterator<Item = (u64, u64, &'a Area)> + '_ {
        let first = self.areas.partition_point(|a| a.end <= start);
        self.areas[first..]
            .iter()
            .take_while(move |a| a.start < end)
            .map(move |a| (start.max(a.start), end.min(a.end), *a))
    }
}

/// Pages that an epoch holds, as ranges of addresses.
pub type Runs = Vec<(u64, u64)>;

/// The pages of one process that the epoch holds.
pub fn runs_of(id: u32, state: &MemoryState, reader: &dyn EpochReader) -> Runs {
    let clip = Clip::new(state);
    let mut runs = Runs::new();
    for run in reader.runs().iter().filter(|r| r.space().0 == id) {
        let end = run.address().saturating_add(run.bytes());
        runs.extend(clip.parts(run.address(), end).map(|(s, e, _)| (s, e)));
    }
    runs
}

/// Makes all mappings that are not kept of the parent's. `files` are open in the new process at the same numbers as here. Returns
/// calls that make writing the contents faster if they run meanwhile, of those `runs` that do not
/// come `later`.
pub fn map(
    stub: &mut Stub,
    state: &MemoryState,
    files: &[File],
    shared: &Memories,
    heritage: Option<&Heritage>,
    (mut runs, later): (Runs, &[(u64, u64)]),
) -> Result<Batch, ProcessError> {
    let none = Heritage::default();
    let heritage = heritage.unwrap_or(&none);
    let mut steps = keep(heritage);
    for area in state.areas.iter().filter(|a| !is_last(a, shared)) {
        let protection = first_protection(area, &runs);
        for (start, end) in heritage.outside(area.start, area.end) {
            let part = Area {
                start,
                end,
                offset: area.offset.wrapping_add(start - area.start),
                ..area.clone()
            };
            steps.extend(map_area(&part, files, shared, protection)?);
            if let Some(advice) = huge_page_advice(area.vm_flags()) {
                let args = [start, end - start, advice];
                steps.push(step(libc::SYS_madvise, args, "asking for huge pages"));
            }
        }
    }
    stub.steps(steps)?;
    if !heritage.kept.is_empty() {
        // To populate what is common would make it two.
        runs = runs
            .iter()
            .flat_map(|r| heritage.outside(r.0, r.1))
            .collect();
    }
    Ok(populating(&at_once(runs, later)))
}

/// Makes what is kept of the parent's mappings the child's: protections, and pages that it has not.
fn keep(heritage: &Heritage) -> Vec<Step> {
    let protect = heritage.protected.iter().map(|&(start, end, protection)| {
        let args = [start, end - start, protection.into()];
        step(libc::SYS_mprotect, args, format!("protecting {start:x}"))
    });
    let drop = heritage.dropped.iter().map(|&(start, end)| {
        let args = [start, end - start, libc::MADV_DONTNEED as u64];
        step(libc::SYS_madvise, args, format!("giving back {start:x}"))
    });
    protect.chain(drop).collect()
}

/// Whether an area is mapped only once what lies below it is sealed.
fn is_last(area: &Area, shared: &Memories) -> bool {
    let memory = area.space.and_then(|s| shared.get(&s));
    area.kind == AreaKind::SharedMemory && memory.is_some_and(|m| m.is_mapped_last(area.vm_flags()))
}

/// Makes the mappings of sealed memory.
pub fn map_sealed(
    stub: &mut Stub,
    state: &MemoryState,
    shared: &Memories,
) -> Result<(), ProcessError> {
    let mut steps = Vec::new();
    for area in state.areas.iter().filter(|a| is_last(a, shared)) {
        steps.extend(map_area(area, &[], shared, area.protection)?);
    }
    stub.steps(steps).map(drop)
}

/// Calls that populate the largest runs, to go on while their contents are read: only to be faster.
fn populating(runs: &[(u64, u64)]) -> Batch {
    let mut largest: Vec<(u64, u64)> = runs
        .iter()
        .copied()
        .filter(|(s, e)| e - s >= WORTH_POPULATING)
        .collect();
    largest.sort_unstable_by_key(|(s, e)| std::cmp::Reverse(e - s));
    largest.truncate(MAX_POPULATED);
    // Contents come in the order of addresses, by and large.
    largest.sort_unstable();
    let mut batch = Batch::new();
    for (start, end) in largest {
        let args = [start, end - start, MADV_POPULATE_WRITE].map(Arg::Value);
        batch.push(libc::SYS_madvise, args);
    }
    batch
}

fn huge_page_advice(flags: VmFlags) -> Option<u64> {
    if flags.has(VmFlags::HUGEPAGE) {
        Some(libc::MADV_HUGEPAGE as u64)
    } else if flags.has(VmFlags::NO_HUGEPAGE) {
        Some(libc::MADV_NOHUGEPAGE as u64)
    } else {
        None
    }
}

fn map_area(
    area: &Area,
    files: &[File],
    shared: &Memories,
    protection: u32,
) -> Result<Option<Step>, ProcessError> {
    let flags = area.vm_flags();
    let file = || area.file.and_then(|f| files.get(f as usize));
    let memory = || {
        area.space
            .and_then(|s| shared.get(&s))
            .map(|memory| memory.mapped(flags))
    };
    let (sort, file) = match area.kind {
        AreaKind::Anonymous => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None),
        AreaKind::PrivateFile => (libc::MAP_PRIVATE, file()),
        AreaKind::SharedFile => (libc::MAP_SHARED, file()),
        AreaKind::SharedMemory => (libc::MAP_SHARED, memory()),
        AreaKind::PrivateMemory => (libc::MAP_PRIVATE, memory()),
        // Attached, or given by the kernel.
        AreaKind::Segment | AreaKind::Vdso | AreaKind::Vvar | AreaKind::VvarVclock => {
            return Ok(None);
        }
    };
    let mut map = sort | libc::MAP_FIXED_NOREPLACE;
    if flags.has(VmFlags::GROWS_DOWN) {
        map |= libc::MAP_GROWSDOWN;
    }
    if flags.has(VmFlags::NO_RESERVE) {
        map |= libc::MAP_NORESERVE;
    }
    if file.is_none() && area.kind != AreaKind::Anonymous {
        return Err(ProcessError::Image(format!(
            "area {:x} refers to nothing",
            area.start
        )));
    }
    let fd = file.map_or(u64::MAX, |f| f.as_raw_fd() as u64);
    let args = [
        area.start,
        area.len(),
        u64::from(protection),
        map as u64,
        fd,
        area.offset,
    ];
    Ok(Some(step(
        libc::SYS_mmap,
        args,
        format!("mapping {:x}-{:x}", area.start, area.end),
    )))
}

/// Writes the contents of all pages of these processes.
pub fn fill(
    spaces: &[Space<'_>],
    shared: &Memories,
    contents: &mut HashMap<u32, FileContents>,
    reader: &dyn EpochReader,
) -> Result<(), ProcessError> {
    let clips: BTreeMap<u32, (&Space<'_>, Clip<'_>)> = spaces
        .iter()
        .map(|space| (space.target.id, (space, Clip::new(space.state))))
        .collect();
    let zeros = vec![0u8; 1 << 20];
    let files: BTreeSet<u32> = contents.keys().copied().collect();
    let wanted = |space: SpaceId| {
        let id = space.0;
        clips.contains_key(&id) || shared.contains_key(&id) || files.contains(&id)
    };
    let runs = reader.runs().into_iter().filter(|r| wanted(r.space()));
    let later = |run: &Run| clips.get(&run.space().0).map_or(&[][..], |(s, _)| s.later);
    let runs: Vec<Run> = runs.flat_map(|run| now(run, later(&run))).collect();
    let walked = reader.pages_in(&runs, Order::Fastest, &mut |run, content| {
        if let Some(memory) = shared.get(&run.space().0) {
            return write_shared(memory, run, content);
        }
        if let Some(file) = contents.get_mut(&run.space().0) {
            if let Content::Bytes(bytes) = content {
                let noted = file.note(run.address(), bytes);
                noted.map_err(|e| {
                    VisitError::Visitor(Box::new(super::internal("comparing a file", e)))
                })?;
            }
            return Ok(());
        }
        let Some((space, clip)) = clips.get(&run.space().0) else {
            return Ok(());
        };
        let from = run.address();
        for (start, end, area) in clip.parts(from, from.saturating_add(run.bytes())) {
            match content {
                Content::Bytes(b) => {
                    let part = &b[(start - from) as usize..(end - from) as usize];
                    space.write(start, part)?;
                }
                // Anonymous memory is zero already.
                Content::Zero if area.kind == AreaKind::Anonymous && space.inherited.is_none() => {}
                Content::Zero => {
                    let mut at = start;
                    while at < end {
                        let n = (end - at).min(zeros.len() as u64);
                        space.write(at, &zeros[..n as usize])?;
                        at += n;
                    }
                }
            }
        }
        Ok(())
    });
    walked.map_err(|e| match e {
        VisitError::Store(e) => e.into(),
        VisitError::Visitor(e) => match e.downcast::<ProcessError>() {
            Ok(e) => *e,
            Err(e) => ProcessError::Image(e.to_string()),
        },
    })
}

/// The parts of a run that do not come later.
fn now(run: Run, later: &[(u64, u64)]) -> Vec<Run> {
    if later.is_empty() {
        return vec![run];
    }
    let parts = at_once(vec![(run.address(), run.address() + run.bytes())], later);
    let part = |(s, e): (u64, u64)| Run::new(run.space(), s / PAGE, (e - s) / PAGE);
    parts.into_iter().filter_map(part).collect()
}

/// Zeros need not be written: the memory is new.
fn write_shared(memory: &Memory, run: Run, content: Content<'_>) -> Result<(), VisitError> {
    let Content::Bytes(bytes) = content else {
        return Ok(());
    };
    let rest = memory.size.saturating_sub(run.address());
    let fits = rest.min(bytes.len() as u64);
    memory
        .file
        .write_all_at(&bytes[..fits as usize], run.address())
        .map_err(|source| {
            let what = "writing shared memory".into();
            VisitError::Visitor(Box::new(ProcessError::Kernel {
                pid: 0,
                what,
                source,
            }))
        })
}

/// A process that gets its contents.
pub struct Space<'a> {
    /// The process.
    pub target: &'a Target,
    /// Its areas.
    pub state: &'a MemoryState,
    /// The memory of a process that has some of its parent's: what is right already is not written.
    /// Reading it so leaves common pages common, which `process_vm_readv(2)` does not.
    pub inherited: Option<File>,
    /// What is not written now.
    pub later: &'a [(u64, u64)],
}

impl Space<'_> {
    fn write(&self, at: u64, bytes: &[u8]) -> Result<(), VisitError> {
        let mut now = Vec::new();
        if let Some(memory) = &self.inherited {
            now.resize(bytes.len(), 0);
            // What cannot be read is written.
            if memory.read_exact_at(&mut now, at).is_err() {
                now.clear();
            }
        }
        for (start, end) in different(&now, bytes) {
            write(self.target, at + start as u64, &bytes[start..end])?;
        }
        Ok(())
    }
}

/// The parts, whole pages, in which contents differ from what is there.
fn different(now: &[u8], wanted: &[u8]) -> Vec<(usize, usize)> {
    if now.len() != wanted.len() {
        return vec![(0, wanted.len())];
    }
    let mut parts: Vec<(usize, usize)> = Vec::new();
    let pages = now.chunks(PAGE_SIZE).zip(wanted.chunks(PAGE_SIZE));
    for (i, (_, wanted)) in pages.enumerate().filter(|(_, (now, wanted))| now != wanted) {
        let start = i * PAGE_SIZE;
        match parts.last_mut() {
            Some(last) if last.1 == start => last.1 += wanted.len(),
            _ => parts.push((start, start + wanted.len())),
        }
    }
    parts
}

fn write(target: &Target, at: u64, bytes: &[u8]) -> Result<(), VisitError> {
    memory::write(target.pid, at, bytes).map_err(|e| {
        VisitError::Visitor(Box::new(
            target.kernel(format!("writing memory at {at:x}"), e),
        ))
    })
}

/// Final protections, advice, guards, names, locks and seals.
pub fn finish(stub: &mut Stub, state: &MemoryState) -> Result<(), ProcessError> {
    let mut steps = Vec::new();
    for guard in state.guards.chunks_exact(2) {
        let args = [
            guard[0],
            guard[1].saturating_sub(guard[0]),
            MADV_GUARD_INSTALL,
        ];
        steps.push(step(libc::SYS_madvise, args, "installing guard pages"));
    }
    for area in &state.areas {
        let (start, len, flags) = (area.start, area.len(), area.vm_flags());
        if area.has_pages() && area.protection & 3 != 3 {
            let args = [start, len, u64::from(area.protection)];
            steps.push(step(
                libc::SYS_mprotect,
                args,
                format!("protecting {start:x}"),
            ));
        }
        for (flag, advice) in ADVICE {
            if flags.has(flag) && area.kind != AreaKind::Vvar && area.kind != AreaKind::VvarVclock {
                let args = [start, len, advice as u64].map(Arg::Value);
                let mut s = Step::new(libc::SYS_madvise, args, format!("advice for {start:x}"));
                s.tolerate = &[libc::EINVAL];
                steps.push(s);
            }
        }
        if let Some(label) = &area.label {
            let mut label = label.clone();
            label.push(0);
            let args = [PR_SET_VMA, 0, start, len]
                .map(Arg::Value)
                .into_iter()
                .chain([Arg::In(label)]);
            let mut s = Step::new(libc::SYS_prctl, args, "naming memory");
            s.tolerate = &[libc::EINVAL, libc::EBADF];
            steps.push(s);
        }
        if flags.has(VmFlags::LOCKED) {
            let on_fault = flags.has(VmFlags::LOCKED_ON_FAULT);
            let how = if on_fault { libc::MLOCK_ONFAULT } else { 0 };
            let args = [start, len, u64::from(how)];
            steps.push(step(libc::SYS_mlock2, args, format!("locking {start:x}")));
        }
    }
    for area in state
        .areas
        .iter()
        .filter(|a| a.vm_flags().has(VmFlags::SEALED))
    {
        let kernel_gave = !area.has_pages() && area.file.is_none();
        if !kernel_gave {
            steps.push(step(
                SYS_MSEAL,
                [area.start, area.len(), 0],
                "sealing memory",
            ));
        }
    }
    if state.lock_future != 0 {
        let args = [u64::from(state.lock_future)];
        steps.push(step(libc::SYS_mlockall, args, "locking future memory"));
    }
    stub.steps(steps).map(drop)
}

const ADVICE: [(VmFlags, libc::c_int); 6] = [
    (VmFlags::SEQUENTIAL, libc::MADV_SEQUENTIAL),
    (VmFlags::RANDOM, libc::MADV_RANDOM),
    (VmFlags::DONT_COPY, libc::MADV_DONTFORK),
    (VmFlags::DONT_DUMP, libc::MADV_DONTDUMP),
    (VmFlags::MERGEABLE, libc::MADV_MERGEABLE),
    (VmFlags::WIPE_ON_FORK, libc::MADV_WIPEONFORK),
];

/// Tells the kernel where code, data, heap, stack, arguments and the program's file are
/// (`PR_SET_MM_MAP`, `struct prctl_mm_map`).
pub fn set_layout(stub: &mut Stub, state: &MemoryState, exe: &File) -> Result<(), ProcessError> {
    let auxv_at = stub.scratch(&state.auxiliary_vector)?;
    let l = &state.layout;
    // start_code, end_code, start_data, end_data, start_brk, brk, start_stack, arguments,
    // environment.
    let words = [
        l[0], l[1], l[3], l[4], l[5], state.brk, l[2], l[6], l[7], l[8], l[9], auxv_at,
    ];
    let mut map: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
    map.extend_from_slice(&(state.auxiliary_vector.len() as u32).to_ne_bytes());
    map.extend_from_slice(&exe_fd(exe).to_ne_bytes());
    let size = map.len() as u64;
    let v = Arg::Value;
    let args = [
        v(libc::PR_SET_MM as u64),
        v(libc::PR_SET_MM_MAP as u64),
        Arg::In(map),
        v(size),
        v(0),
    ];
    stub.steps(vec![Step::new(
        libc::SYS_prctl,
        args,
        "setting the layout of memory",
    )])
    .map(drop)
}

/// The descriptor of the program's file for the kernel; none where it is our own program, which the
/// new process has already and which the kernel refuses to set again.
fn exe_fd(exe: &File) -> u32 {
    use std::os::unix::fs::MetadataExt;
    let id = |m: std::fs::Metadata| (m.dev(), m.ino());
    let (theirs, ours) = (
        exe.metadata().map(id),
        std::fs::metadata("/proc/self/exe").map(id),
    );
    match (theirs, ours) {
        (Ok(a), Ok(b)) if a == b => u32::MAX,
        _ => exe.as_raw_fd() as u32,
    }
}

/// Opens the files that are mapped, and judges whether they are the right ones.
pub fn open_files(
    files: &[MappedFile],
    keep: bool,
    made: &mut Vec<PathBuf>,
) -> Result<Vec<File>, Vec<String>> {
    let (opened, wrong): (Vec<_>, Vec<_>) = files
        .iter()
        .map(|f| crate::resources::memory::reopen(f, keep, made))
        .partition(Result::is_ok);
    let wrong: Vec<String> = wrong.into_iter().filter_map(Result::err).collect();
    if wrong.is_empty() {
        Ok(opened.into_iter().flatten().collect())
    } else {
        Err(wrong)
    }
}
