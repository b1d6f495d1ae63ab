//! `ptrace(2)` with the state of the tracee in its type.
//!
//! A [`Running`] tracee cannot be asked for its registers; a [`Halted`] one must be resumed or
//! detached, and is detached when it is dropped, so that no stop is ever stranded. Tracees are
//! always *seized* (never attached with SIGSTOP), and only for the duration of one piece of work.
//!
//! # Rules
//! - All calls for one tracee must come from the thread that seized it (a rule of the kernel).
//! - An exit status is left for whoever waits for the child, if the tracee is the leader of a
//!   process that is our own child; else it is reaped here, because only then its real parent
//!   learns of it.
//!
//! # Safety
//! `ptrace` is called with a request whose address and data arguments are either integers or
//! pointers to live, correctly sized, exclusively borrowed local values. It never writes to our
//! memory beyond these.
#![allow(unsafe_code)]

use crate::{Errno, last_error};
use std::cell::RefCell;
use std::time::{Duration, Instant};

/// General registers of a thread, as `PTRACE_GETREGS` gives them.
pub type Registers = libc::user_regs_struct;

/// Largest extended state that is read, bytes. An AVX-512 machine needs 2.7 KiB, one with AMX
/// 11 KiB.
const XSTATE_MAX: usize = 16 * 1024;
/// … and room for it on most.
const XSTATE_MOSTLY: usize = 4 * 1024;
const NT_X86_XSTATE: usize = 0x202;
const PTRACE_GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;
const PTRACE_PEEKSIGINFO_SHARED: u32 = 1;

/// Why a tracee did not come to a stop.
#[derive(Debug, thiserror::Error)]
pub enum WaitError {
    /// The thread ended.
    #[error("thread {tid} ended")]
    Ended {
        /// The thread.
        tid: u32,
    },
    /// The deadline passed; the thread is still running and still seized.
    #[error("thread {tid} did not stop in time")]
    Timeout {
        /// The thread.
        tid: u32,
    },
    /// The kernel refused.
    #[error("waiting for thread {tid}: {source}")]
    Kernel {
        /// The thread.
        tid: u32,
        /// What the kernel said.
        source: Errno,
    },
}

/// What a wait found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Stopped by an interrupt or at birth (`PTRACE_EVENT_STOP`); the signal is SIGTRAP, or the
    /// stopping signal where the whole process is in a group stop.
    Event(i32),
    /// A signal is about to be delivered.
    Signal(i32),
    /// Entry into or exit from a system call (`PTRACE_O_TRACESYSGOOD`).
    Syscall,
}

/// A seized thread that runs.
#[derive(Debug)]
pub struct Running {
    tid: u32,
    own_child: bool,
    armed: bool,
}

/// A seized thread that is stopped.
#[derive(Debug)]
pub struct Halted {
    tid: u32,
    own_child: bool,
    stop: Stop,
    armed: bool,
}

fn request(req: libc::c_uint, tid: u32, addr: usize, data: usize) -> Result<i64, Errno> {
    // SAFETY: callers in this file pass integers, or pointers to live values that outlast the
    // call and have the size that the request writes (module heading).
    let r = unsafe {
        libc::ptrace(
            req,
            tid as libc::pid_t,
            addr as *mut libc::c_void,
            data as *mut libc::c_void,
        )
    };
    if r < 0 { Err(last_error()) } else { Ok(r) }
}

impl Running {
    /// Seizes a thread. `own_child` says that it is the leader of a process which this process
    /// itself will wait for.
    pub fn seize(tid: u32, own_child: bool) -> Result<Self, Errno> {
        release_stragglers();
        request(
            libc::PTRACE_SEIZE,
            tid,
            0,
            libc::PTRACE_O_TRACESYSGOOD as usize,
        )?;
        Ok(Self {
            tid,
            own_child,
            armed: true,
        })
    }

    /// Takes charge of a thread that the kernel seized for us at its birth (`CLONE_PTRACE`).
    #[must_use]
    pub fn born_seized(tid: u32) -> Self {
        Self {
            tid,
            own_child: false,
            armed: true,
        }
    }

    /// The thread.
    #[must_use]
    pub fn tid(&self) -> u32 {
        self.tid
    }

    /// Asks the thread to stop; [`Running::wait`] tells when it has.
    pub fn interrupt(&self) -> Result<(), Errno> {
        request(libc::PTRACE_INTERRUPT, self.tid, 0, 0).map(drop)
    }

    /// Waits for any stop.
    pub fn wait(mut self, deadline: Instant) -> Result<Halted, (Option<Self>, WaitError)> {
        match wait_stop(self.tid, self.own_child, deadline) {
            Ok(stop) => {
                self.armed = false;
                Ok(Halted {
                    tid: self.tid,
                    own_child: self.own_child,
                    stop,
                    armed: true,
                })
            }
            Err(e @ WaitError::Ended { .. }) => {
                self.armed = false;
                Err((None, e))
            }
            Err(e) => Err((Some(self), e)),
        }
    }

    /// Waits for the stop that an interrupt asked for. Signals that arrive on the way are
    /// delivered: their handler's frame is then part of what is seen.
    pub fn wait_interrupted(
        mut self,
        deadline: Instant,
    ) -> Result<Halted, (Option<Self>, WaitError)> {
        loop {
            let halted = self.wait(deadline)?;
            match halted.stop {
                Stop::Event(_) => return Ok(halted),
                Stop::Signal(signal) => {
                    let tid = halted.tid;
                    self = halted
                        .resume_with(libc::PTRACE_CONT, signal)
                        .map_err(|source| (None, WaitError::Kernel { tid, source }))?;
                }
                Stop::Syscall => {
                    let tid = halted.tid;
                    self = halted
                        .resume()
                        .map_err(|source| (None, WaitError::Kernel { tid, source }))?;
                }
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // A running tracee cannot be detached: stop it first. One that does not stop soon sleeps
        // in the kernel where nothing wakes it, and is let go when it comes back.
        if self.armed && self.interrupt().is_ok() {
            let straggler = (self.tid, self.own_child);
            if !let_go(straggler, Instant::now() + Duration::from_secs(1)) {
                STRAGGLERS.with_borrow_mut(|all| all.push(straggler));
            }
        }
    }
}

thread_local! {
    /// Threads that this one seized and that had not stopped when they were given up: they will
    /// stop some day, and stand until they are let go. Tracing belongs to a thread, so do these.
    static STRAGGLERS: RefCell<Vec<(u32, bool)>> = const { RefCell::new(Vec::new()) };
}

/// Detaches a thread that has stopped by the deadline; whether it needs no more care.
fn let_go((tid, own_child): (u32, bool), deadline: Instant) -> bool {
    match wait_stop(tid, own_child, deadline) {
        Ok(stop) => {
            let signal = if let Stop::Signal(s) = stop { s } else { 0 };
            let _ = request(libc::PTRACE_DETACH, tid, 0, signal as usize);
            true
        }
        Err(WaitError::Timeout { .. }) => false,
        Err(_) => true,
    }
}

/// Lets threads go that the calling thread had seized and that did not stop in time, but have
/// stopped by now; returns how many are still on their way. A tracer that lives on calls this again
/// until there are none, or they would stand for ever once they come back from the kernel.
pub fn release_stragglers() -> usize {
    STRAGGLERS.with_borrow_mut(|all| {
        all.retain(|&straggler| !let_go(straggler, Instant::now()));
        all.len()
    })
}

impl Halted {
    /// The thread.
    #[must_use]
    pub fn tid(&self) -> u32 {
        self.tid
    }

    /// What stopped it.
    #[must_use]
    pub fn stop(&self) -> Stop {
        self.stop
    }

    fn resume_with(mut self, req: libc::c_uint, signal: i32) -> Result<Running, Errno> {
        request(req, self.tid, 0, signal as usize)?;
        self.armed = false;
        Ok(Running {
            tid: self.tid,
            own_child: self.own_child,
            armed: true,
        })
    }

    /// Asks the thread to stop again as soon as it runs.
    pub fn interrupt(&self) -> Result<(), Errno> {
        request(libc::PTRACE_INTERRUPT, self.tid, 0, 0).map(drop)
    }

    /// Lets the thread run, still seized.
    pub fn resume(self) -> Result<Running, Errno> {
        self.resume_with(libc::PTRACE_CONT, 0)
    }

    /// Lets the thread run until it enters or leaves a system call.
    pub fn resume_to_syscall(self) -> Result<Running, Errno> {
        self.resume_with(libc::PTRACE_SYSCALL, 0)
    }

    /// Lets the thread execute one instruction, after which SIGTRAP is about to be delivered. That
    /// signal must not be blocked or ignored: the kernel would change what the process does on it.
    pub fn step(self) -> Result<Running, Errno> {
        self.resume_with(libc::PTRACE_SINGLESTEP, 0)
    }

    /// Lets the thread run and gives it up.
    pub fn detach(mut self) -> Result<(), Errno> {
        self.armed = false;
        let signal = if let Stop::Signal(s) = self.stop {
            s
        } else {
            0
        };
        match request(libc::PTRACE_DETACH, self.tid, 0, signal as usize) {
            Ok(_) => Ok(()),
            Err(Errno::SRCH) => {
                reap_dying(self.tid, self.own_child);
                Ok(())
            }
            Err(e) => Err(e),
        }
    }

    /// Waits until a thread that was killed is gone, and reaps it unless it is our own child.
    pub fn await_end(mut self, deadline: Instant) -> Result<(), WaitError> {
        self.armed = false;
        loop {
            match wait_stop(self.tid, self.own_child, deadline) {
                Err(WaitError::Ended { .. }) => return Ok(()),
                Err(e) => return Err(e),
                // An exit stop or a stop that came before the kill.
                Ok(_) => drop(request(libc::PTRACE_CONT, self.tid, 0, 0)),
            }
        }
    }

    /// Has the kernel kill this thread's process if this tracer ends before it is detached.
    pub fn die_with_us(&self) -> Result<(), Errno> {
        let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_EXITKILL;
        request(libc::PTRACE_SETOPTIONS, self.tid, 0, options as usize).map(drop)
    }

    /// General registers.
    pub fn registers(&self) -> Result<Registers, Errno> {
        // SAFETY: all-zero is a valid value of a struct of integers.
        let mut regs: Registers = unsafe { std::mem::zeroed() };
        request(libc::PTRACE_GETREGS, self.tid, 0, &raw mut regs as usize)?;
        Ok(regs)
    }

    /// Sets the general registers.
    pub fn set_registers(&mut self, regs: &Registers) -> Result<(), Errno> {
        request(libc::PTRACE_SETREGS, self.tid, 0, &raw const *regs as usize).map(drop)
    }

    /// Extended state (x87, SSE, AVX, AVX-512, PKRU …) in the processor's standard XSAVE format.
    pub fn xstate(&self) -> Result<Vec<u8>, Errno> {
        let mut room = XSTATE_MOSTLY;
        loop {
            let mut buffer = vec![0u8; room];
            let mut iov = libc::iovec {
                iov_base: buffer.as_mut_ptr().cast(),
                iov_len: buffer.len(),
            };
            request(
                libc::PTRACE_GETREGSET,
                self.tid,
                NT_X86_XSTATE,
                &raw mut iov as usize,
            )?;
            let len = iov.iov_len.min(buffer.len());
            if len < room || room >= XSTATE_MAX {
                buffer.truncate(len);
                return Ok(buffer);
            }
            // It may be longer: the kernel gives as much as there is room for.
            room = XSTATE_MAX;
        }
    }

    /// Sets the extended state. The kernel checks it and refuses what the processor lacks.
    pub fn set_xstate(&mut self, state: &[u8]) -> Result<(), Errno> {
        let mut copy = state.to_vec();
        let mut iov = libc::iovec {
            iov_base: copy.as_mut_ptr().cast(),
            iov_len: copy.len(),
        };
        request(
            libc::PTRACE_SETREGSET,
            self.tid,
            NT_X86_XSTATE,
            &raw mut iov as usize,
        )
        .map(drop)
    }

    /// Blocked signals, bit n−1 for signal n. Where a call such as `sigsuspend` was interrupted,
    /// this is the mask that it would have put back.
    pub fn signal_mask(&self) -> Result<u64, Errno> {
        let mut mask = 0u64;
        request(libc::PTRACE_GETSIGMASK, self.tid, 8, &raw mut mask as usize)?;
        Ok(mask)
    }

    /// Sets the blocked signals.
    pub fn set_signal_mask(&mut self, mask: u64) -> Result<(), Errno> {
        request(
            libc::PTRACE_SETSIGMASK,
            self.tid,
            8,
            &raw const mask as usize,
        )
        .map(drop)
    }

    /// The queued signals of the thread, or those of its whole process (`shared`), each as the
    /// 128 bytes of a `siginfo_t`.
    pub fn queued_signals(&self, shared: bool) -> Result<Vec<[u8; 128]>, Errno> {
        const BATCH: usize = 32;
        let mut all = Vec::new();
        loop {
            let args = libc::ptrace_peeksiginfo_args {
                off: all.len() as u64,
                flags: if shared { PTRACE_PEEKSIGINFO_SHARED } else { 0 },
                nr: BATCH as i32,
            };
            let mut batch = [[0u8; 128]; BATCH];
            let n = request(
                libc::PTRACE_PEEKSIGINFO,
                self.tid,
                &raw const args as usize,
                &raw mut batch as usize,
            )? as usize;
            all.extend_from_slice(&batch[..n.min(BATCH)]);
            if n < BATCH {
                return Ok(all);
            }
        }
    }

    /// Whether system calls of the thread are handed to a handler of its own
    /// (`PR_SET_SYSCALL_USER_DISPATCH`): then no remote call may be made.
    pub fn dispatches_calls(&self) -> Result<bool, Errno> {
        const GET_SYSCALL_USER_DISPATCH_CONFIG: libc::c_uint = 0x4211;
        let mut config = [0u64; 4];
        let size = size_of_val(&config);
        let at = config.as_mut_ptr() as usize;
        match request(GET_SYSCALL_USER_DISPATCH_CONFIG, self.tid, size, at) {
            Ok(_) => Ok(config[0] != 0),
            // Kernels before 6.4 cannot tell.
            Err(Errno::IO | Errno::INVAL) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Whether the thread may access I/O ports (`ioperm(2)`).
    pub fn accesses_ports(&self) -> Result<bool, Errno> {
        const NT_386_IOPERM: usize = 0x201;
        // A word of the bitmap: whether there is one is what is asked.
        let mut bitmap = [0u8; 8];
        let mut room = libc::iovec {
            iov_base: bitmap.as_mut_ptr().cast(),
            iov_len: bitmap.len(),
        };
        let at = &raw mut room as usize;
        match request(libc::PTRACE_GETREGSET, self.tid, NT_386_IOPERM, at) {
            Ok(_) => Ok(room.iov_len > 0),
            // No permissions, or a kernel without them.
            Err(Errno::NXIO | Errno::NODEV | Errno::INVAL) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Restartable-sequences registration; `None` where the thread has none.
    pub fn rseq(&self) -> Result<Option<Rseq>, Errno> {
        let mut raw = [0u8; 24];
        let size = raw.len();
        match request(
            PTRACE_GET_RSEQ_CONFIGURATION,
            self.tid,
            size,
            raw.as_mut_ptr() as usize,
        ) {
            Ok(_) => {}
            Err(Errno::IO | Errno::INVAL) => return Ok(None),
            Err(e) => return Err(e),
        }
        let word = |at: usize| u32::from_ne_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
        let address = u64::from(word(0)) | (u64::from(word(4)) << 32);
        let rseq = Rseq {
            address,
            size: word(8),
            signature: word(12),
            flags: word(16),
        };
        Ok((address != 0).then_some(rseq))
    }
}

/// A restartable-sequences registration (`rseq(2)`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rseq {
    /// Address of the thread's `struct rseq`.
    pub address: u64,
    /// Its registered length, bytes.
    pub size: u32,
    /// The signature before every abort handler.
    pub signature: u32,
    /// Registration flags.
    pub flags: u32,
}

impl Drop for Halted {
    fn drop(&mut self) {
        if self.armed {
            let signal = if let Stop::Signal(s) = self.stop {
                s
            } else {
                0
            };
            if request(libc::PTRACE_DETACH, self.tid, 0, signal as usize) == Err(Errno::SRCH) {
                reap_dying(self.tid, self.own_child);
            }
        }
    }
}

/// A thread that is killed while it stands cannot be detached, and stays a zombie until its tracer
/// takes note, and its whole process with it.
fn reap_dying(tid: u32, own_child: bool) {
    let deadline = Instant::now() + Duration::from_secs(1);
    // The status of our own child is for whoever waits for the child.
    while !own_child && wait_stop(tid, own_child, deadline).is_ok() {
        if request(libc::PTRACE_DETACH, tid, 0, 0).is_ok() {
            return;
        }
    }
}

/// How long to poll before giving the processor away between polls: a stop across processors
/// takes 25–55 µs.
const SPIN: Duration = Duration::from_micros(200);

fn wait_stop(tid: u32, own_child: bool, deadline: Instant) -> Result<Stop, WaitError> {
    let begun = Instant::now();
    loop {
        if let Some(stop) = poll_stop(tid, own_child)? {
            return Ok(stop);
        }
        let now = Instant::now();
        if now >= deadline {
            return Err(WaitError::Timeout { tid });
        }
        if now - begun < SPIN {
            rustix::thread::sched_yield();
        } else {
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}

fn poll_stop(tid: u32, own_child: bool) -> Result<Option<Stop>, WaitError> {
    // The exit status of an own child must stay: so it is looked first what there is.
    if own_child && !peek_stop(tid)? {
        return Ok(None);
    }
    let mut status = 0;
    // SAFETY: status is live; the call does not wait.
    let found = unsafe { libc::waitpid(tid as i32, &raw mut status, libc::__WALL | libc::WNOHANG) };
    match found {
        0 => return Ok(None),
        n if n < 0 => return wait_error(tid).map(|()| None),
        _ if !libc::WIFSTOPPED(status) => return Err(WaitError::Ended { tid }),
        _ => {}
    }
    let signal = libc::WSTOPSIG(status);
    Ok(Some(if status >> 16 == libc::PTRACE_EVENT_STOP {
        Stop::Event(signal)
    } else if signal == libc::SIGTRAP | 0x80 {
        Stop::Syscall
    } else {
        Stop::Signal(signal)
    }))
}

/// What the error of a wait for a thread means; nothing where it is to be tried again.
fn wait_error(tid: u32) -> Result<(), WaitError> {
    match last_error() {
        Errno::INTR => Ok(()),
        // Nothing to wait for: the thread was reaped or ended in an exec of another thread.
        Errno::CHILD => Err(WaitError::Ended { tid }),
        source => Err(WaitError::Kernel { tid, source }),
    }
}

/// Whether there is a stop to be waited for, in a process whose end is left to be waited for.
fn peek_stop(tid: u32) -> Result<bool, WaitError> {
    // SAFETY: all-zero is a valid siginfo_t.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let flags = libc::WEXITED | libc::WSTOPPED | libc::__WALL | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: info is live and of the type that waitid writes.
    if unsafe { libc::waitid(libc::P_PID, tid, &raw mut info, flags) } < 0 {
        return wait_error(tid).map(|()| false);
    }
    let ended = matches!(
        info.si_code,
        libc::CLD_EXITED | libc::CLD_KILLED | libc::CLD_DUMPED
    );
    // SAFETY: after a successful waitid the SIGCHLD members are the ones that are set; with
    // WNOHANG and nothing to report they are zero from the initialisation above.
    match unsafe { info.si_pid() } {
        0 => Ok(false),
        _ if ended => Err(WaitError::Ended { tid }),
        _ => Ok(true),
    }
}
