//! What belongs to the process: signals, timers, limits, clocks, switches.
//!
//! # Safety
//! The C library is called as its manual says, with live local values.
#![allow(unsafe_code)]

use crate::{Check, check};
use outlive_test_programs::{clock_ns, fail, good, now, signals, sys};
use std::sync::atomic::{AtomicU64, Ordering};

/// Queued for the process and never taken.
pub(crate) const QUEUED: i32 = 44;
/// Read by a signalfd.
pub(crate) const READ: i32 = 45;

/// Tells of a pipe.
pub(crate) const DRIVEN: i32 = 47;
/// Comes from a timer.
pub(crate) const TIMED: i32 = 48;

/// All of them.
pub(crate) fn all() -> Vec<Check> {
    let mut list = vec![
        queued(),
        dispositions(),
        interval(),
        posix_timers(),
        clocks(),
    ];
    // SAFETY: only numbers and literals are passed.
    unsafe {
        libc::umask(0o037);
        let few = libc::rlimit {
            rlim_cur: 333,
            rlim_max: 4000,
        };
        let _ = good(
            "setrlimit",
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const few).into(),
        );
        let core = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 5 << 20,
        };
        let _ = good(
            "setrlimit",
            libc::setrlimit(libc::RLIMIT_CORE, &raw const core).into(),
        );
        libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        libc::prctl(libc::PR_SET_NAME, c"the (zoo) ".as_ptr());
        libc::personality(libc::ADDR_NO_RANDOMIZE as u64);
    }
    list.push(check("settings", |round| {
        if round % 16 != 0 {
            return;
        }
        // SAFETY: limit is live; the umask is put back at once.
        unsafe {
            let mut limit = libc::rlimit {
                rlim_cur: 0,
                rlim_max: 0,
            };
            libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
            let umask = libc::umask(0o037);
            if limit.rlim_cur != 333 || limit.rlim_max != 4000 || umask != 0o037 {
                fail("a limit or the umask was lost");
            }
            let switch = libc::prctl(libc::PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0);
            if switch != 1 || libc::personality(0xffff_ffff) != libc::ADDR_NO_RANDOMIZE {
                fail("a switch of the process was lost");
            }
        }
    }));
    list
}

/// Five real-time signals wait, blocked, with their numbers.
fn queued() -> Check {
    for n in 0..5usize {
        let value = libc::sigval {
            sival_ptr: (1000 + n) as *mut _,
        };
        // SAFETY: only numbers are passed.
        let r = unsafe { libc::sigqueue(libc::getpid(), QUEUED, value) };
        let _ = good("sigqueue", r.into());
    }
    check("queued signals", |round| {
        if round % 8 != 0 {
            return;
        }
        // They are taken and queued again, in their order.
        for n in 0..5usize {
            let (set, mut info, none) = (signals(&[QUEUED]), [0u64; 16], [0u64; 2]);
            let info_at = info.as_mut_ptr() as usize;
            let (set, none) = (&raw const set as usize, none.as_ptr() as usize);
            // SAFETY: set, info and the limit are live and of the lengths that are taken.
            let r = unsafe { sys(libc::SYS_rt_sigtimedwait, [set, info_at, none, 8, 0, 0]) };
            if r != i64::from(QUEUED) || info[3] != 1000 + n as u64 {
                fail(&format!("queued signal {n}: {r} with {}", info[3]));
            }
            let value = libc::sigval {
                sival_ptr: (1000 + n) as *mut _,
            };
            // SAFETY: only numbers are passed.
            let r = unsafe { libc::sigqueue(libc::getpid(), QUEUED, value) };
            let _ = good("sigqueue", r.into());
        }
    })
}

static HANDLED: AtomicU64 = AtomicU64::new(0);

extern "C" fn on_signal(_: i32) {
    HANDLED.fetch_add(1, Ordering::SeqCst);
}

/// Ignored, handled and default signals, with masks and flags.
fn dispositions() -> Check {
    // SAFETY: all-zero sigactions are valid; the handler has the right form.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = libc::SIG_IGN;
        libc::sigaction(libc::SIGTRAP, &raw const action, std::ptr::null_mut());
        libc::sigaction(libc::SIGHUP, &raw const action, std::ptr::null_mut());
        action.sa_sigaction = on_signal as *const () as usize;
        action.sa_flags = libc::SA_RESTART | libc::SA_NODEFER;
        libc::sigaddset(&raw mut action.sa_mask, libc::SIGTERM);
        libc::sigaction(libc::SIGALRM, &raw const action, std::ptr::null_mut());
        libc::sigaction(46, &raw const action, std::ptr::null_mut());
    }
    check("dispositions", |_| {
        // SAFETY: no thread is harmed by an ignored signal.
        unsafe { libc::raise(libc::SIGTRAP) };
        let before = HANDLED.load(Ordering::SeqCst);
        // SAFETY: the signal is handled.
        unsafe { libc::raise(46) };
        if HANDLED.load(Ordering::SeqCst) <= before {
            fail("a handler was lost");
        }
    })
}

/// An interval timer goes on firing.
fn interval() -> Check {
    let period = libc::timeval {
        tv_sec: 0,
        tv_usec: 40_000,
    };
    let timer = libc::itimerval {
        it_interval: period,
        it_value: period,
    };
    // SAFETY: timer is live.
    let r = unsafe { libc::syscall(libc::SYS_setitimer, libc::ITIMER_REAL, &raw const timer, 0) };
    let _ = good("setitimer", r);
    check("itimer", move |round| {
        if round % 64 != 0 {
            return;
        }
        let mut timer = libc::itimerval {
            it_interval: period,
            it_value: period,
        };
        // SAFETY: timer is live.
        unsafe { libc::syscall(libc::SYS_getitimer, libc::ITIMER_REAL, &raw mut timer) };
        if timer.it_interval.tv_usec != 40_000 {
            fail("the interval timer was lost");
        }
    })
}

fn timer(clock: i32, notify: i32, first: i64, period: i64) -> usize {
    let mut event = [0u32; 16];
    event[0] = 0xfeed;
    event[2] = TIMED as u32;
    event[3] = notify as u32;
    // SAFETY: takes no argument.
    event[4] = unsafe { libc::syscall(libc::SYS_gettid) } as u32;
    let times = [0, period, 0, first];
    let mut id = 0u32;
    let id_at = &raw mut id as usize;
    let times = times.as_ptr() as usize;
    // SAFETY: the event, the ID and the times are live and of the lengths that are taken.
    unsafe {
        let event = event.as_ptr() as usize;
        let args = [clock as usize, event, id_at, 0, 0, 0];
        let _ = good("timer_create", sys(libc::SYS_timer_create, args));
        let args = [id as usize, 0, times, 0, 0, 0];
        let _ = good("timer_settime", sys(libc::SYS_timer_settime, args));
    }
    id as usize
}

/// What is left of a timer and its period, both below a second.
fn left_of(id: usize) -> (i64, i64) {
    let mut times = [0i64; 4];
    // SAFETY: times has the 32 bytes that are written.
    let r = unsafe {
        let args = [id, times.as_mut_ptr() as usize, 0, 0, 0, 0];
        sys(libc::SYS_timer_gettime, args)
    };
    let _ = good("timer_gettime", r);
    (times[2] * 1_000_000_000 + times[3], times[1])
}

/// Timers with and without signals, by clocks of time and of processors, with a gap in their IDs.
fn posix_timers() -> Check {
    const PERIOD: i64 = 15_000_000;
    const LONG: i64 = 999_000_000;
    let gap = timer(libc::CLOCK_REALTIME, libc::SIGEV_NONE, 0, 0);
    let silent = timer(libc::CLOCK_BOOTTIME, libc::SIGEV_NONE, LONG, LONG);
    let begun = now();
    let periodic = timer(libc::CLOCK_MONOTONIC, libc::SIGEV_SIGNAL, PERIOD, PERIOD);
    // Made by the thread whose time it counts.
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let clock = libc::CLOCK_THREAD_CPUTIME_ID;
        let _ = tell.send(timer(clock, libc::SIGEV_THREAD_ID, LONG, 0));
        loop {
            std::thread::park();
        }
    });
    let Ok(thread) = told.recv() else {
        fail("no thread")
    };
    let whole = timer(libc::CLOCK_PROCESS_CPUTIME_ID, libc::SIGEV_NONE, LONG, LONG);
    // SAFETY: only a number is passed.
    let r = unsafe { sys(libc::SYS_timer_delete, [gap, 0, 0, 0, 0, 0]) };
    let _ = good("timer_delete", r);
    let (mut ticks, mut last) = (0, LONG);
    check("POSIX timers", move |round| {
        let (set, mut info, none) = (signals(&[TIMED]), [0i32; 32], [0u64; 2]);
        let info_at = info.as_mut_ptr() as usize;
        let (set, none) = (&raw const set as usize, none.as_ptr() as usize);
        // SAFETY: set, info and the limit are live and of the lengths that are taken.
        let r = unsafe { sys(libc::SYS_rt_sigtimedwait, [set, info_at, none, 8, 0, 0]) };
        // siginfo_t: signal, errno, code, padding, ID of the timer, overrun, value.
        if r == i64::from(TIMED) {
            if info[2] != -2 || info[6] != 0xfeed || info[4] != periodic as i32 {
                fail(&format!("signal of a timer: {:x?}", &info[..8]));
            }
            ticks += 1 + i64::from(info[5]);
        }
        let passed = now() - begun;
        if ticks * PERIOD > passed + PERIOD {
            fail(&format!("{ticks} ticks of a timer in {passed} ns"));
        }
        if round % 16 != 0 {
            return;
        }
        let (left, period) = left_of(silent);
        if period != LONG || left == 0 || left > LONG || left_of(periodic).1 != PERIOD {
            fail("a periodic timer was lost");
        }
        if left_of(whole).1 != LONG {
            fail("a timer of processor time was lost");
        }
        let (left, _) = left_of(thread);
        if left > last {
            fail(&format!(
                "a timer of a thread's time went from {last} to {left}"
            ));
        }
        last = left;
        if round % 256 == 255 && ticks == 0 {
            fail("a timer does not tick");
        }
    })
}

/// Clocks go forwards, together, and do not jump while the program is away.
fn clocks() -> Check {
    let apart = || clock_ns(libc::CLOCK_BOOTTIME) - now();
    let (mut last, mut last_boot, first) = (now(), clock_ns(libc::CLOCK_BOOTTIME), apart());
    check("clocks", move |_| {
        let (this, boot) = (now(), clock_ns(libc::CLOCK_BOOTTIME));
        if this < last || boot < last_boot {
            fail("a clock went backwards");
        }
        if this - last > 30_000_000_000 {
            fail(&format!("CLOCK_MONOTONIC jumped by {} ns", this - last));
        }
        if (apart() - first).abs() > 1_000_000_000 {
            fail("CLOCK_BOOTTIME and CLOCK_MONOTONIC ran apart");
        }
        (last, last_boot) = (this, boot);
    })
}
