//! System calls in another process, in batches.
//!
//! While a program is stopped, a few pages of private memory (the [`Arena`]) lie in it: one with a
//! small position-independent loop, the rest for lists of calls with their data. A [`Batch`] is
//! written there, the thread is sent into the loop with all signals blocked, and when the loop has
//! set its *done* mark the thread is stopped again and the results are read. A call costs well
//! below a microsecond that way, where stopping around each one costs about a hundred.
//!
//! # What a thread does when its tracer dies
//! The loop ends in a wait with a time limit. When nobody stops the thread before
//! [`RESCUE_AFTER`], it puts its own signal mask and registers back, from the copy that lies
//! beside the list ([`Rescue`]), and the program goes on as if nothing had happened. No breakpoint
//! and no signal is used, so the program's handling of SIGTRAP does not matter; the wait is one
//! that leaves the kernel's restart block alone, so an interrupted `nanosleep` still knows its end.
//!
//! # Safety
//! The loop is machine code that is only copied, never run, by this process. Its bytes lie between
//! two symbols of this file's assembly.
#![allow(unsafe_code)]

use crate::Errno;
use crate::aside::Aside;
use crate::memory;
use crate::ptrace::{Halted, Registers, Running, Stop, WaitError};
use rustix::process::{Pid, Signal, kill_process};
use std::time::{Duration, Instant};

/// How long a thread waits in the loop for its tracer before it helps itself.
pub const RESCUE_AFTER: Duration = Duration::from_secs(3);

/// How long a batch may take before it is given up.
const BATCH_TIMEOUT: Duration = Duration::from_secs(60);
/// The same where another thread makes a call: whoever waits for it cannot be stopped, and calls that are
/// made so come back at once.
const ASIDE_TIMEOUT: Duration = Duration::from_secs(1);

std::arch::global_asm!(
    ".pushsection .rodata.outlive_loop,\"a\",@progbits",
    ".globl outlive_loop_begin",
    ".globl outlive_loop_end",
    "outlive_loop_begin:",
    // rbx: header; r12: next call; r13: end of the list.
    "mov r12, [rbx]",
    "mov r13, [rbx + 8]",
    "2:",
    "cmp r12, r13",
    "jae 3f",
    "mov rax, [r12]",
    "test rax, rax",
    "js 5f",
    "mov rdi, [r12 + 8]",
    "mov rsi, [r12 + 16]",
    "mov rdx, [r12 + 24]",
    "mov r10, [r12 + 32]",
    "mov r8, [r12 + 40]",
    "mov r9, [r12 + 48]",
    "syscall",
    "mov [r12 + 56], rax",
    "7:",
    "add r12, 64",
    "jmp 2b",
    // A call with its number below zero: a thread made for it makes it, and is waited for. clone(2)
    // with the same stack, which nobody uses: CLONE_VM, _FS, _FILES, _SIGHAND, _VFORK, _THREAD,
    // _SYSVSEM, _UNTRACED.
    "5:",
    "mov eax, 56",
    "mov edi, 0x854f00",
    "xor esi, esi",
    "xor edx, edx",
    "xor r10d, r10d",
    "xor r8d, r8d",
    "syscall",
    "test rax, rax",
    "js 6f",
    "jnz 7b",
    "mov rax, [r12]",
    "neg rax",
    "mov rdi, [r12 + 8]",
    "mov rsi, [r12 + 16]",
    "mov rdx, [r12 + 24]",
    "mov r10, [r12 + 32]",
    "mov r8, [r12 + 40]",
    "mov r9, [r12 + 48]",
    "syscall",
    "mov [r12 + 56], rax",
    // exit(0), of the thread alone
    "mov eax, 60",
    "xor edi, edi",
    "syscall",
    "6:",
    "mov [r12 + 56], rax",
    "jmp 7b",
    "3:",
    "mov qword ptr [rbx + 16], 1",
    ".globl outlive_loop_wait",
    "outlive_loop_wait:",
    "4:",
    // rt_sigtimedwait(no signal, no info, limit): EAGAIN when the limit passes.
    "mov eax, 128",
    "lea rdi, [rbx + 40]",
    "xor esi, esi",
    "lea rdx, [rbx + 24]",
    "mov r10d, 8",
    "syscall",
    "cmp rax, -11",
    "jne 4b",
    // The tracer is gone: rt_sigprocmask(SIG_SETMASK, saved), then all registers.
    "mov eax, 14",
    "mov edi, 2",
    "lea rsi, [rbx + 48]",
    "xor edx, edx",
    "mov r10d, 8",
    "syscall",
    "lea rsp, [rbx + 56]",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop r11",
    "pop r10",
    "pop r9",
    "pop r8",
    "pop rdi",
    "pop rsi",
    "pop rbp",
    "pop rbx",
    "pop rdx",
    "pop rcx",
    "pop rax",
    "iretq",
    "outlive_loop_end:",
    ".popsection",
);

unsafe extern "C" {
    static outlive_loop_begin: u8;
    static outlive_loop_wait: u8;
    static outlive_loop_end: u8;
}

fn loop_code() -> &'static [u8] {
    let begin = &raw const outlive_loop_begin;
    let end = &raw const outlive_loop_end;
    // SAFETY: both symbols enclose the read-only bytes assembled above, in this order.
    unsafe { std::slice::from_raw_parts(begin, end as usize - begin as usize) }
}

/// The part of the loop that waits for the tracer and helps itself; `rbx` leads to the header.
pub(crate) fn wait_code() -> &'static [u8] {
    let (begin, wait) = (&raw const outlive_loop_begin, &raw const outlive_loop_wait);
    &loop_code()[wait as usize - begin as usize..]
}

const PAGE: u64 = 4096;
/// Stamp at the end of the code page, by which a successor finds an arena.
const STAMP: &[u8; 16] = b"outlive-arena-v1";
pub(crate) const HEADER: u64 = 256;
/// Below the header a rescued thread may take a signal: room for its frame.
const FRAME_ROOM: u64 = 16 * 1024;
const CALL: usize = 64;

/// An argument of a remote call.
#[derive(Clone, Debug)]
pub enum Arg {
    /// A number, a descriptor, an address in the target.
    Value(u64),
    /// Bytes that the call reads; the target gets their address.
    In(Vec<u8>),
    /// Room for so many bytes that the call writes, zero at first.
    Out(usize),
    /// Bytes that the call reads and writes.
    InOut(Vec<u8>),
}

impl From<u64> for Arg {
    fn from(v: u64) -> Self {
        Self::Value(v)
    }
}

/// Names a call of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallId(usize);

#[derive(Clone, Debug)]
struct Call {
    number: i64,
    /// Value, or offset into the data with a marker.
    args: [(u64, bool); 6],
    outs: Vec<(usize, usize, usize)>,
}

/// A list of system calls, run one after the other whatever each returns.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    calls: Vec<Call>,
    data: Vec<u8>,
}

impl Batch {
    /// An empty list.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether nothing was added yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }

    /// Bytes that the batch takes in an arena.
    #[must_use]
    pub fn size(&self) -> usize {
        self.calls.len() * CALL + self.data.len()
    }

    /// Adds a call (`SYS_…`) with up to six arguments.
    pub fn push(&mut self, number: i64, args: impl IntoIterator<Item = Arg>) -> CallId {
        let mut call = Call {
            number,
            args: [(0, false); 6],
            outs: Vec::new(),
        };
        for (i, arg) in args.into_iter().take(6).enumerate() {
            call.args[i] = match arg {
                Arg::Value(v) => (v, false),
                Arg::In(bytes) => {
                    let at = self.data.len();
                    self.data.extend_from_slice(&bytes);
                    self.data.resize(self.data.len().next_multiple_of(16), 0);
                    (at as u64, true)
                }
                Arg::Out(len) => {
                    let at = self.data.len();
                    self.data.resize((at + len).next_multiple_of(16), 0);
                    call.outs.push((i, at, len));
                    (at as u64, true)
                }
                Arg::InOut(bytes) => {
                    let at = self.data.len();
                    self.data.extend_from_slice(&bytes);
                    self.data.resize(self.data.len().next_multiple_of(16), 0);
                    call.outs.push((i, at, bytes.len()));
                    (at as u64, true)
                }
            };
        }
        self.calls.push(call);
        CallId(self.calls.len() - 1)
    }

    /// Adds a call that a thread makes which is made for it and ends then: what it changes of its own
    /// (credentials, keyrings) is gone with it. Where no thread can be made, that is the answer. For
    /// calls that come back at once: the other thread waits.
    ///
    /// A stop signal in that moment (SIGSTOP) stops that thread too, which is sent on then; the program is
    /// stopped once it is let go.
    pub fn push_aside(&mut self, number: i64, args: impl IntoIterator<Item = Arg>) -> CallId {
        self.push(-number, args)
    }

    /// Whether other threads are made for some of the calls.
    fn has_aside(&self) -> bool {
        self.calls.iter().any(|call| call.number < 0)
    }

    fn image(&self, at: u64) -> Vec<u8> {
        let data_at = at + (self.calls.len() * CALL) as u64;
        let mut image = Vec::with_capacity(self.size());
        for call in &self.calls {
            image.extend_from_slice(&call.number.to_ne_bytes());
            for &(value, relative) in &call.args {
                let value = if relative { data_at + value } else { value };
                image.extend_from_slice(&value.to_ne_bytes());
            }
            image.extend_from_slice(&0u64.to_ne_bytes());
        }
        image.extend_from_slice(&self.data);
        image
    }
}

/// What the calls of a batch returned.
#[derive(Debug)]
pub struct Results {
    batch: Batch,
    image: Vec<u8>,
}

impl Results {
    /// Return value of a call.
    pub fn value(&self, id: CallId) -> Result<u64, Errno> {
        let at = id.0 * CALL + 56;
        let mut raw = [0u8; 8];
        raw.copy_from_slice(&self.image[at..at + 8]);
        decode(i64::from_ne_bytes(raw))
    }

    /// What a call wrote to its argument number `arg`, which was an [`Arg::Out`] or
    /// [`Arg::InOut`]; empty otherwise.
    #[must_use]
    pub fn out(&self, id: CallId, arg: usize) -> &[u8] {
        let data = self.batch.calls.len() * CALL;
        let call = &self.batch.calls[id.0];
        match call.outs.iter().find(|o| o.0 == arg) {
            Some(&(_, at, len)) => &self.image[data + at..data + at + len],
            None => &[],
        }
    }

    /// The first call that failed, with its place in the batch.
    #[must_use]
    pub fn first_error(&self) -> Option<(usize, Errno)> {
        (0..self.batch.calls.len()).find_map(|i| Some((i, self.value(CallId(i)).err()?)))
    }
}

pub(crate) fn decode(raw: i64) -> Result<u64, Errno> {
    if (-4095..0).contains(&raw) {
        Err(Errno::from_raw_os_error(-raw as i32))
    } else {
        Ok(raw as u64)
    }
}

/// What a thread needs to help itself when its tracer dies.
#[derive(Clone, Copy, Debug)]
pub struct Rescue {
    /// The registers with which the program is to go on.
    pub registers: Registers,
    /// Its signal mask.
    pub mask: u64,
}

/// Why a remote call could not be made.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// The thread ended or did not stop.
    #[error(transparent)]
    Wait(#[from] WaitError),
    /// The kernel refused an operation on the thread or its memory.
    #[error("remote call in thread {tid}, {what}: {source}")]
    Kernel {
        /// The thread.
        tid: u32,
        /// The operation.
        what: &'static str,
        /// What the kernel said.
        source: Errno,
    },
    /// The thread was not stopped in time and helped itself: it runs on.
    #[error("thread {tid} waited too long for its tracer and went on by itself")]
    Rescued {
        /// The thread.
        tid: u32,
    },
    /// The batch is larger than the arena.
    #[error("a batch of {size} bytes does not fit into {room} bytes")]
    TooLarge {
        /// Bytes needed.
        size: usize,
        /// Bytes there.
        room: usize,
    },
}

/// The pages in the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arena {
    pid: u32,
    base: u64,
    slots: u64,
    slot: u64,
}

/// A thread that is running a batch.
#[derive(Debug)]
pub struct InFlight {
    running: Running,
    header: u64,
    list: u64,
    batch: Batch,
}

/// A thread that has run a batch and was ordered to stop.
#[derive(Debug)]
pub struct Landing {
    running: Running,
    list: u64,
    batch: Batch,
    deadline: Instant,
}

fn put_word(raw: &mut [u8], at: usize, value: u64) {
    raw[at..at + 8].copy_from_slice(&value.to_ne_bytes());
}

/// With these registers the program goes on by itself: a call that the kernel would have restarted
/// is made again.
pub fn restarted(mut regs: Registers) -> Registers {
    let (rax, nr) = (regs.rax as i64, regs.orig_rax as i64);
    if nr >= 0 && matches!(rax, -516 | -514 | -513 | -512) {
        regs.rax = regs.orig_rax;
        regs.rip -= 2;
    }
    regs
}

impl Arena {
    /// Bytes that an arena of so many slots of so many bytes each takes.
    #[must_use]
    pub const fn length(slots: u64, slot: u64) -> u64 {
        PAGE + slots * slot
    }

    /// Bytes for a batch in a slot of `slot` bytes.
    #[must_use]
    pub const fn room(slot: u64) -> u64 {
        slot - HEADER - FRAME_ROOM
    }

    /// Makes an arena out of fresh private memory that was mapped readable and writable at `base`
    /// in the target ([`Arena::length`] bytes); its first page must then be made executable.
    pub fn fill(pid: u32, base: u64, slots: u64, slot: u64) -> Result<Self, Errno> {
        let mut page = vec![0xCCu8; PAGE as usize];
        let code = loop_code();
        page[..code.len()].copy_from_slice(code);
        let stamp = page.len() - STAMP.len();
        page[stamp..].copy_from_slice(STAMP);
        memory::write(pid, base, &page)?;
        Ok(Self {
            pid,
            base,
            slots,
            slot,
        })
    }

    /// Address and length in the target.
    #[must_use]
    pub fn range(&self) -> (u64, u64) {
        (self.base, Self::length(self.slots, self.slot))
    }

    /// Memory that belongs to no batch: room for data to which arguments point indirectly. Not to
    /// be used together with a [`Rescue`]. Address and length.
    #[must_use]
    pub fn scratch(&self) -> (u64, u64) {
        (
            self.base + PAGE + self.slot - HEADER - FRAME_ROOM,
            FRAME_ROOM - 256,
        )
    }

    /// The same arena in a process that is a copy of its own.
    #[must_use]
    pub fn in_copy(&self, pid: u32) -> Self {
        Self { pid, ..*self }
    }

    /// How many threads can run batches at the same time.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.slots as usize
    }

    /// Whether executable memory at this address in a process is the code page of an arena that a
    /// tracer left behind.
    #[must_use]
    pub fn is_stamped(pid: u32, code: u64) -> bool {
        let mut stamp = [0u8; STAMP.len()];
        let at = code + PAGE - STAMP.len() as u64;
        memory::read_exact(pid, at, &mut stamp).is_ok() && stamp == *STAMP
    }

    /// Sends a thread into the loop with a batch, using slot number `slot`.
    pub fn begin(
        &self,
        mut thread: Halted,
        slot: usize,
        batch: Batch,
        rescue: Option<&Rescue>,
    ) -> Result<InFlight, RemoteError> {
        let tid = thread.tid();
        let kernel = |what| move |source| RemoteError::Kernel { tid, what, source };
        let room = Self::room(self.slot) as usize;
        if batch.size() > room || slot >= self.slots() {
            return Err(RemoteError::TooLarge {
                size: batch.size(),
                room,
            });
        }
        let list = self.base + PAGE + slot as u64 * self.slot;
        let header = list + self.slot - HEADER;
        let end = list + (batch.calls.len() * CALL) as u64;
        let raw = header_image(list, end, rescue);
        memory::write_both(self.pid, (list, &batch.image(list)), (header, &raw))
            .map_err(kernel("writing the batch"))?;
        // Whoever is to be put back has these but for where it is.
        let mut regs = match rescue {
            Some(rescue) => rescue.registers,
            None => thread.registers().map_err(kernel("reading registers"))?,
        };
        regs.rip = self.base;
        regs.rbx = header;
        regs.rsp = header - 128;
        regs.orig_rax = u64::MAX;
        regs.rax = 0;
        regs.eflags = 0x202;
        send(&mut thread, &regs)?;
        let running = thread.resume().map_err(kernel("resuming"))?;
        Ok(InFlight {
            running,
            header,
            list,
            batch,
        })
    }

    /// Waits for a batch to be done, stops the thread and reads the results. The registers and
    /// the signal mask of the thread are still those of the loop.
    pub fn finish(&self, flight: InFlight) -> Result<(Halted, Results), RemoteError> {
        self.land(self.call_back(flight)?)
    }

    /// Waits for a batch to be done, and orders the thread to stop. Where several threads are to be
    /// stopped, all are called back before the first is waited for ([`Arena::land`]): they come to
    /// their stops together.
    pub fn call_back(&self, flight: InFlight) -> Result<Landing, RemoteError> {
        let InFlight {
            running,
            header,
            list,
            batch,
        } = flight;
        let tid = running.tid();
        let kernel = |what| move |source| RemoteError::Kernel { tid, what, source };
        let deadline = Instant::now() + BATCH_TIMEOUT;
        let aside = batch.has_aside().then(|| Aside::of(self.pid));
        let running = self.await_done(running, header, aside)?;
        running.interrupt().map_err(kernel("stopping"))?;
        Ok(Landing {
            running,
            list,
            batch,
            deadline,
        })
    }

    /// Waits for the stop of a thread whose batch is done, and reads the results.
    pub fn land(&self, landing: Landing) -> Result<(Halted, Results), RemoteError> {
        let Landing {
            running,
            list,
            batch,
            deadline,
        } = landing;
        let tid = running.tid();
        let kernel = |what| move |source| RemoteError::Kernel { tid, what, source };
        let halted = running.wait_interrupted(deadline).map_err(|(_, e)| e)?;
        let rip = halted.registers().map_err(kernel("reading registers"))?.rip;
        if !(self.base..self.base + PAGE).contains(&rip) {
            return Err(RemoteError::Rescued { tid });
        }
        let mut image = vec![0u8; batch.size()];
        memory::read_exact(self.pid, list, &mut image).map_err(kernel("reading results"))?;
        Ok((halted, Results { batch, image }))
    }

    /// Runs a batch in one thread.
    pub fn run(
        &self,
        thread: Halted,
        batch: Batch,
        rescue: Option<&Rescue>,
    ) -> Result<(Halted, Results), RemoteError> {
        let flight = self.begin(thread, 0, batch, rescue)?;
        self.finish(flight)
    }

    /// Waits until the thread has made all calls of its batch. A thread that is told to continue
    /// (SIGCONT) stops for its tracer whatever it does, and is sent on; one that is told to stop
    /// (SIGSTOP) is told so again afterwards. Those `aside` that make calls in its place are sent on.
    fn await_done(
        &self,
        mut running: Running,
        header: u64,
        mut aside: Option<Aside>,
    ) -> Result<Running, RemoteError> {
        /// Almost every batch is done by then, and nobody is asked before.
        const SOON: Duration = Duration::from_millis(1);
        let tid = running.tid();
        let kernel = |what| move |source| RemoteError::Kernel { tid, what, source };
        let begun = Instant::now();
        let limit = match aside {
            Some(_) => ASIDE_TIMEOUT,
            None => BATCH_TIMEOUT,
        };
        let mut done = [0u8; 8];
        let mut told_to_stop = false;
        loop {
            memory::read_exact(self.pid, header + 16, &mut done)
                .map_err(kernel("waiting for the batch"))?;
            if u64::from_ne_bytes(done) == 1 {
                if let Some(aside) = aside {
                    aside.end();
                }
                if told_to_stop && let Some(raw) = Pid::from_raw(tid.cast_signed()) {
                    // One that has ended need not stop.
                    let _ = kill_process(raw, Signal::STOP);
                }
                return Ok(running);
            }
            let now = Instant::now();
            if now - begun > limit {
                return Err(kernel("waiting for the batch")(Errno::TIMEDOUT));
            }
            rustix::thread::sched_yield();
            if now - begun < SOON {
                continue;
            }
            if let Some(aside) = &mut aside {
                aside.free();
            }
            running = match running.wait(now) {
                Ok(halted) => match halted.stop() {
                    Stop::Signal(libc::SIGSTOP) => {
                        told_to_stop = true;
                        halted.resume().map_err(kernel("resuming"))?
                    }
                    // All signals are blocked: this is a fault.
                    Stop::Signal(_) => return Err(kernel("running a batch")(Errno::FAULT)),
                    _ => halted.resume().map_err(kernel("resuming"))?,
                },
                Err((Some(running), WaitError::Timeout { .. })) => running,
                Err((_, e)) => return Err(e.into()),
            };
        }
    }
}

/// Gives a thread registers that lead into code of ours, and blocks all signals, so that no handler runs
/// on the way. In this order: who is left in between helps itself.
pub(crate) fn send(thread: &mut Halted, regs: &Registers) -> Result<(), RemoteError> {
    let tid = thread.tid();
    let kernel = |what| move |source| RemoteError::Kernel { tid, what, source };
    thread
        .set_registers(regs)
        .map_err(kernel("setting registers"))?;
    thread
        .set_signal_mask(u64::MAX)
        .map_err(kernel("blocking signals"))
}

pub(crate) fn header_image(list: u64, end: u64, rescue: Option<&Rescue>) -> [u8; HEADER as usize] {
    let mut raw = [0u8; HEADER as usize];
    put_word(&mut raw, 0, list);
    put_word(&mut raw, 8, end);
    // Without a rescue the thread waits (practically) for ever.
    put_word(
        &mut raw,
        24,
        rescue.map_or(1 << 40, |_| RESCUE_AFTER.as_secs()),
    );
    if let Some(Rescue { registers, mask }) = rescue {
        let r = restarted(*registers);
        put_word(&mut raw, 48, *mask);
        let order = [
            r.r15, r.r14, r.r13, r.r12, r.r11, r.r10, r.r9, r.r8, r.rdi, r.rsi, r.rbp, r.rbx,
            r.rdx, r.rcx, r.rax, r.rip, r.cs, r.eflags, r.rsp, r.ss,
        ];
        for (i, value) in order.into_iter().enumerate() {
            put_word(&mut raw, 56 + i * 8, value);
        }
    }
    raw
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loop_fits_into_its_page() {
        assert!(loop_code().len() < 1024 && loop_code().len() > 64);
    }

    #[test]
    fn arguments_are_placed_behind_the_list() {
        let mut b = Batch::new();
        b.push(1, [Arg::Value(7), Arg::In(b"abc".to_vec())]);
        let second = b.push(2, [Arg::Out(20)]);
        let image = b.image(0x1000);
        let word = |at: usize| u64::from_ne_bytes(image[at..at + 8].try_into().unwrap());
        assert_eq!((word(0), word(8), word(16)), (1, 7, 0x1000 + 128));
        assert_eq!((word(64), word(72)), (2, 0x1000 + 128 + 16));
        let r = Results {
            image: image.clone(),
            batch: b,
        };
        assert_eq!(r.out(second, 0).len(), 20);
        assert_eq!(r.value(second), Ok(0));
    }

    #[test]
    fn an_interrupted_call_is_made_again_by_a_rescued_thread() {
        // SAFETY: all-zero is a valid value of a struct of integers.
        let mut regs: Registers = unsafe { std::mem::zeroed() };
        (regs.rip, regs.rax, regs.orig_rax) = (100, -512i64 as u64, 35);
        let r = restarted(regs);
        assert_eq!((r.rip, r.rax), (98, 35));
        (regs.rax, regs.orig_rax) = (-512i64 as u64, u64::MAX);
        assert_eq!(restarted(regs).rip, 100);
    }
}
