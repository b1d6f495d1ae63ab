//! System V shared memory, semaphores and message queues (`sysvipc(7)`): which there are, and what
//! the C library's calls do to them. Process IDs are those that the caller sees.
//!
//! # Safety
//! Structures handed to the kernel are live locals of the kernel's layout, which the C library
//! gives; buffers are as long as is said. An attached segment is never accessed by address.
#![allow(unsafe_code)]

use crate::{Errno, last_error};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bit of a segment's mode: it goes with the last process that has it attached.
pub const REMOVED: u32 = 0o1000;
/// Bit of a segment's mode: it is not swapped out.
pub const LOCKED: u32 = 0o2000;

/// The sorts of objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sort {
    /// Shared memory.
    Memory,
    /// Semaphores.
    Semaphores,
    /// Message queues.
    Queue,
}

impl Sort {
    fn short(self) -> &'static str {
        match self {
            Self::Memory => "shm",
            Self::Semaphores => "sem",
            Self::Queue => "msg",
        }
    }
}

/// What all objects have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Object {
    /// The key under which it is found; 0 for none.
    pub key: i32,
    /// Its ID.
    pub id: i32,
    /// Its mode, with [`REMOVED`] and [`LOCKED`].
    pub mode: u32,
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Who made it.
    pub creator_uid: u32,
    /// The group of who made it.
    pub creator_gid: u32,
}

/// A shared memory segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// What all objects have.
    pub object: Object,
    /// Its length, bytes.
    pub size: u64,
    /// The process that made it.
    pub creator: u32,
    /// How many mappings there are of it.
    pub attached: u64,
}

/// A set of semaphores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Semaphores {
    /// What all objects have.
    pub object: Object,
    /// How many there are.
    pub count: u32,
}

/// A message queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Queue {
    /// What all objects have.
    pub object: Object,
    /// How many messages wait.
    pub messages: u32,
    /// The process that sent last, 0 for none.
    pub sender: u32,
    /// The process that received last, 0 for none.
    pub receiver: u32,
}

/// The kernel's lists of objects, kept open: they are read at every stop.
#[derive(Debug, Default)]
pub struct Lists {
    open: [Option<File>; 3],
    text: Vec<u8>,
}

impl Lists {
    fn lines(&mut self, sort: Sort) -> io::Result<Vec<Vec<u64>>> {
        let slot = &mut self.open[sort as usize];
        if slot.is_none() {
            match File::open(format!("/proc/sysvipc/{}", sort.short())) {
                Ok(file) => *slot = Some(file),
                // A kernel without.
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
                Err(e) => return Err(e),
            }
        }
        self.text.clear();
        if let Some(file) = slot {
            let mut piece = [0; 4096];
            loop {
                match file.read_at(&mut piece, self.text.len() as u64)? {
                    0 => break,
                    n => self.text.extend_from_slice(&piece[..n]),
                }
            }
        }
        let text = String::from_utf8_lossy(&self.text);
        Ok(text.lines().skip(1).map(numbers).collect())
    }

    /// All segments.
    pub fn segments(&mut self) -> io::Result<Vec<Segment>> {
        let lines = self.lines(Sort::Memory)?;
        Ok(lines.iter().filter_map(|l| segment(l)).collect())
    }

    /// All sets of semaphores.
    pub fn semaphores(&mut self) -> io::Result<Vec<Semaphores>> {
        let lines = self.lines(Sort::Semaphores)?;
        Ok(lines.iter().filter_map(|l| semaphores(l)).collect())
    }

    /// All message queues.
    pub fn queues(&mut self) -> io::Result<Vec<Queue>> {
        let lines = self.lines(Sort::Queue)?;
        Ok(lines.iter().filter_map(|l| queue(l)).collect())
    }
}

/// The words of a line; the third, the mode, is octal, and keys may be negative.
fn numbers(line: &str) -> Vec<u64> {
    let word = |(i, word): (usize, &str)| match i {
        2 => u64::from_str_radix(word, 8).unwrap_or(0),
        _ => word
            .parse::<i64>()
            .map_or_else(|_| word.parse().unwrap_or(0), |n| n as u64),
    };
    line.split_whitespace().enumerate().map(word).collect()
}

fn object(line: &[u64], owners: usize) -> Option<Object> {
    let [uid, gid, creator_uid, creator_gid] = *line.get(owners..owners + 4)? else {
        return None;
    };
    Some(Object {
        key: line[0] as i32,
        id: line[1] as i32,
        mode: line[2] as u32,
        uid: uid as u32,
        gid: gid as u32,
        creator_uid: creator_uid as u32,
        creator_gid: creator_gid as u32,
    })
}

fn segment(line: &[u64]) -> Option<Segment> {
    Some(Segment {
        object: object(line, 7)?,
        size: line[3],
        creator: line[4] as u32,
        attached: line[6],
    })
}

fn semaphores(line: &[u64]) -> Option<Semaphores> {
    Some(Semaphores {
        object: object(line, 4)?,
        count: line[3] as u32,
    })
}

fn queue(line: &[u64]) -> Option<Queue> {
    Some(Queue {
        object: object(line, 7)?,
        messages: line[4] as u32,
        sender: line[5] as u32,
        receiver: line[6] as u32,
    })
}

fn answered(r: impl Into<i64>) -> Result<i64, Errno> {
    match r.into() {
        -1 => Err(last_error()),
        r => Ok(r),
    }
}

/// Opens the memory of a segment of this length as a file, for writing too. Attaches it for a
/// moment, which changes who did so last.
pub fn open_segment(id: i32, size: u64, writable: bool) -> io::Result<File> {
    let flags = if writable { 0 } else { libc::SHM_RDONLY };
    // SAFETY: only numbers are passed; the kernel chooses a free place.
    let at = unsafe { libc::shmat(id, std::ptr::null(), flags) };
    let _ = answered(at as i64)?;
    let start = at as u64;
    let end = start.saturating_add(size.next_multiple_of(4096));
    let path = format!("/proc/self/map_files/{start:x}-{end:x}");
    let opened = File::options().read(true).write(writable).open(path);
    // SAFETY: at is where it was attached just now; nothing points there.
    answered(unsafe { libc::shmdt(at) })?;
    opened
}

/// Sets owner, group and mode (nine bits) of an object.
pub fn set_access(sort: Sort, object: &Object) -> Result<(), Errno> {
    // SAFETY: all structures are plain numbers, for which zeros are good; they are live.
    let done = unsafe {
        let fill = |perm: &mut libc::ipc_perm| {
            (perm.uid, perm.gid) = (object.uid, object.gid);
            perm.mode = (object.mode & 0o777) as _;
        };
        match sort {
            Sort::Memory => {
                let mut ds: libc::shmid_ds = std::mem::zeroed();
                fill(&mut ds.shm_perm);
                libc::shmctl(object.id, libc::IPC_SET, &raw mut ds)
            }
            Sort::Semaphores => {
                let mut ds: libc::semid_ds = std::mem::zeroed();
                fill(&mut ds.sem_perm);
                libc::semctl(object.id, 0, libc::IPC_SET, &raw mut ds)
            }
            Sort::Queue => {
                let mut ds = queue_state(object.id)?;
                fill(&mut ds.msg_perm);
                libc::msgctl(object.id, libc::IPC_SET, &raw mut ds)
            }
        }
    };
    answered(done).map(drop)
}

fn queue_state(id: i32) -> Result<libc::msqid_ds, Errno> {
    // SAFETY: the structure is plain numbers and live.
    unsafe {
        let mut ds: libc::msqid_ds = std::mem::zeroed();
        answered(libc::msgctl(id, libc::IPC_STAT, &raw mut ds))?;
        Ok(ds)
    }
}

/// How many bytes a queue takes.
pub fn queue_capacity(id: i32) -> Result<u64, Errno> {
    Ok(queue_state(id)?.msg_qbytes)
}

/// Sets how many bytes a queue takes.
pub fn set_queue_capacity(id: i32, bytes: u64) -> Result<(), Errno> {
    let mut ds = queue_state(id)?;
    ds.msg_qbytes = bytes;
    // SAFETY: the structure is live.
    answered(unsafe { libc::msgctl(id, libc::IPC_SET, &raw mut ds) }).map(drop)
}

/// Keeps a segment in memory (`SHM_LOCK`).
pub fn lock_segment(id: i32) -> Result<(), Errno> {
    // SAFETY: only numbers are passed.
    answered(unsafe { libc::shmctl(id, libc::SHM_LOCK, std::ptr::null_mut()) }).map(drop)
}

/// Removes an object; a segment that is attached goes later.
pub fn remove(sort: Sort, id: i32) -> Result<(), Errno> {
    // SAFETY: only numbers are passed.
    let done = unsafe {
        match sort {
            Sort::Memory => libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()),
            Sort::Semaphores => libc::semctl(id, 0, libc::IPC_RMID),
            Sort::Queue => libc::msgctl(id, libc::IPC_RMID, std::ptr::null_mut()),
        }
    };
    answered(done).map(drop)
}

/// One semaphore.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Semaphore {
    /// Its value.
    pub value: u32,
    /// The process that changed it last, 0 for none.
    pub last: u32,
    /// How many threads wait for it.
    pub waiting: u32,
}

/// Looks at one semaphore of a set.
pub fn semaphore(id: i32, number: u32) -> Result<Semaphore, Errno> {
    let ask = |what: libc::c_int| {
        // SAFETY: only numbers are passed.
        answered(unsafe { libc::semctl(id, number as i32, what) }).map(|n| n as u32)
    };
    Ok(Semaphore {
        value: ask(libc::GETVAL)?,
        last: ask(libc::GETPID)?,
        waiting: ask(libc::GETNCNT)? + ask(libc::GETZCNT)?,
    })
}

/// A copy of the n-th message of a queue, type and text of at most `longest` bytes; `None` where
/// there are less.
pub fn message(id: i32, n: u32, longest: usize) -> Result<Option<(i64, Vec<u8>)>, Errno> {
    const MSG_COPY: libc::c_int = 0o40000;
    receive(id, i64::from(n), longest, libc::IPC_NOWAIT | MSG_COPY)
}

/// Takes the first message out of a queue, and throws its text away.
pub fn drop_message(id: i32) -> Result<bool, Errno> {
    let flags = libc::IPC_NOWAIT | libc::MSG_NOERROR;
    Ok(receive(id, 0, 0, flags)?.is_some())
}

fn receive(
    id: i32,
    which: i64,
    longest: usize,
    flags: libc::c_int,
) -> Result<Option<(i64, Vec<u8>)>, Errno> {
    let mut buffer = vec![0u64; 1 + longest.div_ceil(8)];
    // SAFETY: buffer has room for the type and longest bytes.
    let got = unsafe { libc::msgrcv(id, buffer.as_mut_ptr().cast(), longest, which, flags) };
    match answered(got as i64) {
        Ok(length) => {
            let text = buffer[1..].iter().flat_map(|w| w.to_ne_bytes());
            let text = text.take(length as usize).collect();
            Ok(Some((buffer[0].cast_signed(), text)))
        }
        Err(Errno::NOMSG) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Asks that the next object of this sort gets this ID, which happens if it is free.
pub fn want_id(sort: Sort, id: i32) -> io::Result<()> {
    let path = format!("/proc/sys/kernel/{}_next_id", sort.short());
    std::fs::write(path, id.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_all_lists_are_understood() {
        let line = "-559038737 24 3640 12288 939 940 2 1 2 3 4 1 2 3 12288 0";
        let found = segment(&numbers(line)).unwrap();
        let object = Object {
            key: 0xdead_beef_u32 as i32,
            id: 24,
            mode: 0o640 | REMOVED | LOCKED,
            uid: 1,
            gid: 2,
            creator_uid: 3,
            creator_gid: 4,
        };
        assert_eq!(found.object, object);
        assert_eq!((found.size, found.creator, found.attached), (12288, 939, 2));
        let line = " -559038737 24 3640 5 1 2 3 4 0 0";
        let found = semaphores(&numbers(line)).unwrap();
        assert_eq!((found.object, found.count), (object, 5));
        let line = "-559038737 24 3640 100 6 7 8 1 2 3 4 0 0 0";
        let found = queue(&numbers(line)).unwrap();
        assert_eq!((found.object, found.messages), (object, 6));
        assert_eq!((found.sender, found.receiver), (7, 8));
        assert!(segment(&[1, 2, 3]).is_none() && queue(&[]).is_none());
    }

    #[test]
    fn a_segment_is_listed_opened_and_removed() {
        // SAFETY: only numbers are passed.
        let id = unsafe { libc::shmget(libc::IPC_PRIVATE, 5000, 0o600) };
        assert!(id >= 0);
        let mut lists = Lists::default();
        let mut find = || {
            lists
                .segments()
                .unwrap()
                .into_iter()
                .find(|s| s.object.id == id)
        };
        let found = find().unwrap();
        assert_eq!((found.size, found.attached), (5000, 0));
        assert_eq!(found.creator, std::process::id());
        let access = Object {
            mode: 0o640,
            ..found.object
        };
        set_access(Sort::Memory, &access).unwrap();
        assert_eq!(find().unwrap().object.mode, 0o640);
        if rustix::process::geteuid().is_root() {
            let file = open_segment(id, 5000, true).unwrap();
            file.write_all_at(b"x", 4999).unwrap();
            let mut seen = [0];
            let again = open_segment(id, 5000, false).unwrap();
            again.read_exact_at(&mut seen, 4999).unwrap();
            assert_eq!(&seen, b"x");
        } else {
            println!("skipped: needs root");
        }
        remove(Sort::Memory, id).unwrap();
        // A child that another test forked while it was attached has it attached too, until it ends.
        let gone = (0..10_000).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(1));
            find().is_none()
        });
        assert!(gone, "{:?}", find());
    }

    #[test]
    fn messages_are_copied_and_semaphores_seen() {
        // SAFETY: numbers, and a live message of the length that is said.
        let (queue, set) = unsafe {
            let queue = libc::msgget(libc::IPC_PRIVATE, 0o600);
            let message = [7u64, u64::from_ne_bytes(*b"eight by")];
            assert_eq!(libc::msgsnd(queue, message.as_ptr().cast(), 5, 0), 0);
            let set = libc::semget(libc::IPC_PRIVATE, 2, 0o600);
            assert_eq!(libc::semctl(set, 1, libc::SETVAL, 3), 0);
            (queue, set)
        };
        for _ in 0..2 {
            assert_eq!(message(queue, 0, 100), Ok(Some((7, b"eight".to_vec()))));
        }
        assert_eq!(message(queue, 1, 100), Ok(None));
        assert!(message(queue, 0, 2).is_err());
        let me = std::process::id();
        let mut lists = Lists::default();
        let listed = lists.queues().unwrap();
        let listed = listed.iter().find(|q| q.object.id == queue).unwrap();
        assert_eq!(
            (listed.messages, listed.sender, listed.receiver),
            (1, me, 0)
        );
        let bytes = queue_capacity(queue).unwrap();
        set_queue_capacity(queue, bytes / 2).unwrap();
        assert_eq!(queue_capacity(queue).unwrap(), bytes / 2);
        assert_eq!(drop_message(queue), Ok(true));
        assert_eq!(drop_message(queue), Ok(false));
        let none = Semaphore::default();
        assert_eq!(semaphore(set, 0).unwrap(), none);
        assert_eq!(
            semaphore(set, 1).unwrap(),
            Semaphore {
                value: 3,
                last: me,
                ..none
            }
        );
        assert_eq!(
            lists
                .semaphores()
                .unwrap()
                .iter()
                .find(|s| s.object.id == set)
                .unwrap()
                .count,
            2
        );
        remove(Sort::Queue, queue).unwrap();
        remove(Sort::Semaphores, set).unwrap();
    }
}
