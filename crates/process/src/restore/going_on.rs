//! Tracking that goes on from the restored epoch: what the program has not changed since need not
//! be taken again.
//!
//! # Rules
//! - It begins when the contents are in place and nothing else was done: all private memory is
//!   registered, the pages that came from the epoch are protected and count as stored. Whatever a
//!   later step of the restore writes, or the program, is found by the next epoch.
//! - Only pages that came from the epoch count as stored. What else is there (code of another
//!   kernel) is new.
//! - Memory that processes share is taken anew, under new numbers; what the epoch holds of it is
//!   said to be absent first.
//! - What comes later counts as stored, too: it is tracked by whoever brings it
//!   ([`super::lazy::filling`]).
//! - Where any of it is not possible (an old kernel, memory that cannot be registered) there is no
//!   such tracking, and no error: the next epoch is a full one.

use super::lazy::filling::Filling;
use super::lazy::{Later, Missing};
use super::saved::Saved;
use super::space::runs_of;
use super::stub::Stub;
use crate::ProcessError;
use crate::bootstrap::{self, Wanted};
use crate::layout::private_areas;
use crate::member::Member;
use crate::pages::{PageTracker, Span};
use crate::reentry::WaitBook;
use crate::target::Target;
use crate::track::{TrackOptions, Tracked};
use outlive_epoch::{EpochReader, Run};
use std::collections::{BTreeMap, BTreeSet};

/// The memory of processes that are being restored, under tracking.
pub struct GoingOn {
    /// One of each process, in their order; none where that has the address space of another, and
    /// of which then.
    pages: Vec<Result<PageTracker, usize>>,
    options: TrackOptions,
    /// Pages of the epoch that belong to no process.
    others: Vec<Run>,
}

impl GoingOn {
    /// Whether memory can be tracked in this way.
    #[must_use]
    pub fn can_be(options: &TrackOptions) -> bool {
        // A guard's thread is none of a restore, which must have one thread only.
        options.strategy.tracks() && !options.strategy.guards()
    }

    /// Begins, when the contents are in place, but for what comes `later`.
    pub fn begin(
        stubs: &mut [Stub],
        saved: &Saved,
        (reader, later): (&dyn EpochReader, &Later),
        (options, missing): (&TrackOptions, &Option<Missing>),
    ) -> Option<Self> {
        let pages: Result<Vec<_>, _> = stubs
            .iter_mut()
            .zip(&saved.processes)
            .enumerate()
            .map(|(at, (stub, process))| {
                if !process.has_memory() {
                    return Ok(Err(saved.holder_of_memory(at)));
                }
                let held = runs_of(stub.target.id, &process.memory, reader);
                let id = stub.target.id;
                let filling = missing.as_ref().and_then(|m| m.filling(id));
                let later = later.get(&id).filter(|_| filling.is_some());
                let later = later.map_or(&[][..], Vec::as_slice);
                track(stub, (&held, later), (options, filling)).map(Ok)
            })
            .collect();
        let pages = pages
            .inspect_err(|e| tracing::info!("the next epoch will be a full one: {e}"))
            .ok()?;
        let ids: BTreeSet<u32> = stubs.iter().map(|s| s.target.id).collect();
        let mut others = reader.runs();
        others.retain(|run| !ids.contains(&run.space().0));
        let options = options.clone();
        Some(Self {
            pages,
            options,
            others,
        })
    }

    /// Gains a foothold in every process, whose threads have got everything else.
    pub fn finish(self, stubs: &mut [Stub]) -> Option<Tracked> {
        let root = stubs.first()?.target.pid;
        members(stubs, self.pages)
            .and_then(|members| Tracked::going_on(root, self.options, members, self.others))
            .inspect_err(|e| tracing::info!("the next epoch will be a full one: {e}"))
            .ok()
    }
}

fn members(
    stubs: &mut [Stub],
    pages: Vec<Result<PageTracker, usize>>,
) -> Result<Vec<Member>, ProcessError> {
    let mut holders = BTreeMap::new();
    let mut others = Vec::new();
    for (at, (stub, pages)) in stubs.iter_mut().zip(pages).enumerate() {
        let pid = stub.target.pid;
        match pages {
            Ok(pages) => {
                let member = Member::going_on(pid, &mut stub.threads, pages)?;
                holders.insert(at, member);
            }
            Err(holder) => others.push((holder, pid)),
        }
    }
    let mut members = Vec::with_capacity(stubs.len());
    for (holder, pid) in others {
        let target = Target::open(pid)?;
        let joined = holders
            .get(&holder)
            .map(|h| h.join(target, WaitBook::default()));
        members.extend(joined);
    }
    members.extend(holders.into_values());
    Ok(members)
}

fn track(
    stub: &mut Stub,
    (held, later): (&[Span], &[Span]),
    (options, filling): (&TrackOptions, Option<Filling>),
) -> Result<PageTracker, ProcessError> {
    let (target, arena) = (&stub.target, &stub.arena);
    let wanted = if options.soft_dirty {
        Wanted::SoftDirty
    } else {
        Wanted::Notes
    };
    let means = bootstrap::make_tracker(target, &mut stub.threads[0], arena, wanted)?;
    let means = means.map_err(|why| target.kernel(why, std::io::Error::other("not tracked")))?;
    let mappings = bootstrap::mappings_without(target, Some(arena.range()))?;
    PageTracker::going_on(
        target,
        (means, options.granularity),
        &private_areas(&mappings, None),
        held,
        (later, filling),
    )
}
