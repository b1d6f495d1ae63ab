//! Keys, and the keyrings in which they are.

use crate::{Absent, Check, Kind, look, must, offered, same};
use std::ffi::CStr;
use std::path::Path;

pub(crate) const KINDS: &[Kind] = &[
    ("session-keyring", keyring),
    ("session-keyring-empty", empty_keyring),
    ("session-keyring-of-service", service_keyring),
    ("session-keyring-of-a-thread", keyring_of_thread),
    (
        "session-keyring-that-leads-to-user",
        keyring_that_leads_to_user,
    ),
    (
        "session-keyring-of-a-thread-that-leads-to-user",
        keyring_of_thread_that_leads_to_user,
    ),
    ("session-keyring-of-user", keyring_of_user),
    ("session-keyring-of-user-forged", forged_keyring),
    ("process-keyring", |_| own_keyring(-2)),
    ("thread-keyring", |_| own_keyring(-1)),
];

fn keyring(_: &Path) -> Result<Check, Absent> {
    const JOIN: i32 = 1;
    const SESSION: i32 = -3;
    // SAFETY: the texts are literals.
    unsafe {
        let name = c"outlive-test".as_ptr();
        offered("keyctl", libc::syscall(libc::SYS_keyctl, JOIN, name))?;
        let key = libc::syscall(
            libc::SYS_add_key,
            c"user".as_ptr(),
            name,
            c"secret".as_ptr(),
            6,
            SESSION,
        );
        offered("add_key", key)?;
        look(move || {
            let found = libc::syscall(
                libc::SYS_keyctl,
                10,
                SESSION,
                c"user".as_ptr(),
                c"outlive-test".as_ptr(),
                0,
            );
            same("the key", found, key);
        })
    }
}

/// Asks `keyctl(2)` with two numbers.
fn keyctl(operation: i32, first: i64, second: i64) -> i64 {
    // SAFETY: only numbers are passed: none of these operations takes a text there but for a null
    // pointer.
    unsafe { libc::syscall(libc::SYS_keyctl, operation, first, second) }
}

/// `KEYCTL_JOIN_SESSION_KEYRING` without a name: a new one.
fn join_new() -> Result<i64, Absent> {
    offered("keyctl", keyctl(1, 0, 0))
}

fn key_in(ring: i32, description: &std::ffi::CStr) -> Result<i64, Absent> {
    // SAFETY: the texts live until the call returns, the contents are as long as is said.
    let key = unsafe {
        let (sort, contents) = (c"user".as_ptr(), c"secret".as_ptr());
        libc::syscall(
            libc::SYS_add_key,
            sort,
            description.as_ptr(),
            contents,
            6,
            ring,
        )
    };
    offered("add_key", key)
}

/// The key of this name that this thread finds.
fn found(name: &std::ffi::CStr) -> i64 {
    let nothing = std::ptr::null::<u8>();
    // SAFETY: both texts end with a zero.
    unsafe {
        libc::syscall(
            libc::SYS_request_key,
            c"user".as_ptr(),
            name.as_ptr(),
            nothing,
            0,
        )
    }
}

/// What is in the keyring of the user is found.
fn user_keyring_is_found() -> Result<Check, Absent> {
    // In the keyring of the user.
    let key = key_in(-4, c"outlive-test-of-user")?;
    look(move || {
        same("the user's key", found(c"outlive-test-of-user"), key);
        // KEYCTL_UNLINK
        must("unlink", keyctl(9, key, -4));
    })
}

fn empty_keyring(_: &Path) -> Result<Check, Absent> {
    join_new()?;
    look(must_have_session_keyring)
}

fn must_have_session_keyring() {
    must("its session keyring", keyctl(0, -3, 0));
}

/// As systemd makes it: with the keyring of the user, and a number.
fn service_keyring(_: &Path) -> Result<Check, Absent> {
    join_new()?;
    // KEYCTL_LINK
    offered("link", keyctl(8, -4, -3))?;
    key_in(-3, c"invocation_id")?;
    user_keyring_is_found()
}

fn keyring_of_thread(_: &Path) -> Result<Check, Absent> {
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let key = join_new().and_then(|_| key_in(-3, c"outlive-test"));
        let _ = tell.send(key.map(|_| ()));
        loop {
            std::thread::park();
        }
    });
    told.recv()
        .unwrap_or_else(|e| outlive_test_programs::fail(&e.to_string()))?;
    look(must_have_session_keyring)
}

/// A key in a keyring of a thread or a process, which the kernel makes then.
fn own_keyring(which: i32) -> Result<Check, Absent> {
    let key = key_in(which, c"outlive-test")?;
    look(move || same("the key", found(c"outlive-test"), key))
}

/// A session keyring by name, which leads to that of the user.
fn join_and_link() -> Result<(), Absent> {
    join(c"outlive-test-linked")?;
    key_in(-3, c"outlive-test-linked")?;
    // KEYCTL_LINK
    offered("link", keyctl(8, -5, -3))?;
    Ok(())
}

fn join(name: &CStr) -> Result<i64, Absent> {
    // SAFETY: the text ends with a zero.
    offered("keyctl", unsafe {
        libc::syscall(libc::SYS_keyctl, 1, name.as_ptr())
    })
}

fn keyring_that_leads_to_user(_: &Path) -> Result<Check, Absent> {
    join_and_link()?;
    look(|| same("a key", found(c"outlive-test-linked") > 0, true))
}

fn keyring_of_thread_that_leads_to_user(_: &Path) -> Result<Check, Absent> {
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let _ = tell.send(join_and_link());
        loop {
            std::thread::park();
        }
    });
    told.recv()
        .unwrap_or_else(|e| outlive_test_programs::fail(&e.to_string()))?;
    look(|| {
        same("a key", found(c"outlive-test-linked") > 0, false);
        must_have_no_session_keyring();
    })
}

/// This thread has none, and was given none: it finds that of its user only as long as this is its user.
fn must_have_no_session_keyring() {
    // SAFETY: it takes nothing.
    let user = unsafe { libc::getuid() };
    let name = std::ffi::CString::new(format!("_uid_ses.{user}")).unwrap_or_default();
    let finds = || {
        let nothing = std::ptr::null::<u8>();
        // SAFETY: both texts end with a zero.
        unsafe {
            let sort = c"keyring".as_ptr();
            libc::syscall(libc::SYS_request_key, sort, name.as_ptr(), nothing, 0) > 0
        }
    };
    same("that of its user", finds(), true);
    // SAFETY: only numbers are passed: of this thread alone. Who is not root may not.
    if unsafe { libc::syscall(libc::SYS_setresuid, 65534, u32::MAX, u32::MAX) } == 0 {
        same("a session keyring that it was given", finds(), false);
    }
}

/// That of the user, as its own.
fn keyring_of_user(_: &Path) -> Result<Check, Absent> {
    // SAFETY: it takes nothing.
    let user = unsafe { libc::getuid() };
    let name = std::ffi::CString::new(format!("_uid_ses.{user}"));
    // It is made when it is asked for.
    let kept = offered("keyctl", keyctl(0, -5, 0))?;
    join(&name.map_err(|e| Absent(e.to_string()))?)?;
    same("the session keyring", keyctl(0, -3, 0), kept);
    user_keyring_is_found()
}

/// With a keyring that has the name of one of a user.
fn forged_keyring(_: &Path) -> Result<Check, Absent> {
    join_new()?;
    // SAFETY: the texts end with a zero, and a keyring has no contents.
    let ring = unsafe {
        let (sort, name) = (c"keyring".as_ptr(), c"_uid.0".as_ptr());
        libc::syscall(libc::SYS_add_key, sort, name, 0, 0, -3)
    };
    key_in(offered("add_key", ring)? as i32, c"outlive-test-forged")?;
    look(|| same("a key", found(c"outlive-test-forged") > 0, true))
}
