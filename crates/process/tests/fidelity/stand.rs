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

/// `fs_base` and `gs_base` in `user_regs_struct`.
pub const FS_BASE: usize = 21;
pub const GS_BASE: usize = 22;

fn ptrace(request: libc::c_uint, tid: u32, address: usize, data: usize) -> i64 {
    // SAFETY: see the module heading.
    unsafe { libc::ptrace(request, tid as i32, address as *mut u8, data as *mut u8) }
}

/// Stops every thread of a program, one after the other, looks at it and lets it go.
pub fn look(program: &Program) -> BTreeMap<u32, Thread> {
    let pid = program.pid;
    tids(pid)
        .into_iter()
        .filter_map(|tid| Some((tid, look_at(program, tid)?)))
        .collect()
}

fn look_at(program: &Program, tid: u32) -> Option<Thread> {
    if ptrace(libc::PTRACE_SEIZE, tid, 0, 0) != 0 {
        return None;
    }
    assert_eq!(ptrace(libc::PTRACE_INTERRUPT, tid, 0, 0), 0);
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
    assert_eq!(ptrace(libc::PTRACE_GETREGS, tid, 0, registers), 0);
    let mut room = libc::iovec {
        iov_base: thread.xstate.as_mut_ptr().cast(),
        iov_len: thread.xstate.len(),
    };
    assert_eq!(
        ptrace(libc::PTRACE_GETREGSET, tid, 0x202, &raw mut room as usize),
        0
    );
    thread.xstate.truncate(room.iov_len);
    assert_eq!(
        ptrace(
            libc::PTRACE_GETSIGMASK,
            tid,
            8,
            &raw mut thread.mask as usize
        ),
        0
    );
    let event = status >> 16 == libc::PTRACE_EVENT_STOP;
    let signal = if event { 0 } else { libc::WSTOPSIG(status) };
    assert_eq!(ptrace(libc::PTRACE_DETACH, tid, 0, signal as usize), 0);
    Some(thread)
}
