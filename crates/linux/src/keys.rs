//! The session keyring of this process (`keyrings(7)`).
//!
//! # Safety
//! The call gets numbers only.
#![allow(unsafe_code)]

use crate::{Errno, last_error};

/// `KEYCTL_GET_KEYRING_ID`
pub const GET_KEYRING_ID: u64 = 0;
/// `KEY_SPEC_SESSION_KEYRING`
pub const SESSION_KEYRING: u64 = -3i64 as u64;

/// The serial number of the session keyring of who calls. Who has none is given that of its user by
/// asking; so a thread asks that ends then, for keyrings belong to threads.
///
/// # Errors
/// `ENOSYS` where the kernel has no keys; others where the keyring is revoked or may not be looked at.
pub fn session_keyring() -> Result<u64, Errno> {
    let ask = || {
        // SAFETY: only numbers are passed.
        let serial = unsafe { libc::syscall(libc::SYS_keyctl, GET_KEYRING_ID, SESSION_KEYRING, 0) };
        u64::try_from(serial).map_err(|_| last_error())
    };
    let asking = std::thread::Builder::new().spawn(ask);
    asking.map_or(Err(Errno::AGAIN), |thread| {
        thread.join().unwrap_or(Err(Errno::AGAIN))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everybody_has_a_session_keyring_to_whom_the_kernel_gives_keys() {
        match session_keyring() {
            Ok(serial) => assert_eq!(session_keyring(), Ok(serial)),
            Err(e) => assert_eq!(e, Errno::NOSYS),
        }
    }
}
