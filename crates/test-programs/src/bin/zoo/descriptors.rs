//! Descriptors of every kind that can be saved.
//!
//! # Safety
//! The C library is called as its manual says, with live local values.
#![allow(unsafe_code)]

use crate::{Check, check, process};
use outlive_test_programs::{fail, good, signals, sys};
use std::ffi::CString;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// All of them.
pub(crate) fn all(dir: &Path) -> Vec<Check> {
    vec![
        log(dir),
        position(dir),
        pipe(),
        full_pipe(),
        event(),
        timer(),
        epoll(),
        nested_epoll(),
        semaphore(),
        signal(),
        driven(),
        listening(dir),
        devices(dir),
    ]
}

/// A log that is only appended to.
fn log(dir: &Path) -> Check {
    let path = dir.join("log");
    let opened = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .read(true)
        .open(path);
    let Ok(mut file) = opened else { fail("no log") };
    let mut length = 0;
    check("log", move |round| {
        let line = format!("{round:020}\n");
        let written = file.write(line.as_bytes());
        length += line.len() as u64;
        let found = file.metadata().map(|m| m.len());
        if written.ok() != Some(21) || found.ok() != Some(length) {
            fail("the log has a wrong length");
        }
    })
}

/// Two numbers for one open file, one of which closes at exec: they share a position.
fn position(dir: &Path) -> Check {
    let path = dir.join("data");
    let bytes: Vec<u8> = (0..10_000u32).flat_map(u32::to_ne_bytes).collect();
    if std::fs::write(&path, bytes).is_err() {
        fail("no file");
    }
    let Ok(mut file) = std::fs::File::open(path) else {
        fail("no file")
    };
    // SAFETY: only numbers are passed; the duplicate belongs to the new File alone.
    let mut twin = unsafe {
        let fd = good(
            "dup",
            libc::fcntl(file.as_raw_fd(), libc::F_DUPFD, 100).into(),
        );
        std::fs::File::from_raw_fd(fd as i32)
    };
    let mut next = 0u32;
    check("file position", move |_| {
        let mut word = [0u8; 4];
        let which = if next.is_multiple_of(2) {
            &mut file
        } else {
            &mut twin
        };
        if which.read_exact(&mut word).is_err() || u32::from_ne_bytes(word) != next {
            fail("a shared position was lost");
        }
        next += 1;
        if next == 9000 {
            next = 0;
            if twin.seek(SeekFrom::Start(0)).is_err() {
                fail("seek");
            }
        }
        // SAFETY: only numbers are passed.
        let flags = unsafe {
            [file.as_raw_fd(), twin.as_raw_fd()].map(|fd| libc::fcntl(fd, libc::F_GETFD))
        };
        if flags != [libc::FD_CLOEXEC, 0] {
            fail("a flag of a descriptor was lost");
        }
    })
}

fn make_pipe(flags: i32) -> [i32; 2] {
    let mut ends = [0; 2];
    // SAFETY: ends has room for two.
    let _ = good(
        "pipe2",
        unsafe { libc::pipe2(ends.as_mut_ptr(), flags) }.into(),
    );
    ends
}

/// A pipe that always holds the last five numbers.
fn pipe() -> Check {
    let [from, to] = make_pipe(libc::O_CLOEXEC | libc::O_NONBLOCK);
    let put = move |n: u64| {
        // SAFETY: n is live and 8 bytes long.
        let r = unsafe { libc::write(to, (&raw const n).cast(), 8) };
        let _ = good("write", r as i64);
    };
    (0..5).for_each(put);
    check("pipe", move |round| {
        let mut n = 0u64;
        // SAFETY: n is live and 8 bytes long.
        let r = unsafe { libc::read(from, (&raw mut n).cast(), 8) };
        if r != 8 || n != round {
            fail(&format!(
                "the pipe gave {r} bytes and {n} instead of {round}"
            ));
        }
        put(round + 5);
    })
}

/// A pipe of a size of its own that is full, and stays so.
fn full_pipe() -> Check {
    let [_, to] = make_pipe(libc::O_NONBLOCK);
    // SAFETY: the bytes are live.
    unsafe {
        let _ = good(
            "F_SETPIPE_SZ",
            libc::fcntl(to, libc::F_SETPIPE_SZ, 8192).into(),
        );
        let bytes = [7u8; 8192];
        let r = libc::write(to, bytes.as_ptr().cast(), bytes.len());
        if r != 8192 {
            fail("the pipe cannot be filled");
        }
    }
    check("full pipe", move |_| {
        // SAFETY: one live byte.
        let r = unsafe { libc::write(to, [1u8].as_ptr().cast(), 1) };
        // SAFETY: only numbers are passed.
        let size = unsafe { libc::fcntl(to, libc::F_GETPIPE_SZ) };
        if r != -1 || size != 8192 {
            fail("a full pipe takes more");
        }
    })
}

fn read_word(fd: i32) -> i64 {
    let mut n = 0u64;
    // SAFETY: n is live and 8 bytes long.
    let r = unsafe {
        sys(
            libc::SYS_read,
            [fd as usize, &raw mut n as usize, 8, 0, 0, 0],
        )
    };
    if r < 0 { r } else { n as i64 }
}

fn event() -> Check {
    // SAFETY: only numbers are passed.
    let fd = unsafe { libc::eventfd(1_000_000, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
    let _ = good("eventfd", fd.into());
    check("eventfd", move |round| {
        let wanted = if round == 0 { 1_000_000 } else { round + 7 };
        let got = read_word(fd);
        if got != wanted as i64 {
            fail(&format!("the eventfd gave {got} instead of {wanted}"));
        }
        let n = round + 1 + 7;
        // SAFETY: n is live and 8 bytes long.
        let _ = good(
            "write",
            unsafe { libc::write(fd, (&raw const n).cast(), 8) } as i64,
        );
    })
}

/// A periodic timer; its ticks are never more than time has passed.
fn timer() -> Check {
    const PERIOD: i64 = 25_000_000;
    let every = libc::timespec {
        tv_sec: 0,
        tv_nsec: PERIOD,
    };
    let spec = libc::itimerspec {
        it_interval: every,
        it_value: every,
    };
    // SAFETY: spec is live.
    let fd = unsafe {
        let fd = libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_NONBLOCK);
        let _ = good("timerfd_create", fd.into());
        libc::timerfd_settime(fd, 0, &raw const spec, std::ptr::null_mut());
        fd
    };
    let (begun, mut ticks) = (outlive_test_programs::now(), 0);
    check("timerfd", move |round| {
        if round % 32 == 31 {
            let got = read_word(fd);
            ticks += got.max(0);
            let passed = outlive_test_programs::now() - begun;
            if ticks * PERIOD > passed + PERIOD {
                fail(&format!("{ticks} ticks of the timerfd in {passed} ns"));
            }
        }
    })
}

/// Level- and edge-triggered watches with data, on an eventfd and a pipe.
fn epoll() -> Check {
    // SAFETY: only numbers and live events are passed.
    let (ep, level) = unsafe {
        let ep = libc::epoll_create1(libc::EPOLL_CLOEXEC);
        let level = libc::eventfd(1, 0);
        let edge = make_pipe(0);
        let add = |fd, events: i32, data: u64| {
            let mut event = libc::epoll_event {
                events: events as u32,
                u64: data,
            };
            let r = libc::epoll_ctl(ep, libc::EPOLL_CTL_ADD, fd, &raw mut event);
            let _ = good("epoll_ctl", r.into());
        };
        add(level, libc::EPOLLIN, 0xfeed_0000_0001);
        add(edge[0], libc::EPOLLIN | libc::EPOLLET, 0xfeed_0000_0002);
        add(edge[1], libc::EPOLLERR | libc::EPOLLONESHOT, 3);
        (ep, level)
    };
    check("epoll", move |_| {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; 8];
        // SAFETY: events has room for eight.
        let n = unsafe { libc::epoll_wait(ep, events.as_mut_ptr(), 8, 0) };
        let seen: Vec<u64> = events[..n.max(0) as usize].iter().map(|e| e.u64).collect();
        if seen != [0xfeed_0000_0001] {
            fail(&format!("epoll (watching {level}) reports {seen:x?}"));
        }
    })
}

/// An epoll instance that watches another one, which watches a counter; whoever asks
/// the outer one is led to the inner one.
fn nested_epoll() -> Check {
    // SAFETY: only numbers and live events are passed.
    let (outer, inner, counter) = unsafe {
        let outer = libc::epoll_create1(libc::EPOLL_CLOEXEC);
        let inner = libc::epoll_create1(0);
        let counter = libc::eventfd(0, libc::EFD_NONBLOCK);
        for (instance, fd) in [(outer, inner), (inner, counter)] {
            let mut event = libc::epoll_event {
                events: libc::EPOLLIN as u32,
                u64: fd as u64,
            };
            let r = libc::epoll_ctl(instance, libc::EPOLL_CTL_ADD, fd, &raw mut event);
            let _ = good("epoll_ctl", r.into());
        }
        (outer, inner, counter)
    };
    check("nested epoll", move |round| {
        let ready = |instance| {
            let mut event = libc::epoll_event { events: 0, u64: 0 };
            // SAFETY: event has room for one.
            let n = unsafe { libc::epoll_wait(instance, &raw mut event, 1, 0) };
            (n == 1).then_some(event.u64)
        };
        let wanted = if round.is_multiple_of(2) {
            (None, None)
        } else {
            (Some(inner as u64), Some(counter as u64))
        };
        let found = (ready(outer), ready(inner));
        if found != wanted {
            fail(&format!("nested epoll reports {found:?} in round {round}"));
        }
        if round.is_multiple_of(2) {
            let one = 1u64;
            // SAFETY: one is live and 8 bytes long.
            let r = unsafe { libc::write(counter, (&raw const one).cast(), 8) };
            let _ = good("write", r as i64);
        } else if read_word(counter) != 1 {
            fail("the counter below nested epoll is off");
        }
    })
}

/// A counter of which each read takes one.
fn semaphore() -> Check {
    // SAFETY: only numbers are passed.
    let fd = unsafe { libc::eventfd(3, libc::EFD_NONBLOCK | libc::EFD_SEMAPHORE) };
    let _ = good("eventfd", fd.into());
    check("semaphore", move |_| {
        let taken: Vec<i64> = (0..4).map(|_| read_word(fd)).collect();
        if taken != [1, 1, 1, -i64::from(libc::EAGAIN)] {
            fail(&format!("the semaphore gave {taken:?}"));
        }
        let three = 3u64;
        // SAFETY: three is live and 8 bytes long.
        let r = unsafe { libc::write(fd, (&raw const three).cast(), 8) };
        let _ = good("write", r as i64);
    })
}

/// A signalfd reads what the program sends itself.
fn signal() -> Check {
    let set = signals(&[process::READ]);
    // SAFETY: set is live and 8 bytes long.
    let fd = unsafe {
        let set = &raw const set as usize;
        let flags = libc::SFD_NONBLOCK as usize;
        sys(libc::SYS_signalfd4, [usize::MAX, set, 8, flags, 0, 0])
    };
    let fd = good("signalfd4", fd) as i32;
    check("signalfd", move |round| {
        if round % 8 == 0 {
            let value = libc::sigval {
                sival_ptr: (round as usize) as *mut _,
            };
            // SAFETY: only numbers are passed.
            let r = unsafe { libc::sigqueue(libc::getpid(), process::READ, value) };
            let _ = good("sigqueue", r.into());
        } else if round % 8 == 4 {
            let mut info = [0u64; 16];
            // SAFETY: info has 128 bytes.
            let r = unsafe { libc::read(fd, info.as_mut_ptr().cast(), 128) };
            // ssi_ptr is the word at byte 48.
            if r != 128 || info[6] != round - 4 {
                fail(&format!("the signalfd gave {r} bytes and {}", info[6]));
            }
        }
    })
}

/// A pipe that tells of what is written by a signal of the program's choice, and a socket with an
/// owner that is told nothing.
fn driven() -> Check {
    const SETOWN_EX: i32 = 15;
    const GETOWN_EX: i32 = 16;
    const SETSIG: i32 = 10;
    let [from, to] = make_pipe(libc::O_CLOEXEC | libc::O_NONBLOCK);
    let [quiet, _peer] = make_pair();
    let process = [1, std::process::id() as i32];
    // SAFETY: numbers and a live pair of numbers are passed.
    unsafe {
        for fd in [from, quiet] {
            let r = libc::fcntl(fd, SETOWN_EX, process.as_ptr());
            let _ = good("F_SETOWN_EX", r.into());
        }
        let _ = good(
            "F_SETSIG",
            libc::fcntl(from, SETSIG, process::DRIVEN).into(),
        );
        let flags = libc::O_ASYNC | libc::O_NONBLOCK;
        let _ = good("F_SETFL", libc::fcntl(from, libc::F_SETFL, flags).into());
    }
    check("signal-driven", move |round| {
        let (set, mut info, second) = (signals(&[process::DRIVEN]), [0u32; 32], [1u64, 0]);
        let info_at = info.as_mut_ptr() as usize;
        let (set, second) = (&raw const set as usize, second.as_ptr() as usize);
        // SAFETY: set, info and the limit are live and of the lengths that are taken.
        let r = unsafe {
            let _ = good(
                "write",
                libc::write(to, [round as u8].as_ptr().cast(), 1) as i64,
            );
            sys(libc::SYS_rt_sigtimedwait, [set, info_at, second, 8, 0, 0])
        };
        let (mut byte, mut owner) = ([0u8], [0i32; 2]);
        // SAFETY: one byte and two numbers are live.
        unsafe {
            libc::read(from, byte.as_mut_ptr().cast(), 1);
            libc::fcntl(quiet, GETOWN_EX, owner.as_mut_ptr());
        }
        // si_fd lies behind the eight bytes of si_band.
        if r != i64::from(process::DRIVEN) || info[6] != from as u32 || byte != [round as u8] {
            fail(&format!("told by {r} of fd {} instead of {from}", info[6]));
        }
        if owner != process {
            fail(&format!("a socket belongs to {owner:?}"));
        }
    })
}

fn make_pair() -> [i32; 2] {
    let mut ends = [0; 2];
    // SAFETY: ends has room for two.
    let r = unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0, ends.as_mut_ptr()) };
    let _ = good("socketpair", r.into());
    ends
}

/// Listening sockets keep their addresses.
fn listening(dir: &Path) -> Check {
    let Ok(tcp) = std::net::TcpListener::bind("127.0.0.1:0") else {
        fail("no listener")
    };
    let Ok(v6) = std::net::TcpListener::bind("[::1]:0") else {
        fail("no listener")
    };
    let path = dir.join("socket");
    let Ok(unix) = std::os::unix::net::UnixListener::bind(&path) else {
        fail("no listener")
    };
    let port = tcp.local_addr().ok();
    check("listening", move |round| {
        if round % 32 == 0 {
            let address = unix.local_addr().ok();
            let named = address.as_ref().and_then(|a| a.as_pathname());
            if tcp.local_addr().ok() != port || v6.local_addr().is_err() || named != Some(&path) {
                fail("a listening socket lost its address");
            }
        }
    })
}

/// Devices that hold nothing, a directory, a path only.
fn devices(dir: &Path) -> Check {
    let Ok(dir) = CString::new(dir.as_os_str().as_bytes()) else {
        fail("a zero in a path")
    };
    // SAFETY: literals and live strings are passed.
    let fds = unsafe {
        [
            libc::open(c"/dev/null".as_ptr(), libc::O_RDWR),
            libc::open(c"/dev/zero".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC),
            libc::open(c"/dev/urandom".as_ptr(), libc::O_RDONLY),
            libc::open(dir.as_ptr(), libc::O_RDONLY | libc::O_DIRECTORY),
        ]
    };
    for fd in fds {
        let _ = good("open", fd.into());
    }
    check("devices", move |_| {
        if read_word(fds[1]) != 0 || read_word(fds[2]) == 0 || read_word(fds[0]) != 0 {
            fail("a device is another one");
        }
    })
}
