//! Threads that stood inside the old kernel's vDSO go on, instruction by instruction, until they
//! are out of it: it must not be relied on any longer ([`crate::vdso`]).
//!
//! The leading thread of the new process does it for each of them, with their registers, while the
//! process has no signal handlers yet.
//!
//! # Rules
//! - At a system call they are left alone: making it is right under any kernel.
//! - The old data are out of reach at first. Code that gets by without them had read all that it
//!   needed before. Code that reads them finds zeros, of which it makes a system call; if it makes
//!   none, it read a clock that now stands at zero, and the epoch is refused.

use super::stub::{PATIENCE, Stub, step};
use crate::freeze::Held;
use crate::resources::memory::{AreaKind, MemoryState};
use crate::resources::thread::{RegistersState, ThreadState};
use crate::{ProcessError, Refusal};
use outlive_linux::memory;
use outlive_linux::ptrace::{Halted, Registers, Stop};
use std::ops::Range;
use std::time::Instant;

/// Instructions after which a thread is not waited for any longer.
const MOST_STEPS: usize = 20_000;
const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// Where the old kernel's code and data lie in a process.
#[derive(Clone, Debug)]
pub struct OldPlaces {
    /// Code.
    pub code: Range<u64>,
    /// Data: ranges of zeros.
    pub data: Vec<Range<u64>>,
}

impl OldPlaces {
    /// What an address space says of the old kernel, before it is changed.
    pub fn of(state: &MemoryState) -> Option<Self> {
        let of = |kind| {
            let areas = state.areas.iter().filter(move |a| a.kind == kind);
            areas.map(|a| a.start..a.end)
        };
        let data = of(AreaKind::Vvar).chain(of(AreaKind::VvarVclock));
        Some(Self {
            code: of(AreaKind::Vdso).next()?,
            data: data.collect(),
        })
    }
}

enum Out {
    /// Out of the old code, or about to make a system call.
    Safe,
    /// It read a clock that stands at zero.
    Misled,
}

/// Brings these threads out of the old code; their registers are changed accordingly.
pub fn leave(
    stub: &mut Stub,
    places: &OldPlaces,
    threads: &mut [ThreadState],
) -> Result<(), ProcessError> {
    let inside = |t: &&mut ThreadState| places.code.contains(&t.registers.rip);
    for thread in threads.iter_mut().filter(inside) {
        protect(stub, places, 0)?;
        let out = walk(stub, places, thread)?;
        protect(stub, places, 1)?;
        if let Out::Misled = out {
            return Err(ProcessError::Refused(vec![refusal(stub, thread)]));
        }
    }
    Ok(())
}

fn refusal(stub: &Stub, thread: &ThreadState) -> Refusal {
    let what = "it was reading a clock inside the vDSO of the kernel that it was saved under, and \
                this is another one";
    stub.target.refusal(
        format!("thread {}", thread.tid),
        what,
        "restore another epoch (--epoch), or under that kernel",
    )
}

fn protect(stub: &mut Stub, places: &OldPlaces, protection: u64) -> Result<(), ProcessError> {
    let of = |r: &Range<u64>| {
        let args = [r.start, r.end - r.start, protection];
        step(libc::SYS_mprotect, args, "protecting the old kernel's data")
    };
    stub.steps(places.data.iter().map(of).collect()).map(drop)
}

fn walk(
    stub: &mut Stub,
    places: &OldPlaces,
    thread: &mut ThreadState,
) -> Result<Out, ProcessError> {
    let pid = stub.target.pid;
    let mut now = thread.registers.to_ptrace();
    let at_call = |r: &Registers| {
        let mut code = [0u8; 2];
        memory::read_exact(pid, r.rip, &mut code).is_ok() && code == SYSCALL
    };
    let mut before = [0u8; 2];
    let behind_call =
        memory::read_exact(pid, now.rip - 2, &mut before).is_ok() && before == SYSCALL;
    if behind_call {
        return Ok(Out::Safe);
    }
    now.orig_rax = u64::MAX;
    let mut misled = false;
    for _ in 0..MOST_STEPS {
        if at_call(&now) {
            misled = false;
            break;
        }
        if !places.code.contains(&now.rip) {
            break;
        }
        if enters_kernel(pid, now.rip) {
            return Err(stuck(stub, thread));
        }
        match one_step(stub, thread, &now)? {
            Some(next) => now = next,
            None if misled => return Err(stuck(stub, thread)),
            None => {
                misled = true;
                protect(stub, places, 1)?;
            }
        }
    }
    if places.code.contains(&now.rip) && !at_call(&now) {
        return Err(stuck(stub, thread));
    }
    thread.registers = RegistersState::of(&now);
    Ok(if misled { Out::Misled } else { Out::Safe })
}

/// Whether the instruction there enters the kernel in a way that no vDSO does: what is stepped
/// through comes from an image, and no system call of its choice may be made.
fn enters_kernel(pid: u32, rip: u64) -> bool {
    const LONGEST: usize = 15;
    let mut code = [0u8; LONGEST];
    let length = (2..=LONGEST)
        .rev()
        .find(|&n| memory::read_exact(pid, rip, &mut code[..n]).is_ok());
    is_entry(&code[..length.unwrap_or(0)])
}

/// The same of an instruction's bytes, whatever prefixes it has.
fn is_entry(code: &[u8]) -> bool {
    const PREFIXES: [u8; 11] = [
        0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0x66, 0x67, 0xf0, 0xf2, 0xf3,
    ];
    let is_prefix = |b: &&u8| PREFIXES.contains(b) || **b & 0xf0 == 0x40;
    let prefixes = code.iter().take_while(is_prefix).count();
    match code[prefixes..] {
        // syscall, sysret, sysenter, sysexit; int n, iret
        [0x0f, 0x05 | 0x07 | 0x34 | 0x35, ..] | [0xcc..=0xcf, ..] => true,
        _ => false,
    }
}

fn stuck(stub: &Stub, thread: &ThreadState) -> ProcessError {
    let what = format!("thread {}: leaving the old kernel's vDSO", thread.tid);
    let why = std::io::Error::other("it faults, or does not come to an end");
    stub.target.kernel(what, why)
}

/// Executes one instruction with these registers; `None` where it faults.
fn one_step(
    stub: &mut Stub,
    thread: &mut ThreadState,
    from: &Registers,
) -> Result<Option<Registers>, ProcessError> {
    let held = stub.threads.remove(0);
    let target = &stub.target;
    let failed = |e: outlive_linux::Errno| target.kernel("stepping out of the old vDSO", e);
    let mut halted = held
        .into_halted()
        .ok_or_else(|| target.kernel("stepping", std::io::Error::other("no thread")))?;
    let only_trap = !(1u64 << (libc::SIGTRAP - 1) | 1u64 << (libc::SIGSEGV - 1));
    halted.set_signal_mask(only_trap).map_err(failed)?;
    halted.set_xstate(&thread.xstate).map_err(failed)?;
    halted.set_registers(from).map_err(failed)?;
    let running = halted.step().map_err(failed)?;
    let halted: Halted = running
        .wait(Instant::now() + PATIENCE)
        .map_err(|(_, e)| target.kernel(e.to_string(), std::io::Error::other("no stop")))?;
    let next = match halted.stop() {
        Stop::Signal(libc::SIGTRAP) => {
            thread.xstate = halted.xstate().map_err(failed)?;
            Some(halted.registers().map_err(failed)?)
        }
        _ => None,
    };
    let mut held = Held::new(halted).map_err(failed)?;
    held.touch();
    stub.threads.insert(0, held);
    Ok(next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_enters_the_kernel_is_known() {
        for code in [
            &[0x0f, 0x05][..],
            &[0x48, 0x0f, 0x05],
            &[0xcd, 0x80],
            &[0x66, 0x0f, 0x34],
        ] {
            assert!(is_entry(code), "{code:x?}");
        }
        for code in [
            &[][..],
            &[0x48],
            &[0x0f, 0xa2],
            &[0x0f, 0x31],
            &[0x90, 0x0f, 0x05],
        ] {
            assert!(!is_entry(code), "{code:x?}");
        }
    }
}
