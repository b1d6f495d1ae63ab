//! A stop of the tests' own, independent of the library's: seize, interrupt, read registers and
//! signal masks, detach. Only for programs that the library does not hold at that moment.
//!
//! # Safety
//! `ptrace` is called with numbers and pointers to live, large enough local values; `waitpid` with
//! a live status word.
#![allow(unsafe_code)]

use crate::support::Program;
use crate::view::tids;
use std::collections::BTreeMap;

/// What a thread holds while it stands still.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Thread {
    pub name: String,
    pub registers: [u64; 27],
    pub xstate: Vec<u8>,
    pub mask: u64,
}

impl Thread {
    /// Whether it was waiting for a futex, and not on its way there.
    fn is_at_futex(&self) -> bool {
        // `orig_rax` and `rax` of `struct user_regs_struct`; the kernel's `ERESTARTSYS`.
        self.registers[15] == libc::SYS_futex as u64 && self.registers[10] == (-512_i64) as u64
    }
}

/// The same as [`look`], once so many threads wait for a futex.
pub fn look_asleep(program: &Program, name: &str, threads: usize) -> BTreeMap<u32, Thread> {
    loop {
        let found = look(program, name);
        if found.len() == threads && found.values().all(Thread::is_at_futex) {
            return found;
        }
        program.must_be_well();
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

fn ptrace(request: libc::c_uint, tid: u32, address: usize, data: usize) -> i64 {
    // SAFETY: see the module heading.
    unsafe { libc::ptrace(request, tid as i32, address as *mut u8, data as *mut u8) }
}

/// Stops the threads of a program whose names begin with `name`, one after the other, looks at each
/// and lets it go. A stop like this one interrupts calls that do not restart by themselves.
pub fn look(program: &Program, name: &str) -> BTreeMap<u32, Thread> {
    let comm = |tid: &u32| {
        let path = format!("/proc/{}/task/{tid}/comm", program.pid);
        std::fs::read_to_string(path).is_ok_and(|c| c.starts_with(name))
    };
    tids(program.pid)
        .into_iter()
        .filter(comm)
        .filter_map(|tid| Some((tid, look_at(program, tid)?)))
        .collect()
}

fn look_at(program: &Program, tid: u32) -> Option<Thread> {
    let must = |r| assert_eq!(r, 0, "thread {tid}; {}", program.story());
    if ptrace(libc::PTRACE_SEIZE, tid, 0, 0) != 0 {
        return None;
    }
    must(ptrace(libc::PTRACE_INTERRUPT, tid, 0, 0));
    let mut status = 0;
    // SAFETY: status is live.
    while unsafe { libc::waitpid(tid as i32, &raw mut status, libc::__WALL) } != tid as i32 {}
    assert!(
        libc::WIFSTOPPED(status),
        "thread {tid} ended: {status:#x}; {}",
        program.story()
    );
    let mut thread = Thread {
        name: std::fs::read_to_string(format!("/proc/{}/task/{tid}/comm", program.pid))
            .unwrap_or_default(),
        registers: [0; 27],
        xstate: vec![0; 16384],
        mask: 0,
    };
    let registers = thread.registers.as_mut_ptr() as usize;
    must(ptrace(libc::PTRACE_GETREGS, tid, 0, registers));
    let mut room = libc::iovec {
        iov_base: thread.xstate.as_mut_ptr().cast(),
        iov_len: thread.xstate.len(),
    };
    must(ptrace(
        libc::PTRACE_GETREGSET,
        tid,
        0x202,
        &raw mut room as usize,
    ));
    thread.xstate.truncate(room.iov_len);
    must(ptrace(
        libc::PTRACE_GETSIGMASK,
        tid,
        8,
        &raw mut thread.mask as usize,
    ));
    let event = status >> 16 == libc::PTRACE_EVENT_STOP;
    let signal = if event { 0 } else { libc::WSTOPSIG(status) };
    must(ptrace(libc::PTRACE_DETACH, tid, 0, signal as usize));
    Some(thread)
}
