//! Descriptors that this process inherited and that its children are not to inherit.
//!
//! # Safety
//! `fcntl(F_SETFD)` takes integers only; it changes a flag of a descriptor's number and neither
//! closes nor makes one.
#![allow(unsafe_code)]

use crate::{Errno, last_error};
use std::fs;
use std::io;

/// First descriptor beyond the standard streams.
const FIRST: i32 = 3;

/// Sees to it that no pipe and no socket beyond the standard streams reaches programs that this
/// process starts. What else was inherited (files, devices) is passed on as it is. For use before
/// other threads are started.
///
/// # Errors
/// What the operating system says of `/proc/self/fd`.
pub fn withhold_pipes_and_sockets() -> io::Result<()> {
    for entry in fs::read_dir("/proc/self/fd")? {
        let entry = entry?;
        let number = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        let Some(number) = number.filter(|number| *number >= FIRST) else {
            continue;
        };
        let Ok(what) = fs::read_link(entry.path()) else {
            continue;
        };
        let what = what.to_string_lossy();
        if what.starts_with("pipe:[") || what.starts_with("socket:[") {
            close_on_exec(number)?;
        }
    }
    Ok(())
}

fn close_on_exec(number: i32) -> Result<(), Errno> {
    // SAFETY: integers only; a number that is no descriptor gives an error.
    let done = unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) };
    if done < 0 {
        return Err(last_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::{FdFlags, fcntl_getfd};
    use rustix::pipe::{PipeFlags, pipe_with};

    #[test]
    fn pipes_are_withheld_and_files_are_not() {
        let (read, _write) = pipe_with(PipeFlags::empty()).unwrap();
        let file = rustix::fs::open(
            "/dev/null",
            rustix::fs::OFlags::RDONLY,
            rustix::fs::Mode::empty(),
        )
        .unwrap();
        assert_eq!(fcntl_getfd(&read).unwrap(), FdFlags::empty());
        withhold_pipes_and_sockets().unwrap();
        assert_eq!(fcntl_getfd(&read).unwrap(), FdFlags::CLOEXEC);
        assert_eq!(fcntl_getfd(&file).unwrap(), FdFlags::empty());
    }
}
