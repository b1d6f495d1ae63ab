//! The address space under another kernel: what the old kernel had mapped becomes ordinary memory,
//! and what this one maps gets a place of its own. Why, and with which contents: [`crate::vdso`].
//!
//! Once changed so, a process is saved and restored like any other: to a later restore the old
//! object is memory, and the object of this kernel is the kernel's.

use super::leave::OldPlaces;
use super::space::kernel_kind;
use super::stub::{Stub, step};
use crate::ProcessError;
use crate::resources::machine::MachineState;
use crate::resources::memory::{Area, AreaKind, MemoryState};
use crate::vdso::Bridge;
use outlive_linux::maps::Mapping;
use outlive_linux::memory;

const PAGE: u64 = outlive_epoch::PAGE_SIZE as u64;
/// Highest address that is used for the new object.
const TOP: u64 = 0x7fff_0000_0000;
/// Free bytes that must lie on either side of it, since heaps and stacks grow.
const MARGIN: u64 = 1 << 30;

/// What this kernel is to the processes of an image.
pub enum Kernel {
    /// The one that they knew, as far as they can see.
    Same,
    /// Another one.
    Other(Bridge),
}

/// Old code that is to be written into a process: its address and contents.
pub struct OldCode {
    /// Where it lies, and the data beside it.
    pub places: OldPlaces,
    /// As it was.
    original: Vec<u8>,
    /// With the way to the new object.
    contents: Vec<u8>,
}

fn is_kernels(kind: AreaKind) -> bool {
    matches!(kind, AreaKind::Vdso | AreaKind::Vvar | AreaKind::VvarVclock)
}

/// Judges this kernel by what the image's had mapped. The error says why there is no way.
pub fn judge(
    saved: &MachineState,
    here: &MachineState,
    processes: &[&MemoryState],
    ours: &[Mapping],
) -> Result<Kernel, String> {
    let areas = || processes.iter().flat_map(|p| &p.areas);
    let same_length = areas().filter(|a| is_kernels(a.kind)).all(|a| {
        let same = ours.iter().find(|m| kernel_kind(m) == Some(a.kind));
        same.is_some_and(|m| m.len() == a.len())
    });
    if saved.vdso == here.vdso && same_length {
        return Ok(Kernel::Same);
    }
    let mut old = areas().filter(|a| a.kind == AreaKind::Vdso).peekable();
    if old.peek().is_none() {
        return Ok(Kernel::Same);
    }
    if old.any(|a| a.len() != saved.vdso.len() as u64) {
        return Err("the kernel is another one, and only part of the vDSO is mapped".into());
    }
    Bridge::new(&saved.vdso, &here.vdso).map(Kernel::Other)
}

/// Changes the description of an address space for another kernel.
pub fn transplant(
    state: &mut MemoryState,
    bridge: &Bridge,
    ours: &[Mapping],
) -> Result<Option<OldCode>, ProcessError> {
    let mut block: Vec<(AreaKind, &Mapping)> = ours
        .iter()
        .filter_map(|m| Some((kernel_kind(m)?, m)))
        .collect();
    block.sort_by_key(|(_, m)| m.start);
    let (Some(first), Some(last)) = (block.first(), block.last()) else {
        return Err(ProcessError::Image("this kernel has no vDSO".into()));
    };
    let (from, length) = (first.1.start, last.1.end - first.1.start);
    let to = free_place(state, ours, length)?;
    let new_at = block.iter().find(|(kind, _)| *kind == AreaKind::Vdso);
    let new_at = new_at.map_or(to, |(_, m)| m.start - from + to);
    let old = OldPlaces::of(state).map(|places| OldCode {
        places,
        original: bridge.original().to_vec(),
        contents: bridge.contents(new_at),
    });
    for area in state.areas.iter_mut().filter(|a| is_kernels(a.kind)) {
        area.kind = AreaKind::Anonymous;
        area.flags.clear();
        area.offset = 0;
    }
    if old.is_some() {
        // The data lie at fixed distances before the code.
        let areas = block.into_iter().map(|(kind, m)| Area {
            start: m.start - from + to,
            end: m.end - from + to,
            protection: m.prot,
            kind,
            flags: Vec::new(),
            file: None,
            space: None,
            offset: m.offset,
            label: None,
        });
        state.areas.extend(areas);
        state.areas.sort_by_key(|a| a.start);
    }
    Ok(old)
}

/// A place by chance, since code at a known address helps an attacker.
fn free_place(state: &MemoryState, ours: &[Mapping], length: u64) -> Result<u64, ProcessError> {
    let mut taken: Vec<(u64, u64)> = state.areas.iter().map(|a| (a.start, a.end)).collect();
    taken.extend(ours.iter().map(|m| (m.start, m.end)));
    taken.sort_unstable();
    taken.push((TOP, TOP));
    // The largest hole.
    let mut free_from = 0x1_0000_0000;
    let mut best = (0, 0);
    for (start, end) in taken {
        let free = start.min(TOP).saturating_sub(free_from);
        if free > best.1 {
            best = (free_from, free);
        }
        free_from = free_from.max(end);
    }
    let choices = best.1.saturating_sub(2 * MARGIN + length) / PAGE;
    if choices == 0 {
        let what = "memory: no room for the vDSO of this kernel";
        return Err(ProcessError::Image(what.into()));
    }
    let mut random = [0u8; 8];
    // Without chance any place will do.
    let _ = rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty());
    Ok(best.0 + MARGIN + u64::from_ne_bytes(random) % choices * PAGE)
}

/// Writes the old code as it was, for those threads that stand in it.
pub fn write(stub: &mut Stub, old: &OldCode) -> Result<(), ProcessError> {
    put(stub, old, &old.original)
}

/// Has the old code lead to the new, once no thread stands in it any more.
pub fn connect(stub: &mut Stub, old: &OldCode) -> Result<(), ProcessError> {
    put(stub, old, &old.contents)
}

fn put(stub: &mut Stub, old: &OldCode, contents: &[u8]) -> Result<(), ProcessError> {
    let (at, len) = (old.places.code.start, contents.len() as u64);
    let protect = |protection| {
        let args = [at, len, protection];
        vec![step(libc::SYS_mprotect, args, "protecting the old vDSO")]
    };
    stub.steps(protect(3))?;
    memory::write(stub.target.pid, at, contents)
        .map_err(|e| stub.target.kernel("writing the old vDSO", e))?;
    stub.steps(protect(5)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area(start: u64, end: u64) -> Area {
        Area {
            start,
            end,
            protection: 3,
            kind: AreaKind::Anonymous,
            flags: Vec::new(),
            file: None,
            space: None,
            offset: 0,
            label: None,
        }
    }

    fn state(areas: Vec<Area>) -> MemoryState {
        MemoryState {
            layout: vec![0; 10],
            brk: 0,
            auxiliary_vector: Vec::new(),
            lock_future: 0,
            guards: Vec::new(),
            files: Vec::new(),
            areas,
        }
    }

    fn ours() -> Vec<Mapping> {
        outlive_linux::maps::read(std::process::id()).unwrap()
    }

    #[test]
    fn the_new_object_lies_where_nothing_is() {
        let ours = ours();
        let state = state(vec![
            area(0x40_0000, 0x50_0000),
            area(0x5555_0000_0000, 0x5556_0000_0000),
        ]);
        let places: Vec<u64> = (0..50)
            .map(|_| free_place(&state, &ours, 0x6000).unwrap())
            .collect();
        for &at in &places {
            let apart = |s: u64, e: u64| at + 0x6000 + MARGIN <= s || at >= e + MARGIN;
            assert!(state.areas.iter().all(|a| apart(a.start, a.end)), "{at:x}");
            assert!(ours.iter().all(|m| apart(m.start, m.end)), "{at:x}");
        }
        assert!(places.iter().any(|p| *p != places[0]));
        let full = super::tests::state(vec![area(0x1_0000, TOP)]);
        assert!(free_place(&full, &[], 0x6000).is_err());
    }

    #[test]
    fn another_kernel_makes_the_old_areas_ordinary_and_adds_its_own() {
        let here = MachineState::here().unwrap();
        let ours = ours();
        let (v, d) = (0x7ffe_0000_8000, 0x7ffe_0000_4000);
        let len = here.vdso.len() as u64;
        let mut old = state(vec![
            area(0x40_0000, 0x50_0000),
            area(d, v),
            area(v, v + len),
        ]);
        old.areas[1].kind = AreaKind::Vvar;
        old.areas[2].kind = AreaKind::Vdso;
        let mut machine = here.clone();
        *machine.vdso.last_mut().unwrap() ^= 1;
        let Kernel::Other(bridge) = judge(&machine, &here, &[&old], &ours).unwrap() else {
            panic!("taken for the same kernel");
        };
        let code = transplant(&mut old, &bridge, &ours).unwrap().unwrap();
        assert_eq!(
            (code.places.code.start, code.contents.len() as u64),
            (v, len)
        );
        super::super::space::validate(&old).unwrap();
        let kinds = |kind| old.areas.iter().filter(move |a| a.kind == kind);
        assert_eq!(kinds(AreaKind::Anonymous).count(), 3);
        let new = kinds(AreaKind::Vdso).next().unwrap();
        let data = kinds(AreaKind::Vvar).next().unwrap();
        let at = |kind| {
            ours.iter()
                .find(|m| kernel_kind(m) == Some(kind))
                .unwrap()
                .start
        };
        assert_eq!(
            new.start - data.start,
            at(AreaKind::Vdso) - at(AreaKind::Vvar)
        );
    }

    #[test]
    fn part_of_an_object_under_another_kernel_is_refused() {
        let here = MachineState::here().unwrap();
        let mut part = state(vec![area(0x7ffe_0000_0000, 0x7ffe_0000_1000)]);
        part.areas[0].kind = AreaKind::Vdso;
        assert!(judge(&here, &here, &[&part], &ours()).is_err());
    }
}
