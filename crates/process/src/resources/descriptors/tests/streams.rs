//! Standard streams, of a child that has nothing else.

use super::super::stream::StandardStream;
use super::super::{Description, collect_table, preflight};
use super::*;
use std::process::{Child, Command, Stdio};
use std::sync::RwLockWriteGuard;

/// A child that only waits; it is ended with the test.
pub(super) struct Waiting(Child);

impl Waiting {
    fn with(stdin: Stdio, stdout: Stdio, stderr: Stdio) -> Self {
        let starting = STARTING.write().unwrap_or_else(PoisonError::into_inner);
        Self::start(stdin, stdout, stderr, starting)
    }

    /// A child with these descriptors of the test under the same numbers, and nothing else.
    pub(super) fn inheriting(fds: &[&dyn AsFd]) -> Self {
        let starting = STARTING.write().unwrap_or_else(PoisonError::into_inner);
        let set = |flags| {
            for fd in fds {
                rustix::io::fcntl_setfd(fd, flags).unwrap();
            }
        };
        set(rustix::io::FdFlags::empty());
        let child = Self::start(Stdio::null(), Stdio::null(), Stdio::null(), starting);
        set(rustix::io::FdFlags::CLOEXEC);
        child
    }

    pub(super) fn pid(&self) -> u32 {
        self.0.id()
    }

    fn start(
        stdin: Stdio,
        stdout: Stdio,
        stderr: Stdio,
        starting: RwLockWriteGuard<'_, ()>,
    ) -> Self {
        let child = Command::new("sleep")
            .arg("1000")
            .stdin(stdin)
            .stdout(stdout)
            .stderr(stderr)
            .spawn()
            .unwrap();
        // Once it sleeps, the descriptors of the test are gone from it and those of its start too.
        let call = format!("/proc/{}/syscall", child.id());
        let sleeps = format!("{} ", libc::SYS_clock_nanosleep);
        while !std::fs::read_to_string(&call).unwrap().starts_with(&sleeps) {
            std::thread::yield_now();
        }
        drop(starting);
        Self(child)
    }

    fn collect(&self) -> FdTable {
        let pid = self.0.id();
        let pidfd = pidfd_open(Pid::from_raw(pid as i32).unwrap(), PidfdFlags::empty()).unwrap();
        // What the test runner itself had inherited is none of our business.
        let inherited: Vec<u32> = std::fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .filter_map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().ok())
            .filter(|&number| number > 2)
            .collect();
        let pidfd = pidfd.as_fd();
        let target = Target {
            pid,
            program: "sleep",
            pidfd,
            ignore: &inherited,
        };
        preflight(&[target]).unwrap();
        collect_table(
            &[target],
            &std::collections::HashSet::new(),
            &mut Memory::default(),
            &mut SharedObjects::default(),
        )
        .unwrap()
        .table
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn streams(table: &FdTable) -> Vec<(u32, Option<StandardStream>)> {
    table
        .descriptions
        .iter()
        .map(|d| match &d.object {
            Description::Stream(state) => (d.holders[0].number, Some(state.stream)),
            _ => (d.holders[0].number, None),
        })
        .collect()
}

#[test]
fn pipes_to_the_starter_are_re_attached() {
    let child = Waiting::with(Stdio::piped(), Stdio::piped(), Stdio::null());
    let table = child.collect();
    assert_eq!(
        streams(&table),
        [
            (0, Some(StandardStream::Input)),
            (1, Some(StandardStream::Output)),
            (2, None)
        ]
    );
}

#[test]
fn one_pipe_for_output_and_error_is_two_streams() {
    let (_read, write) = std::io::pipe().unwrap();
    let again = write.try_clone().unwrap();
    let child = Waiting::with(Stdio::null(), write.into(), again.into());
    assert_eq!(
        streams(&child.collect()),
        [
            (0, None),
            (1, Some(StandardStream::Output)),
            (2, Some(StandardStream::Error))
        ]
    );
}

#[test]
fn input_that_has_ended_stays_ended() {
    let (read, write) = std::io::pipe().unwrap();
    let child = Waiting::with(read.into(), Stdio::null(), Stdio::null());
    // Whatever another child inherited of it is gone once nobody is starting.
    let _quiet = no_child_starts();
    drop(write);
    let table = child.collect();
    assert_eq!(streams(&table)[0], (0, None));
    let made = recreate(&table);
    assert_eq!(rustix::io::read(made_for(&made, 0), &mut [0]), Ok(0));
}

#[test]
fn a_terminal_is_re_attached() {
    use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let terminal = ioctl_tiocgptpeer(&master, flags).unwrap();
    let copy = || Stdio::from(terminal.try_clone().unwrap());
    let child = Waiting::with(copy(), copy(), copy());
    let expected = [
        StandardStream::Input,
        StandardStream::Output,
        StandardStream::Error,
    ];
    let found = streams(&child.collect());
    assert_eq!(found.len(), 3);
    for ((number, stream), (n, wanted)) in found.into_iter().zip(expected.into_iter().enumerate()) {
        assert_eq!((number, stream), (n as u32, Some(wanted)));
    }
}

#[test]
fn a_program_that_opens_and_closes_meanwhile_is_not_refused_for_it() {
    let script = "while :; do exec 5</etc/passwd 6>/dev/null 5<&- 6>&-; done";
    let starting = STARTING.write().unwrap_or_else(PoisonError::into_inner);
    let mut command = Command::new("sh");
    command
        .args(["-c", script])
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    let busy = Waiting(command.stderr(Stdio::null()).spawn().unwrap());
    let comm = format!("/proc/{}/comm", busy.0.id());
    while std::fs::read_to_string(&comm).unwrap() != "sh\n" {
        std::thread::yield_now();
    }
    drop(starting);
    let pid = busy.0.id();
    let pidfd = pidfd_open(Pid::from_raw(pid as i32).unwrap(), PidfdFlags::empty()).unwrap();
    let inherited: Vec<u32> = (7..1024).collect();
    let pidfd = pidfd.as_fd();
    let target = Target {
        pid,
        program: "sh",
        pidfd,
        ignore: &inherited,
    };
    for _ in 0..50 {
        preflight(&[target]).unwrap();
    }
}
