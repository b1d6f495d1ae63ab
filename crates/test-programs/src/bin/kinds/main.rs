//! One kind of state at a time: `kinds NAME` makes it, waits, and on SIGUSR1 looks whether it is
//! still what it was; `kinds NAME later` makes it on SIGUSR2 only, so that a tracker is there
//! already; `kinds --list` names all kinds. `kinds --tree A,B C,D …` makes many at once: the first
//! list itself, each further one in a child, which tells by its exit status what it found.
//!
//! This is the list of what a process can hold, as complete as the kernel's interface is known
//! here: a kind that is missing is one that nobody has asked about yet. Each is shaped so that a
//! loss shows: what can be read is read, what can be used is used.
//!
//! # Safety
//! Plain C library calls with numbers, literals and live local values; mappings are accessed within
//! the length that they were made with.
#![allow(unsafe_code)]

mod files;
mod ipc;
mod keys;
mod limits;
mod memory;
mod objects;
mod process;
mod sharing;
mod sockets;

use outlive_test_programs::{
    await_report_order, await_report_order_patiently, await_signal, block, fail, say,
};
use std::path::PathBuf;

/// Looks whether it is still what it was; fails loudly where it is not.
pub(crate) type Check = Box<dyn FnOnce()>;

/// Why this machine does not offer a kind.
pub(crate) struct Absent(String);

/// Makes one; the directory is the program's own.
pub(crate) type Make = fn(&std::path::Path) -> Result<Check, Absent>;

/// A kind of state by name.
pub(crate) type Kind = (&'static str, Make);

/// The answer of a call that a kernel, a machine or a user may not offer.
pub(crate) fn offered(what: &str, answer: i64) -> Result<i64, Absent> {
    if answer >= 0 {
        return Ok(answer);
    }
    Err(Absent(format!(
        "{what}: {}",
        std::io::Error::last_os_error()
    )))
}

/// The answer of a call that must succeed.
pub(crate) fn must(what: &str, answer: impl Into<i64>) -> i64 {
    let answer = answer.into();
    if answer < 0 {
        fail(&format!("{what}: {}", std::io::Error::last_os_error()));
    }
    answer
}

/// A check.
pub(crate) fn look(check: impl FnOnce() + 'static) -> Result<Check, Absent> {
    Ok(Box::new(check))
}

/// Fails unless both are equal.
pub(crate) fn same<T: PartialEq + std::fmt::Debug>(what: &str, got: T, wanted: T) {
    if got != wanted {
        fail(&format!("{what} is {got:?}, not {wanted:?}"));
    }
}

fn kinds() -> impl Iterator<Item = Kind> {
    let lists = [
        files::KINDS,
        objects::KINDS,
        sockets::KINDS,
        memory::KINDS,
        ipc::KINDS,
        process::KINDS,
        sharing::KINDS,
        limits::KINDS,
        keys::KINDS,
    ];
    lists.into_iter().flatten().copied()
}

fn main() {
    let mut words = std::env::args().skip(1);
    let name = words.next().unwrap_or_default();
    if name == "--list" {
        for (name, _) in kinds() {
            say(name);
        }
        return;
    }
    if name == "--tree" {
        return tree(&words.collect::<Vec<_>>());
    }
    let Some((_, make)) = kinds().find(|(n, _)| *n == name) else {
        fail("usage: kinds NAME [later|patient] | kinds --list")
    };
    let here = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
    block(&[libc::SIGUSR1, libc::SIGUSR2]);
    let manner = words.next();
    let later = manner.as_deref() == Some("later");
    if later {
        say("ready");
        await_signal(libc::SIGUSR2);
    }
    let made = make(&here);
    if let Err(Absent(why)) = &made {
        say(&format!("absent: {why}"));
    }
    say(if later { "held" } else { "ready" });
    if manner.as_deref() == Some("patient") {
        await_report_order_patiently();
    } else {
        await_report_order();
    }
    if let Ok(check) = made {
        check();
    }
    say("intact");
}

/// Makes the kinds of a list, all of which this machine must offer.
fn make_all(list: &str, dir: &std::path::Path) -> Vec<Check> {
    let make = |name: &str| {
        let Some((_, make)) = kinds().find(|(n, _)| *n == name) else {
            fail(&format!("there is no kind {name}"))
        };
        let own = dir.join(name);
        if std::fs::create_dir(&own).is_err() {
            fail("no directory");
        }
        make(&own).unwrap_or_else(|Absent(why)| fail(&format!("{name}: {why}")))
    };
    list.split(',').map(make).collect()
}

fn tree(lists: &[String]) {
    let here = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
    block(&[libc::SIGUSR1, libc::SIGUSR2]);
    let Some((own, others)) = lists.split_first() else {
        fail("usage: kinds --tree A,B C,D …")
    };
    let (mut told, tell) = std::io::pipe().unwrap_or_else(|e| fail(&e.to_string()));
    let mut children = Vec::new();
    for list in others {
        // SAFETY: the program has one thread, so the child may do anything.
        let child = must("fork", unsafe { libc::fork() });
        if child == 0 {
            let checks = make_all(list, &here);
            if std::io::Write::write_all(&mut &tell, b"+").is_err() {
                fail("nobody is told");
            }
            await_report_order();
            checks.into_iter().for_each(|check| check());
            // SAFETY: does not return.
            unsafe { libc::_exit(0) }
        }
        let mut byte = [0];
        if std::io::Read::read_exact(&mut told, &mut byte).is_err() {
            fail("a child is gone");
        }
        children.push(child as i32);
    }
    let checks = make_all(own, &here);
    say("ready");
    await_report_order();
    for child in children {
        // SAFETY: only numbers are passed.
        must("kill", unsafe { libc::kill(child, libc::SIGUSR1) });
        same("how a child ended", process::ended(child), 0);
    }
    checks.into_iter().for_each(|check| check());
    say("intact");
}
