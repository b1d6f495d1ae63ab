//! A process without any privilege that waits to be looked at, and whether there is Landlock.
//!
//! # Safety
//! Between `fork` and `exec` only system calls with numbers are made.
#![allow(unsafe_code)]

use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

/// `SECBIT_NOROOT`: user 0 gains nothing by beginning a program.
const NOROOT: libc::c_ulong = 1;

/// Starts a process of this user and group, without capabilities and in a session of its own, that is
/// ready to be looked at by whoever has them too. It ends once its standard input is closed.
///
/// # Errors
/// Where it could not be made, or has ended at once.
pub fn start(user: u32, group: u32) -> io::Result<Child> {
    let mut command = Command::new("/bin/cat");
    command.env_clear().current_dir("/").uid(user).gid(group);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let forgo = || {
        // SAFETY: only numbers are passed. Who has no privilege may not forgo any, and has none.
        unsafe {
            libc::setsid();
            libc::prctl(libc::PR_SET_SECUREBITS, NOROOT, 0, 0, 0);
            let clear = libc::PR_CAP_AMBIENT_CLEAR_ALL;
            libc::prctl(libc::PR_CAP_AMBIENT, clear, 0, 0, 0);
        }
        Ok(())
    };
    // SAFETY: it makes system calls with numbers only.
    unsafe { command.pre_exec(forgo) };
    let mut child = command.stderr(Stdio::null()).spawn()?;
    // Once it answers, nothing of this process is left in it.
    let answer = (child.stdin.as_mut()).zip(child.stdout.as_mut()).map_or(
        Err(io::ErrorKind::BrokenPipe.into()),
        |(to, from)| {
            to.write_all(b"\n")?;
            from.read_exact(&mut [0])
        },
    );
    if let Err(e) = answer {
        let _ = child.kill();
        let _ = child.wait();
        return Err(e);
    }
    Ok(child)
}

/// Whether the kernel has Landlock, and is to ask it (`landlock_create_ruleset(2)`).
#[must_use]
pub fn has_landlock() -> bool {
    /// `LANDLOCK_CREATE_RULESET_VERSION`
    const VERSION: libc::c_uint = 1;
    let nothing = std::ptr::null::<u8>();
    // SAFETY: without attributes, only its version is asked for.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, nothing, 0, VERSION) };
    version >= 1
        || !matches!(
            crate::last_error(),
            crate::Errno::NOSYS | crate::Errno::OPNOTSUPP
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_has_no_capability_and_ends_with_its_input() {
        let (user, group) = (rustix::process::getuid(), rustix::process::getgid());
        let mut child = start(user.as_raw(), group.as_raw()).unwrap();
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        let line = |name: &str| status.lines().find(|l| l.starts_with(name)).unwrap();
        for set in ["CapPrm", "CapEff"] {
            assert_eq!(
                line(set).split_whitespace().nth(1),
                Some("0000000000000000")
            );
        }
        assert_eq!(
            line("Uid").split_whitespace().nth(2),
            Some(&user.as_raw().to_string()[..])
        );
        drop(child.stdin.take());
        assert!(child.wait().unwrap().success());
    }
}
