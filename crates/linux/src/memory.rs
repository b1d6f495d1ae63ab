//! Reading and writing the memory of another process in bulk: `process_vm_readv(2)`,
//! `process_vm_writev(2)`.
//!
//! # Safety
//! Local vectors point into borrowed slices; remote ones are only numbers to us. Questions to the
//! kernel have a length of zero.
#![allow(unsafe_code)]

use crate::{Errno, last_error};
use std::cell::RefCell;

/// `IOV_MAX`: ranges in one call.
pub const RANGES: usize = 1024;

/// A range of another process: address and length in bytes.
pub type Remote = (u64, usize);

fn vector(&(address, len): &Remote) -> libc::iovec {
    libc::iovec {
        iov_base: address as *mut libc::c_void,
        iov_len: len,
    }
}

thread_local! {
    /// Ranges of the last call, so that none has to make room for its own.
    static VECTORS: RefCell<Vec<libc::iovec>> = const { RefCell::new(Vec::new()) };
}

/// Reads the ranges (at most [`RANGES`] of them) one after the other into `out`; returns how many
/// bytes could be read before one was not there.
pub fn read(pid: u32, ranges: &[Remote], out: &mut [u8]) -> Result<usize, Errno> {
    if let [one] = ranges {
        return read_vectors(pid, &[vector(one)], out);
    }
    VECTORS.with_borrow_mut(|remote| {
        remote.clear();
        remote.extend(ranges.iter().take(RANGES).map(vector));
        read_vectors(pid, remote, out)
    })
}

fn read_vectors(pid: u32, remote: &[libc::iovec], out: &mut [u8]) -> Result<usize, Errno> {
    let local = libc::iovec {
        iov_base: out.as_mut_ptr().cast(),
        iov_len: out.len(),
    };
    // SAFETY: local describes the exclusively borrowed slice out; the kernel writes nowhere else.
    let n = unsafe {
        libc::process_vm_readv(
            pid as i32,
            &raw const local,
            1,
            remote.as_ptr(),
            remote.len() as u64,
            0,
        )
    };
    if n < 0 {
        Err(last_error())
    } else {
        Ok(n as usize)
    }
}

/// Reads exactly `out.len()` bytes at an address.
pub fn read_exact(pid: u32, address: u64, out: &mut [u8]) -> Result<(), Errno> {
    match read(pid, &[(address, out.len())], out)? {
        n if n == out.len() => Ok(()),
        _ => Err(Errno::FAULT),
    }
}

/// Writes all of `bytes` to an address, which must be mapped writable.
pub fn write(pid: u32, address: u64, bytes: &[u8]) -> Result<(), Errno> {
    let mut done = 0;
    while done < bytes.len() {
        let rest = &bytes[done..];
        let local = libc::iovec {
            iov_base: rest.as_ptr().cast_mut().cast(),
            iov_len: rest.len(),
        };
        let remote = libc::iovec {
            iov_base: (address + done as u64) as *mut libc::c_void,
            iov_len: rest.len(),
        };
        // SAFETY: local describes the borrowed slice rest, which the kernel only reads.
        let n = unsafe {
            libc::process_vm_writev(pid as i32, &raw const local, 1, &raw const remote, 1, 0)
        };
        match n {
            n if n < 0 => return Err(last_error()),
            0 => return Err(Errno::FAULT),
            n => done += n as usize,
        }
    }
    Ok(())
}

/// Writes to two places of the memory of another process, the first one first.
///
/// # Errors
/// See [`write`].
pub fn write_both(pid: u32, first: (u64, &[u8]), second: (u64, &[u8])) -> Result<(), Errno> {
    let all = [first, second];
    let local = all.map(|(_, bytes)| libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    });
    let remote = all.map(|(address, bytes)| libc::iovec {
        iov_base: address as *mut libc::c_void,
        iov_len: bytes.len(),
    });
    // SAFETY: local describes the borrowed slices, which the kernel only reads; both arrays have two.
    let n =
        unsafe { libc::process_vm_writev(pid as i32, local.as_ptr(), 2, remote.as_ptr(), 2, 0) };
    if n >= 0 && n as usize == first.1.len() + second.1.len() {
        return Ok(());
    }
    // A part of it at most: each on its own, which tells what is wrong.
    write(pid, first.0, first.1)?;
    write(pid, second.0, second.1)
}

/// Whether the kernel can seal memory (`mseal(2)`, Linux 6.10).
#[must_use]
pub fn can_seal() -> bool {
    const SYS_MSEAL: libc::c_long = 462;
    // SAFETY: no byte is sealed.
    unsafe { libc::syscall(SYS_MSEAL, 0, 0, 0) == 0 }
}

/// Whether the kernel has guard pages (`MADV_GUARD_INSTALL`, Linux 6.13).
#[must_use]
pub fn can_guard() -> bool {
    const MADV_GUARD_INSTALL: libc::c_int = 102;
    // SAFETY: no byte is changed.
    unsafe { libc::madvise(std::ptr::null_mut(), 0, MADV_GUARD_INSTALL) == 0 }
}
