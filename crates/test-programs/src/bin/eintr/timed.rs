//! Calls that nothing ever wakes: each must come back when its time limit has passed, not before.
//!
//! # Safety
//! Every pointer that is passed is to a live local value of the type that the call takes.
#![allow(unsafe_code)]

use crate::Ids;
use outlive_test_programs::{good, signals, sys, timespec};
use std::sync::atomic::AtomicU32;

/// A call with a time limit.
pub(crate) struct Timed {
    pub(crate) name: &'static str,
    /// What it returns at the limit.
    pub(crate) expected: i64,
    /// The only limit that it can have, nanoseconds.
    pub(crate) fixed: Option<i64>,
    /// How early it may be by its nature (timers that tick), nanoseconds.
    pub(crate) grain: i64,
    /// Takes the limit and the moment of its end, nanoseconds.
    pub(crate) call: Box<dyn Fn(i64, i64) -> i64 + Send>,
}

const AGAIN: i64 = -(libc::EAGAIN as i64);
const TIMED_OUT: i64 = -(libc::ETIMEDOUT as i64);
/// The time limit of sockets, nanoseconds.
const SOCKET: i64 = 120_000_000;
/// Sockets count in ticks of at least 1/100 s; the first one is partly over.
const TICK: i64 = 10_000_000;

fn timed(
    name: &'static str,
    expected: i64,
    call: impl Fn(i64, i64) -> i64 + Send + 'static,
) -> Timed {
    Timed {
        name,
        expected,
        fixed: None,
        grain: 0,
        call: Box::new(call),
    }
}

fn ms(ns: i64) -> usize {
    (ns as usize).div_ceil(1_000_000)
}

/// All of them. `sockets` adds those on sockets of kinds that may not be saved.
pub(crate) fn all(ids: &Ids, sockets: bool) -> Vec<Timed> {
    let mut list = polls();
    list.extend(sleeps());
    list.push(sem(ids.limited));
    list.push(socket("accept", listener(), |fd| {
        // SAFETY: no address is asked for.
        unsafe { sys(libc::SYS_accept4, [fd as usize, 0, 0, 0, 0, 0]) }
    }));
    if sockets {
        list.push(socket(
            "recv-udp",
            open(libc::AF_INET, libc::SOCK_DGRAM),
            receive,
        ));
        list.push(socket("recv-unix", unix_pair(), receive));
        list.push(socket("read-unix", unix_pair(), |fd| {
            let mut byte = 0u8;
            // SAFETY: byte is live.
            unsafe {
                sys(
                    libc::SYS_read,
                    [fd as usize, &raw mut byte as usize, 1, 0, 0, 0],
                )
            }
        }));
    }
    list
}

fn polls() -> Vec<Timed> {
    // SAFETY: no pointer is passed.
    let ep = unsafe { good("epoll_create1", libc::epoll_create1(0).into()) } as usize;
    // A mask other than the thread's own: it must be put back at every return.
    let mask = signals(&[libc::SIGUSR1, libc::SIGWINCH]);
    vec![
        timed("epoll_wait", 0, move |limit, _| {
            // SAFETY: what is pointed to are live locals (or the static word) of the types taken.
            unsafe {
                let mut event = libc::epoll_event { events: 0, u64: 0 };
                sys(
                    libc::SYS_epoll_wait,
                    [ep, &raw mut event as usize, 1, ms(limit), 0, 0],
                )
            }
        }),
        timed("epoll_pwait", 0, move |limit, _| {
            // SAFETY: what is pointed to are live locals (or the static word) of the types taken.
            unsafe {
                let mut event = libc::epoll_event { events: 0, u64: 0 };
                let mask = &raw const mask as usize;
                sys(
                    libc::SYS_epoll_pwait,
                    [ep, &raw mut event as usize, 1, ms(limit), mask, 8],
                )
            }
        }),
        timed("epoll_pwait2", 0, move |limit, _| {
            // SAFETY: what is pointed to are live locals (or the static word) of the types taken.
            unsafe {
                let mut event = libc::epoll_event { events: 0, u64: 0 };
                let t = timespec(limit);
                let mask = &raw const mask as usize;
                let event = &raw mut event as usize;
                sys(
                    libc::SYS_epoll_pwait2,
                    [ep, event, 1, &raw const t as usize, mask, 8],
                )
            }
        }),
        timed("poll", 0, move |limit, _| {
            // SAFETY: what is pointed to are live locals (or the static word) of the types taken.
            unsafe { sys(libc::SYS_poll, [0, 0, ms(limit), 0, 0, 0]) }
        }),
        timed("ppoll", 0, move |limit, _| {
            // SAFETY: what is pointed to are live locals (or the static word) of the types taken.
            unsafe {
                let mut t = timespec(limit);
                let mask = &raw const mask as usize;
                sys(libc::SYS_ppoll, [0, 0, &raw mut t as usize, mask, 8, 0])
            }
        }),
        timed("select", 0, move |limit, _| {
            // SAFETY: what is pointed to are live locals (or the static word) of the types taken.
            unsafe {
                let us = limit / 1000 + 1;
                let mut t = libc::timeval {
                    tv_sec: us / 1_000_000,
                    tv_usec: us % 1_000_000,
                };
                sys(libc::SYS_select, [0, 0, 0, 0, &raw mut t as usize, 0])
            }
        }),
        timed("pselect6", 0, move |limit, _| {
            // SAFETY: what is pointed to are live locals (or the static word) of the types taken.
            unsafe {
                let mut t = timespec(limit);
                let mask = [&raw const mask as usize, 8];
                sys(
                    libc::SYS_pselect6,
                    [0, 0, 0, 0, &raw mut t as usize, mask.as_ptr() as usize],
                )
            }
        }),
    ]
}

static WORD: AtomicU32 = AtomicU32::new(0);

fn sleeps() -> Vec<Timed> {
    let word = || WORD.as_ptr() as usize;
    let futex = |command: i32| (command | libc::FUTEX_PRIVATE_FLAG) as usize;
    vec![
        timed("nanosleep", 0, |limit, _| {
            // SAFETY: what is pointed to are live locals (or the static word) of the types taken.
            unsafe {
                let (t, mut left) = (timespec(limit), timespec(0));
                let left = &raw mut left as usize;
                sys(
                    libc::SYS_nanosleep,
                    [&raw const t as usize, left, 0, 0, 0, 0],
                )
            }
        }),
        timed("nanosleep-same", 0, |limit, _| {
            let mut t = timespec(limit);
            let t = &raw mut t as usize;
            // SAFETY: what is pointed to is a live local: what is left takes the limit's place.
            unsafe { sys(libc::SYS_nanosleep, [t, t, 0, 0, 0, 0]) }
        }),
        timed("nanosleep-null", 0, |limit, _| {
            // SAFETY: what is pointed to are live locals (or the static word) of the types taken.
            unsafe {
                let t = timespec(limit);
                sys(libc::SYS_nanosleep, [&raw const t as usize, 0, 0, 0, 0, 0])
            }
        }),
        timed("clock_nanosleep", 0, |limit, _| {
            // SAFETY: what is pointed to are live locals (or the static word) of the types taken.
            unsafe {
                let (t, mut left) = (timespec(limit), timespec(0));
                let (clock, t) = (libc::CLOCK_MONOTONIC as usize, &raw const t as usize);
                sys(
                    libc::SYS_clock_nanosleep,
                    [clock, 0, t, &raw mut left as usize, 0, 0],
                )
            }
        }),
        timed("clock_nanosleep-absolute", 0, |_, end| {
            // SAFETY: what is pointed to are live locals (or the static word) of the types taken.
            unsafe {
                let t = timespec(end);
                let clock = libc::CLOCK_MONOTONIC as usize;
                let absolute = libc::TIMER_ABSTIME as usize;
                sys(
                    libc::SYS_clock_nanosleep,
                    [clock, absolute, &raw const t as usize, 0, 0, 0],
                )
            }
        }),
        timed("futex", TIMED_OUT, move |limit, _| {
            // SAFETY: what is pointed to are live locals (or the static word) of the types taken.
            unsafe {
                let t = timespec(limit);
                sys(
                    libc::SYS_futex,
                    [
                        word(),
                        futex(libc::FUTEX_WAIT),
                        0,
                        &raw const t as usize,
                        0,
                        0,
                    ],
                )
            }
        }),
        timed("futex-absolute", TIMED_OUT, move |_, end| {
            // SAFETY: what is pointed to are live locals (or the static word) of the types taken.
            unsafe {
                let (t, any) = (timespec(end), u32::MAX as usize);
                let command = futex(libc::FUTEX_WAIT_BITSET);
                sys(
                    libc::SYS_futex,
                    [word(), command, 0, &raw const t as usize, 0, any],
                )
            }
        }),
        timed("sigtimedwait", AGAIN, |limit, _| {
            // SAFETY: what is pointed to are live locals (or the static word) of the types taken.
            unsafe {
                let (set, t) = (signals(&[libc::SIGUSR2]), timespec(limit));
                let (set, t) = (&raw const set as usize, &raw const t as usize);
                sys(libc::SYS_rt_sigtimedwait, [set, 0, t, 8, 0, 0])
            }
        }),
    ]
}

fn sem(id: i32) -> Timed {
    timed("semtimedop", AGAIN, move |limit, _| {
        let down = libc::sembuf {
            sem_num: 0,
            sem_op: -1,
            sem_flg: 0,
        };
        let t = timespec(limit);
        let (down, t) = (&raw const down as usize, &raw const t as usize);
        // SAFETY: the operation and the limit are live locals.
        unsafe { sys(libc::SYS_semtimedop, [id as usize, down, 1, t, 0, 0]) }
    })
}

fn socket(name: &'static str, fd: i32, call: impl Fn(i32) -> i64 + Send + 'static) -> Timed {
    let limit = libc::timeval {
        tv_sec: 0,
        tv_usec: SOCKET / 1000,
    };
    // SAFETY: the limit is live and of the length that is given.
    let r = unsafe {
        libc::setsockopt(
            fd,
            libc::SOL_SOCKET,
            libc::SO_RCVTIMEO,
            (&raw const limit).cast(),
            size_of::<libc::timeval>() as u32,
        )
    };
    let _ = good("SO_RCVTIMEO", r.into());
    let call = Box::new(move |_, _| call(fd));
    Timed {
        name,
        expected: AGAIN,
        fixed: Some(SOCKET),
        grain: TICK,
        call,
    }
}

fn receive(fd: i32) -> i64 {
    let mut byte = 0u8;
    // SAFETY: byte is live; no address is asked for.
    unsafe {
        sys(
            libc::SYS_recvfrom,
            [fd as usize, &raw mut byte as usize, 1, 0, 0, 0],
        )
    }
}

fn open(family: i32, sort: i32) -> i32 {
    // SAFETY: only numbers are passed.
    let fd = unsafe { libc::socket(family, sort | libc::SOCK_CLOEXEC, 0) };
    let _ = good("socket", fd.into());
    let mut address = libc::sockaddr_in {
        sin_family: libc::AF_INET as u16,
        sin_port: 0,
        sin_addr: libc::in_addr {
            s_addr: u32::from_ne_bytes([127, 0, 0, 1]),
        },
        sin_zero: [0; 8],
    };
    // SAFETY: the address is live and of the length that is given.
    let r = unsafe {
        let length = size_of::<libc::sockaddr_in>() as u32;
        libc::bind(fd, (&raw mut address).cast(), length)
    };
    let _ = good("bind", r.into());
    fd
}

fn listener() -> i32 {
    let fd = open(libc::AF_INET, libc::SOCK_STREAM);
    // SAFETY: only numbers are passed.
    let _ = good("listen", unsafe { libc::listen(fd, 4) }.into());
    fd
}

fn unix_pair() -> i32 {
    let mut pair = [0; 2];
    // SAFETY: pair is live and has room for two.
    let r = unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0, pair.as_mut_ptr()) };
    let _ = good("socketpair", r.into());
    pair[0]
}
