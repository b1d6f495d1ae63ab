//! Objects without a name that a descriptor holds: events, timers, watches, processes, rings.

use crate::files::must_be_open;
use crate::{Absent, Check, Kind, look, must, offered, same};
use outlive_test_programs::{block, now, timespec};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

pub(crate) const KINDS: &[Kind] = &[
    ("eventfd", |_| eventfd(0, 7)),
    ("eventfd-semaphore", |_| eventfd(libc::EFD_SEMAPHORE, 1)),
    ("epoll-ready", epoll_ready),
    ("epoll-nested", epoll_nested),
    ("epoll-fired-once", epoll_fired),
    ("epoll-of-closed", epoll_of_closed),
    ("signalfd-pending", signalfd),
    ("timerfd-once", |_| timerfd(libc::CLOCK_MONOTONIC, 0)),
    ("timerfd-repeated", |_| {
        timerfd(libc::CLOCK_BOOTTIME, 20_000_000)
    }),
    ("timerfd-expired", timerfd_expired),
    ("inotify", inotify),
    ("inotify-queued", inotify_queued),
    ("fanotify", fanotify),
    ("pidfd-own", |_| pidfd(std::process::id() as i32)),
    ("pidfd-child", pidfd_child),
    ("pidfd-zombie", pidfd_zombie),
    ("pidfd-stranger", |_| pidfd(1)),
    ("pidfd-thread", pidfd_thread),
    ("userfaultfd", userfaultfd),
    ("io-uring", io_uring),
    ("perf-event", perf_event),
    ("bpf-map", bpf_map),
    ("bpf-program", bpf_program),
    ("landlock-rules", landlock_rules),
    ("namespace-network", |_| namespace("net")),
    ("namespace-mount", |_| namespace("mnt")),
    ("namespace-user", |_| namespace("user")),
    ("namespace-time", |_| namespace("time")),
    ("pipe-full", pipe_full),
    ("pipe-packets", pipe_packets),
    ("pipe-larger", pipe_larger),
    ("pipe-end-gone", pipe_end_gone),
    ("kernel-crypto", kernel_crypto),
];

fn read_u64(fd: i32) -> i64 {
    let mut value = 0u64;
    // SAFETY: value is live and 8 bytes long.
    let r = unsafe { libc::read(fd, (&raw mut value).cast(), 8) };
    if r == 8 { value as i64 } else { -1 }
}

fn eventfd(flags: i32, first: i64) -> Result<Check, Absent> {
    // SAFETY: only numbers are passed.
    let fd = must("eventfd", unsafe {
        libc::eventfd(7, flags | libc::EFD_NONBLOCK)
    }) as i32;
    look(move || {
        same("the first read", read_u64(fd), first);
        same(
            "the second read",
            read_u64(fd),
            if first == 1 { 1 } else { -1 },
        );
    })
}

fn event() -> i32 {
    // SAFETY: only numbers are passed.
    must("eventfd", unsafe { libc::eventfd(0, libc::EFD_NONBLOCK) }) as i32
}

fn raise(fd: i32) {
    let one = 1u64;
    // SAFETY: the value is live and 8 bytes long.
    must(
        "write",
        unsafe { libc::write(fd, (&raw const one).cast(), 8) } as i64,
    );
}

fn epoll() -> i32 {
    // SAFETY: only numbers are passed.
    must("epoll_create1", unsafe { libc::epoll_create1(0) }) as i32
}

fn watch(epoll: i32, fd: i32, events: i32, data: u64) {
    let mut event = libc::epoll_event {
        events: events as u32,
        u64: data,
    };
    // SAFETY: the event is live.
    must("epoll_ctl", unsafe {
        libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, fd, &raw mut event)
    });
}

/// The data of the events that are there now.
fn ready(epoll: i32) -> Vec<u64> {
    let mut events = [libc::epoll_event { events: 0, u64: 0 }; 8];
    // SAFETY: the array is live and as long as is said.
    let n = must("epoll_wait", unsafe {
        libc::epoll_wait(epoll, events.as_mut_ptr(), 8, 0)
    });
    events[..n as usize].iter().map(|e| e.u64).collect()
}

fn epoll_ready(_: &Path) -> Result<Check, Absent> {
    let (epoll, level, edge, quiet) = (epoll(), event(), event(), event());
    watch(epoll, level, libc::EPOLLIN, 11);
    watch(epoll, edge, libc::EPOLLIN | libc::EPOLLET, 22);
    watch(epoll, quiet, libc::EPOLLIN, 33);
    raise(level);
    look(move || {
        same("what is ready", ready(epoll), vec![11]);
        raise(edge);
        let mut both = ready(epoll);
        both.sort_unstable();
        same("what is ready then", both, vec![11, 22]);
    })
}

fn epoll_nested(_: &Path) -> Result<Check, Absent> {
    let (outer, inner, source) = (epoll(), epoll(), event());
    watch(inner, source, libc::EPOLLIN, 5);
    watch(outer, inner, libc::EPOLLIN, 6);
    look(move || {
        same("what is ready before", ready(outer), vec![]);
        raise(source);
        same("what is ready outside", ready(outer), vec![6]);
        same("what is ready inside", ready(inner), vec![5]);
    })
}

fn epoll_fired(_: &Path) -> Result<Check, Absent> {
    let (epoll, source) = (epoll(), event());
    watch(epoll, source, libc::EPOLLIN | libc::EPOLLONESHOT, 9);
    raise(source);
    same("what fires", ready(epoll), vec![9]);
    look(move || same("what fires again", ready(epoll), vec![]))
}

fn epoll_of_closed(_: &Path) -> Result<Check, Absent> {
    let (epoll, source) = (epoll(), event());
    watch(epoll, source, libc::EPOLLIN, 4);
    // SAFETY: only numbers are passed; the number is not used again.
    let kept = unsafe {
        let kept = must("dup", libc::dup(source)) as i32;
        must("close", libc::close(source));
        kept
    };
    look(move || {
        raise(kept);
        same("what is ready", ready(epoll), vec![4]);
    })
}

fn signalfd(_: &Path) -> Result<Check, Absent> {
    block(&[libc::SIGHUP]);
    // SAFETY: the set is live; the rest are numbers.
    let fd = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigaddset(&raw mut set, libc::SIGHUP);
        let fd = must(
            "signalfd",
            libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK),
        );
        must("kill", libc::kill(libc::getpid(), libc::SIGHUP));
        fd as i32
    };
    look(move || {
        // SAFETY: the descriptor is ours.
        let mut file = unsafe { File::from_raw_fd(fd) };
        let mut info = [0; 128];
        same("what is read", file.read(&mut info).ok(), Some(128));
        same("the signal", info[0], libc::SIGHUP as u8);
    })
}

fn set_timerfd(clock: i32, value: i64, interval: i64) -> i32 {
    let new = libc::itimerspec {
        it_interval: timespec(interval),
        it_value: timespec(value),
    };
    // SAFETY: the value is live; the rest are numbers.
    unsafe {
        let fd = must(
            "timerfd_create",
            libc::timerfd_create(clock, libc::TFD_NONBLOCK),
        ) as i32;
        must(
            "settime",
            libc::timerfd_settime(fd, 0, &raw const new, std::ptr::null_mut()),
        );
        fd
    }
}

fn timerfd(clock: i32, interval: i64) -> Result<Check, Absent> {
    let first = if interval == 0 {
        3_600_000_000_000
    } else {
        interval
    };
    let fd = set_timerfd(clock, first, interval);
    look(move || {
        let mut left: libc::itimerspec = libc::itimerspec {
            it_interval: timespec(0),
            it_value: timespec(0),
        };
        // SAFETY: the value is live.
        must("gettime", unsafe {
            libc::timerfd_gettime(fd, &raw mut left)
        });
        same("the interval", left.it_interval.tv_nsec, interval);
        same(
            "running",
            left.it_value.tv_sec > 3000 || interval > 0 && left.it_value.tv_nsec > 0,
            true,
        );
    })
}

fn timerfd_expired(_: &Path) -> Result<Check, Absent> {
    let fd = set_timerfd(libc::CLOCK_MONOTONIC, 1, 0);
    let begun = now();
    while now() - begun < 2_000_000 {}
    look(move || same("expirations", read_u64(fd), 1))
}

fn watched(dir: &Path) -> i32 {
    let path = std::ffi::CString::new(dir.as_os_str().as_bytes()).unwrap_or_default();
    // SAFETY: the path is live.
    unsafe {
        let fd = must("inotify_init1", libc::inotify_init1(libc::IN_NONBLOCK)) as i32;
        must(
            "add",
            libc::inotify_add_watch(fd, path.as_ptr(), libc::IN_CREATE),
        );
        fd
    }
}

fn created(fd: i32) -> bool {
    let mut events = [0u8; 256];
    // SAFETY: the buffer is live and as long as is said.
    unsafe { libc::read(fd, events.as_mut_ptr().cast(), events.len()) > 16 }
}

fn inotify(dir: &Path) -> Result<Check, Absent> {
    let fd = watched(dir);
    let dir = dir.to_path_buf();
    look(move || {
        same("an event before", created(fd), false);
        let _ = File::create(dir.join("new"));
        same("an event", created(fd), true);
    })
}

fn inotify_queued(dir: &Path) -> Result<Check, Absent> {
    let fd = watched(dir);
    let _ = File::create(dir.join("new"));
    look(move || same("an event", created(fd), true))
}

fn fanotify(_: &Path) -> Result<Check, Absent> {
    // SAFETY: only numbers are passed.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_fanotify_init,
            libc::FAN_CLASS_NOTIF,
            libc::O_RDONLY,
        )
    };
    let fd = offered("fanotify_init", fd)? as i32;
    look(move || must_be_open(fd))
}

fn open_pidfd(pid: i32, flags: u32) -> Result<i32, Absent> {
    // SAFETY: only numbers are passed.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, flags) };
    Ok(offered("pidfd_open", fd)? as i32)
}

/// Whose it is; -1 once that one was reaped.
fn pid_of(fd: i32) -> i32 {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap_or_default();
    let pid = info.lines().find_map(|l| l.strip_prefix("Pid:"));
    pid.and_then(|p| p.trim().parse().ok()).unwrap_or(-2)
}

fn pidfd(pid: i32) -> Result<Check, Absent> {
    let fd = open_pidfd(pid, 0)?;
    look(move || same("whose it is", pid_of(fd), pid))
}

fn pidfd_child(_: &Path) -> Result<Check, Absent> {
    let child = crate::process::waiting_child();
    let fd = open_pidfd(child, 0)?;
    look(move || {
        same("whose it is", pid_of(fd), child);
        // SAFETY: only numbers are passed.
        let sent = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, libc::SIGTERM, 0, 0) };
        must("pidfd_send_signal", sent);
        same("how it ended", crate::process::ended(child), -libc::SIGTERM);
    })
}

fn pidfd_zombie(_: &Path) -> Result<Check, Absent> {
    let child = crate::process::zombie(23);
    let fd = open_pidfd(child, 0)?;
    look(move || {
        same("whose it is", pid_of(fd), child);
        let mut poll = libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: the structure is live.
        must("poll", unsafe { libc::poll(&raw mut poll, 1, 0) });
        same("that it ended", poll.revents & libc::POLLIN, libc::POLLIN);
        same("its status", crate::process::ended(child), 23);
    })
}

fn pidfd_thread(_: &Path) -> Result<Check, Absent> {
    // SAFETY: takes no argument.
    let tid = unsafe { libc::gettid() };
    let fd = open_pidfd(tid, libc::O_EXCL as u32)?;
    look(move || same("whose it is", pid_of(fd), tid))
}

fn userfaultfd(_: &Path) -> Result<Check, Absent> {
    // SAFETY: only numbers are passed.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_NONBLOCK | 1) };
    let fd = offered("userfaultfd", fd)? as i32;
    look(move || must_be_open(fd))
}

fn io_uring(_: &Path) -> Result<Check, Absent> {
    let mut parameters = [0u32; 30];
    // SAFETY: the structure has 120 bytes.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 4, parameters.as_mut_ptr()) };
    let fd = offered("io_uring_setup", fd)? as i32;
    look(move || must_be_open(fd))
}

fn perf_event(_: &Path) -> Result<Check, Absent> {
    // struct perf_event_attr: a software event, the task clock.
    let mut attributes = [0u32; 32];
    (attributes[0], attributes[1], attributes[2]) = (1, 128, 1);
    // SAFETY: the structure has 128 bytes, as it says.
    let fd = unsafe { libc::syscall(libc::SYS_perf_event_open, attributes.as_ptr(), 0, -1, -1, 0) };
    let fd = offered("perf_event_open", fd)? as i32;
    look(move || must_be_open(fd))
}

fn bpf(command: i32, attributes: &mut [u32; 40]) -> Result<i32, Absent> {
    let at = attributes.as_mut_ptr();
    // SAFETY: the structure is live and as long as is said.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, at, size_of_val(attributes)) };
    Ok(offered("bpf", fd)? as i32)
}

fn bpf_map(_: &Path) -> Result<Check, Absent> {
    let mut attributes = [0u32; 40];
    // An array of four words.
    attributes[..4].copy_from_slice(&[2, 4, 4, 4]);
    let fd = bpf(0, &mut attributes)?;
    look(move || must_be_open(fd))
}

fn bpf_program(_: &Path) -> Result<Check, Absent> {
    // mov r0, 0; exit
    static CODE: [u64; 2] = [0xb7, 0x95];
    let mut attributes = [0u32; 40];
    (attributes[0], attributes[1]) = (1, 2);
    for (at, pointer) in [(2, CODE.as_ptr() as u64), (4, c"GPL".as_ptr() as u64)] {
        attributes[at] = pointer as u32;
        attributes[at + 1] = (pointer >> 32) as u32;
    }
    let fd = bpf(5, &mut attributes)?;
    look(move || must_be_open(fd))
}

fn landlock_rules(_: &Path) -> Result<Check, Absent> {
    const SYS_LANDLOCK_CREATE_RULESET: i64 = 444;
    let handled = 1u64;
    // SAFETY: the structure is live and as long as is said.
    let fd = unsafe { libc::syscall(SYS_LANDLOCK_CREATE_RULESET, &raw const handled, 8, 0) };
    let fd = offered("landlock_create_ruleset", fd)? as i32;
    look(move || must_be_open(fd))
}

fn namespace(name: &str) -> Result<Check, Absent> {
    let file = File::open(format!("/proc/self/ns/{name}")).map_err(|e| Absent(e.to_string()))?;
    look(move || must_be_open(file.as_raw_fd()))
}

fn pipe(flags: i32) -> (i32, i32) {
    let mut ends = [0; 2];
    // SAFETY: the array is live.
    must("pipe2", unsafe { libc::pipe2(ends.as_mut_ptr(), flags) });
    (ends[0], ends[1])
}

fn write(fd: i32, bytes: &[u8]) -> isize {
    // SAFETY: the bytes are live.
    unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) }
}

fn read(fd: i32, most: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0; most];
    // SAFETY: the buffer is live and as long as is said.
    let n = unsafe { libc::read(fd, bytes.as_mut_ptr().cast(), most) };
    bytes.truncate(usize::try_from(n).ok()?);
    Some(bytes)
}

fn pipe_full(_: &Path) -> Result<Check, Absent> {
    let (reader, writer) = pipe(libc::O_NONBLOCK);
    let mut sent = Vec::new();
    for n in 0u32.. {
        if write(writer, &n.to_ne_bytes()) < 0 {
            break;
        }
        sent.extend(n.to_ne_bytes());
    }
    look(move || {
        let mut got = Vec::new();
        while let Some(more) = read(reader, 4096) {
            got.extend(more);
        }
        same("what was in it", got == sent, true);
    })
}

fn pipe_packets(_: &Path) -> Result<Check, Absent> {
    let (reader, writer) = pipe(libc::O_DIRECT | libc::O_NONBLOCK);
    write(writer, b"one");
    write(writer, b"three");
    look(move || {
        same("the first packet", read(reader, 100), Some(b"one".to_vec()));
        same(
            "the second packet",
            read(reader, 100),
            Some(b"three".to_vec()),
        );
    })
}

fn pipe_larger(_: &Path) -> Result<Check, Absent> {
    let (reader, _writer) = pipe(0);
    // SAFETY: only numbers are passed.
    unsafe {
        must(
            "F_SETPIPE_SZ",
            libc::fcntl(reader, libc::F_SETPIPE_SZ, 1 << 19),
        );
    }
    look(move || {
        same(
            "its size",
            // SAFETY: as above.
            unsafe { libc::fcntl(reader, libc::F_GETPIPE_SZ) },
            1 << 19,
        )
    })
}

fn pipe_end_gone(_: &Path) -> Result<Check, Absent> {
    let (reader, writer) = pipe(libc::O_NONBLOCK);
    write(writer, b"rest");
    // SAFETY: only numbers are passed; the number is not used again.
    must("close", unsafe { libc::close(writer) });
    look(move || {
        same("the rest", read(reader, 100), Some(b"rest".to_vec()));
        same("the end", read(reader, 100), Some(Vec::new()));
    })
}

fn kernel_crypto(_: &Path) -> Result<Check, Absent> {
    // SAFETY: only numbers are passed.
    let fd = unsafe { libc::socket(libc::AF_ALG, libc::SOCK_SEQPACKET, 0) };
    let fd = offered("AF_ALG", fd.into())? as i32;
    look(move || must_be_open(fd))
}
