//! A mount namespace of its own for a restored program, and being in it for a while.
//!
//! Whoever opens a file has it through a mount, which belongs to a namespace; the kernel refuses to
//! link or rename between two of them. So what a program in another mount namespace shall hold is
//! opened there. Nothing is mounted meanwhile: `/proc` is the caller's.
//!
//! # Rules
//! - Mounts made outside later reach the namespace where they are shared there; nothing reaches the
//!   outside.
//! - The calling thread comes back, to its own root and working directory too.
//!
//! # Safety
//! Calls get numbers, or pointers to strings that live for ever.
#![allow(unsafe_code)]

use crate::{Errno, last_error};
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::fs::{Mode, OFlags, open};

/// The calling thread is in a new mount namespace until it goes home; it goes home when this is
/// dropped, too.
#[derive(Debug)]
pub struct Away {
    home: OwnedFd,
    root: OwnedFd,
    directory: OwnedFd,
    gone_home: bool,
}

fn path(path: &str) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    open(path, flags, Mode::empty())
}

fn own_namespace() -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    open("/proc/thread-self/ns/mnt", flags, Mode::empty())
}

fn done(result: libc::c_int) -> Result<(), Errno> {
    if result < 0 {
        Err(last_error())
    } else {
        Ok(())
    }
}

impl Away {
    /// Makes the namespace, with the mounts of the caller's, and enters it.
    ///
    /// # Errors
    /// [`Errno::PERM`] without CAP_SYS_ADMIN.
    pub fn begin() -> Result<Self, Errno> {
        let mut away = Self {
            home: own_namespace()?,
            root: path("/")?,
            directory: path(".")?,
            gone_home: true,
        };
        // SAFETY: only a number is passed.
        done(unsafe { libc::unshare(libc::CLONE_NEWNS) })?;
        away.gone_home = false;
        let (none, slave) = (std::ptr::null(), libc::MS_REC | libc::MS_SLAVE);
        // SAFETY: the one string that is passed lives for ever; the others are absent.
        done(unsafe { libc::mount(none, c"/".as_ptr(), none, slave, none.cast()) })?;
        Ok(away)
    }

    /// Goes home; the namespace stays as long as what is returned, or somebody in it.
    ///
    /// # Errors
    /// Where the caller may not go home: it has had no privilege to leave, then, either.
    pub fn end(mut self) -> Result<OwnedFd, Errno> {
        let namespace = own_namespace()?;
        self.go_home()?;
        Ok(namespace)
    }

    fn go_home(&mut self) -> Result<(), Errno> {
        if self.gone_home {
            return Ok(());
        }
        // SAFETY: numbers, and a string that lives for ever.
        unsafe {
            done(libc::setns(self.home.as_raw_fd(), libc::CLONE_NEWNS))?;
            done(libc::fchdir(self.root.as_raw_fd()))?;
            done(libc::chroot(c".".as_ptr()))?;
            done(libc::fchdir(self.directory.as_raw_fd()))?;
        }
        self.gone_home = true;
        Ok(())
    }
}

impl Drop for Away {
    fn drop(&mut self) {
        // Best effort on a path that leads to an error already.
        let _ = self.go_home();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_comes_home_from_other_mounts() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED 1 test: namespaces need root");
            return;
        }
        let here = || std::fs::read_link("/proc/thread-self/ns/mnt").unwrap();
        let places = || {
            let link = |name: &str| std::fs::read_link(format!("/proc/thread-self/{name}"));
            (link("root").unwrap(), link("cwd").unwrap())
        };
        let (home, before) = (here(), places());
        let away = Away::begin().unwrap();
        assert_ne!(here(), home);
        assert_eq!(places(), before);
        let fd = away.end().unwrap();
        assert_eq!((here(), places()), (home.clone(), before.clone()));
        let link = std::fs::read_link(format!("/proc/thread-self/fd/{}", fd.as_raw_fd())).unwrap();
        assert_ne!(link, home);
        drop(Away::begin().unwrap());
        assert_eq!((here(), places()), (home, before));
    }
}
