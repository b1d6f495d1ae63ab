//! The foothold in a process: the arena for remote calls, and the userfaultfd that tracks writes.

use crate::freeze::{Held, remote_failed};
use crate::pages::Means;
use crate::target::Target;
use crate::{ProcessError, Refusal};
use outlive_linux::Errno;
use outlive_linux::maps::{self, Mapping};
use outlive_linux::memory;
use outlive_linux::remote::{Arena, Arg, Batch};
use outlive_linux::single::Site;
use outlive_linux::soft_dirty;
use outlive_linux::userfault::{FLAGS, GUARD_FLAGS, WriteTracker};
use rustix::fd::OwnedFd;
use rustix::process::{PidfdGetfdFlags, pidfd_getfd};

/// Where the arena lies and how it is divided.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Address, or `None` for wherever the kernel likes.
    pub at: Option<u64>,
    /// Threads that can run batches at the same time.
    pub slots: u64,
    /// Bytes for each.
    pub slot: u64,
    /// Private memory, which children get a copy of. Else it is shared, so that it never becomes
    /// one mapping with memory of the program's own.
    pub private: bool,
}

impl Plan {
    /// For capture: small batches in many threads.
    pub const CAPTURE: Self = Self {
        at: None,
        slots: 32,
        slot: 64 * 1024,
        private: false,
    };
}

const NONE: u64 = u64::MAX;
const PAGE: u64 = 4096;
const PROT_RW: u64 = (libc::PROT_READ | libc::PROT_WRITE) as u64;
const PROT_RX: u64 = (libc::PROT_READ | libc::PROT_EXEC) as u64;
/// So an arena is mapped first: a program has no shared memory like this, so that it is known as ours
/// from the beginning on, should we die.
const PROT_ALL: u64 = PROT_RW | PROT_RX;

/// Finds a `syscall` instruction in a process: the vDSO has one, else any code will do.
pub fn find_syscall(pid: u32, mappings: &[Mapping]) -> Option<u64> {
    let vdso = mappings.iter().filter(|m| m.name == b"[vdso]");
    let others = mappings
        .iter()
        .filter(|m| m.prot & 4 != 0 && m.name != b"[vdso]");
    for m in vdso.chain(others) {
        let mut code = vec![0u8; m.len().min(4 << 20) as usize];
        if memory::read_exact(pid, m.start, &mut code).is_ok()
            && let Some(at) = code.windows(2).position(|w| w == [0x0f, 0x05])
        {
            return Some(m.start + at as u64);
        }
    }
    None
}

/// Where single calls are made in a program that goes on if we die: at the end of the vDSO, or at any
/// `syscall` instruction.
pub fn find_site(pid: u32, mappings: &[Mapping]) -> Option<Site> {
    let vdso = mappings.iter().find(|m| m.name == b"[vdso]");
    vdso.and_then(|m| Site::at_the_end_of(pid, m.end))
        .or_else(|| find_syscall(pid, mappings).map(Site::bare))
}

/// Makes an arena in a stopped process.
pub fn make_arena(
    target: &Target,
    leader: &mut Held,
    site: Site,
    plan: Plan,
) -> Result<Arena, ProcessError> {
    let length = Arena::length(plan.slots, plan.slot);
    let sharing = if plan.private {
        libc::MAP_PRIVATE
    } else {
        libc::MAP_SHARED
    };
    let mut flags = (sharing | libc::MAP_ANONYMOUS) as u64;
    if plan.at.is_some() {
        flags |= libc::MAP_FIXED_NOREPLACE as u64;
    }
    let args = [plan.at.unwrap_or(0), length, PROT_ALL, flags, NONE, 0];
    let base = call(
        target,
        leader,
        site,
        libc::SYS_mmap,
        args,
        "mapping working memory",
    );
    let base = base.map_err(|e| match e {
        ProcessError::NotPermitted { .. } => {
            let what = "memory that may not become executable (PR_SET_MDWE, or a security module)";
            let remedy = "run the program without this restriction";
            ProcessError::Refused(vec![target.refusal("", what, remedy)])
        }
        other => other,
    })?;
    let arena = Arena::fill(target.pid, base, plan.slots, plan.slot)
        .map_err(|e| target.kernel("filling working memory", e));
    let mut protect = |at, length, protection, what| {
        let args = [at, length, protection, 0, 0, 0];
        call(target, leader, site, libc::SYS_mprotect, args, what)
    };
    let code = protect(base, PAGE, PROT_RX, "protecting the code in working memory");
    let rest = (base + PAGE, length - PAGE);
    let protected =
        code.and_then(|_| protect(rest.0, rest.1, PROT_RW, "protecting working memory"));
    match arena.and_then(|arena| protected.map(|_| arena)) {
        Ok(arena) => Ok(arena),
        Err(e) => {
            let _ = leader.single(site, libc::SYS_munmap, [base, length, 0, 0, 0, 0]);
            Err(e)
        }
    }
}

/// Removes an arena.
pub fn remove_arena(
    target: &Target,
    leader: &mut Held,
    site: Site,
    range: (u64, u64),
) -> Result<(), ProcessError> {
    let args = [range.0, range.1, 0, 0, 0, 0];
    call(
        target,
        leader,
        site,
        libc::SYS_munmap,
        args,
        "unmapping working memory",
    )
    .map(drop)
}

fn call(
    target: &Target,
    leader: &mut Held,
    site: Site,
    number: i64,
    args: [u64; 6],
    what: &str,
) -> Result<u64, ProcessError> {
    let result = leader
        .single(site, number, args)
        .map_err(|e| remote_failed(target, e))?;
    result.map_err(|e| target.kernel(what, e))
}

/// Whether a mapping begins an arena that a tracer left which died, finished or not.
pub fn is_left_behind(pid: u32, m: &Mapping) -> bool {
    let (slots, slot) = (Plan::CAPTURE.slots, Plan::CAPTURE.slot);
    let finished = m.prot == 5 && m.len() == PAGE;
    let begun = m.prot == 7 && m.len() == Arena::length(slots, slot);
    let blank = || {
        let mut code = [1; PAGE as usize];
        memory::read_exact(pid, m.start, &mut code).is_ok() && code.iter().all(|b| *b == 0)
    };
    m.shared
        && m.name.starts_with(b"/dev/zero")
        && (finished || begun)
        && (Arena::is_stamped(pid, m.start) || begun && blank())
}

/// The refusal of a process of which a thread is in an arena that a tracer left which died.
pub fn still_helping_itself(target: &Target) -> Refusal {
    let what = "a thread is still helping itself after an earlier outlive died";
    target.refusal("", what, "try again in a few seconds")
}

/// Removes what a tracer that died left in the process: its arena is found by its stamp.
pub fn remove_leftovers(
    target: &Target,
    threads: &mut [Held],
    site: Site,
    mappings: &[Mapping],
) -> Result<(), ProcessError> {
    for (at, m) in mappings.iter().enumerate() {
        if !is_left_behind(target.pid, m) {
            continue;
        }
        if threads
            .iter()
            .any(|t| (m.start..m.end).contains(&t.registers.rip))
        {
            return Err(ProcessError::Refused(vec![still_helping_itself(target)]));
        }
        let rest = mappings
            .get(at + 1)
            .filter(|n| n.start == m.end && n.shared);
        let end = rest.map_or(m.end, |n| n.end);
        remove_arena(target, &mut threads[0], site, (m.start, end - m.start))?;
    }
    Ok(())
}

/// How writes are to be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// By asynchronous write protection, or else by soft-dirty bits.
    Notes,
    /// By soft-dirty bits.
    SoftDirty,
    /// By synchronous write protection: writers wait, and with `holes` whoever touches memory for the
    /// first time.
    Guard {
        /// See there.
        holes: bool,
    },
}

/// The means by which writes of the process are found. `Err` in the inner result: the kernel has
/// none, and why. A guard that may not be made is refused.
pub fn make_tracker(
    target: &Target,
    leader: &mut Held,
    arena: &Arena,
    wanted: Wanted,
) -> Result<Result<Means, String>, ProcessError> {
    let (guards, holes) = match wanted {
        Wanted::Guard { holes } => (true, holes),
        _ => (false, false),
    };
    if wanted == Wanted::SoftDirty {
        let there = soft_dirty::is_there().then_some(Means::SoftDirty);
        return Ok(there.ok_or_else(|| "this kernel has no soft-dirty bits".into()));
    }
    let flags = if guards { GUARD_FLAGS } else { FLAGS };
    let made = match take_userfault(target, leader, arena, flags)? {
        Err(Errno::PERM) if guards => {
            let what =
                "memory that it may not have guarded (userfaultfd with faults of the kernel)";
            let remedy = "use another --strategy, run it with CAP_SYS_PTRACE, or set the sysctl \
                          vm.unprivileged_userfaultfd=1";
            return Err(ProcessError::Refused(vec![
                target.refusal("", what, remedy),
            ]));
        }
        made if guards => made.and_then(|fd| WriteTracker::guarding(fd, holes)),
        made => made.and_then(WriteTracker::new),
    };
    Ok(match made {
        Ok(tracker) => Ok(Means::Protection(tracker)),
        Err(_) if !guards && soft_dirty::is_there() => Ok(Means::SoftDirty),
        Err(Errno::INVAL) => Err(
            "this kernel has neither asynchronous write protection (Linux 6.7) nor soft-dirty bits"
                .into(),
        ),
        Err(e) => Err(format!("userfaultfd: {e}")),
    })
}

/// Creates a userfaultfd in the process and takes it out. `Err` in the inner result: the kernel
/// makes none.
pub fn take_userfault(
    target: &Target,
    leader: &mut Held,
    arena: &Arena,
    flags: u64,
) -> Result<Result<OwnedFd, Errno>, ProcessError> {
    let (taken, number) = match make_userfault(target, leader, arena, flags)? {
        Ok(made) => made,
        Err(e) => return Ok(Err(e)),
    };
    let mut batch = Batch::new();
    batch.push(libc::SYS_close, [Arg::Value(number)]);
    leader
        .run(arena, batch)
        .map_err(|e| remote_failed(target, e))?;
    Ok(Ok(taken))
}

/// The same, and the process keeps it under the number that is returned, too.
pub fn make_userfault(
    target: &Target,
    leader: &mut Held,
    arena: &Arena,
    flags: u64,
) -> Result<Result<(OwnedFd, u64), Errno>, ProcessError> {
    let mut batch = Batch::new();
    let fd = batch.push(libc::SYS_userfaultfd, [Arg::Value(flags)]);
    let answers = leader
        .run(arena, batch)
        .map_err(|e| remote_failed(target, e))?;
    let number = match answers.value(fd) {
        Ok(number) => number,
        Err(e) => return Ok(Err(e)),
    };
    let taken = pidfd_getfd(&target.pidfd, number as i32, PidfdGetfdFlags::empty());
    let taken = taken.map_err(|e| target.kernel("taking over the userfaultfd", e))?;
    Ok(Ok((taken, number)))
}

/// Keeps the arena out of children and core dumps.
pub fn hide_arena(target: &Target, leader: &mut Held, arena: &Arena) -> Result<(), ProcessError> {
    let (base, length) = arena.range();
    let mut batch = Batch::new();
    for advice in [libc::MADV_DONTFORK, libc::MADV_DONTDUMP] {
        let args = [
            Arg::Value(base),
            Arg::Value(length),
            Arg::Value(advice as u64),
        ];
        batch.push(libc::SYS_madvise, args);
    }
    leader
        .run(arena, batch)
        .map(drop)
        .map_err(|e| remote_failed(target, e))
}

/// The mappings of a process without those in `range` (address, length).
pub fn mappings_without(
    target: &Target,
    range: Option<(u64, u64)>,
) -> Result<Vec<Mapping>, ProcessError> {
    let mut all = maps::read(target.pid).map_err(|e| target.kernel("reading its mappings", e))?;
    if let Some((base, length)) = range {
        all.retain(|m| m.start < base || m.end > base + length);
    }
    Ok(all)
}
