//! A thread with a root directory of its own: an empty file system that nobody else sees.
//!
//! A unix socket keeps the path that it was bound to, as it was given. To give one the same path
//! without touching the file that is there, it is bound in here; afterwards nothing is left of it.
//!
//! # Rules
//! - The file system is in memory and mounted nowhere: it lasts as long as a file of it is in use.
//! - No path leads out, `..` does not either. Descriptors are those of the whole process.
//!
//! # Safety
//! Calls get numbers, pointers to strings that live for ever, or none; descriptors that they return
//! are owned here alone.
#![allow(unsafe_code)]

use crate::{Errno, last_error};
use rustix::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use rustix::fs::Mode;
use std::thread::Builder;

/// `FSOPEN_CLOEXEC` and `FSMOUNT_CLOEXEC`
const CLOEXEC: libc::c_long = 1;
/// `FSCONFIG_CMD_CREATE`
const CREATE: libc::c_long = 6;

/// The calling thread has a root directory of its own. Only threads that end with it have one.
#[derive(Debug)]
pub struct PrivateRoot {
    mount: OwnedFd,
    count: u64,
}

/// Runs `work` in a thread with a root and working directory that are empty.
///
/// # Errors
/// [`Errno::PERM`] without CAP_SYS_ADMIN and CAP_SYS_CHROOT; `work` was not begun then.
pub fn in_private_root<T: Send>(
    work: impl FnOnce(&mut PrivateRoot) -> T + Send,
) -> Result<T, Errno> {
    let body = || PrivateRoot::enter().map(|mut root| work(&mut root));
    std::thread::scope(|scope| {
        let thread = Builder::new().spawn_scoped(scope, body);
        let ended = thread.map_err(|_| Errno::AGAIN)?.join();
        ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn owned(result: libc::c_long) -> Result<OwnedFd, Errno> {
    match RawFd::try_from(result) {
        // SAFETY: the number was just returned by a call that makes a descriptor (callers pass
        // nothing else), and is not negative: nobody else owns it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(last_error()),
    }
}

fn memory() -> Result<OwnedFd, Errno> {
    // SAFETY: a string that lives for ever, and a number.
    let system = owned(unsafe { libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), CLOEXEC) })?;
    let (fd, none) = (system.as_raw_fd(), std::ptr::null::<u8>());
    // SAFETY: numbers; this command takes no pointers, which are null.
    if unsafe { libc::syscall(libc::SYS_fsconfig, fd, CREATE, none, none, 0) } < 0 {
        return Err(last_error());
    }
    let attributes = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    // SAFETY: numbers.
    owned(unsafe { libc::syscall(libc::SYS_fsmount, fd, CLOEXEC, attributes) })
}

impl PrivateRoot {
    fn enter() -> Result<Self, Errno> {
        let mount = memory()?;
        // SAFETY: a number; the directories of this thread, which is new, become its own.
        if unsafe { libc::unshare(libc::CLONE_FS) } < 0 {
            return Err(last_error());
        }
        let mut root = Self { mount, count: 0 };
        root.renew()?;
        Ok(root)
    }

    /// Goes to another root directory, which is empty.
    ///
    /// # Errors
    /// Of the calls that this takes.
    pub fn renew(&mut self) -> Result<(), Errno> {
        rustix::process::fchdir(&self.mount)?;
        rustix::process::chroot(".")?;
        let name = self.count.to_string();
        self.count += 1;
        rustix::fs::mkdir(&name, Mode::RWXU)?;
        rustix::process::chdir(&name)?;
        rustix::process::chroot(".")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn nothing_leads_out_and_nothing_is_left() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED 1 test: root directories need root");
            return;
        }
        let here = tempfile::tempdir().unwrap();
        let file = here.path().join("file");
        fs::write(&file, b"outside").unwrap();
        let up = format!("../../../../..{}", file.display());
        in_private_root(|root| {
            for _ in 0..3 {
                assert_eq!(fs::read_dir("/").unwrap().count(), 0);
                assert!(!file.exists());
                assert!(fs::read(&up).is_err());
                fs::create_dir_all(file.parent().unwrap()).unwrap();
                fs::write(&file, b"inside").unwrap();
                assert_eq!(fs::read(&up).unwrap(), b"inside");
                root.renew().unwrap();
            }
        })
        .unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"outside");
    }
}
