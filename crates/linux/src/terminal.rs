//! The modes of a terminal, whole: as the kernel keeps them (`struct termios2`).
//!
//! # Safety
//! Each `ioctl` is given a pointer to live bytes of the size that its number names.
#![allow(unsafe_code)]

use crate::{Errno, last_error};
use std::os::fd::{AsRawFd, BorrowedFd};

/// Bytes of the modes.
pub const MODES: usize = 44;
/// `_IOR('T', 0x2a, struct termios2)`
const TCGETS2: libc::Ioctl = 0x802c_542a_u32 as libc::Ioctl;
/// `_IOW('T', 0x2b, struct termios2)`
const TCSETS2: libc::Ioctl = 0x402c_542b;

/// Reads the modes of a terminal.
///
/// # Errors
/// `ENOTTY` where it is none.
pub fn modes(terminal: BorrowedFd<'_>) -> Result<[u8; MODES], Errno> {
    let mut modes = [0u8; MODES];
    // SAFETY: modes is live and has the size of the structure.
    let r = unsafe { libc::ioctl(terminal.as_raw_fd(), TCGETS2, modes.as_mut_ptr()) };
    if r < 0 { Err(last_error()) } else { Ok(modes) }
}

/// Sets them, at once.
///
/// # Errors
/// `ENOTTY` where it is none.
pub fn set_modes(terminal: BorrowedFd<'_>, modes: &[u8; MODES]) -> Result<(), Errno> {
    // SAFETY: modes is live and has the size of the structure, which the kernel only reads.
    let r = unsafe { libc::ioctl(terminal.as_raw_fd(), TCSETS2, modes.as_ptr()) };
    if r < 0 { Err(last_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn modes_that_were_set_are_read() {
        let mut options = std::fs::OpenOptions::new();
        let master = options.read(true).write(true).open("/dev/ptmx").unwrap();
        let mut changed = modes(master.as_fd()).unwrap();
        // The lowest bit of the local modes: signals from the keyboard.
        changed[12] ^= 1;
        set_modes(master.as_fd(), &changed).unwrap();
        assert_eq!(modes(master.as_fd()), Ok(changed));
        let null = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(modes(null.as_fd()), Err(Errno::NOTTY));
    }
}
