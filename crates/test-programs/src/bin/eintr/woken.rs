//! Calls without a limit, or with one that is far away: each must come back once for every time
//! that it is woken, with what it was woken by, and never otherwise.
//!
//! # Safety
//! Every pointer that is passed is to a live local value, or a static, of the type that the call
//! takes.
#![allow(unsafe_code)]

use crate::Ids;
use outlive_test_programs::{check, expect, fail, good, now, signals, sys, timespec};
use std::sync::atomic::{AtomicI64, AtomicU32, AtomicU64, Ordering};

/// The signal that `sigwaitinfo` takes.
pub(crate) const WAITED: i32 = 40;
/// The signal that `sigsuspend` lets in.
pub(crate) const SUSPENDED: i32 = 41;
/// A limit that no test reaches, nanoseconds.
const FAR: i64 = 3_600_000_000_000;

/// Wakes the thread for the n-th time; takes n and the thread.
pub(crate) type Wake = Box<dyn Fn(u64, i32) + Send>;

/// A call and what wakes it.
pub(crate) struct Woken {
    pub(crate) name: &'static str,
    pub(crate) wake: Wake,
    /// Waits to be woken for the n-th time.
    pub(crate) wait: Box<dyn Fn(u64) + Send>,
}

fn woken(
    name: &'static str,
    wake: impl Fn(u64, i32) + Send + 'static,
    wait: impl Fn(u64) + Send + 'static,
) -> Woken {
    Woken {
        name,
        wake: Box::new(wake),
        wait: Box::new(wait),
    }
}

/// All of them.
pub(crate) fn all(ids: &Ids) -> Vec<Woken> {
    let mut list = vec![
        pipe_read(),
        event_read(),
        timer_read(),
        futex(),
        sigwait(),
        sigsuspend(),
    ];
    list.push(sem(ids.woken, 0, None));
    list.push(sem(ids.woken, 1, Some(FAR)));
    list.push(msgrcv(ids.queue));
    list.extend(polls());
    list
}

fn read(what: &str, fd: usize, wanted: usize) -> u64 {
    let mut value = 0u64;
    // SAFETY: value is live and has room for the at most 8 bytes.
    let r = unsafe {
        sys(
            libc::SYS_read,
            [fd, &raw mut value as usize, wanted, 0, 0, 0],
        )
    };
    expect(what, r, wanted as i64);
    value
}

fn write(what: &str, fd: usize, value: u64) {
    // SAFETY: value is live and 8 bytes long.
    let r = unsafe { sys(libc::SYS_write, [fd, &raw const value as usize, 8, 0, 0, 0]) };
    expect(what, r, 8);
}

fn pipe_read() -> Woken {
    let mut ends = [0; 2];
    // SAFETY: ends has room for two.
    let _ = good("pipe", unsafe { libc::pipe(ends.as_mut_ptr()) }.into());
    let [from, to] = ends.map(|fd| fd as usize);
    woken(
        "pipe",
        move |n, _| write("the pipe's write", to, n),
        move |n| {
            let got = read("the pipe's read", from, 8);
            check(got == n, || format!("the pipe gave {got} instead of {n}"));
        },
    )
}

fn eventfd() -> usize {
    // SAFETY: only numbers are passed.
    good(
        "eventfd",
        unsafe { libc::eventfd(0, libc::EFD_SEMAPHORE) }.into(),
    ) as usize
}

fn event_read() -> Woken {
    let fd = eventfd();
    woken(
        "eventfd",
        move |_, _| write("the eventfd's write", fd, 1),
        move |_| {
            let got = read("the eventfd's read", fd, 8);
            check(got == 1, || format!("the eventfd gave {got}"));
        },
    )
}

/// Wakes itself: each read must come at a tick, not before.
fn timer_read() -> Woken {
    const PERIOD: i64 = 70_000_000;
    let begun = AtomicI64::new(0);
    let ticks = AtomicI64::new(0);
    // SAFETY: only numbers are passed.
    let fd = unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, 0) };
    let fd = good("timerfd_create", fd.into()) as usize;
    woken(
        "timerfd",
        |_, _| {},
        move |n| {
            if n == 0 {
                let every = timespec(PERIOD);
                let spec = libc::itimerspec {
                    it_interval: every,
                    it_value: every,
                };
                begun.store(now(), Ordering::Relaxed);
                // SAFETY: spec is live.
                let r = unsafe {
                    libc::timerfd_settime(fd as i32, 0, &raw const spec, std::ptr::null_mut())
                };
                expect("timerfd_settime", r.into(), 0);
            }
            let got = read("the timerfd's read", fd, 8) as i64;
            let all = ticks.fetch_add(got, Ordering::Relaxed) + got;
            let passed = now() - begun.load(Ordering::Relaxed);
            check(passed >= all * PERIOD, || {
                format!("{all} ticks of the timerfd in {passed} ns")
            });
        },
    )
}

static WORD: AtomicU32 = AtomicU32::new(0);

fn futex() -> Woken {
    let call = |command: i32, value: u32| {
        let command = (command | libc::FUTEX_PRIVATE_FLAG) as usize;
        // SAFETY: the word is a static; no limit is given.
        unsafe {
            sys(
                libc::SYS_futex,
                [WORD.as_ptr() as usize, command, value as usize, 0, 0, 0],
            )
        }
    };
    woken(
        "futex-wake",
        move |n, _| {
            WORD.store(n as u32 + 1, Ordering::SeqCst);
            let _ = good("FUTEX_WAKE", call(libc::FUTEX_WAKE, 1));
        },
        move |n| {
            while WORD.load(Ordering::SeqCst) <= n as u32 {
                let seen = WORD.load(Ordering::SeqCst);
                if seen > n as u32 {
                    return;
                }
                let r = call(libc::FUTEX_WAIT, seen);
                check(r == 0 || r == -i64::from(libc::EAGAIN), || {
                    format!("FUTEX_WAIT returned {r}")
                });
            }
        },
    )
}

/// Queues a signal with a number to one thread.
fn queue(tid: i32, signal: i32, number: u64) {
    let mut info = [0u64; 16];
    info[0] = signal as u64;
    // si_code at byte 8; pid and uid at 16; the value at 24.
    info[1] = libc::SI_QUEUE as u32 as u64;
    info[3] = number;
    // SAFETY: info is live and as long as a siginfo_t; getpid takes no argument.
    let r = unsafe {
        let pid = libc::getpid() as usize;
        let info = info.as_ptr() as usize;
        sys(
            libc::SYS_rt_tgsigqueueinfo,
            [pid, tid as usize, signal as usize, info, 0, 0],
        )
    };
    expect("queueing a signal", r, 0);
}

fn sigwait() -> Woken {
    woken(
        "sigwaitinfo",
        |n, tid| queue(tid, WAITED, n),
        |n| {
            let (set, mut info) = (signals(&[WAITED]), [0u64; 16]);
            let (set, at) = (&raw const set as usize, info.as_mut_ptr() as usize);
            // SAFETY: set and info are live and as long as the call takes them.
            let r = unsafe { sys(libc::SYS_rt_sigtimedwait, [set, at, 0, 8, 0, 0]) };
            expect("sigwaitinfo", r, WAITED.into());
            check(info[3] == n, || {
                format!("sigwaitinfo gave number {} instead of {n}", info[3])
            });
        },
    )
}

static HANDLED: AtomicU64 = AtomicU64::new(0);

extern "C" fn on_suspended(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel gives a siginfo_t of a queued signal, whose value is valid.
    let number = unsafe { (*info).si_value().sival_ptr as u64 };
    if HANDLED.fetch_add(1, Ordering::SeqCst) != number {
        fail("sigsuspend handled a signal out of turn");
    }
}

fn sigsuspend() -> Woken {
    // SAFETY: an all-zero sigaction is valid; the handler has the signature that SA_SIGINFO asks.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_suspended as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        let r = libc::sigaction(SUSPENDED, &raw const action, std::ptr::null_mut());
        let _ = good("sigaction", r.into());
    }
    let mask = signals(&[libc::SIGUSR1, libc::SIGUSR2, WAITED]);
    woken(
        "sigsuspend",
        |n, tid| queue(tid, SUSPENDED, n),
        move |n| {
            while HANDLED.load(Ordering::SeqCst) <= n {
                let before = HANDLED.load(Ordering::SeqCst);
                // SAFETY: mask is live and 8 bytes long.
                let r = unsafe {
                    sys(
                        libc::SYS_rt_sigsuspend,
                        [&raw const mask as usize, 8, 0, 0, 0, 0],
                    )
                };
                expect("sigsuspend", r, -i64::from(libc::EINTR));
                if HANDLED.load(Ordering::SeqCst) == before {
                    fail("sigsuspend returned although no signal was handled");
                }
            }
        },
    )
}

fn sem(id: i32, which: u16, limit: Option<i64>) -> Woken {
    let operate = move |by: i16, limit: Option<i64>| {
        let operation = libc::sembuf {
            sem_num: which,
            sem_op: by,
            sem_flg: 0,
        };
        let t = timespec(limit.unwrap_or(0));
        let t = limit.map_or(0, |_| &raw const t as usize);
        let operation = &raw const operation as usize;
        // SAFETY: the operation and the limit are live locals.
        unsafe { sys(libc::SYS_semtimedop, [id as usize, operation, 1, t, 0, 0]) }
    };
    let down = move || match limit {
        Some(_) => operate(-1, limit),
        None => {
            let operation = libc::sembuf {
                sem_num: which,
                sem_op: -1,
                sem_flg: 0,
            };
            // SAFETY: the operation is a live local.
            unsafe {
                sys(
                    libc::SYS_semop,
                    [id as usize, &raw const operation as usize, 1, 0, 0, 0],
                )
            }
        }
    };
    let name = if limit.is_some() {
        "semtimedop-far"
    } else {
        "semop"
    };
    woken(
        name,
        move |_, _| expect("semop up", operate(1, None), 0),
        move |_| {
            expect(name, down(), 0);
        },
    )
}

fn msgrcv(id: i32) -> Woken {
    woken(
        "msgrcv",
        move |n, _| {
            let message = [1u64, n];
            // SAFETY: message is a type and the 8 bytes that are said to follow it.
            let r = unsafe {
                sys(
                    libc::SYS_msgsnd,
                    [id as usize, message.as_ptr() as usize, 8, 0, 0, 0],
                )
            };
            expect("msgsnd", r, 0);
        },
        move |n| {
            let mut message = [0u64; 2];
            // SAFETY: message has room for a type and 8 bytes.
            let r = unsafe {
                sys(
                    libc::SYS_msgrcv,
                    [id as usize, message.as_mut_ptr() as usize, 8, 1, 0, 0],
                )
            };
            expect("msgrcv", r, 8);
            check(message[1] == n, || {
                format!("msgrcv gave {} instead of {n}", message[1])
            });
        },
    )
}

/// Waits for an eventfd to become readable, without limit.
fn polls() -> Vec<Woken> {
    let ready = |name: &'static str, fd: usize, wait: Box<dyn Fn() -> i64 + Send>| {
        woken(
            name,
            move |_, _| write("the eventfd's write", fd, 1),
            move |_| {
                expect(name, wait(), 1);
                let _ = read("the eventfd's read", fd, 8);
            },
        )
    };
    let (a, b, c) = (eventfd(), eventfd(), eventfd());
    // SAFETY: event is live; the other arguments are numbers.
    let ep = unsafe {
        let ep = good("epoll_create1", libc::epoll_create1(0).into());
        let mut event = libc::epoll_event {
            events: libc::EPOLLIN as u32,
            u64: 77,
        };
        let r = libc::epoll_ctl(ep as i32, libc::EPOLL_CTL_ADD, a as i32, &raw mut event);
        expect("epoll_ctl", r.into(), 0);
        ep as usize
    };
    vec![
        ready(
            "epoll_wait-far",
            a,
            Box::new(move || {
                // SAFETY: what is pointed to are live locals (or the static word) of the types taken.
                unsafe {
                    let mut event = libc::epoll_event { events: 0, u64: 0 };
                    let r = sys(
                        libc::SYS_epoll_wait,
                        [ep, &raw mut event as usize, 1, usize::MAX, 0, 0],
                    );
                    let data = event.u64;
                    check(r < 1 || data == 77, || format!("epoll gave data {data}"));
                    r
                }
            }),
        ),
        ready(
            "poll-far",
            b,
            Box::new(move || {
                // SAFETY: what is pointed to are live locals (or the static word) of the types taken.
                unsafe {
                    let mut one = libc::pollfd {
                        fd: b as i32,
                        events: libc::POLLIN,
                        revents: 0,
                    };
                    sys(
                        libc::SYS_poll,
                        [&raw mut one as usize, 1, usize::MAX, 0, 0, 0],
                    )
                }
            }),
        ),
        ready(
            "select-far",
            c,
            Box::new(move || {
                // SAFETY: what is pointed to are live locals (or the static word) of the types taken.
                unsafe {
                    let mut set = [0u64; 16];
                    set[c / 64] = 1 << (c % 64);
                    sys(
                        libc::SYS_select,
                        [c + 1, set.as_mut_ptr() as usize, 0, 0, 0, 0],
                    )
                }
            }),
        ),
    ]
}
