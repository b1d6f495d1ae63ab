//! Limits, scheduling, and the switches of `prctl` and its like.

use crate::{Absent, Check, Kind, look, must, offered, same};
use std::path::Path;

pub(crate) const KINDS: &[Kind] = &[
    ("limits", limits),
    ("nice", nice),
    ("scheduling-batch", |_| scheduling(libc::SCHED_BATCH, 0)),
    ("scheduling-idle", |_| scheduling(libc::SCHED_IDLE, 0)),
    ("scheduling-fifo", |_| scheduling(libc::SCHED_FIFO, 3)),
    ("scheduling-round-robin", |_| {
        scheduling(libc::SCHED_RR | libc::SCHED_RESET_ON_FORK, 4)
    }),
    ("scheduling-deadline", deadline),
    ("processors-allowed", processors),
    ("input-output-priority", io_priority),
    ("timer-slack", |_| {
        switch(libc::PR_SET_TIMERSLACK, 77_777, libc::PR_GET_TIMERSLACK)
    }),
    ("keep-capabilities", |_| {
        switch(libc::PR_SET_KEEPCAPS, 1, libc::PR_GET_KEEPCAPS)
    }),
    ("secure-bits", |_| {
        switch(libc::PR_SET_SECUREBITS, 0x5, libc::PR_GET_SECUREBITS)
    }),
    ("no-new-privileges", |_| {
        switch(libc::PR_SET_NO_NEW_PRIVS, 1, libc::PR_GET_NO_NEW_PRIVS)
    }),
    ("not-dumpable", |_| {
        switch(libc::PR_SET_DUMPABLE, 0, libc::PR_GET_DUMPABLE)
    }),
    ("parent-death-signal", |_| {
        switch_out(libc::PR_SET_PDEATHSIG, 30, libc::PR_GET_PDEATHSIG)
    }),
    ("child-subreaper", |_| {
        switch_out(
            libc::PR_SET_CHILD_SUBREAPER,
            1,
            libc::PR_GET_CHILD_SUBREAPER,
        )
    }),
    ("no-huge-pages", |_| {
        switch(libc::PR_SET_THP_DISABLE, 1, libc::PR_GET_THP_DISABLE)
    }),
    ("machine-check-policy", machine_check),
    ("time-stamp-counter-off", |_| {
        switch_out(
            libc::PR_SET_TSC,
            libc::PR_TSC_SIGSEGV as u64,
            libc::PR_GET_TSC,
        )
    }),
    ("memory-merging", |_| switch(67, 1, 68)),
    ("write-or-execute", |_| switch(65, 1, 66)),
    ("input-output-flusher", |_| switch(57, 1, 58)),
    ("speculation", speculation),
    ("core-scheduling", core_scheduling),
    ("personality", personality),
    ("processor-id-faulting", |_| arch(0x1012, 0, 0x1011)),
    ("thread-pointer-gs", |_| {
        arch_out(0x1001, 0x7777_0000, 0x1004)
    }),
    ("port-permissions", port_permissions),
    ("local-descriptor-table", local_descriptor_table),
    ("thread-local-segment", thread_local_segment),
    ("system-call-dispatch", dispatch),
    ("system-call-filter", filter),
    ("system-call-filter-strict", strict),
    ("landlock-restricted", landlock),
    ("landlock-restricted-user", landlock_of_user),
    ("landlock-restricted-capabilities", landlock_of_weaker),
    ("landlock-restricted-thread", landlock_of_thread),
    ("membarrier", membarrier),
    ("out-of-memory-score", |_| {
        written("/proc/self/oom_score_adj", "345\n")
    }),
    ("core-dump-filter", |_| {
        written("/proc/self/coredump_filter", "00000073\n")
    }),
    ("scheduling-group", |_| {
        // That of the session, which is to be no other's.
        // SAFETY: takes no argument.
        offered("setsid", unsafe { libc::setsid() }.into())?;
        written("/proc/self/autogroup", "nice 7")
    }),
    ("mount-namespace", |_| unshared(libc::CLONE_NEWNS)),
    ("network-namespace", |_| unshared(libc::CLONE_NEWNET)),
    ("host-name-namespace", |_| unshared(libc::CLONE_NEWUTS)),
    ("ipc-namespace", |_| unshared(libc::CLONE_NEWIPC)),
    ("user-namespace", |_| unshared(libc::CLONE_NEWUSER)),
    ("process-namespace-of-children", |_| {
        unshared(libc::CLONE_NEWPID)
    }),
    ("control-group-namespace", |_| {
        unshared(libc::CLONE_NEWCGROUP)
    }),
    ("time-namespace-of-children", |_| {
        unshared(libc::CLONE_NEWTIME)
    }),
];

fn limits(_: &Path) -> Result<Check, Absent> {
    let get = |what| {
        let mut limit = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: the limit is live.
        must("getrlimit", unsafe {
            libc::getrlimit(what, &raw mut limit)
        });
        (limit.rlim_cur, limit.rlim_max)
    };
    let list = [
        (libc::RLIMIT_NOFILE, 333),
        (libc::RLIMIT_CORE, 0),
        (libc::RLIMIT_STACK, 7 << 20),
    ];
    for (what, soft) in list {
        let limit = libc::rlimit {
            rlim_cur: soft,
            rlim_max: get(what).1,
        };
        // SAFETY: the limit is live.
        must("setrlimit", unsafe {
            libc::setrlimit(what, &raw const limit)
        });
    }
    let before = list.map(|(what, _)| get(what));
    look(move || same("the limits", list.map(|(what, _)| get(what)), before))
}

fn nice(_: &Path) -> Result<Check, Absent> {
    // SAFETY: only numbers are passed.
    must("setpriority", unsafe {
        libc::setpriority(libc::PRIO_PROCESS, 0, 7)
    });
    look(|| {
        same(
            "nice",
            // SAFETY: as above.
            unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) },
            7,
        )
    })
}

fn scheduling(policy: i32, priority: i32) -> Result<Check, Absent> {
    let parameter = libc::sched_param {
        sched_priority: priority,
    };
    // SAFETY: the parameter is live.
    let r = unsafe { libc::sched_setscheduler(0, policy, &raw const parameter) };
    offered("sched_setscheduler", r.into())?;
    look(move || {
        let mut now = libc::sched_param { sched_priority: -1 };
        // SAFETY: the parameter is live.
        unsafe {
            same("the policy", libc::sched_getscheduler(0), policy);
            must("sched_getparam", libc::sched_getparam(0, &raw mut now));
        }
        same("the priority", now.sched_priority, priority);
    })
}

fn attributes() -> [u64; 6] {
    let mut now = [0u64; 6];
    // SAFETY: the structure is live and as long as is said.
    must("sched_getattr", unsafe {
        libc::syscall(libc::SYS_sched_getattr, 0, now.as_mut_ptr(), 48, 0)
    });
    now
}

fn deadline(_: &Path) -> Result<Check, Absent> {
    // size and policy; flags; nice and priority; run time, deadline and period in nanoseconds.
    let wanted = [48 | 6 << 32, 0, 0, 5_000_000, 50_000_000, 50_000_000];
    // SAFETY: the structure is live and as long as it says.
    offered("sched_setattr", unsafe {
        libc::syscall(libc::SYS_sched_setattr, 0, wanted.as_ptr(), 0)
    })?;
    look(move || same("the attributes", attributes(), wanted))
}

fn processors(_: &Path) -> Result<Check, Absent> {
    let set = 1u64;
    // SAFETY: the set is live and as long as is said.
    must("sched_setaffinity", unsafe {
        libc::syscall(libc::SYS_sched_setaffinity, 0, 8, &raw const set)
    });
    look(|| {
        let mut now = [0u64; 128];
        // SAFETY: as above.
        must("sched_getaffinity", unsafe {
            libc::syscall(libc::SYS_sched_getaffinity, 0, 1024, now.as_mut_ptr())
        });
        same("the processors", now[0], 1);
    })
}

fn io_priority(_: &Path) -> Result<Check, Absent> {
    // SAFETY: only numbers are passed: best effort, level 6.
    must("ioprio_set", unsafe {
        libc::syscall(libc::SYS_ioprio_set, 1, 0, 2 << 13 | 6)
    });
    look(|| {
        same(
            "the priority",
            // SAFETY: as above.
            unsafe { libc::syscall(libc::SYS_ioprio_get, 1, 0) },
            2 << 13 | 6,
        )
    })
}

fn prctl(what: i32, value: u64) -> i32 {
    // SAFETY: the callers pass switches that take numbers, or the address of a live number.
    unsafe { libc::prctl(what, value, 0u64, 0u64, 0u64) }
}

/// A switch whose value is the answer.
fn switch(set: i32, value: u64, get: i32) -> Result<Check, Absent> {
    offered("prctl", prctl(set, value).into())?;
    look(move || same("the switch", prctl(get, 0) as u64, value))
}

/// A switch whose value is written to memory.
fn switch_out(set: i32, value: u64, get: i32) -> Result<Check, Absent> {
    offered("prctl", prctl(set, value).into())?;
    look(move || {
        let mut now = 0i32;
        must("prctl", prctl(get, &raw mut now as u64));
        same("the switch", now as u64, value);
    })
}

fn machine_check(_: &Path) -> Result<Check, Absent> {
    offered(
        "PR_MCE_KILL",
        // SAFETY: only numbers are passed: kill at once.
        unsafe { libc::prctl(libc::PR_MCE_KILL, 1u64, 1u64, 0u64, 0u64) }.into(),
    )?;
    look(|| same("the policy", prctl(libc::PR_MCE_KILL_GET, 0), 1))
}

fn speculation(_: &Path) -> Result<Check, Absent> {
    // SAFETY: only numbers are passed: store bypass off.
    let r = unsafe { libc::prctl(libc::PR_SET_SPECULATION_CTRL, 0u64, 4u64, 0u64, 0u64) };
    offered("PR_SET_SPECULATION_CTRL", r.into())?;
    let before = prctl(libc::PR_GET_SPECULATION_CTRL, 0);
    look(move || same("the state", prctl(libc::PR_GET_SPECULATION_CTRL, 0), before))
}

fn core_scheduling(_: &Path) -> Result<Check, Absent> {
    const PR_SCHED_CORE: i32 = 62;
    offered(
        "PR_SCHED_CORE",
        // SAFETY: only numbers are passed: a cookie of its own.
        unsafe { libc::prctl(PR_SCHED_CORE, 1u64, 0u64, 0u64, 0u64) }.into(),
    )?;
    look(|| {
        let mut cookie = 0u64;
        // SAFETY: the cookie is live.
        must("PR_SCHED_CORE", unsafe {
            libc::prctl(PR_SCHED_CORE, 0u64, 0u64, 0u64, &raw mut cookie)
        });
        same("that it has a cookie", cookie != 0, true);
    })
}

fn personality(_: &Path) -> Result<Check, Absent> {
    // SAFETY: only numbers are passed.
    must("personality", unsafe {
        libc::personality(libc::ADDR_NO_RANDOMIZE as u64)
    });
    look(|| {
        same(
            "it",
            // SAFETY: as above.
            unsafe { libc::personality(0xffff_ffff) },
            libc::ADDR_NO_RANDOMIZE,
        )
    })
}

fn arch_prctl(code: i32, value: u64) -> i64 {
    // SAFETY: the callers pass numbers, or the address of a live number.
    unsafe { libc::syscall(libc::SYS_arch_prctl, code, value) }
}

fn arch(set: i32, value: u64, get: i32) -> Result<Check, Absent> {
    offered("arch_prctl", arch_prctl(set, value))?;
    look(move || same("it", arch_prctl(get, 0) as u64, value))
}

fn arch_out(set: i32, value: u64, get: i32) -> Result<Check, Absent> {
    offered("arch_prctl", arch_prctl(set, value))?;
    look(move || {
        let mut now = 0u64;
        must("arch_prctl", arch_prctl(get, &raw mut now as u64));
        same("it", now, value);
    })
}

fn port_permissions(_: &Path) -> Result<Check, Absent> {
    // SAFETY: only numbers are passed: the port of the old debug card.
    offered("ioperm", unsafe { libc::ioperm(0x80, 1, 1) }.into())?;
    look(|| {
        // SAFETY: the port is readable without effect.
        unsafe { std::arch::asm!("in al, dx", out("al") _, in("dx") 0x80u16) };
    })
}

/// struct user_desc: number, base, limit, and flags of a 32-bit data segment.
const SEGMENT: [u32; 4] = [0, 0x1000, 0xfffff, 0x51];

fn local_descriptor_table(_: &Path) -> Result<Check, Absent> {
    // SAFETY: the structure is live and as long as is said.
    offered("modify_ldt", unsafe {
        libc::syscall(libc::SYS_modify_ldt, 1, SEGMENT.as_ptr(), 16)
    })?;
    look(|| {
        let mut table = [0u64; 16];
        // SAFETY: the buffer is live and as long as is said.
        let n = unsafe { libc::syscall(libc::SYS_modify_ldt, 0, table.as_mut_ptr(), 128) };
        same("that there is an entry", n > 0 && table[0] != 0, true);
    })
}

fn thread_local_segment(_: &Path) -> Result<Check, Absent> {
    let mut entry = SEGMENT;
    entry[0] = 12;
    // SAFETY: the structure is live.
    offered("set_thread_area", unsafe {
        libc::syscall(libc::SYS_set_thread_area, entry.as_mut_ptr())
    })?;
    look(|| {
        let mut now = [12u32, 0, 0, 0];
        // SAFETY: the structure is live.
        must("get_thread_area", unsafe {
            libc::syscall(libc::SYS_get_thread_area, now.as_mut_ptr())
        });
        same("its base", now[1], 0x1000);
    })
}

fn dispatch(_: &Path) -> Result<Check, Absent> {
    const PR_SET_SYSCALL_USER_DISPATCH: i32 = 59;
    static SELECTOR: std::sync::atomic::AtomicU8 = std::sync::atomic::AtomicU8::new(0);
    let at = SELECTOR.as_ptr();
    // SAFETY: the selector is live for ever, and allows all.
    let r = unsafe { libc::prctl(PR_SET_SYSCALL_USER_DISPATCH, 1u64, 0u64, 0u64, at) };
    offered("PR_SET_SYSCALL_USER_DISPATCH", r.into())?;
    look(|| {
        // What is dispatched ends in SIGSYS, whose handler leaves.
        extern "C" fn seen(_: i32) {
            SELECTOR.store(0, std::sync::atomic::Ordering::SeqCst);
            outlive_test_programs::say("intact");
            // SAFETY: does not return.
            unsafe { libc::_exit(0) };
        }
        // SAFETY: the handler leaves.
        unsafe {
            libc::signal(libc::SIGSYS, seen as extern "C" fn(i32) as usize);
            SELECTOR.store(1, std::sync::atomic::Ordering::SeqCst);
            libc::getppid();
        }
        SELECTOR.store(0, std::sync::atomic::Ordering::SeqCst);
        outlive_test_programs::fail("calls are not dispatched");
    })
}

fn filter(_: &Path) -> Result<Check, Absent> {
    // getppid answers EXFULL; all else passes.
    static CODE: [libc::sock_filter; 4] = [
        libc::sock_filter {
            code: 0x20,
            jt: 0,
            jf: 0,
            k: 0,
        },
        libc::sock_filter {
            code: 0x15,
            jt: 0,
            jf: 1,
            k: libc::SYS_getppid as u32,
        },
        libc::sock_filter {
            code: 0x06,
            jt: 0,
            jf: 0,
            k: 0x0005_0000 | libc::EXFULL as u32,
        },
        libc::sock_filter {
            code: 0x06,
            jt: 0,
            jf: 0,
            k: 0x7fff_0000,
        },
    ];
    must("PR_SET_NO_NEW_PRIVS", prctl(libc::PR_SET_NO_NEW_PRIVS, 1));
    let program = libc::sock_fprog {
        len: 4,
        filter: CODE.as_ptr().cast_mut(),
    };
    let r = prctl_pointer(
        libc::PR_SET_SECCOMP,
        libc::SECCOMP_MODE_FILTER.into(),
        &raw const program as u64,
    );
    offered("PR_SET_SECCOMP", r.into())?;
    // SAFETY: takes no argument.
    look(|| same("getppid", unsafe { libc::getppid() }, -libc::EXFULL))
}

fn prctl_pointer(what: i32, first: u64, second: u64) -> i32 {
    // SAFETY: the callers pass the address of a live structure.
    unsafe { libc::prctl(what, first, second, 0u64, 0u64) }
}

fn strict(_: &Path) -> Result<Check, Absent> {
    // A thread of its own: what is left to it is read, write and exit.
    let (mut reader, writer) = std::io::pipe().map_err(|e| Absent(e.to_string()))?;
    std::thread::spawn(move || {
        use std::io::Read;
        let mut byte = [0];
        if prctl(libc::PR_SET_SECCOMP, 1) == 0 {
            let _ = reader.read(&mut byte);
        }
        // SAFETY: ends this thread alone.
        unsafe { libc::syscall(libc::SYS_exit, 0) };
    });
    let filtered = || {
        let dir = std::fs::read_dir("/proc/self/task")
            .into_iter()
            .flatten()
            .flatten();
        dir.filter_map(|t| std::fs::read_to_string(t.path().join("status")).ok())
            .any(|s| s.contains("Seccomp:\t1"))
    };
    let begun = outlive_test_programs::now();
    while !filtered() {
        if outlive_test_programs::now() - begun > 5_000_000_000 {
            return Err(Absent("no strict mode".into()));
        }
    }
    look(move || {
        same("that a thread is confined", filtered(), true);
        drop(writer);
    })
}

fn landlock(_: &Path) -> Result<Check, Absent> {
    restrict()?;
    look(|| {
        same(
            "writing",
            std::fs::OpenOptions::new()
                .write(true)
                .open("/dev/null")
                .is_err(),
            true,
        )
    })
}

/// Another user, without capabilities.
fn become_other() -> Result<(), Absent> {
    // SAFETY: only numbers are passed.
    unsafe {
        offered("setresgid", libc::setresgid(65533, 65533, 65533).into())?;
        must("setresuid", libc::setresuid(65534, 65534, 65534));
    }
    Ok(())
}

fn landlock_of_user(path: &Path) -> Result<Check, Absent> {
    become_other()?;
    landlock(path)
}

/// The same user with fewer capabilities.
fn landlock_of_weaker(path: &Path) -> Result<Check, Absent> {
    // SAFETY: header and sets are live and of the kernel's layout.
    unsafe {
        let header = [0x2008_0522u32, 0];
        let sets = [[1u32 << 7, 1 << 7, 0], [0; 3]];
        let set = libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr());
        offered("capset", set)?;
    }
    landlock(path)
}

fn landlock_of_thread(_: &Path) -> Result<Check, Absent> {
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let _ = tell.send(restrict());
        loop {
            std::thread::park();
        }
    });
    told.recv()
        .unwrap_or_else(|e| outlive_test_programs::fail(&e.to_string()))?;
    look(|| ())
}

fn restrict() -> Result<(), Absent> {
    // SAFETY: the structure is live and as long as is said: no file may be written.
    unsafe {
        let handled = 2u64;
        let fd = offered(
            "landlock_create_ruleset",
            libc::syscall(444, &raw const handled, 8, 0),
        )?;
        must("PR_SET_NO_NEW_PRIVS", prctl(libc::PR_SET_NO_NEW_PRIVS, 1));
        offered("landlock_restrict_self", libc::syscall(446, fd, 0))?;
        must("close", libc::close(fd as i32));
    }
    Ok(())
}

fn membarrier(_: &Path) -> Result<Check, Absent> {
    // SAFETY: only numbers are passed: private expedited, registration and use.
    offered("membarrier", unsafe {
        libc::syscall(libc::SYS_membarrier, 16, 0, 0)
    })?;
    look(|| {
        same(
            "using it",
            // SAFETY: as above.
            unsafe { libc::syscall(libc::SYS_membarrier, 8, 0, 0) },
            0,
        )
    })
}

fn written(path: &'static str, wanted: &'static str) -> Result<Check, Absent> {
    let value = wanted.trim().trim_start_matches("nice ");
    let value = if wanted.len() == 9 {
        format!("0x{value}")
    } else {
        value.to_owned()
    };
    std::fs::write(path, value).map_err(|e| Absent(format!("{path}: {e}")))?;
    look(move || {
        let now = std::fs::read_to_string(path).unwrap_or_default();
        same("it", now.contains(wanted), true);
    })
}

fn unshared(flag: i32) -> Result<Check, Absent> {
    let name = match flag {
        libc::CLONE_NEWNS => "mnt",
        libc::CLONE_NEWNET => "net",
        libc::CLONE_NEWUTS => "uts",
        libc::CLONE_NEWIPC => "ipc",
        libc::CLONE_NEWUSER => "user",
        libc::CLONE_NEWPID => "pid_for_children",
        libc::CLONE_NEWCGROUP => "cgroup",
        _ => "time_for_children",
    };
    let parent = std::fs::read_link("/proc/self/ns/".to_owned() + name).ok();
    // SAFETY: only numbers are passed.
    offered("unshare", unsafe { libc::unshare(flag) }.into())?;
    look(move || {
        let now = std::fs::read_link("/proc/self/ns/".to_owned() + name);
        // One that no process lives in yet has no name.
        let other = now.map_or(flag == libc::CLONE_NEWPID, |n| Some(n) != parent);
        same("that it has one of its own", other, true);
    })
}
