//! The modes of a terminal, whole, as the kernel keeps them (`struct termios2`); and pseudo-terminals
//! seen from their masters.
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

/// The switches of a master.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Switch {
    /// The other side cannot be opened (`TIOCSPTLCK`).
    Locked,
    /// What is read begins with a byte that says what it is (`TIOCPKT`).
    Packets,
}

/// The number of a pseudo-terminal (`TIOCGPTN`).
///
/// # Errors
/// `ENOTTY` where this is no master.
pub fn number(master: BorrowedFd<'_>) -> Result<u32, Errno> {
    ask(master, 0x8004_5430)
}

/// Reads a switch of a master.
///
/// # Errors
/// `ENOTTY` where this is none.
pub fn switch(master: BorrowedFd<'_>, switch: Switch) -> Result<bool, Errno> {
    let order = match switch {
        Switch::Locked => 0x8004_5439,
        Switch::Packets => 0x8004_5438,
    };
    Ok(ask(master, order)? != 0)
}

fn ask(master: BorrowedFd<'_>, order: u32) -> Result<u32, Errno> {
    let mut answer = 0u32;
    // SAFETY: all these orders write four bytes to the live local.
    let r = unsafe {
        libc::ioctl(
            master.as_raw_fd(),
            libc::Ioctl::from(order),
            &raw mut answer,
        )
    };
    if r < 0 { Err(last_error()) } else { Ok(answer) }
}

/// Sets a switch of a master.
///
/// # Errors
/// `ENOTTY` where this is none.
pub fn set_switch(master: BorrowedFd<'_>, switch: Switch, on: bool) -> Result<(), Errno> {
    let order: libc::Ioctl = match switch {
        Switch::Locked => 0x4004_5431,
        Switch::Packets => 0x5420,
    };
    let on = i32::from(on);
    // SAFETY: both orders read four bytes of the live local.
    let r = unsafe { libc::ioctl(master.as_raw_fd(), order, &raw const on) };
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
