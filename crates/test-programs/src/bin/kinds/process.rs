//! What belongs to a process as a whole, its children and its relation to others.

use crate::{Absent, Check, Kind, look, must, offered, same};
use outlive_test_programs::{await_signal, block, now, timespec};
use std::path::Path;

pub(crate) const KINDS: &[Kind] = &[
    ("nothing", |_| look(|| ())),
    ("working-directory", working_directory),
    ("working-directory-deleted", working_directory_deleted),
    ("root-directory", root_directory),
    ("file-mode-mask", file_mode_mask),
    ("session-of-its-own", session),
    ("child-waiting", child_waiting),
    ("child-zombie", child_zombie),
    ("child-stopped", child_stopped),
    ("child-without-signal", child_without_signal),
    ("child-of-vfork", child_of_vfork),
    ("child-traced", child_traced),
    ("grandchild-orphaned", grandchild_orphaned),
    ("leading-thread-ended", leading_thread_ended),
    ("interval-timer-real", |_| interval_timer(libc::ITIMER_REAL)),
    ("interval-timer-virtual", |_| {
        interval_timer(libc::ITIMER_VIRTUAL)
    }),
    ("interval-timer-profiling", |_| {
        interval_timer(libc::ITIMER_PROF)
    }),
    ("posix-timer-signal", posix_timer_signal),
    ("posix-timer-thread", posix_timer_thread),
    ("posix-timer-silent", posix_timer_silent),
    ("posix-timer-of-ended-thread", posix_timer_of_ended),
    ("posix-timer-of-a-thread", |_| {
        let id = posix_timer(libc::CLOCK_THREAD_CPUTIME_ID, libc::SIGEV_NONE, 0, 0)?;
        arm(id, &value(LONG, 2 * LONG));
        look(move || must_run(id))
    }),
    ("posix-timer-processor", posix_timer_processor),
    ("signal-handlers", signal_handlers),
    ("signals-pending", signals_pending),
    ("signals-queued", signals_queued),
    ("alternate-stack", alternate_stack),
    ("capabilities-dropped", capabilities_dropped),
    ("user-changed", user_changed),
    ("groups-changed", groups_changed),
    ("name-changed", name_changed),
    ("title-changed", title_changed),
];

/// Waits for a child: its exit status, or the negative number of the signal that ended it.
pub(crate) fn ended(child: i32) -> i32 {
    let mut status = 0;
    // SAFETY: the status is live.
    must("waitpid", unsafe {
        libc::waitpid(child, &raw mut status, 0)
    });
    if libc::WIFEXITED(status) {
        libc::WEXITSTATUS(status)
    } else {
        -libc::WTERMSIG(status)
    }
}

/// A child that waits for ever.
pub(crate) fn waiting_child() -> i32 {
    child(|| {
        loop {
            // SAFETY: takes no argument.
            unsafe { libc::pause() };
        }
    })
}

/// A child that does this and leaves.
fn child(work: impl FnOnce()) -> i32 {
    // SAFETY: the program has one thread, so the child may do anything.
    let child = must("fork", unsafe { libc::fork() }) as i32;
    if child == 0 {
        work();
        // SAFETY: does not return.
        unsafe { libc::_exit(0) }
    }
    child
}

/// A child that has ended and was not waited for.
pub(crate) fn zombie(status: i32) -> i32 {
    // SAFETY: does not return; the information is live.
    unsafe {
        let child = child(|| libc::_exit(status));
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let how = libc::WEXITED | libc::WNOWAIT;
        must(
            "waitid",
            libc::waitid(libc::P_PID, child as u32, &raw mut info, how),
        );
        child
    }
}

fn here() -> std::path::PathBuf {
    std::env::current_dir().unwrap_or_default()
}

fn working_directory(dir: &Path) -> Result<Check, Absent> {
    let path = dir.join("inner");
    let _ = std::fs::create_dir(&path);
    must(
        "chdir",
        -i64::from(std::env::set_current_dir(&path).is_err()),
    );
    look(move || same("the directory", here(), path))
}

fn working_directory_deleted(dir: &Path) -> Result<Check, Absent> {
    let path = dir.join("inner");
    let _ = std::fs::create_dir(&path);
    must(
        "chdir",
        -i64::from(std::env::set_current_dir(&path).is_err()),
    );
    must("rmdir", -i64::from(std::fs::remove_dir(&path).is_err()));
    look(|| same("that it is gone", std::env::current_dir().is_err(), true))
}

fn root_directory(_: &Path) -> Result<Check, Absent> {
    // SAFETY: the path is a literal.
    offered("chroot", unsafe { libc::chroot(c"/tmp".as_ptr()) }.into())?;
    look(|| {
        same(
            "that the root is another",
            Path::new("/proc/self").exists(),
            false,
        )
    })
}

fn file_mode_mask(_: &Path) -> Result<Check, Absent> {
    // SAFETY: only numbers are passed.
    unsafe { libc::umask(0o137) };
    // SAFETY: as above.
    look(|| same("the mask", unsafe { libc::umask(0) }, 0o137))
}

fn session(_: &Path) -> Result<Check, Absent> {
    let child = child(|| {
        // SAFETY: take no pointers.
        unsafe {
            must("setsid", libc::setsid());
            loop {
                libc::pause();
            }
        }
    });
    // SAFETY: only numbers are passed.
    let own = move || unsafe { (libc::getsid(child), libc::getpgid(child)) };
    while own().0 != child {}
    look(move || {
        same("session and group", own(), (child, child));
        end(child);
    })
}

/// Ends a child.
pub(crate) fn end(child: i32) {
    // SAFETY: only numbers are passed.
    must("kill", unsafe { libc::kill(child, libc::SIGKILL) });
    same("how it ended", ended(child), -libc::SIGKILL);
}

fn child_waiting(_: &Path) -> Result<Check, Absent> {
    let child = waiting_child();
    look(move || end(child))
}

fn child_zombie(_: &Path) -> Result<Check, Absent> {
    let child = zombie(77);
    look(move || same("its status", ended(child), 77))
}

fn child_stopped(_: &Path) -> Result<Check, Absent> {
    let child = waiting_child();
    let mut status = 0;
    // SAFETY: the status is live.
    unsafe {
        must("kill", libc::kill(child, libc::SIGSTOP));
        must(
            "waitpid",
            libc::waitpid(child, &raw mut status, libc::WUNTRACED),
        );
    }
    look(move || {
        let state = std::fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
        same("that it stands", state.contains(") T "), true);
        end(child);
    })
}

static SHARED: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);

extern "C" fn waits(_: *mut libc::c_void) -> i32 {
    loop {
        // SAFETY: takes no argument.
        unsafe { libc::pause() };
    }
}

fn child_without_signal(_: &Path) -> Result<Check, Absent> {
    // SAFETY: only numbers are passed: fork, but its end is told to nobody.
    let child = unsafe { libc::syscall(libc::SYS_clone, 0, 0, 0, 0, 0) };
    if child == 0 {
        waits(std::ptr::null_mut());
    }
    let child = offered("clone", child)? as i32;
    look(move || {
        let mut status = 0;
        // SAFETY: the status is live.
        unsafe {
            must("kill", libc::kill(child, libc::SIGKILL));
            same(
                "waiting without __WALL",
                libc::waitpid(child, &raw mut status, 0),
                -1,
            );
            must(
                "waitpid",
                libc::waitpid(child, &raw mut status, libc::__WALL),
            );
        }
    })
}

fn child_of_vfork(_: &Path) -> Result<Check, Absent> {
    let helper = child(|| {
        // A parent that sleeps until its child executes or ends, which it does not.
        // SAFETY: only numbers are passed; the child touches no memory.
        unsafe {
            let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
            let _ = libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0);
            loop {
                libc::syscall(libc::SYS_pause);
            }
        }
    });
    let children = format!("/proc/{helper}/task/{helper}/children");
    let begun = now();
    while std::fs::read_to_string(&children)
        .unwrap_or_default()
        .is_empty()
    {
        if now() - begun > 10_000_000_000 {
            return Err(Absent("the child does not appear".into()));
        }
    }
    look(move || {
        let child = std::fs::read_to_string(&children).unwrap_or_default();
        let child: i32 = child.trim().parse().unwrap_or(-1);
        // SAFETY: only numbers are passed.
        must("kill", unsafe { libc::kill(child, libc::SIGKILL) });
        end(helper);
    })
}

fn child_traced(_: &Path) -> Result<Check, Absent> {
    let child = waiting_child();
    let mut status = 0;
    // SAFETY: the status is live; the rest are numbers.
    unsafe {
        must(
            "PTRACE_ATTACH",
            libc::ptrace(libc::PTRACE_ATTACH, child, 0, 0),
        );
        must(
            "waitpid",
            libc::waitpid(child, &raw mut status, libc::__WALL),
        );
    }
    look(move || {
        // SAFETY: only numbers are passed.
        must("PTRACE_DETACH", unsafe {
            libc::ptrace(libc::PTRACE_DETACH, child, 0, 0)
        });
        end(child);
    })
}

fn grandchild_orphaned(_: &Path) -> Result<Check, Absent> {
    // SAFETY: only numbers are passed.
    must("subreaper", unsafe {
        libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1)
    });
    let first = child(|| {
        waiting_child();
    });
    same("the child", ended(first), 0);
    let me = std::process::id();
    let children = move || {
        let text = std::fs::read_to_string(format!("/proc/{me}/task/{me}/children"));
        text.unwrap_or_default().trim().parse::<i32>().unwrap_or(-1)
    };
    let orphan = children();
    must("the orphan", orphan);
    look(move || {
        same("the orphan", children(), orphan);
        end(orphan);
    })
}

fn leading_thread_ended(_: &Path) -> Result<Check, Absent> {
    let child = child(|| {
        std::thread::spawn(|| waits(std::ptr::null_mut()));
        // SAFETY: ends this thread alone.
        unsafe { libc::syscall(libc::SYS_exit, 0) };
    });
    let state = format!("/proc/{child}/stat");
    while !std::fs::read_to_string(&state)
        .unwrap_or_default()
        .contains(") Z ")
    {}
    look(move || {
        let dir = std::fs::read_dir(format!("/proc/{child}/task"));
        same("its threads", dir.map(Iterator::count).ok(), Some(2));
        end(child);
    })
}

fn value(ns: i64, interval: i64) -> libc::itimerspec {
    libc::itimerspec {
        it_interval: timespec(interval),
        it_value: timespec(ns),
    }
}

const LONG: i64 = 3_000_000_000_000;

fn interval_timer(which: i32) -> Result<Check, Absent> {
    let mut timer = libc::itimerval {
        it_interval: libc::timeval {
            tv_sec: 5000,
            tv_usec: 7,
        },
        it_value: libc::timeval {
            tv_sec: 4000,
            tv_usec: 0,
        },
    };
    // SAFETY: the value is live.
    must("setitimer", unsafe {
        libc::setitimer(which as _, &raw const timer, std::ptr::null_mut())
    });
    look(move || {
        // SAFETY: the value is live.
        must("getitimer", unsafe {
            libc::getitimer(which as _, &raw mut timer)
        });
        same(
            "the interval",
            (timer.it_interval.tv_sec, timer.it_interval.tv_usec / 4000),
            (5000, 0),
        );
        same(
            "what is left",
            (3900..=4000).contains(&timer.it_value.tv_sec),
            true,
        );
    })
}

fn posix_timer(clock: i32, notify: i32, signal: i32, thread: i32) -> Result<i32, Absent> {
    let mut id = 0i32;
    // SAFETY: event and number are live; this is the kernel's call, whose timers are numbers.
    unsafe {
        let mut event: libc::sigevent = std::mem::zeroed();
        (event.sigev_notify, event.sigev_signo) = (notify, signal);
        event.sigev_notify_thread_id = thread;
        event.sigev_value.sival_ptr = 0x1234 as *mut _;
        let r = libc::syscall(libc::SYS_timer_create, clock, &raw mut event, &raw mut id);
        offered("timer_create", r)?;
    }
    Ok(id)
}

fn arm(id: i32, value: &libc::itimerspec) {
    let none = std::ptr::null_mut::<libc::itimerspec>();
    // SAFETY: the value is live.
    must("timer_settime", unsafe {
        libc::syscall(libc::SYS_timer_settime, id, 0, value, none)
    });
}

fn left(id: i32) -> (i64, i64) {
    let mut now = value(0, 0);
    // SAFETY: the value is live.
    must("timer_gettime", unsafe {
        libc::syscall(libc::SYS_timer_gettime, id, &raw mut now)
    });
    (now.it_value.tv_sec, now.it_interval.tv_sec)
}

fn must_run(id: i32) {
    let (left, interval) = left(id);
    same("the interval", interval, 6000);
    same("what is left", (2900..=3000).contains(&left), true);
}

fn posix_timer_signal(_: &Path) -> Result<Check, Absent> {
    let given_back = posix_timer(libc::CLOCK_REALTIME, libc::SIGEV_NONE, 0, 0)?;
    let id = posix_timer(libc::CLOCK_MONOTONIC, libc::SIGEV_SIGNAL, libc::SIGUSR2, 0)?;
    // SAFETY: only numbers are passed: the numbers have a gap then.
    must("timer_delete", unsafe {
        libc::syscall(libc::SYS_timer_delete, given_back)
    });
    arm(id, &value(LONG, 2 * LONG));
    look(move || {
        must_run(id);
        arm(id, &value(1_000_000, 0));
        await_signal(libc::SIGUSR2);
    })
}

fn posix_timer_thread(_: &Path) -> Result<Check, Absent> {
    // SAFETY: takes no argument.
    let me = unsafe { libc::gettid() };
    let id = posix_timer(
        libc::CLOCK_BOOTTIME,
        libc::SIGEV_THREAD_ID,
        libc::SIGUSR2,
        me,
    )?;
    arm(id, &value(LONG, 2 * LONG));
    look(move || {
        must_run(id);
        arm(id, &value(1_000_000, 0));
        await_signal(libc::SIGUSR2);
    })
}

fn posix_timer_of_ended(_: &Path) -> Result<Check, Absent> {
    let thread = std::thread::spawn(|| {
        // SAFETY: takes no argument.
        let me = unsafe { libc::gettid() };
        posix_timer(
            libc::CLOCK_MONOTONIC,
            libc::SIGEV_THREAD_ID,
            libc::SIGUSR2,
            me,
        )
    });
    let id = thread
        .join()
        .unwrap_or_else(|_| Err(Absent("no thread".into())))?;
    arm(id, &value(LONG, 2 * LONG));
    look(move || must_run(id))
}

fn posix_timer_silent(_: &Path) -> Result<Check, Absent> {
    let id = posix_timer(libc::CLOCK_REALTIME, libc::SIGEV_NONE, 0, 0)?;
    arm(id, &value(LONG, 2 * LONG));
    look(move || must_run(id))
}

fn posix_timer_processor(_: &Path) -> Result<Check, Absent> {
    let id = posix_timer(
        libc::CLOCK_PROCESS_CPUTIME_ID,
        libc::SIGEV_SIGNAL,
        libc::SIGUSR2,
        0,
    )?;
    arm(id, &value(LONG, 2 * LONG));
    look(move || must_run(id))
}

extern "C" fn handler(_: i32) {
    SHARED.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
}

fn signal_handlers(_: &Path) -> Result<Check, Absent> {
    // SAFETY: the handler only counts; the structures are live.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as extern "C" fn(i32) as usize;
        action.sa_flags = libc::SA_RESTART | libc::SA_NODEFER;
        libc::sigaddset(&raw mut action.sa_mask, libc::SIGTERM);
        must(
            "sigaction",
            libc::sigaction(libc::SIGHUP, &raw const action, std::ptr::null_mut()),
        );
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
        look(|| {
            must("raise", libc::raise(libc::SIGHUP));
            must("raise", libc::raise(libc::SIGPIPE));
            same("calls", SHARED.load(std::sync::atomic::Ordering::SeqCst), 1);
            let mut now: libc::sigaction = std::mem::zeroed();
            must(
                "sigaction",
                libc::sigaction(libc::SIGHUP, std::ptr::null(), &raw mut now),
            );
            same(
                "the mask",
                libc::sigismember(&raw const now.sa_mask, libc::SIGTERM),
                1,
            );
        })
    }
}

fn signals_pending(_: &Path) -> Result<Check, Absent> {
    block(&[libc::SIGHUP, libc::SIGTERM]);
    // SAFETY: only numbers are passed.
    unsafe {
        must("kill", libc::kill(libc::getpid(), libc::SIGHUP));
        must(
            "tgkill",
            libc::syscall(
                libc::SYS_tgkill,
                libc::getpid(),
                libc::gettid(),
                libc::SIGTERM,
            ),
        );
    }
    look(|| {
        await_signal(libc::SIGHUP);
        await_signal(libc::SIGTERM);
    })
}

fn signals_queued(_: &Path) -> Result<Check, Absent> {
    let signal = libc::SIGRTMIN() + 3;
    block(&[signal]);
    // SAFETY: only numbers are passed.
    unsafe {
        for n in 1..=3 {
            let value = libc::sigval {
                sival_ptr: (n * 11) as *mut _,
            };
            must("sigqueue", libc::sigqueue(libc::getpid(), signal, value));
        }
        look(move || {
            let set = outlive_test_programs::signals(&[signal]);
            for n in 1..=3usize {
                let mut info: libc::siginfo_t = std::mem::zeroed();
                let none = std::ptr::null::<libc::timespec>();
                let r = libc::syscall(
                    libc::SYS_rt_sigtimedwait,
                    &raw const set,
                    &raw mut info,
                    none,
                    8,
                );
                same("the signal", r, signal.into());
                same("its value", info.si_value().sival_ptr as usize, n * 11);
                same("its sender", info.si_pid(), libc::getpid());
            }
        })
    }
}

fn alternate_stack(_: &Path) -> Result<Check, Absent> {
    let room = vec![0u8; 64 << 10].leak();
    let stack = libc::stack_t {
        ss_sp: room.as_mut_ptr().cast(),
        ss_flags: 0,
        ss_size: room.len(),
    };
    // SAFETY: the stack is live for ever.
    must("sigaltstack", unsafe {
        libc::sigaltstack(&raw const stack, std::ptr::null_mut())
    });
    let wanted = (stack.ss_sp as usize, stack.ss_size);
    look(move || {
        let mut now = libc::stack_t {
            ss_sp: std::ptr::null_mut(),
            ss_flags: 0,
            ss_size: 0,
        };
        // SAFETY: the structure is live.
        must("sigaltstack", unsafe {
            libc::sigaltstack(std::ptr::null(), &raw mut now)
        });
        same("the stack", (now.ss_sp as usize, now.ss_size), wanted);
    })
}

fn capabilities_dropped(_: &Path) -> Result<Check, Absent> {
    let header = [0x2008_0522u32, 0];
    let read = move || {
        let mut sets = [0u32; 6];
        // SAFETY: header and sets are live.
        must("capget", unsafe {
            libc::syscall(libc::SYS_capget, header.as_ptr(), sets.as_mut_ptr())
        });
        sets
    };
    let mut sets = read();
    // CAP_NET_RAW and CAP_SYS_TIME leave the effective set, the latter also the permitted one.
    sets[0] &= !(1 << 13 | 1 << 25);
    sets[1] &= !(1 << 25);
    // SAFETY: header and sets are live.
    offered("capset", unsafe {
        libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr())
    })?;
    look(move || same("the sets", read(), sets))
}

fn user_changed(_: &Path) -> Result<Check, Absent> {
    // SAFETY: only numbers are passed.
    unsafe {
        offered("setresgid", libc::setresgid(1234, 1235, 1236).into())?;
        offered("setresuid", libc::setresuid(1234, 1234, 1236).into())?;
    }
    look(|| {
        let (mut real, mut effective, mut saved) = (0, 0, 0);
        // SAFETY: the numbers are live.
        must("getresuid", unsafe {
            libc::getresuid(&raw mut real, &raw mut effective, &raw mut saved)
        });
        same("the users", (real, effective, saved), (1234, 1234, 1236));
    })
}

fn groups_changed(_: &Path) -> Result<Check, Absent> {
    let groups = [5u32, 777, 31];
    offered(
        "setgroups",
        // SAFETY: the list is live and as long as is said.
        unsafe { libc::setgroups(3, groups.as_ptr()) }.into(),
    )?;
    look(|| {
        let mut now = [0u32; 8];
        // SAFETY: as above.
        same(
            "their number",
            unsafe { libc::getgroups(8, now.as_mut_ptr()) },
            3,
        );
        now[..3].sort_unstable();
        same("the groups", &now[..3], &[5, 31, 777]);
    })
}

fn name_changed(_: &Path) -> Result<Check, Absent> {
    let name = || std::fs::read_to_string("/proc/self/comm").unwrap_or_default();
    // SAFETY: the name is a literal.
    must("PR_SET_NAME", unsafe {
        libc::prctl(libc::PR_SET_NAME, c"other".as_ptr())
    });
    look(move || same("the name", name(), "other\n".to_owned()))
}

fn title_changed(_: &Path) -> Result<Check, Absent> {
    const ARG_START: i32 = 8;
    const ARG_END: i32 = 9;
    static TITLE: &[u8] = b"a title of its own\0";
    let at = TITLE.as_ptr() as usize;
    // SAFETY: the text lives for ever.
    let r = unsafe {
        libc::prctl(libc::PR_SET_MM, ARG_END, at + TITLE.len(), 0, 0).min(libc::prctl(
            libc::PR_SET_MM,
            ARG_START,
            at,
            0,
            0,
        ))
    };
    offered("PR_SET_MM", r.into())?;
    look(|| {
        same(
            "the title",
            std::fs::read("/proc/self/cmdline").ok(),
            Some(TITLE.to_vec()),
        )
    })
}
