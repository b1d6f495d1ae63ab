//! One process of a tracked tree: its foothold, its page tracking, and what is taken of it at a
//! stop.

mod capture;

use crate::bootstrap::{self, Plan, Wanted};
use crate::captured::Spare;
use crate::flags::FlagsCache;
use crate::freeze::{Held, freeze};
use crate::guard::Guard;
use crate::image::ThreadsState;
use crate::layout::{Layout, private_areas};
use crate::pages::{Means, PageTracker, World};
use crate::procfs::ThreadFiles;
use crate::reentry::{Sleepers, WaitBook};
use crate::residue::Residue;
use crate::resources::shared::{self, SharedObjects};
use crate::resources::{attributes, memory, signals, thread};
use crate::restore::lazy::filling::Filling;
use crate::target::{Status, Target};
use crate::track::{TrackOptions, Tracking};
use crate::{ProcessError, Refusal, namespaces, preflight, sharing};
use outlive_epoch::{PageSink, Run};
use outlive_linux::maps::{self, Mapping, VmFlags};
use outlive_linux::remote::Arena;
use outlive_linux::single::Site;
use std::time::Duration;

/// A process under tracking. Between epochs nothing is attached to it.
pub struct Member {
    /// The process.
    pub target: Target,
    arena: Arena,
    site: Site,
    space: Space,
    waits: WaitBook,
    files: ThreadFiles,
    /// Other members have its address space too.
    pub has_fellows: bool,
    /// Threads that may be apart from their process; unknown of one that was not looked at.
    suspects: Option<Vec<u32>>,
    /// Whether a thread found the session keyring of its user at the stop before.
    in_session_of_user: bool,
    /// Buffers of earlier stops.
    pub spare: Spare,
}

/// An address space, which several processes may have.
enum Space {
    /// This process stands for it.
    Held(Box<HeldSpace>),
    /// Another member does, which has this process ID.
    Of(u32),
}

/// What is known of an address space.
struct HeldSpace {
    pages: PageTracker,
    build_ids: memory::BuildIds,
    flags: FlagsCache,
    layout: Layout,
    /// How the program locks memory that it will map, once that was looked at.
    lock_future: Option<u32>,
}

/// A process in which no foothold could be gained, and why.
pub struct NotAdopted {
    /// The process.
    pub target: Target,
    /// What is known of its interrupted calls.
    pub waits: WaitBook,
    /// What went wrong.
    pub error: ProcessError,
}

impl NotAdopted {
    /// The same on the heap: it is large.
    pub fn boxed(target: Target, waits: WaitBook, error: ProcessError) -> Box<Self> {
        Box::new(Self {
            target,
            waits,
            error,
        })
    }
}

/// What was seen of a stopped thread before any remote call, and the time left of its call.
pub type Seen = (thread::Sight, Option<u64>);

/// Everything that is taken of one process but its descriptors.
pub struct MemberState {
    /// Attributes; the parent is for the caller to fill in.
    pub process: attributes::ProcessState,
    /// Signals.
    pub signals: signals::SignalsState,
    /// Threads.
    pub threads: ThreadsState,
    /// Address space.
    pub memory: memory::MemoryState,
    /// Pages that had not been copied before.
    pub residue: Residue,
}

/// Looks at all threads of a stopped process, and prepares each to go on with an interrupted call.
/// This comes before anything else can fail.
pub fn look(
    target: &Target,
    waits: &mut WaitBook,
    threads: &mut [Held],
    sleepers: &Sleepers,
    files: &mut ThreadFiles,
) -> Result<Vec<Seen>, ProcessError> {
    let mut seen = Vec::with_capacity(threads.len());
    let tids: Vec<u32> = threads.iter().map(|t| t.tid).collect();
    files.retain(&tids);
    let statuses = files.statuses(&tids);
    for (held, status) in threads.iter_mut().zip(statuses) {
        let sight = thread::look(target, held, status)?;
        let left = waits.prepare(target, held, &sight.status, sleepers);
        seen.push((sight, left));
    }
    for held in threads {
        thread::refuse(target, held)?;
    }
    Ok(seen)
}

/// Prepares a stopped thread to go on as if it had not been stopped, where it was not looked at.
pub fn prepare(target: &Target, waits: &mut WaitBook, held: &mut Held, sleepers: &Sleepers) {
    // One that cannot be read is about to end.
    if let Ok(status) = Status::read(target.pid, held.tid) {
        waits.prepare(target, held, &status, sleepers);
        waits.going_on(held.tid, &status);
    }
}

/// Lets all threads go on. All are let go even if one cannot be.
pub fn let_go(
    target: &Target,
    waits: &mut WaitBook,
    threads: Vec<Held>,
    files: &mut ThreadFiles,
) -> Result<(), ProcessError> {
    let tids = threads.iter().map(|t| t.tid);
    let waiting: Vec<u32> = tids.filter(|tid| waits.waits(*tid)).collect();
    let statuses = files.statuses(&waiting);
    for (tid, status) in waiting.into_iter().zip(statuses) {
        if let Ok(status) = status {
            waits.going_on(tid, &status);
        }
    }
    let mut failed = None;
    for held in threads {
        let tid = held.tid;
        if let Err(e) = held.release() {
            failed = failed.or(Some(target.kernel(format!("resuming thread {tid}"), e)));
        }
    }
    failed.map_or(Ok(()), Err)
}

impl Member {
    /// Gains a foothold in a process that is stopped. Says how its writes are found.
    pub fn adopt(
        target: Target,
        waits: WaitBook,
        threads: &mut [Held],
        options: &TrackOptions,
    ) -> Result<(Self, Tracking), Box<NotAdopted>> {
        let (arena, site, means) = match foothold(&target, threads, wanted(options)) {
            Ok(gained) => gained,
            Err(error) => return Err(NotAdopted::boxed(target, waits, error)),
        };
        let (means, tracking) = match means {
            Ok(means @ Means::Protection(_)) => (Some(means), Tracking::WriteProtect),
            Ok(Means::SoftDirty) => (Some(Means::SoftDirty), Tracking::SoftDirty),
            Err(why) => (None, Tracking::FullCopy(why)),
        };
        let how = (means, arena.range().0);
        let pages = match PageTracker::new(&target, how, options.granularity) {
            Ok(pages) => pages,
            Err(error) => return Err(NotAdopted::boxed(target, waits, error)),
        };
        let member = Self::with(target, waits, arena, site, pages);
        Ok((member, tracking))
    }

    /// Gains a foothold in a restored process whose memory is tracked already.
    pub fn going_on(
        pid: u32,
        threads: &mut [Held],
        pages: PageTracker,
    ) -> Result<Self, ProcessError> {
        let mut target = Target::open(pid)?;
        if let Some(filling) = pages.filling() {
            target.lodger = filling.lodger().clone();
        }
        let (arena, site, _) = foothold(&target, threads, None)?;
        Ok(Self::with(target, WaitBook::default(), arena, site, pages))
    }

    fn with(target: Target, waits: WaitBook, arena: Arena, site: Site, pages: PageTracker) -> Self {
        Self {
            files: ThreadFiles::new(target.pid, 0),
            target,
            arena,
            site,
            space: Space::Held(Box::new(HeldSpace {
                pages,
                build_ids: memory::BuildIds::default(),
                flags: FlagsCache::default(),
                layout: Layout::default(),
                lock_future: None,
            })),
            waits,
            has_fellows: false,
            suspects: None,
            in_session_of_user: true,
            spare: Spare::default(),
        }
    }

    /// A further process of the address space of this member, whose foothold is also its.
    #[must_use]
    pub fn join(&self, target: Target, waits: WaitBook) -> Self {
        Self {
            files: ThreadFiles::new(target.pid, 0),
            arena: self.arena.in_copy(target.pid),
            site: self.site,
            space: Space::Of(self.holder()),
            target,
            waits,
            has_fellows: false,
            suspects: None,
            in_session_of_user: true,
            spare: Spare::default(),
        }
    }

    /// The member that stands for its address space: itself, mostly.
    #[must_use]
    pub fn holder(&self) -> u32 {
        match self.space {
            Space::Held(_) => self.target.pid,
            Space::Of(other) => other,
        }
    }

    /// From now on this other member stands for its address space.
    pub fn set_holder(&mut self, holder: u32) {
        if holder != self.target.pid {
            self.space = Space::Of(holder);
        }
    }

    /// Takes over an address space, which it has too, from a member that is no more. Returns the
    /// pages that the epochs so far hold of that; all are copied again. Without it the old member is
    /// as it was.
    pub fn take_over(&mut self, from: &mut Self) -> Result<Vec<Run>, ProcessError> {
        let Space::Held(held) = &mut from.space else {
            return Ok(Vec::new());
        };
        let mappings = bootstrap::mappings_without(&self.target, Some(self.arena.range()))?;
        let old = held
            .pages
            .move_to(&self.target, &private_areas(&mappings, None))?;
        held.layout = Layout::default();
        std::mem::swap(&mut self.space, &mut from.space);
        Ok(old)
    }

    /// Copies what was written since the last pass while the program runs, unless there is no time
    /// for it any more; returns the bytes.
    pub fn precopy(
        &mut self,
        sink: &mut dyn PageSink,
        shared: &mut SharedObjects,
        hurry: &mut dyn FnMut() -> bool,
    ) -> Result<u64, ProcessError> {
        let Space::Held(space) = &mut self.space else {
            return Ok(0);
        };
        if space.pages.is_served() {
            return Ok(0);
        }
        let HeldSpace {
            layout,
            flags,
            pages,
            ..
        } = &mut **space;
        layout.read(&self.target, self.arena.range(), flags)?;
        for (m, _) in layout
            .mappings()
            .iter()
            .filter(|(m, _)| shared::Sort::of(m).is_some())
        {
            // What goes away meanwhile, or is to be refused, is left to the stop.
            let _ = shared.space_of(&self.target, m, VmFlags::MAY_WRITE);
        }
        let changes = pages.pass(&self.target, layout.areas(), World::Runs)?;
        space.pages.copy(&changes, sink, hurry)?;
        Ok(changes.bytes())
    }

    /// See [`PageTracker::abandon`].
    pub fn abandon(&mut self) -> bool {
        match &mut self.space {
            Space::Held(space) => space.pages.abandon(),
            Space::Of(_) => false,
        }
    }

    /// See [`PageTracker::owe`].
    pub fn owe(&mut self, pages: &[Run], absent: &[Run]) {
        if let Space::Held(space) = &mut self.space {
            space.pages.owe(pages, absent);
        }
    }

    /// Pages that the next pass hands over whether they were written or not.
    #[must_use]
    pub fn owed_pages(&self) -> u64 {
        match &self.space {
            Space::Held(space) => space.pages.owed_pages(),
            Space::Of(_) => 0,
        }
    }

    /// Whether the epochs so far hold nothing of it.
    #[must_use]
    pub fn is_fresh(&self) -> bool {
        matches!(&self.space, Space::Held(space) if space.pages.is_fresh())
    }

    /// Who serves missing pages of it, as long as it matters.
    #[must_use]
    pub fn filling(&self) -> Option<&Filling> {
        match &self.space {
            Space::Held(space) => space.pages.filling(),
            Space::Of(_) => None,
        }
    }

    /// The next stop may be longer because memory is taken over from who served it; see also
    /// [`PageTracker::let_go_served`].
    pub fn may_take_over(&mut self) {
        if let Space::Held(space) = &mut self.space {
            space.pages.let_go_served();
            space.pages.may_take_over();
        }
    }

    /// Whether its writes are found by soft-dirty bits.
    #[must_use]
    pub fn has_soft_dirty(&self) -> bool {
        matches!(&self.space, Space::Held(space) if space.pages.has_soft_dirty())
    }

    /// Who holds writers back, where somebody does.
    #[must_use]
    pub fn guard(&self) -> Option<&Guard> {
        match &self.space {
            Space::Held(space) => space.pages.guard(),
            _ => None,
        }
    }

    /// Whether the program has other processes, with which this one may share pages.
    pub fn set_relatives(&mut self, has: bool) {
        if let Space::Held(space) = &mut self.space {
            space.pages.has_relatives = has;
        }
    }

    /// Whether a thread of the program stands at an instruction that faulted.
    pub fn set_at_fault(&mut self, at_fault: bool) {
        if let Space::Held(space) = &mut self.space {
            space.pages.at_fault = at_fault;
        }
    }

    /// Whether the process may end without the program, and whether therefore nothing of it is to be
    /// copied behind at the next stop.
    pub fn set_fleeting(&mut self, may_end: bool, hurries: bool) {
        if let Space::Held(space) = &mut self.space {
            (space.pages.may_end, space.pages.hurries) = (may_end, hurries);
        }
    }

    /// What is done before a stop, while the program runs.
    pub fn before_stop(&mut self) -> Result<Sleepers, ProcessError> {
        if let Some(guard) = self.guard() {
            guard.open(true);
        }
        if let Space::Held(space) = &mut self.space {
            let reader = space.layout.reader(&self.target)?;
            space.flags.refresh(&self.target, reader)?;
            if space.lock_future.is_none() {
                let ours = space.flags.at(self.arena.range().0);
                space.lock_future = Some(future_locking(ours));
            }
        }
        let apart = sharing::apart(&self.target, self.target.threads()?);
        self.suspects = Some(apart.into_iter().map(|(tid, _)| tid).collect());
        Ok(self.waits.look(&self.target))
    }

    /// Refusals of stopped threads that are apart from their process, see [`sharing::apart`].
    pub fn refuse_apart(&mut self, tids: impl Iterator<Item = u32>) -> Vec<Refusal> {
        let suspects = self.suspects.take();
        let is_suspect = |tid: &u32| suspects.as_ref().is_none_or(|s| s.contains(tid));
        let apart = sharing::apart(&self.target, tids.filter(is_suspect));
        let refusal = |found| sharing::refuse_apart(&self.target, found);
        apart.into_iter().map(refusal).collect()
    }

    /// Whether a stopped thread was in a call that goes by no name, see [`WaitBook::is_nameless`].
    #[must_use]
    pub fn has_nameless(&self, threads: &[Held], sleepers: &Sleepers) -> bool {
        threads.iter().any(|t| self.waits.is_nameless(t, sleepers))
    }

    /// Whether a stopped thread is inside the code that the kernel gives to programs, where it reads
    /// a clock: another kernel could not let it go on there.
    #[must_use]
    pub fn reads_clock(&self, threads: &[Held]) -> bool {
        let Space::Held(space) = &self.space else {
            return false;
        };
        let Some((start, end)) = space.flags.place_of(b"[vdso]") else {
            return false;
        };
        threads
            .iter()
            .any(|t| (start..end).contains(&t.registers.rip))
    }

    /// Refuses a process that has gone to other namespaces since it was adopted.
    pub fn refuse_moved(&self, root: u32) -> Result<(), ProcessError> {
        match namespaces::refusals(&self.target, root)? {
            moved if moved.is_empty() => Ok(()),
            moved => Err(ProcessError::Refused(moved)),
        }
    }

    /// Stops all threads.
    pub fn freeze(
        &mut self,
        timeout: Duration,
        sleepers: &Sleepers,
    ) -> Result<Vec<Held>, ProcessError> {
        let (target, waits) = (&self.target, &mut self.waits);
        freeze(target, timeout, &mut |held| {
            prepare(target, waits, held, sleepers);
        })
    }

    /// Lets threads go on that were not looked at.
    pub fn give_back(
        &mut self,
        mut threads: Vec<Held>,
        sleepers: &Sleepers,
    ) -> Result<(), ProcessError> {
        for held in &mut threads {
            prepare(&self.target, &mut self.waits, held, sleepers);
        }
        self.let_go(threads)
    }

    /// See [`look`].
    pub fn look(
        &mut self,
        threads: &mut [Held],
        sleepers: &Sleepers,
    ) -> Result<Vec<Seen>, ProcessError> {
        let (waits, files) = (&mut self.waits, &mut self.files);
        look(&self.target, waits, threads, sleepers, files)
    }

    /// Its children, once its threads stand and were looked at: then it makes no more of them.
    pub fn children(&mut self) -> Vec<u32> {
        // Without a list there is nobody.
        let threads = self.target.threads().unwrap_or_default();
        self.files.children(&threads)
    }

    /// At the stops to come so many helpers read a part of what there is much of.
    pub fn set_helpers(&mut self, helpers: usize) {
        self.files.set_helpers(helpers);
    }

    /// See [`let_go`].
    pub fn let_go(&mut self, threads: Vec<Held>) -> Result<(), ProcessError> {
        if let Some(guard) = self.guard() {
            guard.open(false);
        }
        let (waits, files) = (&mut self.waits, &mut self.files);
        let_go(&self.target, waits, threads, files)
    }

    /// What was taken as saved is not; everything is fresh again.
    pub fn forget_progress(&mut self) {
        let Space::Held(space) = &mut self.space else {
            return;
        };
        match bootstrap::mappings_without(&self.target, Some(self.arena.range())) {
            Ok(mappings) => space.pages.forget(&private_areas(&mappings, None)),
            Err(_) => space.pages.forget_later(),
        }
    }

    /// Whether the foothold is still there: a process that began another program (`execve(2)`) has
    /// lost it, with all its memory.
    #[must_use]
    pub fn is_intact(&self) -> bool {
        Arena::is_stamped(self.target.pid, self.arena.range().0)
    }

    /// The member is no more: the pages that the epochs so far hold of it.
    #[must_use]
    pub fn retire(self) -> Vec<Run> {
        match self.space {
            Space::Held(space) => space.pages.retire(),
            Space::Of(_) => Vec::new(),
        }
    }

    /// Removes the arena from the stopped process.
    pub fn remove_foothold(&self, threads: &mut [Held]) -> Result<(), ProcessError> {
        if !self.is_intact() || self.holder() != self.target.pid {
            return Ok(());
        }
        let range = self.arena.range();
        let leader = &mut threads[0];
        let removed = bootstrap::remove_arena(&self.target, leader, self.site, range);
        let left = leader.vacate(self.site);
        removed?;
        left.map_err(|e| self.target.kernel("leaving the vDSO", e))
    }
}

/// The flags of `mlockall(2)` by which new memory is locked. Nothing tells of them but new memory
/// itself: our own, which is as old as the foothold.
fn future_locking(ours: VmFlags) -> u32 {
    let has = |flag, word: libc::c_int| if ours.has(flag) { word as u32 } else { 0 };
    has(VmFlags::LOCKED, libc::MCL_FUTURE) | has(VmFlags::LOCKED_ON_FAULT, libc::MCL_ONFAULT)
}

/// Refuses memory that is bound to memory nodes in ranges of its own (`mbind(2)`). A range without
/// a policy shows that of the process.
fn refuse_policies(target: &Target, refusals: &mut Vec<Refusal>) {
    // A kernel without memory nodes has no such file.
    let text = target.proc_file("numa_maps").unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let ranges = text.lines().filter_map(|line| {
        let mut words = line.split(' ');
        Some((words.next()?, words.next()?))
    });
    let mut first = None;
    for (address, policy) in ranges {
        if *first.get_or_insert(policy) != policy {
            let what = format!("memory with a policy of its own (mbind: {policy})");
            let remedy = "run the program under numactl instead";
            refusals.push(target.refusal(format!("address {address}"), what, remedy));
            return;
        }
    }
}

type Foothold = (Arena, Site, Result<Means, String>);

fn wanted(options: &TrackOptions) -> Option<Wanted> {
    let strategy = options.strategy;
    strategy.tracks().then_some(match strategy.guards() {
        true => Wanted::Guard {
            holes: options.strict,
        },
        false if options.soft_dirty => Wanted::SoftDirty,
        false => Wanted::Notes,
    })
}

fn foothold(
    target: &Target,
    threads: &mut [Held],
    wanted: Option<Wanted>,
) -> Result<Foothold, ProcessError> {
    let mappings = bootstrap::mappings_without(target, None)?;
    let site = bootstrap::find_site(target.pid, &mappings).ok_or_else(|| {
        let what = "no syscall instruction was found in its code";
        ProcessError::Refused(vec![target.refusal("", what, "report this")])
    })?;
    if threads.iter().any(|t| site.holds(t.registers.rip)) {
        return Err(ProcessError::Refused(vec![
            bootstrap::still_helping_itself(target),
        ]));
    }
    let removed = bootstrap::remove_leftovers(target, threads, site, &mappings);
    let leader = &mut threads[0];
    let gained = removed.and_then(|()| arena_and_means(target, leader, site, wanted));
    let left = leader.vacate(site);
    let (arena, means) = gained?;
    left.map_err(|e| target.kernel("leaving the vDSO", e))?;
    Ok((arena, site, means))
}

fn arena_and_means(
    target: &Target,
    leader: &mut Held,
    site: Site,
    wanted: Option<Wanted>,
) -> Result<(Arena, Result<Means, String>), ProcessError> {
    let arena = bootstrap::make_arena(target, leader, site, Plan::CAPTURE)?;
    let means = bootstrap::hide_arena(target, leader, &arena).and_then(|()| match wanted {
        Some(wanted) => bootstrap::make_tracker(target, leader, &arena, wanted),
        None => Ok(Err("not asked for".into())),
    });
    if means.is_err() {
        let _ = bootstrap::remove_arena(target, leader, site, arena.range());
    }
    Ok((arena, means?))
}

/// A refusal of a process whose memory somebody tracks already: an outlive, or the program itself.
pub fn tracked_already(target: &Target) -> Result<Option<Refusal>, ProcessError> {
    let mappings =
        maps::read_with_flags(target.pid).map_err(|e| target.kernel("reading its mappings", e))?;
    let tracked = mappings
        .iter()
        .find(|(_, flags)| flags.has(VmFlags::WRITE_PROTECT));
    Ok(tracked.map(|(m, _)| {
        let place = format!("address {:x}-{:x}", m.start, m.end);
        let what = "memory whose writes are tracked by a userfaultfd already";
        let remedy = "see whether `outlive ps` lists the program, and give its name then";
        target.refusal(place, what, remedy)
    }))
}

/// Everything of one process that would be refused later, as far as it can be seen before; of a
/// program with this root.
pub fn refusals(target: &Target, root: u32) -> Result<Vec<Refusal>, ProcessError> {
    let mut refusals: Vec<Refusal> = preflight::of_process(target, root)?;
    let mappings =
        maps::read_with_flags(target.pid).map_err(|e| target.kernel("reading its mappings", e))?;
    for (at, (m, flags)) in mappings.iter().enumerate() {
        let left = |m: &Mapping| bootstrap::is_left_behind(target.pid, m);
        // What an outlive that died left behind is removed at the first stop.
        let leftover = left(m) || (at > 0 && m.shared && left(&mappings[at - 1].0));
        if !leftover && let Err(what) = memory::kind_of(m, *flags) {
            refusals.push(memory::refusal(target, m, what));
        }
    }
    refuse_policies(target, &mut refusals);
    Ok(refusals)
}
