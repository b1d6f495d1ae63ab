//! Objects of System V and POSIX that outlive who made them, and asynchronous I/O contexts.

use crate::{Absent, Check, Kind, look, must, offered, same};
use outlive_test_programs::say;
use std::path::Path;

pub(crate) const KINDS: &[Kind] = &[
    ("system-v-memory", |_| memory(false, true)),
    ("system-v-memory-removed", |_| memory(true, true)),
    ("system-v-memory-detached", |_| memory(false, false)),
    ("system-v-memory-of-others", memory_of_others),
    ("system-v-semaphores", semaphores),
    ("system-v-semaphores-undone", undone),
    ("system-v-messages", messages),
    ("system-v-messages-over-capacity", messages_over_capacity),
    ("system-v-messages-awaited", awaited),
    ("system-v-of-a-child", of_a_child),
    ("posix-message-queue", posix_queue),
    ("posix-semaphore-shared", posix_semaphore),
    ("asynchronous-io", aio),
];

const SIZE: usize = 3 * 4096;

fn memory(removed: bool, attached: bool) -> Result<Check, Absent> {
    // SAFETY: the segment is accessed within its size while it is attached.
    unsafe {
        let id = must("shmget", libc::shmget(libc::IPC_PRIVATE, SIZE, 0o640)) as i32;
        // Whoever looks after the tests removes what is named like this.
        say(&format!("shm {id}"));
        let at = libc::shmat(id, std::ptr::null(), 0).cast::<u8>();
        must("shmat", at as i64);
        std::slice::from_raw_parts_mut(at, SIZE).fill(0xa7);
        if removed {
            must(
                "shmctl",
                libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()),
            );
        }
        if !attached {
            must("shmdt", libc::shmdt(at.cast()));
        }
        look(move || {
            let at = if attached {
                at
            } else {
                libc::shmat(id, std::ptr::null(), 0).cast::<u8>()
            };
            must("shmat", at as i64);
            let bytes = std::slice::from_raw_parts(at, SIZE);
            same("the contents", bytes.iter().all(|&b| b == 0xa7), true);
            let mut state: libc::shmid_ds = std::mem::zeroed();
            must("IPC_STAT", libc::shmctl(id, libc::IPC_STAT, &raw mut state));
            same("its mode", state.shm_perm.mode & 0o777, 0o640);
            same("who has it", state.shm_nattch, 1);
        })
    }
}

/// A process that is nobody's in the program has the segment too, until we are gone.
fn memory_of_others(_: &Path) -> Result<Check, Absent> {
    let me = std::process::id() as i32;
    let check = memory(true, true)?;
    // SAFETY: numbers only; the children make system calls only.
    unsafe {
        let child = must("fork", libc::fork()) as i32;
        if child == 0 {
            if libc::fork() == 0 {
                while libc::kill(me, 0) == 0 {
                    libc::usleep(10_000);
                }
            }
            libc::_exit(0);
        }
        must("waitpid", libc::waitpid(child, std::ptr::null_mut(), 0));
    }
    // It is shared on purpose: how many have it is not looked at.
    drop(check);
    look(|| ())
}

fn semaphores(_: &Path) -> Result<Check, Absent> {
    // SAFETY: only numbers are passed.
    unsafe {
        let id = must("semget", libc::semget(libc::IPC_PRIVATE, 2, 0o600)) as i32;
        say(&format!("sem {id}"));
        must("SETVAL", libc::semctl(id, 1, libc::SETVAL, 41));
        let mut up = libc::sembuf {
            sem_num: 1,
            sem_op: 1,
            sem_flg: 0,
        };
        must("semop", libc::semop(id, &raw mut up, 1));
        look(move || same("its value", libc::semctl(id, 1, libc::GETVAL), 42))
    }
}

/// A child's operations are undone when it ends: one took away, one added, one did both.
fn undone(_: &Path) -> Result<Check, Absent> {
    const BEFORE: [i32; 4] = [1, 5, 32_767, 9];
    const CHANGES: [i16; 4] = [-1, 2, -30_000, 0];
    // SAFETY: only numbers and live operations are passed; the child makes system calls only.
    unsafe {
        let id = must("semget", libc::semget(libc::IPC_PRIVATE, 4, 0o600)) as i32;
        say(&format!("sem {id}"));
        let values = move || [0, 1, 2, 3].map(|n| libc::semctl(id, n, libc::GETVAL));
        for (n, value) in (0..).zip(BEFORE) {
            must("SETVAL", libc::semctl(id, n, libc::SETVAL, value));
        }
        let child = must("fork", libc::fork()) as i32;
        if child == 0 {
            for (n, change) in (0..).zip(CHANGES) {
                for sem_op in if change == 0 { [7, -7] } else { [change, 0] } {
                    let mut one = libc::sembuf {
                        sem_num: n,
                        sem_op,
                        sem_flg: libc::SEM_UNDO as i16,
                    };
                    if sem_op != 0 && libc::semop(id, &raw mut one, 1) != 0 {
                        libc::_exit(1);
                    }
                }
            }
            libc::semctl(id, 3, libc::SETVAL, 10);
            loop {
                libc::pause();
            }
        }
        let after = [0, 7, 2767, 10];
        while values() != after {
            std::thread::yield_now();
        }
        look(move || {
            same("the values", values(), after);
            let last = [0, 1, 2, 3].map(|n| libc::semctl(id, n, libc::GETPID));
            same("who changed them last", last, [child; 4]);
            crate::process::end(child);
            same("the values in the end", values(), [1, 5, 32_767, 10]);
        })
    }
}

fn messages(_: &Path) -> Result<Check, Absent> {
    // SAFETY: the messages are live, and their type is followed by as many bytes as is said.
    unsafe {
        let id = must("msgget", libc::msgget(libc::IPC_PRIVATE, 0o600)) as i32;
        say(&format!("msg {id}"));
        let message: [i64; 2] = [3, 0x0102_0304];
        must("msgsnd", libc::msgsnd(id, message.as_ptr().cast(), 8, 0));
        look(move || {
            let mut got = [0i64; 2];
            let n = libc::msgrcv(id, got.as_mut_ptr().cast(), 8, 0, libc::IPC_NOWAIT);
            same("its length", n, 8);
            same("the message", got, [3, 0x0102_0304]);
        })
    }
}

/// A queue whose capacity was lowered below what it holds.
fn messages_over_capacity(_: &Path) -> Result<Check, Absent> {
    // SAFETY: the messages and the state are live, and messages as long as is said.
    unsafe {
        let id = must("msgget", libc::msgget(libc::IPC_PRIVATE, 0o600)) as i32;
        say(&format!("msg {id}"));
        let message = [5i64; 65];
        must("msgsnd", libc::msgsnd(id, message.as_ptr().cast(), 512, 0));
        must("msgsnd", libc::msgsnd(id, message.as_ptr().cast(), 256, 0));
        let mut state: libc::msqid_ds = std::mem::zeroed();
        must("IPC_STAT", libc::msgctl(id, libc::IPC_STAT, &raw mut state));
        state.msg_qbytes = 100;
        must("IPC_SET", libc::msgctl(id, libc::IPC_SET, &raw mut state));
        look(move || {
            let mut state: libc::msqid_ds = std::mem::zeroed();
            must("IPC_STAT", libc::msgctl(id, libc::IPC_STAT, &raw mut state));
            same("its capacity", state.msg_qbytes, 100);
            let mut got = [0i64; 65];
            let mut next = || libc::msgrcv(id, got.as_mut_ptr().cast(), 512, 0, libc::IPC_NOWAIT);
            same("the messages", (next(), next()), (512, 256));
        })
    }
}

/// A queue that nobody has used yet, and for which a thread waits.
fn awaited(_: &Path) -> Result<Check, Absent> {
    // SAFETY: the messages are live, and their type is followed by as many bytes as is said.
    let id = unsafe { must("msgget", libc::msgget(libc::IPC_PRIVATE, 0o600)) as i32 };
    say(&format!("msg {id}"));
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut got = [0i64; 2];
        // SAFETY: as above.
        let n = unsafe { libc::msgrcv(id, got.as_mut_ptr().cast(), 8, 0, 0) };
        let error = std::io::Error::last_os_error();
        let _ = tell.send(if n < 0 { Err(error) } else { Ok(got) });
    });
    let waits = || {
        let calls = std::fs::read_dir("/proc/self/task").into_iter().flatten();
        let mut calls = calls
            .flatten()
            .filter_map(|task| std::fs::read_to_string(task.path().join("syscall")).ok());
        calls.any(|call| call.starts_with(&format!("{} {id:#x} ", libc::SYS_msgrcv)))
    };
    while !waits() {
        std::thread::yield_now();
    }
    look(move || {
        let message = [4i64, 0x0506];
        // SAFETY: as above.
        must("msgsnd", unsafe {
            libc::msgsnd(id, message.as_ptr().cast(), 8, 0)
        });
        match told.recv() {
            Ok(Ok(got)) => same("the message", got, message),
            other => outlive_test_programs::fail(&format!("waiting for a message: {other:?}")),
        }
    })
}

/// A child made and used one of each sort: the parent did not yet.
fn of_a_child(_: &Path) -> Result<Check, Absent> {
    let (mut told, tell) = std::io::pipe().map_err(|e| Absent(e.to_string()))?;
    // SAFETY: the segment is accessed within its size while it is attached; the message is live and
    // as long as is said.
    let child = unsafe {
        let child = must("fork", libc::fork()) as i32;
        if child == 0 {
            let shm = libc::shmget(libc::IPC_PRIVATE, SIZE, 0o600);
            let at = libc::shmat(shm, std::ptr::null(), 0).cast::<u8>();
            std::slice::from_raw_parts_mut(at, SIZE).fill(0x5c);
            libc::shmdt(at.cast());
            let sem = libc::semget(libc::IPC_PRIVATE, 1, 0o600);
            libc::semctl(sem, 0, libc::SETVAL, 31);
            let msg = libc::msgget(libc::IPC_PRIVATE, 0o600);
            let message = [6i64, 0x0708];
            libc::msgsnd(msg, message.as_ptr().cast(), 8, 0);
            say(&format!("shm {shm} sem {sem} msg {msg}"));
            let ids = [shm, sem, msg].map(i32::to_ne_bytes).concat();
            let _ = std::io::Write::write_all(&mut &tell, &ids);
            loop {
                libc::pause();
            }
        }
        child
    };
    drop(tell);
    let mut ids = [0; 12];
    std::io::Read::read_exact(&mut told, &mut ids).map_err(|e| Absent(e.to_string()))?;
    drop(told);
    let id = |at: usize| i32::from_ne_bytes([ids[at], ids[at + 1], ids[at + 2], ids[at + 3]]);
    let (shm, sem, msg) = (id(0), id(4), id(8));
    // SAFETY: as above.
    look(move || unsafe {
        crate::process::end(child);
        let at = libc::shmat(shm, std::ptr::null(), 0).cast::<u8>();
        must("shmat", at as i64);
        let bytes = std::slice::from_raw_parts(at, SIZE);
        same("the contents", bytes.iter().all(|&b| b == 0x5c), true);
        same("the value", libc::semctl(sem, 0, libc::GETVAL), 31);
        let mut got = [0i64; 2];
        let n = libc::msgrcv(msg, got.as_mut_ptr().cast(), 8, 0, libc::IPC_NOWAIT);
        same("the message", (n, got), (8, [6, 0x0708]));
    })
}

fn posix_queue(_: &Path) -> Result<Check, Absent> {
    let name = std::ffi::CString::new(format!("/outlive-test-{}", std::process::id()));
    let name = name.unwrap_or_default();
    // SAFETY: the name and the message are live.
    unsafe {
        let flags = libc::O_RDWR | libc::O_CREAT | libc::O_NONBLOCK;
        let queue = libc::mq_open(
            name.as_ptr(),
            flags,
            0o600,
            std::ptr::null::<libc::mq_attr>(),
        );
        offered("mq_open", queue.into())?;
        must("mq_unlink", libc::mq_unlink(name.as_ptr()));
        must("mq_send", libc::mq_send(queue, c"hello".as_ptr(), 5, 2));
        look(move || {
            let mut text = vec![0u8; 8192];
            let n = libc::mq_receive(queue, text.as_mut_ptr().cast(), 8192, std::ptr::null_mut());
            same("its length", n, 5);
        })
    }
}

fn posix_semaphore(_: &Path) -> Result<Check, Absent> {
    let name = std::ffi::CString::new(format!("/outlive-test-{}", std::process::id()));
    let name = name.unwrap_or_default();
    // SAFETY: the name is live; the semaphore stays mapped.
    unsafe {
        let semaphore = libc::sem_open(name.as_ptr(), libc::O_CREAT, 0o600, 5);
        if semaphore == libc::SEM_FAILED {
            return Err(Absent("no named semaphores".into()));
        }
        // Its file is then mapped without a name.
        must("sem_unlink", libc::sem_unlink(name.as_ptr()));
        look(move || {
            let mut value = 0;
            must("sem_wait", libc::sem_wait(semaphore));
            must(
                "sem_getvalue",
                libc::sem_getvalue(semaphore, &raw mut value),
            );
            same("its value", value, 4);
        })
    }
}

fn aio(_: &Path) -> Result<Check, Absent> {
    let mut context = 0u64;
    // SAFETY: the context is live.
    offered("io_setup", unsafe {
        libc::syscall(libc::SYS_io_setup, 8, &raw mut context)
    })?;
    look(move || {
        let mut event = [0u64; 4];
        let none = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: the event and the time are live.
        let n = unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                context,
                0,
                1,
                event.as_mut_ptr(),
                &raw const none,
            )
        };
        same("events", n, 0);
    })
}
