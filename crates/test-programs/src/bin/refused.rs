//! Holds one piece of state of the kind named by its argument, and waits: `refused KIND [later]`,
//! where `later` means on SIGUSR2, so that a tracker is there already. For the tests which show
//! that what cannot be saved is refused by name and left unharmed.
//!
//! # Safety
//! Plain C library calls with numbers, literals and live local values.
#![allow(unsafe_code)]

use outlive_test_programs::{await_report_order, await_signal, block, fail, good, say};

fn main() {
    block(&[libc::SIGUSR1, libc::SIGUSR2]);
    let kind = std::env::args().nth(1).unwrap_or_default();
    for _ in 0..3 {
        std::thread::spawn(|| {
            loop {
                std::thread::park();
            }
        });
    }
    if std::env::args().nth(2).as_deref() == Some("later") {
        say("ready");
        await_signal(libc::SIGUSR2);
        hold(&kind);
        say("held");
    } else {
        hold(&kind);
        say("ready");
    }
    await_report_order();
    say("unharmed");
}

/// A process with something of ours that is not a thread: a child, or a sibling.
fn share(flags: i32) {
    extern "C" fn wait(_: *mut libc::c_void) -> libc::c_int {
        // SAFETY: numbers only.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            loop {
                libc::pause();
            }
        }
    }
    let stack: &mut [u128] = Box::leak(vec![0; 4096].into());
    // SAFETY: the stack is nobody else's, for ever; the process only waits.
    let pid = unsafe {
        let top = stack.as_mut_ptr_range().end.cast();
        libc::clone(wait, top, flags | libc::SIGCHLD, std::ptr::null_mut())
    };
    let _ = good("clone", pid.into());
}

/// A grandchild that nobody waits for has all our memory, until we are gone.
fn give_away() {
    let me = std::process::id() as i32;
    // SAFETY: numbers only; the children make system calls only.
    unsafe {
        let child = libc::fork();
        if child == 0 {
            if libc::fork() == 0 {
                while libc::kill(me, 0) == 0 {
                    libc::usleep(10_000);
                }
            }
            libc::_exit(0);
        }
        let _ = good("fork", child.into());
        let waited = libc::waitpid(child, std::ptr::null_mut(), 0);
        let _ = good("waitpid", waited.into());
    }
}

fn hold(kind: &str) {
    let page = 4096;
    // SAFETY: see the module heading; what is made is never accessed.
    unsafe {
        match kind {
            "timer-of-some-thread" => {
                let mut timer: libc::timer_t = std::mem::zeroed();
                let mut event: libc::sigevent = std::mem::zeroed();
                event.sigev_notify = libc::SIGEV_NONE;
                let clock = libc::CLOCK_THREAD_CPUTIME_ID;
                let r = libc::timer_create(clock, &raw mut event, &raw mut timer);
                let _ = good("timer_create", r.into());
            }
            "foreign-memory" => {
                let id = good(
                    "shmget",
                    libc::shmget(libc::IPC_PRIVATE, page, 0o600).into(),
                );
                let at = libc::shmat(id as i32, std::ptr::null(), 0);
                let _ = good("shmat", at as i64);
                let gone = libc::shmctl(id as i32, libc::IPC_RMID, std::ptr::null_mut());
                let _ = good("shmctl", gone.into());
                give_away();
            }
            "shared-descriptors" => share(libc::CLONE_FILES),
            "shared-directory" => share(libc::CLONE_FS),
            "shared-memory" => share(libc::CLONE_VM),
            "netlink" => {
                let fd = libc::socket(libc::AF_NETLINK, libc::SOCK_RAW, 0);
                let _ = good("socket", fd.into());
            }
            "stranger-owns" => {
                let mut ends = [0; 2];
                let _ = good("pipe", libc::pipe(ends.as_mut_ptr()).into());
                let r = libc::fcntl(ends[0], libc::F_SETOWN, libc::getppid());
                let _ = good("F_SETOWN", r.into());
            }
            "io-uring" => {
                let mut parameters = [0u32; 30];
                let r = libc::syscall(libc::SYS_io_uring_setup, 4, parameters.as_mut_ptr());
                let _ = good("io_uring_setup", r);
            }
            "seccomp" => {
                let allow = [libc::sock_filter {
                    code: 6,
                    jt: 0,
                    jf: 0,
                    k: 0x7fff_0000,
                }];
                let program = libc::sock_fprog {
                    len: 1,
                    filter: allow.as_ptr().cast_mut(),
                };
                let _ = good(
                    "no_new_privs",
                    libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).into(),
                );
                let mode = libc::SECCOMP_MODE_FILTER;
                let r = libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program);
                let _ = good("seccomp", r.into());
            }
            "nothing" => {}
            _ => fail("usage: refused KIND"),
        }
    }
}
