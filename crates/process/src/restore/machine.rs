//! Another machine than the one that the program was saved on: its processor and its kernel.
//!
//! # Rules
//! - What differs without a program seeing it is adapted: the layout of extended registers, the
//!   vDSO ([`super::vdso`]).
//! - What a program may rely on and this machine lacks is a refusal that names it.

use super::saved::{Saved, SavedProcess};
use super::vdso::{self, Kernel};
use crate::resources::machine::{MachineState, XstateLayout};
use crate::{ProcessError, Refusal};
use outlive_linux::clock::TimeOffsets;
use outlive_linux::maps::{Mapping, VmFlags};
use outlive_linux::memory;

/// The first registration of restartable sequences, which every kernel with them takes.
const FIRST_RSEQ: u32 = 32;
/// Length of what the kernel keeps in a registration, in the auxiliary vector.
const AT_RSEQ_FEATURE_SIZE: u64 = 27;

/// Adapts what was saved to this machine; returns what makes that impossible.
pub fn adapt(saved: &mut Saved, ours: &[Mapping]) -> Result<Vec<Refusal>, ProcessError> {
    let here = MachineState::here()?;
    let layout = XstateLayout::of(&saved.machine)?;
    let mut refusals = processor(saved, &layout)?;
    for process in &saved.processes {
        refusals.extend(kernel(process));
    }
    if let Some(root) = saved
        .processes
        .first()
        .filter(|_| !TimeOffsets::are_possible())
    {
        let what = "this kernel has no time namespaces, by which its clocks go on";
        refusals.push(root.refusal(what, "restore it under a kernel with CONFIG_TIME_NS"));
    }
    let memories: Vec<_> = saved.processes.iter().map(|p| &p.memory).collect();
    match vdso::judge(&saved.machine, &here, &memories, ours) {
        Ok(Kernel::Same) => {}
        Ok(Kernel::Other(bridge)) => {
            for process in &mut saved.processes {
                process.old_code = vdso::transplant(&mut process.memory, &bridge, ours)?;
            }
        }
        Err(what) => refusals.extend(saved.processes.first().map(|p| {
            let what = format!("the kernel is another one: {what}");
            p.refusal(
                what,
                &format!("restore it under Linux {}", saved.subject.kernel),
            )
        })),
    }
    Ok(refusals)
}

fn processor(saved: &mut Saved, from: &XstateLayout) -> Result<Vec<Refusal>, ProcessError> {
    let to = XstateLayout::here();
    let missing = saved.machine.missing_here();
    let mut refusals = Vec::new();
    if let Some(root) = saved.processes.first().filter(|_| !missing.is_empty()) {
        let what = format!(
            "the processor lacks features that the program may use: {}",
            missing.join(", ")
        );
        refusals.push(root.refusal(what, "restore it on a processor that has them"));
    }
    for process in &mut saved.processes {
        let mut lacking = Vec::new();
        for thread in &mut process.threads.threads {
            match from.convert(&thread.xstate, &to)? {
                Ok(area) => thread.xstate = area,
                Err(state) => lacking.push(format!("thread {} uses {state}", thread.tid)),
            }
        }
        for what in lacking {
            let what = format!("{what}, which the processor lacks");
            refusals.push(process.refusal(what, "restore it on a processor that has them"));
        }
    }
    Ok(refusals)
}

/// What this kernel cannot give to a process.
fn kernel(process: &SavedProcess) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    let mut refuse = |what: &str| {
        let what = format!("{what}, which this kernel lacks");
        refusals.push(process.refusal(what, "restore it under a newer kernel"));
    };
    let memory = &process.memory;
    if memory
        .areas
        .iter()
        .any(|a| a.vm_flags().has(VmFlags::SEALED))
        && !memory::can_seal()
    {
        refuse("it sealed memory (mseal)");
    }
    if !memory.guards.is_empty() && !memory::can_guard() {
        refuse("it has guard pages (MADV_GUARD_INSTALL)");
    }
    let sizes = process
        .threads
        .threads
        .iter()
        .filter_map(|t| t.rseq.as_ref());
    let largest = sizes.map(|r| r.size).max().unwrap_or(0);
    if !fits_rseq(largest, rseq_of_kernel()) {
        refusals.push(process.refusal(
            format!("it registered restartable sequences of {largest} bytes, which this kernel does not take"),
            "restore it under the kernel that it was saved under",
        ));
    }
    refusals
}

/// Whether a kernel that keeps so many bytes (0: it does not say) takes a registration.
fn fits_rseq(registered: u32, kept: u64) -> bool {
    registered <= FIRST_RSEQ || kept != 0 && u64::from(registered) >= kept
}

fn rseq_of_kernel() -> u64 {
    let auxv = std::fs::read("/proc/self/auxv").unwrap_or_default();
    let (words, _) = auxv.as_chunks::<8>();
    let words: Vec<u64> = words.iter().map(|w| u64::from_ne_bytes(*w)).collect();
    let (pairs, _) = words.as_chunks::<2>();
    let found = pairs.iter().find(|p| p[0] == AT_RSEQ_FEATURE_SIZE);
    found.map_or(0, |p| p[1])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registrations_of_restartable_sequences_fit_by_the_rules_of_the_kernel() {
        for (registered, kept, fits) in [
            (0, 0, true),
            (32, 0, true),
            (32, 28, true),
            (32, 40, true),
            (64, 0, false),
            (64, 28, true),
            (64, 40, true),
            (36, 40, false),
        ] {
            assert_eq!(fits_rseq(registered, kept), fits, "{registered} {kept}");
        }
    }
}
