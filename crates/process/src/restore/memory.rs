//! Making all address spaces: mappings, contents, and what is done when these are in place.

use super::heirs::Heirs;
use super::lazy::Later;
use super::saved::{Files, Saved, SavedProcess};
use super::stub::Stub;
use super::system_v::Objects;
use super::{leave, space, tree, vdso};
use crate::ProcessError;
use crate::resources::shared::{self, FileContents, Memories};
use outlive_epoch::EpochReader;
use outlive_linux::remote::Batch;
use std::collections::HashMap;

/// What the address spaces are made from.
pub struct Contents<'a> {
    /// The epoch.
    pub reader: &'a dyn EpochReader,
    /// Who has memory from whom.
    pub heirs: &'a Heirs,
    /// What comes later.
    pub later: &'a Later,
}

impl Contents<'_> {
    fn later(&self, stub: &Stub) -> &[(u64, u64)] {
        self.later.get(&stub.target.id).map_or(&[], Vec::as_slice)
    }
}

/// Makes the address space of a process whose children have much of it, before these are made.
pub fn give(
    stub: &mut Stub,
    saved: &SavedProcess,
    files: &Files,
    shared: &Memories,
    from: &Contents<'_>,
) -> Result<(), ProcessError> {
    if !from.heirs.gives(stub.target.id) {
        return Ok(());
    }
    let populating = mappings(stub, saved, files, shared, from)?;
    let flight = stub.begin(populating)?;
    let space = space_of(stub, saved, from)?;
    let filled = space::fill(&[space], &Memories::new(), &mut HashMap::new(), from.reader);
    stub.finish(flight)?;
    filled
}

fn space_of<'a>(
    stub: &'a Stub,
    saved: &'a SavedProcess,
    from: &'a Contents<'_>,
) -> Result<space::Space<'a>, ProcessError> {
    let open = |_| std::fs::File::open(format!("/proc/{}/mem", stub.target.pid));
    let inherited = from.heirs.of(stub.target.id).map(open).transpose();
    Ok(space::Space {
        target: &stub.target,
        state: &saved.memory,
        inherited: inherited.map_err(|e| stub.target.kernel("opening its memory", e))?,
        later: from.later(stub),
    })
}

/// Makes the mappings of one process.
fn mappings(
    stub: &mut Stub,
    saved: &SavedProcess,
    files: &Files,
    shared: &Memories,
    from: &Contents<'_>,
) -> Result<Batch, ProcessError> {
    let heritage = from.heirs.of(stub.target.id);
    space::clear(stub, &saved.memory, heritage)?;
    let runs = space::runs_of(stub.target.id, &saved.memory, from.reader);
    let runs = (runs, from.later(stub));
    let populating = space::map(stub, &saved.memory, &files.mapped, shared, heritage, runs)?;
    if let Some(code) = &saved.old_code {
        vdso::write(stub, code)?;
    }
    Ok(populating)
}

/// Makes all address spaces, with their contents.
pub fn make(
    stubs: &mut [Stub],
    saved: &Saved,
    files: &[Files],
    (shared, contents): (&Memories, &mut HashMap<u32, FileContents>),
    (objects, from): (&Objects, &Contents<'_>),
) -> Result<(), ProcessError> {
    let has_none = |(_, p): &(&mut Stub, &SavedProcess)| !p.has_memory();
    for (stub, _) in stubs.iter_mut().zip(&saved.processes).filter(has_none) {
        space::forget_rseq(stub)?;
    }
    let mut flights = Vec::with_capacity(stubs.len());
    for ((stub, saved), files) in stubs.iter_mut().zip(&saved.processes).zip(files) {
        if !saved.has_memory() {
            continue;
        }
        let populating = if from.heirs.gives(stub.target.id) {
            Batch::new()
        } else {
            mappings(stub, saved, files, shared, from)?
        };
        let (arena, length) = stub.arena.range();
        objects.attach(stub, &saved.memory, arena + length + tree::ASIDE)?;
        flights.push(stub.begin(populating)?);
    }
    let filled = {
        let spaces = stubs.iter().zip(&saved.processes);
        let spaces: Result<Vec<_>, _> = spaces
            .filter(|(stub, p)| p.has_memory() && !from.heirs.gives(stub.target.id))
            .map(|(stub, p)| space_of(stub, p, from))
            .collect();
        spaces.and_then(|spaces| space::fill(&spaces, shared, contents, from.reader))
    };
    let with_memory = stubs
        .iter_mut()
        .zip(&saved.processes)
        .filter(|(_, p)| p.has_memory());
    for ((stub, _), flight) in with_memory.zip(flights) {
        stub.finish(flight)?;
    }
    filled
}

/// What is done to memory when the contents are in place: seals, protections, locks.
pub fn finish(
    stubs: &mut [Stub],
    saved: &mut Saved,
    files: &[Files],
    shared: &Memories,
) -> Result<(), ProcessError> {
    shared::seal(&saved.shared, shared)?;
    for ((stub, saved), files) in stubs.iter_mut().zip(&saved.processes).zip(files) {
        if saved.has_memory() {
            space::map_sealed(stub, &saved.memory, shared)?;
            space::finish(stub, &saved.memory)?;
            space::set_layout(stub, &saved.memory, &files.executable)?;
        }
    }
    leave_old_code(stubs, saved)
}

/// Brings all threads out of the code of another kernel, before that leads to this one's.
fn leave_old_code(stubs: &mut [Stub], saved: &mut Saved) -> Result<(), ProcessError> {
    for (at, stub) in stubs.iter_mut().enumerate() {
        let holder = saved.holder_of_memory(at);
        let places = saved.processes[holder]
            .old_code
            .as_ref()
            .map(|code| code.places.clone());
        if let Some(places) = places {
            leave::leave(stub, &places, &mut saved.processes[at].threads.threads)?;
        }
    }
    for (stub, saved) in stubs.iter_mut().zip(&saved.processes) {
        if let Some(code) = &saved.old_code {
            vdso::connect(stub, code)?;
        }
    }
    Ok(())
}
