//! The session keyring of this process, and those that the kernel keeps for users (`keyrings(7)`).
//!
//! # Safety
//! The calls get numbers only.
#![allow(unsafe_code)]

use crate::{Errno, last_error};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};

/// The list of keys that whoever opens it may see.
const LIST: &str = "/proc/keys";
/// Bytes of it that are read, at most: some fifty thousand keys. It is read while programs stand still.
const LONGEST: usize = 4 << 20;

/// `KEYCTL_GET_KEYRING_ID`
pub const GET_KEYRING_ID: u64 = 0;
/// `KEY_SPEC_SESSION_KEYRING`
pub const SESSION_KEYRING: u64 = -3i64 as u64;

/// `KEY_SPEC_USER_KEYRING`
pub const USER_KEYRING: u64 = -4i64 as u64;
/// `KEY_SPEC_USER_SESSION_KEYRING`
pub const USER_SESSION_KEYRING: u64 = -5i64 as u64;

/// The serial number of a keyring of the thread that calls.
fn serial(which: u64) -> Result<u64, Errno> {
    // SAFETY: only numbers are passed.
    let serial = unsafe { libc::syscall(libc::SYS_keyctl, GET_KEYRING_ID, which, 0) };
    u64::try_from(serial).map_err(|_| last_error())
}

/// Has a thread answer that ends then: keyrings and users belong to threads.
fn aside<T: Send + 'static>(
    ask: impl FnOnce() -> Result<T, Errno> + Send + 'static,
) -> Result<T, Errno> {
    let asking = std::thread::Builder::new().spawn(ask);
    asking.map_or(Err(Errno::AGAIN), |thread| {
        thread.join().unwrap_or(Err(Errno::AGAIN))
    })
}

/// The keyrings that the kernel keeps for a user, which makes them if need be.
///
/// # Errors
/// `EPERM` for another user without `CAP_SETUID`.
pub fn keyrings_of(user: u32) -> Result<[u64; 2], Errno> {
    aside(move || {
        const SAME: libc::uid_t = u32::MAX;
        // SAFETY: only numbers are passed. The call itself, unlike that of the C library, is for this
        // thread alone. Whose memory it is remains the same, as that is of the effective user.
        if unsafe { libc::syscall(libc::SYS_setresuid, user, SAME, SAME) } != 0 {
            return Err(last_error());
        }
        Ok([serial(USER_KEYRING)?, serial(USER_SESSION_KEYRING)?])
    })
}

/// The list of keys, as who opened it may see it.
#[derive(Debug)]
pub struct List(File);

impl List {
    /// As this process may see it.
    ///
    /// # Errors
    /// What opening it says.
    pub fn open() -> io::Result<Self> {
        File::open(LIST).map(Self)
    }

    /// That which a process of another user opened. Whoever may trace that one can give it any file there
    /// to be taken for it, also one of a file system of his own, which may never answer: so its name and its
    /// mount, which the kernel tells by itself, come first.
    ///
    /// # Errors
    /// Where this is not the list.
    pub fn of(file: File) -> io::Result<Self> {
        let ours = File::open(LIST)?;
        let fd = file.as_raw_fd();
        let named = std::fs::read_link(format!("/proc/self/fd/{fd}"))?;
        let same = named.as_os_str() == LIST
            && mount_of(&file)? == mount_of(&ours)?
            && file.metadata()?.ino() == ours.metadata()?.ino();
        match same {
            true => Ok(Self(file)),
            false => Err(io::Error::other("somebody put another file in its place")),
        }
    }
}

/// The number of the mount that a file was opened in.
fn mount_of(file: &File) -> io::Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd()))?;
    let mut lines = text.lines();
    let number = lines.find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok());
    number.ok_or_else(|| io::Error::other("its mount is not told"))
}

/// How often each session keyring of a user is in use, of those that the list of keys shows: as a session
/// keyring, by links to it, and by the kernel itself, once.
///
/// # Errors
/// What reading says, and where it is longer than any that is looked through.
pub fn uses(list: &List) -> io::Result<Vec<(u64, u64)>> {
    let text = read(&list.0, LONGEST)?;
    Ok(parse_uses(&String::from_utf8_lossy(&text)))
}

/// All of a file that is not longer than this.
fn read(file: &File, longest: usize) -> io::Result<Vec<u8>> {
    let (mut text, mut room) = (Vec::new(), vec![0; 16 << 10]);
    loop {
        match file.read_at(&mut room, text.len() as u64)? {
            0 => return Ok(text),
            read => text.extend_from_slice(&room[..read]),
        }
        if text.len() > longest {
            let what = format!("it is longer than {longest} bytes");
            return Err(io::Error::other(what));
        }
    }
}

fn parse_uses(text: &str) -> Vec<(u64, u64)> {
    let of = |line: &str| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let [
            serial,
            _flags,
            uses,
            _until,
            _permissions,
            _user,
            _group,
            "keyring",
            name,
            ..,
        ] = words[..]
        else {
            return None;
        };
        name.strip_prefix("_uid_ses.")?;
        Some((u64::from_str_radix(serial, 16).ok()?, uses.parse().ok()?))
    };
    text.lines().filter_map(of).collect()
}

/// The serial number of the session keyring of who calls. Who has none is given that of its user by
/// asking; so a thread asks that ends then, for keyrings belong to threads.
///
/// # Errors
/// `ENOSYS` where the kernel has no keys; others where the keyring is revoked or may not be looked at.
pub fn session_keyring() -> Result<u64, Errno> {
    aside(|| serial(SESSION_KEYRING))
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

    #[test]
    fn keyrings_of_users_are_told_and_so_is_how_often_they_are_used() {
        let user = rustix::process::getuid().as_raw();
        match keyrings_of(user) {
            Ok(both) => {
                assert_eq!(keyrings_of(user), Ok(both));
                let list = List::open().unwrap();
                let uses = uses(&list).unwrap();
                assert!(
                    uses.iter()
                        .any(|(ring, uses)| *ring == both[1] && *uses > 0)
                );
            }
            Err(e) => assert_eq!(e, Errno::NOSYS),
        }
        assert_eq!(rustix::process::getuid().as_raw(), user);
    }

    #[test]
    fn only_the_list_of_keys_is_taken_for_it_and_none_is_read_without_end() {
        for other in ["/dev/zero", "/dev/null", "/proc/self/environ", "/proc/stat"] {
            assert!(List::of(File::open(other).unwrap()).is_err(), "{other}");
        }
        let endless = File::open("/dev/zero").unwrap();
        let error = read(&endless, 64 << 10).unwrap_err().to_string();
        assert!(error.contains("longer than"), "{error}");
        match File::open(LIST) {
            Ok(list) => assert!(uses(&List::of(list).unwrap()).is_ok()),
            Err(e) => assert_eq!(e.kind(), io::ErrorKind::NotFound),
        }
    }

    #[test]
    fn a_list_of_keys_is_read_line_by_line() {
        let text = "153f7d4d I--Q---     3 perm 1f3f0000     0 65534 keyring   _uid_ses.0: 1\n\
                    24752bba I--Q---     2 perm 1f3f0000     0 65534 keyring   _uid.0: empty\n\
                    00d6ab1a I--Q---     1 2w   1f3f0000  1000 65534 keyring   _uid_ses.1000: 1\n\
                    00d6ab1b I--Q---     1 perm 1f3f0000  1000 65534 user      _uid_ses.7: 1\n\n x\n";
        assert_eq!(parse_uses(text), [(0x153f_7d4d, 3), (0xd6_ab1a, 1)]);
        assert_eq!(parse_uses(""), []);
    }
}
