//! A parent and its child that use System V shared memory, semaphores and queues, and look after
//! every property of them: `system_v FILE`. As soon as there is such a file, it removes all
//! objects and ends with 8.
//!
//! # Safety
//! The C library is called with numbers and live local values; segments are accessed within the
//! length with which they were made, in parts that stay mapped.
#![allow(unsafe_code)]

use outlive_test_programs::{check, expect, fail, good, mix, say};
use std::path::PathBuf;
use std::ptr::null_mut;

const PAGE: usize = 4096;
/// Bytes of the large segment; the end is no whole page.
const LENGTH: usize = 400 * PAGE - 100;

fn main() {
    let end = PathBuf::from(std::env::args_os().nth(1).unwrap_or_default());
    let mut all = Objects::make();
    // SAFETY: the child only runs `answer`.
    let child = unsafe { libc::fork() };
    if child == 0 {
        all.answer();
    }
    let _ = good("fork", child.into());
    say(&format!(
        "ready {} {} {} {} {}",
        all.large, all.apart, all.set, all.queue, all.idle
    ));
    for round in 0.. {
        if end.exists() {
            break;
        }
        all.look(round, child);
        std::thread::sleep(std::time::Duration::from_millis(3));
    }
    // SAFETY: only numbers are passed.
    unsafe {
        libc::kill(child, libc::SIGKILL);
        libc::waitpid(child, null_mut(), 0);
        for segment in [all.large, all.apart] {
            libc::shmctl(segment, libc::IPC_RMID, null_mut());
        }
        libc::semctl(all.set, 0, libc::IPC_RMID);
        libc::msgctl(all.queue, libc::IPC_RMID, null_mut());
        libc::msgctl(all.idle, libc::IPC_RMID, null_mut());
    }
    std::process::exit(8);
}

struct Objects {
    key: i32,
    /// Found by a key, of another owner, mapped twice and in parts.
    large: i32,
    whole: *mut u64,
    second: *mut u64,
    /// Removed, and there as long as somebody has it.
    removed: i32,
    common: *mut u64,
    /// Made, and mapped only now and then.
    apart: i32,
    set: i32,
    queue: i32,
    /// A queue in which nothing is.
    idle: i32,
}

fn attach(id: i32, flags: i32) -> *mut u64 {
    // SAFETY: the kernel chooses a free place.
    let at = unsafe { libc::shmat(id, std::ptr::null(), flags) };
    let _ = good("shmat", at as i64);
    at.cast()
}

fn state(id: i32) -> libc::shmid_ds {
    // SAFETY: plain numbers, live.
    unsafe {
        let mut ds: libc::shmid_ds = std::mem::zeroed();
        let stat = libc::shmctl(id, libc::IPC_STAT, &raw mut ds);
        expect("IPC_STAT", stat.into(), 0);
        ds
    }
}

fn word(at: *mut u64, offset: usize) -> u64 {
    // SAFETY: within a mapping, see the module heading.
    unsafe { at.byte_add(offset).read_volatile() }
}

fn put(at: *mut u64, offset: usize, value: u64) {
    // SAFETY: within a mapping that can be written, see the module heading.
    unsafe { at.byte_add(offset).write_volatile(value) };
}

#[repr(C)]
struct Message {
    sort: i64,
    text: [u64; 8],
}

impl Objects {
    fn make() -> Self {
        let key = (0x4f75_0000 | (std::process::id() & 0xffff)).cast_signed();
        let new = libc::IPC_CREAT | libc::IPC_EXCL | 0o600;
        let any = libc::IPC_PRIVATE;
        // SAFETY: numbers, and a live structure.
        let [large, removed, apart, set, queue, idle] = unsafe {
            let all = [
                libc::shmget(key, LENGTH, new),
                libc::shmget(any, PAGE, new),
                libc::shmget(any, 3 * PAGE, new),
                libc::semget(key, 3, new),
                libc::msgget(key, new),
                libc::msgget(any, new),
            ];
            let mut ds = state(all[0]);
            (ds.shm_perm.uid, ds.shm_perm.gid, ds.shm_perm.mode) = (1234, 1235, 0o640);
            expect(
                "IPC_SET",
                libc::shmctl(all[0], libc::IPC_SET, &raw mut ds).into(),
                0,
            );
            all
        };
        for id in [large, removed, apart, set, queue, idle] {
            let _ = good("making an object", id.into());
        }
        let made = Self {
            key,
            large,
            whole: attach(large, 0),
            second: attach(large, libc::SHM_RDONLY),
            removed,
            common: attach(removed, 0),
            apart,
            set,
            queue,
            idle,
        };
        made.prepare();
        made
    }

    fn prepare(&self) {
        for offset in (0..LENGTH - 8).step_by(PAGE) {
            put(self.whole, offset, mix(offset as u64));
        }
        let apart = attach(self.apart, 0);
        put(apart, 2 * PAGE, 1000);
        // SAFETY: parts of our own mappings that are not used any more; numbers.
        unsafe {
            let middle = self.whole.byte_add(10 * PAGE).cast();
            expect("munmap", libc::munmap(middle, 5 * PAGE).into(), 0);
            let page = self.whole.byte_add(20 * PAGE).cast();
            expect(
                "mprotect",
                libc::mprotect(page, PAGE, libc::PROT_READ).into(),
                0,
            );
            expect("shmdt", libc::shmdt(apart.cast()).into(), 0);
            let gone = libc::shmctl(self.removed, libc::IPC_RMID, null_mut());
            expect("IPC_RMID", gone.into(), 0);
            for (n, value) in [(0, 3), (2, 32_767)] {
                let set = libc::semctl(self.set, n, libc::SETVAL, value);
                expect("SETVAL", set.into(), 0);
            }
        }
        for n in 0..5 {
            self.send(self.queue, n);
        }
        // Used, and empty again.
        self.send(self.idle, 0);
        self.receive(self.idle, 0);
    }

    fn send(&self, queue: i32, n: u64) {
        let message = Message {
            sort: 1 + (n % 3) as i64,
            text: [n; 8],
        };
        // SAFETY: a live message of that length.
        let sent = unsafe { libc::msgsnd(queue, (&raw const message).cast(), self.length(n), 0) };
        expect("msgsnd", sent.into(), 0);
    }

    fn receive(&self, queue: i32, n: u64) {
        let mut message = Message {
            sort: 0,
            text: [0; 8],
        };
        // SAFETY: there is room for a message of that length.
        let got = unsafe { libc::msgrcv(queue, (&raw mut message).cast(), 64, 0, 0) };
        expect("msgrcv", got as i64, self.length(n) as i64);
        check(
            message.sort == 1 + (n % 3) as i64 && message.text[0] == n,
            || format!("message {n} is another one: {}", message.text[0]),
        );
    }

    fn length(&self, n: u64) -> usize {
        8 + (n % 7) as usize * 8
    }

    /// The child counts what it is asked to, as soon as the semaphore lets it.
    fn answer(&self) -> ! {
        loop {
            self.change(1, -1);
            put(self.common, 8, word(self.common, 8) + 1);
        }
    }

    fn change(&self, number: u16, by: i16) {
        let mut change = libc::sembuf {
            sem_num: number,
            sem_op: by,
            sem_flg: 0,
        };
        // SAFETY: one live change.
        let done = unsafe { libc::semop(self.set, &raw mut change, 1) };
        expect("semop", done.into(), 0);
    }

    fn look(&mut self, round: u64, child: i32) {
        self.look_at_segments(round);
        self.change(1, 1);
        while word(self.common, 8) != round + 1 {
            std::thread::yield_now();
        }
        // SAFETY: only numbers are passed.
        let [one, two, three, last, first] = unsafe {
            [
                libc::semctl(self.set, 0, libc::GETVAL),
                libc::semctl(self.set, 1, libc::GETVAL),
                libc::semctl(self.set, 2, libc::GETVAL),
                libc::semctl(self.set, 1, libc::GETPID),
                libc::semctl(self.set, 0, libc::GETPID),
            ]
        };
        let me = std::process::id() as i32;
        let seen = [one, two, three, last, first];
        check(seen == [3, 0, 32_767, child, me], || {
            format!("semaphores have {seen:?}; the child is {child}, we are {me}")
        });
        self.receive(self.queue, round);
        self.send(self.queue, round + 5);
        if round.is_multiple_of(16) {
            // SAFETY: only numbers are passed.
            let found = unsafe {
                [
                    libc::shmget(self.key, 0, 0),
                    libc::semget(self.key, 0, 0),
                    libc::msgget(self.key, 0),
                ]
            };
            let ours = [self.large, self.set, self.queue];
            check(found == ours, || format!("found {found:?}, not {ours:?}"));
        }
        if round == 100 {
            self.send(self.idle, 0);
            self.receive(self.idle, 0);
        }
    }

    fn look_at_segments(&self, round: u64) {
        let changing = 30 * PAGE;
        if round > 0 {
            expect(
                "the second mapping",
                word(self.second, changing) as i64,
                round as i64,
            );
        }
        put(self.whole, changing, round + 1);
        for page in [0, 9, 15, 20, 399] {
            let offset = page * PAGE;
            let seen = [word(self.whole, offset), word(self.second, offset)];
            check(seen == [mix(offset as u64); 2], || {
                format!("page {page}: {seen:x?}")
            });
        }
        expect(
            "an unmapped page",
            word(self.second, 12 * PAGE) as i64,
            mix(12 * PAGE as u64) as i64,
        );
        // The parent's parts: before and after the hole, the page in between that is protected and
        // what follows it, and the second mapping; the same for the child.
        let ds = state(self.large);
        check(ds.shm_nattch == 10 && ds.shm_segsz == LENGTH, || {
            format!("{} mappings of {} bytes", ds.shm_nattch, ds.shm_segsz)
        });
        let p = ds.shm_perm;
        let owner = (p.uid, p.gid, p.mode & 0o777, p.cuid, ds.shm_cpid);
        let me = std::process::id() as i32;
        check(owner == (1234, 1235, 0o640, 0, me), || format!("{owner:?}"));
        let ds = state(self.removed);
        check(ds.shm_nattch == 2 && ds.shm_perm.mode & 0o1000 != 0, || {
            format!(
                "removed: {} mappings, mode {:o}",
                ds.shm_nattch, ds.shm_perm.mode
            )
        });
        let apart = attach(self.apart, 0);
        expect(
            "the segment apart",
            word(apart, 2 * PAGE) as i64,
            1000 + round as i64,
        );
        put(apart, 2 * PAGE, 1001 + round);
        // SAFETY: what was attached just now and is not used any more.
        if unsafe { libc::shmdt(apart.cast()) } != 0 {
            fail("shmdt failed");
        }
    }
}
