//! What `rustix` lacks for making inotify watches again: a file by its handle, and the number of
//! the next watch.
//!
//! # Safety
//! Pointers go to live locals whose size the kernel knows or is told.
#![allow(unsafe_code)]

use crate::{Errno, last_error};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `_IOW('I', 0, __s32)`.
const INOTIFY_IOC_SETNEXTWD: libc::Ioctl = 0x4004_4900;

/// `MAX_HANDLE_SZ`
const LARGEST_HANDLE: usize = 128;

#[repr(C)]
struct Handle {
    bytes: u32,
    kind: i32,
    handle: [u8; LARGEST_HANDLE],
}

/// Opens the file with this handle, on the file system that `mount` is a file of, as `O_PATH`.
///
/// # Errors
/// `ESTALE` when there is no such file any more, `EPERM` without `CAP_DAC_READ_SEARCH`, `EINVAL`
/// for a handle that is too long.
pub fn open_by_handle(mount: BorrowedFd<'_>, kind: i32, bytes: &[u8]) -> Result<OwnedFd, Errno> {
    let mut handle = Handle {
        bytes: bytes.len() as u32,
        kind,
        handle: [0; LARGEST_HANDLE],
    };
    let room = handle.handle.get_mut(..bytes.len()).ok_or(Errno::INVAL)?;
    room.copy_from_slice(bytes);
    // SAFETY: handle is a live local with the layout of `struct file_handle`, whose length was
    // checked against its room by `get_mut`; the kernel only reads it.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_open_by_handle_at,
            libc::c_long::from(mount.as_raw_fd()),
            &raw const handle,
            libc::c_long::from(libc::O_PATH | libc::O_CLOEXEC),
        )
    };
    let fd = i32::try_from(fd).map_err(|_| Errno::BADF)?;
    if fd < 0 {
        return Err(last_error());
    }
    // SAFETY: fd was just made by the kernel for us and is nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sets the number that the next watch of an inotify instance gets, from 1 on.
///
/// # Errors
/// `ENOTTY` on a kernel without checkpoint support, `EINVAL` for a number below 1.
pub fn set_next_watch(inotify: BorrowedFd<'_>, number: i32) -> Result<(), Errno> {
    // SAFETY: the argument is a number, no pointer.
    let answer = unsafe {
        libc::ioctl(
            inotify.as_raw_fd(),
            INOTIFY_IOC_SETNEXTWD,
            libc::c_long::from(number),
        )
    };
    if answer < 0 {
        Err(last_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::inotify;
    use std::os::fd::AsFd;

    #[test]
    fn the_next_watch_gets_the_number() {
        let instance = inotify::init(inotify::CreateFlags::CLOEXEC).unwrap();
        let dir = tempfile::tempdir().unwrap();
        set_next_watch(instance.as_fd(), 77).unwrap();
        let flags = inotify::WatchFlags::CREATE;
        assert_eq!(inotify::add_watch(&instance, dir.path(), flags), Ok(77));
        assert_eq!(set_next_watch(instance.as_fd(), 0), Err(Errno::INVAL));
    }

    #[test]
    fn a_handle_that_is_too_long_is_not_tried() {
        let root = std::fs::File::open("/").unwrap();
        let long = [0; LARGEST_HANDLE + 1];
        assert_eq!(
            open_by_handle(root.as_fd(), 1, &long).err(),
            Some(Errno::INVAL)
        );
    }
}
