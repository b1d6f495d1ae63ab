//! One system call in a process in which there is no working memory yet: those that make it
//! ([`crate::remote::Arena`]), and the one that removes it.
//!
//! # What a thread does when its tracer dies
//! A thread that was sent to a `syscall` instruction somewhere in the program's code would go on
//! behind it, with registers that are not its own. So the instruction is written to where nobody
//! runs: between the end of the vDSO and the end of its last page, a few hundred bytes of zeros in
//! pages that are executable and belong to the process alone. Behind it stands the loop's way out
//! ([`crate::remote`]): wait for the tracer, and if it does not come, put signal mask and registers
//! back. That way only reads its memory. Afterwards the bytes are zeros again.
//!
//! Where there is no such place, any `syscall` instruction must do ([`Site::bare`]): for processes
//! that are being made, which are killed with their tracer, and for programs that have no vDSO.

use crate::Errno;
use crate::ptrace::{Halted, Stop};
use crate::remote::{HEADER, RemoteError, Rescue, decode, header_image, send, wait_code};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// How long one call may take before it is given up.
const TIMEOUT: Duration = Duration::from_secs(60);
/// `syscall`.
const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// Room for the code, before the header.
const CODE: usize = 256;
const LENGTH: usize = CODE + HEADER as usize;

/// Where a call is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Site {
    at: u64,
    /// Where the way out finds what to put back.
    header: Option<u64>,
}

fn code() -> Vec<u8> {
    [&SYSCALL, wait_code()].concat()
}

impl Site {
    /// A `syscall` instruction of the program.
    #[must_use]
    pub const fn bare(at: u64) -> Self {
        Self { at, header: None }
    }

    /// The place at the end of the vDSO, which ends at this address, if it is free: zeros, or what a
    /// tracer that died left there. `None` also where the system does not let us write to it.
    #[must_use]
    pub fn at_the_end_of(pid: u32, end: u64) -> Option<Self> {
        let at = end.checked_sub(LENGTH as u64)?;
        let there = free(pid, at)?;
        write(pid, at, &there).ok()?;
        Some(Self {
            at,
            header: Some(at + CODE as u64),
        })
    }

    /// Whether a thread with this instruction pointer is helping itself there.
    #[must_use]
    pub fn holds(&self, rip: u64) -> bool {
        self.header.is_some() && (self.at..self.at + LENGTH as u64).contains(&rip)
    }

    /// Makes the zeros of before again. No thread may be there any more.
    ///
    /// # Errors
    /// Those of writing to memory.
    pub fn clear(&self, pid: u32) -> Result<(), Errno> {
        match self.header {
            Some(_) => write(pid, self.at, &[0; LENGTH]),
            None => Ok(()),
        }
    }

    /// Makes one system call in a stopped thread, by stopping around it. The thread's registers are
    /// those of the call afterwards, and all signals are blocked. `rescue` is what it goes on with if
    /// we die meanwhile.
    ///
    /// # Errors
    /// [`RemoteError`]: nothing is known about the call then.
    pub fn call(
        &self,
        mut thread: Halted,
        number: i64,
        args: [u64; 6],
        rescue: &Rescue,
    ) -> Result<(Halted, Result<u64, Errno>), RemoteError> {
        let tid = thread.tid();
        let kernel = |what| move |source| RemoteError::Kernel { tid, what, source };
        let mut regs = thread.registers().map_err(kernel("reading registers"))?;
        if let Some(header) = self.header {
            // The program may have something else there by now.
            free(tid, self.at).ok_or_else(|| kernel("finding room for a call")(Errno::FAULT))?;
            let mut bytes = code();
            bytes.resize(CODE, 0);
            bytes.extend_from_slice(&header_image(0, 0, Some(rescue)));
            write(tid, self.at, &bytes).map_err(kernel("writing a call"))?;
            regs.rbx = header;
        }
        regs.rip = self.at;
        regs.rax = number as u64;
        regs.orig_rax = u64::MAX;
        [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9] = args;
        send(&mut thread, &regs)?;
        let mut syscall_stops = 0;
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let running = thread.resume_to_syscall().map_err(kernel("resuming"))?;
            thread = running.wait(deadline).map_err(|(_, e)| e)?;
            if let Stop::Signal(_) = thread.stop() {
                // All signals are blocked: this is a fault, there is no such instruction there.
                return Err(kernel("running a system call")(Errno::FAULT));
            }
            if thread.stop() == Stop::Syscall {
                syscall_stops += 1;
                if syscall_stops == 2 {
                    let rax = thread.registers().map_err(kernel("reading registers"))?.rax;
                    return Ok((thread, decode(rax as i64)));
                }
            }
        }
    }
}

/// What is at the place of a call, if that is nothing of the program's.
fn free(pid: u32, at: u64) -> Option<[u8; LENGTH]> {
    let mut there = [0; LENGTH];
    crate::memory::read_exact(pid, at, &mut there).ok()?;
    let code = code();
    let rest = match there.starts_with(&code) {
        true => &there[code.len()..CODE],
        false => &there[..],
    };
    rest.iter().all(|b| *b == 0).then_some(there)
}

/// Writes to memory that the process itself may not write to; it gets pages of its own.
fn write(pid: u32, at: u64, bytes: &[u8]) -> Result<(), Errno> {
    let error = |e: std::io::Error| Errno::from_io_error(&e).unwrap_or(Errno::IO);
    let memory = File::options()
        .write(true)
        .open(format!("/proc/{pid}/mem"))
        .map_err(error)?;
    memory.write_all_at(bytes, at).map_err(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_out_fits_before_its_header() {
        let code = code();
        assert!(code.len() < CODE && code.starts_with(&SYSCALL));
        assert!(code.ends_with(&[0x48, 0xcf]), "it ends with iretq");
    }

    #[test]
    fn the_end_of_the_vdso_is_free_and_is_used_and_cleared() {
        let mut child = std::process::Command::new("sleep")
            .arg("100")
            .spawn()
            .unwrap();
        let pid = child.id();
        let vdso = loop {
            let maps = crate::maps::read(pid).unwrap();
            if std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap() == "sleep\n"
                && let Some(vdso) = maps.iter().find(|m| m.name == b"[vdso]")
            {
                break vdso.end;
            }
        };
        let site = Site::at_the_end_of(pid, vdso).expect("a place");
        assert!(site.holds(vdso - 1) && !site.holds(vdso) && !site.holds(vdso - 4096));
        write(pid, site.at, &code()).unwrap();
        assert_eq!(Site::at_the_end_of(pid, vdso), Some(site));
        write(pid, site.at, b"something else").unwrap();
        assert_eq!(Site::at_the_end_of(pid, vdso), None);
        site.clear(pid).unwrap();
        assert_eq!(Site::at_the_end_of(pid, vdso), Some(site));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
