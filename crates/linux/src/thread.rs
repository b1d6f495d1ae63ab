//! Attributes of a thread that can be read and set from outside.
//!
//! # Safety
//! Each call gets pointers to live local values of the size that it is told.
#![allow(unsafe_code)]

use crate::{Errno, last_error};

/// The list of robust futexes that a thread registered: address of its head and length of the
/// head, bytes (`get_robust_list(2)`).
pub fn robust_list(tid: u32) -> Result<(u64, u64), Errno> {
    let (mut head, mut len) = (0u64, 0u64);
    // SAFETY: both out-pointers are live.
    let r = unsafe { libc::syscall(libc::SYS_get_robust_list, tid, &raw mut head, &raw mut len) };
    if r < 0 {
        Err(last_error())
    } else {
        Ok((head, len))
    }
}

/// `struct sched_attr` of a thread (`sched_getattr(2)`), 48 bytes: size, policy, flags, nice,
/// priority, and the parameters of deadline scheduling.
pub fn scheduling(tid: u32) -> Result<[u8; 48], Errno> {
    let mut attr = [0u8; 48];
    // SAFETY: attr is live and as long as the call is told.
    let r = unsafe {
        libc::syscall(
            libc::SYS_sched_getattr,
            tid,
            attr.as_mut_ptr(),
            attr.len(),
            0,
        )
    };
    if r < 0 { Err(last_error()) } else { Ok(attr) }
}

/// Sets the scheduling attributes of a thread.
pub fn set_scheduling(tid: u32, attr: &[u8; 48]) -> Result<(), Errno> {
    // SAFETY: attr is live and says its own length in its first field.
    let r = unsafe { libc::syscall(libc::SYS_sched_setattr, tid, attr.as_ptr(), 0) };
    if r < 0 { Err(last_error()) } else { Ok(()) }
}

/// The processors that a thread may run on, as a bit mask (`sched_getaffinity(2)`).
pub fn affinity(tid: u32) -> Result<Vec<u8>, Errno> {
    let mut mask = vec![0u8; 1024];
    // SAFETY: mask is live and as long as the call is told.
    let r = unsafe {
        libc::syscall(
            libc::SYS_sched_getaffinity,
            tid,
            mask.len(),
            mask.as_mut_ptr(),
        )
    };
    if r < 0 {
        return Err(last_error());
    }
    mask.truncate(r as usize);
    Ok(mask)
}

/// Sets the processors that a thread may run on.
pub fn set_affinity(tid: u32, mask: &[u8]) -> Result<(), Errno> {
    // SAFETY: mask is live and as long as the call is told.
    let r = unsafe { libc::syscall(libc::SYS_sched_setaffinity, tid, mask.len(), mask.as_ptr()) };
    if r < 0 { Err(last_error()) } else { Ok(()) }
}

/// I/O priority of a thread (`ioprio_get(2)`).
pub fn io_priority(tid: u32) -> Result<u32, Errno> {
    // SAFETY: only numbers are passed; 1 is IOPRIO_WHO_PROCESS.
    let r = unsafe { libc::syscall(libc::SYS_ioprio_get, 1, tid) };
    if r < 0 {
        Err(last_error())
    } else {
        Ok(r as u32)
    }
}

/// Sets the I/O priority of a thread.
pub fn set_io_priority(tid: u32, priority: u32) -> Result<(), Errno> {
    // SAFETY: only numbers are passed; 1 is IOPRIO_WHO_PROCESS.
    let r = unsafe { libc::syscall(libc::SYS_ioprio_set, 1, tid, priority) };
    if r < 0 { Err(last_error()) } else { Ok(()) }
}

/// Raises the priority of the calling thread (nice −20) until it is dropped, where that is
/// permitted: so that a short piece of work for which others wait is not interrupted by them.
#[derive(Debug)]
pub struct Urgent {
    before: Option<i32>,
}

impl Urgent {
    /// Begins.
    #[must_use]
    pub fn begin() -> Self {
        let before = rustix::process::getpriority_process(None).ok();
        let raised = rustix::process::setpriority_process(None, -20);
        Self {
            before: before.filter(|_| raised.is_ok()),
        }
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        if let Some(nice) = self.before {
            // Lowering one's own priority is always permitted.
            let _ = rustix::process::setpriority_process(None, nice);
        }
    }
}

/// Ends a process (SIGKILL).
pub fn kill(pid: u32) -> Result<(), Errno> {
    // SAFETY: only numbers are passed.
    if unsafe { libc::kill(pid as i32, libc::SIGKILL) } < 0 {
        Err(last_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_attributes_can_be_read_and_set() {
        let me = rustix::thread::gettid().as_raw_nonzero().get() as u32;
        let mask = affinity(me).unwrap();
        assert!(mask.iter().any(|&b| b != 0));
        set_affinity(me, &mask).unwrap();
        let attr = scheduling(me).unwrap();
        set_scheduling(me, &attr).unwrap();
        assert_ne!(robust_list(me).unwrap().0, 0);
        set_io_priority(me, io_priority(me).unwrap()).unwrap();
        let nice = || rustix::process::getpriority_process(None).unwrap();
        let before = nice();
        drop(Urgent::begin());
        assert_eq!(nice(), before);
    }
}
