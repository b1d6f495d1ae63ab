//! Threads: names, parked ones, alternate stacks in use, a robust mutex that is held, thread-local
//! data, scheduling.
//!
//! # Safety
//! The C library is called as its manual says, with leaked memory that lives for ever.
#![allow(unsafe_code)]

use crate::{Check, check};
use outlive_test_programs::{fail, good, sys};
use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

/// All of them.
pub(crate) fn all() -> Vec<Check> {
    parked();
    vec![alternate_stack(), robust(), local()]
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) {
    let builder = std::thread::Builder::new()
        .name(name.into())
        .stack_size(64 * 1024);
    if builder.spawn(work).is_err() {
        fail("a thread could not be made");
    }
}

/// Threads that sleep for ever, with names and priorities of their own.
fn parked() {
    for n in 0..4 {
        spawn(&format!("parked {n})"), move || {
            // SAFETY: only numbers and a live mask are passed; 0 means the calling thread.
            unsafe {
                libc::setpriority(libc::PRIO_PROCESS, 0, n);
                let only_first = 1u64;
                let mask = &raw const only_first as usize;
                if n == 2 {
                    sys(libc::SYS_sched_setaffinity, [0, 8, mask, 0, 0, 0]);
                    sys(libc::SYS_ioprio_set, [1, 0, 2 << 13 | 6, 0, 0, 0]);
                }
                if n == 3 {
                    let lowest = libc::sched_param { sched_priority: 0 };
                    libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const lowest);
                    libc::prctl(libc::PR_SET_TIMERSLACK, 123_456);
                }
            }
            loop {
                std::thread::park();
            }
        });
    }
}

static DEPTH: AtomicU64 = AtomicU64::new(0);

extern "C" fn on_own_stack(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: ss is live; the handler runs on the alternate stack, so the kernel says so.
    unsafe {
        let mut ss: libc::stack_t = std::mem::zeroed();
        let r = libc::sigaltstack(std::ptr::null(), &raw mut ss);
        let here = &raw const ss as usize;
        let inside = (ss.ss_sp as usize..ss.ss_sp as usize + ss.ss_size).contains(&here);
        if r != 0 || ss.ss_flags & libc::SS_ONSTACK == 0 || !inside || info.is_null() {
            fail("a handler does not run on the alternate stack");
        }
        DEPTH.fetch_add(1, Ordering::SeqCst);
        // Blocked here for most of the time: captured inside a handler.
        let pause = libc::timespec {
            tv_sec: 0,
            tv_nsec: 5_000_000,
        };
        libc::nanosleep(&raw const pause, std::ptr::null_mut());
    }
}

/// A thread that is mostly inside a handler on a stack of its own.
fn alternate_stack() -> Check {
    // SAFETY: an all-zero sigaction is valid; the handler has the form that SA_SIGINFO asks for.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_own_stack as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        action.sa_mask = std::mem::zeroed();
        libc::sigaddset(&raw mut action.sa_mask, libc::SIGWINCH);
        let r = libc::sigaction(libc::SIGUSR2, &raw const action, std::ptr::null_mut());
        let _ = good("sigaction", r.into());
    }
    spawn("handler", || {
        let stack = Box::leak(vec![0u8; 64 * 1024].into_boxed_slice());
        let ss = libc::stack_t {
            ss_sp: stack.as_mut_ptr().cast(),
            ss_flags: 0,
            ss_size: stack.len(),
        };
        // SAFETY: the stack is leaked; the signal is sent to this thread itself.
        unsafe {
            let _ = good(
                "sigaltstack",
                libc::sigaltstack(&raw const ss, std::ptr::null_mut()).into(),
            );
            loop {
                libc::raise(libc::SIGUSR2);
            }
        }
    });
    let mut last = 0;
    check("alternate stack", move |round| {
        if round % 256 == 255 {
            let now = DEPTH.load(Ordering::SeqCst);
            if now <= last {
                fail("the handler's thread stands still");
            }
            last = now;
        }
    })
}

/// A robust mutex whose owner lives: nobody may be told that it died.
fn robust() -> Check {
    // SAFETY: the mutex and its attributes are leaked or live, and initialised before use.
    let mutex = unsafe {
        let mutex: &'static mut libc::pthread_mutex_t = Box::leak(Box::new(std::mem::zeroed()));
        let mut kind: libc::pthread_mutexattr_t = std::mem::zeroed();
        libc::pthread_mutexattr_init(&raw mut kind);
        libc::pthread_mutexattr_setrobust(&raw mut kind, libc::PTHREAD_MUTEX_ROBUST);
        libc::pthread_mutex_init(mutex, &raw const kind);
        &raw mut *mutex as usize
    };
    spawn("owner", move || {
        // SAFETY: initialised above and never freed.
        unsafe { libc::pthread_mutex_lock(mutex as *mut _) };
        loop {
            std::thread::park();
        }
    });
    check("robust mutex", move |round| {
        // The owner has had its time.
        if round > 100 {
            // SAFETY: initialised above and never freed.
            let r = unsafe { libc::pthread_mutex_trylock(mutex as *mut _) };
            if r != libc::EBUSY {
                fail(&format!("a robust mutex that is held gave {r}"));
            }
        }
    })
}

/// Thread-local data, and restartable sequences with it: the kernel tells where we run.
fn local() -> Check {
    thread_local!(static MINE: Cell<u64> = const { Cell::new(0) });
    check("thread-local data", |round| {
        if MINE.replace(round + 1) != round {
            fail("thread-local data was lost");
        }
        // SAFETY: no argument.
        if unsafe { libc::sched_getcpu() } < 0 {
            fail("the kernel does not tell the processor");
        }
    })
}
