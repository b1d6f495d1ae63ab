//! Small files of `/proc`, of which a stop reads one or two for each thread.
//!
//! # Rules
//! - To open such a file takes about as long as to read it. So it stays open from stop to stop, as far
//!   as this process may have files open.
//! - An open file belongs to the thread, not to its number: when the thread has ended it tells nothing
//!   any more, and the file of that number is opened anew.
//! - Where there are many, helpers read a part of them: threads that do nothing else, and end with the
//!   reading.

use crate::target::Status;
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Files for which a helper is worth its while.
const WORTH_A_HELPER: usize = 64;
/// Most files that this process keeps open in this way. Each holds about a page in the kernel.
const MOST_KEPT: usize = 4096;
/// The part of what this process may have open that it keeps open in this way.
const SHARE_KEPT: u64 = 4;

static KEPT: AtomicUsize = AtomicUsize::new(0);

fn most_kept() -> usize {
    static MOST: OnceLock<usize> = OnceLock::new();
    *MOST.get_or_init(|| {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        let share = limit.current.map_or(u64::MAX, |most| most / SHARE_KEPT);
        usize::try_from(share).map_or(MOST_KEPT, |share| share.min(MOST_KEPT))
    })
}

/// A file that stays open.
#[derive(Debug)]
pub struct Kept(OwnedFd);

impl Kept {
    /// Keeps it, if there are not too many.
    pub fn new(file: OwnedFd) -> Option<Self> {
        if KEPT.fetch_add(1, Ordering::Relaxed) < most_kept() {
            return Some(Self(file));
        }
        KEPT.fetch_sub(1, Ordering::Relaxed);
        None
    }
}

impl Kept {
    /// The file.
    pub fn file(&self) -> &OwnedFd {
        &self.0
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        KEPT.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What the kernel gives at least at a time of a file of short records of which there is more: it fills
/// a page with whole ones.
const AT_ONCE: usize = 2048;

/// Whether the end of a file has been read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// Where nothing comes any more.
    Nothing,
    /// Where so little came that it was all: of files with records that are shorter than [`AT_ONCE`].
    Short,
}

/// Reads all of a file from its beginning into a buffer, which grows as it must; returns the length.
fn read_whole(file: &OwnedFd, end: End, buffer: &mut Vec<u8>) -> Result<usize, Errno> {
    let mut length = 0;
    loop {
        if buffer.len() - length < 2 * AT_ONCE {
            buffer.resize(buffer.len() + 4 * AT_ONCE, 0);
        }
        match rustix::io::pread(file, &mut buffer[length..], length as u64) {
            Ok(0) => return Ok(length),
            Ok(n) if end == End::Short && n < AT_ONCE => return Ok(length + n),
            Ok(n) => length += n,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

fn open(path: &str) -> Result<OwnedFd, Errno> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}

/// The contents of a small file.
pub fn read(path: &str) -> io::Result<Vec<u8>> {
    read_until(path, End::Nothing)
}

/// The contents of a file of short records, or of one that is a single record.
pub fn read_short(path: &str) -> io::Result<Vec<u8>> {
    read_until(path, End::Short)
}

fn read_until(path: &str, end: End) -> io::Result<Vec<u8>> {
    let mut buffer = Vec::new();
    let length = read_whole(&open(path)?, end, &mut buffer)?;
    buffer.truncate(length);
    Ok(buffer)
}

/// The files about the threads of a process that stay open.
#[derive(Debug)]
pub struct ThreadFiles {
    pid: u32,
    helpers: usize,
    open: HashMap<u32, Files>,
}

/// Those of one thread. A list of children is empty also when the thread has ended: it stays open only
/// as long as the status does, which tells that.
#[derive(Debug)]
struct Files {
    status: Kept,
    children: Option<Kept>,
}

impl ThreadFiles {
    /// Those of this process, of which `helpers` may read a part.
    pub fn new(pid: u32, helpers: usize) -> Self {
        let open = HashMap::new();
        Self { pid, helpers, open }
    }

    /// From now on so many read a part.
    pub fn set_helpers(&mut self, helpers: usize) {
        self.helpers = helpers;
    }

    /// From now on these are all threads of the process.
    pub fn retain(&mut self, tids: &[u32]) {
        if self.open.len() > tids.len() {
            let there: HashSet<u32> = tids.iter().copied().collect();
            self.open.retain(|tid, _| there.contains(tid));
        }
    }

    /// The statuses of these threads.
    pub fn statuses(&mut self, tids: &[u32]) -> Vec<io::Result<Status>> {
        let known = |tid: &u32| (*tid, self.open.remove(tid));
        let asked = tids.iter().map(known).collect();
        let pid = self.pid;
        let read = spread(
            asked,
            self.helpers,
            WORTH_A_HELPER,
            |buffer, (tid, files)| {
                let (files, length) = read_status(pid, tid, files, buffer);
                let status = length.map_err(io::Error::from);
                let status = status.and_then(|n| Status::of(pid, tid, &buffer[..n]));
                (tid, files, status)
            },
        );
        let mut all = Vec::with_capacity(read.len());
        for (tid, files, status) in read {
            self.open.extend(files.map(|files| (tid, files)));
            all.push(status);
        }
        all
    }

    /// The children of these threads, whose statuses were read while they stood where they stand now.
    pub fn children(&mut self, tids: &[u32]) -> Vec<u32> {
        let take = |tid: &u32| {
            let kept = self.open.get_mut(tid).and_then(|f| f.children.take());
            (*tid, kept)
        };
        let asked: Vec<(u32, Option<Kept>)> = tids.iter().map(take).collect();
        let pid = self.pid;
        let read = spread(
            asked,
            self.helpers,
            WORTH_A_HELPER,
            |buffer, (tid, kept)| {
                let (kept, length) = read_children(pid, tid, kept, buffer);
                let text = String::from_utf8_lossy(&buffer[..length.unwrap_or(0)]);
                (tid, kept, children_in(&text).collect::<Vec<u32>>())
            },
        );
        let mut all = Vec::new();
        for (tid, kept, children) in read {
            all.extend(children);
            if let Some(files) = self.open.get_mut(&tid) {
                files.children = kept;
            }
        }
        all.sort_unstable();
        all
    }
}

/// Reads the status of one thread; with the files that stay open.
fn read_status(
    pid: u32,
    tid: u32,
    files: Option<Files>,
    buffer: &mut Vec<u8>,
) -> (Option<Files>, Result<usize, Errno>) {
    if let Some(files) = files
        && let Ok(length) = read_whole(&files.status.0, End::Short, buffer)
    {
        return (Some(files), Ok(length));
    }
    let opened = open(&format!("/proc/{pid}/task/{tid}/status"));
    match opened.and_then(|file| read_whole(&file, End::Short, buffer).map(|length| (file, length)))
    {
        Ok((file, length)) => {
            let children = None;
            let files = Kept::new(file).map(|status| Files { status, children });
            (files, Ok(length))
        }
        Err(errno) => (None, Err(errno)),
    }
}

/// Reads the children of one thread; with the file that stays open.
fn read_children(
    pid: u32,
    tid: u32,
    kept: Option<Kept>,
    buffer: &mut Vec<u8>,
) -> (Option<Kept>, Result<usize, Errno>) {
    if let Some(kept) = kept {
        let length = read_whole(&kept.0, End::Short, buffer);
        return (Some(kept), length);
    }
    let opened = open(&format!("/proc/{pid}/task/{tid}/children"));
    match opened.and_then(|file| read_whole(&file, End::Short, buffer).map(|length| (file, length)))
    {
        Ok((file, length)) => (Kept::new(file), Ok(length)),
        Err(errno) => (None, Err(errno)),
    }
}

/// The children that a thread's list of them names.
pub fn children_in(text: &str) -> impl Iterator<Item = u32> {
    text.split_whitespace().filter_map(|w| w.parse().ok())
}

/// Does something with each, in their order; where there are at least so many for each, helpers do a
/// part. Each has a buffer of its own.
pub fn spread<T: Send, R: Send>(
    items: Vec<T>,
    helpers: usize,
    least: usize,
    work: impl Fn(&mut Vec<u8>, T) -> R + Sync,
) -> Vec<R> {
    let workers = (items.len() / least.max(1)).min(helpers.saturating_add(1));
    let do_all = |items: Vec<T>| -> Vec<R> {
        let mut buffer = Vec::new();
        let each = items.into_iter().map(|item| work(&mut buffer, item));
        each.collect()
    };
    if workers < 2 {
        return do_all(items);
    }
    let part = items.len().div_ceil(workers);
    let mut items = items.into_iter();
    let mut parts: Vec<Vec<T>> = Vec::with_capacity(workers);
    for _ in 0..workers {
        parts.push(items.by_ref().take(part).collect());
    }
    let mut parts = parts.into_iter();
    let ours = parts.next().unwrap_or_default();
    std::thread::scope(|scope| {
        let do_all = &do_all;
        let others: Vec<_> = parts
            .map(|part| scope.spawn(move || do_all(part)))
            .collect();
        let mut all = do_all(ours);
        for other in others {
            match other.join() {
                Ok(done) => all.extend(done),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        all
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_that_is_spread_comes_back_in_its_order() {
        for (count, helpers) in [(0, 3), (1, 3), (7, 0), (7, 1), (100, 3), (101, 7)] {
            let items: Vec<usize> = (0..count).collect();
            let doubled = spread(items, helpers, 2, |_, n| n * 2);
            let expected: Vec<usize> = (0..count).map(|n| n * 2).collect();
            assert_eq!(doubled, expected, "{count} {helpers}");
        }
    }

    /// A thread that waits, and what ends it.
    fn sleeper(name: &str) -> (u32, impl FnOnce() + use<>) {
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let (tell, told) = std::sync::mpsc::channel();
        let thread = std::thread::Builder::new().name(name.into());
        let thread = thread.spawn(move || {
            tell.send(rustix::thread::gettid()).unwrap();
            let _ = wait.recv();
        });
        let tid = told.recv().unwrap().as_raw_nonzero().get().cast_unsigned();
        let end = move || {
            drop(go);
            thread.unwrap().join().unwrap();
        };
        (tid, end)
    }

    #[test]
    fn files_stay_open_as_long_as_the_thread_is_there() {
        let mut files = ThreadFiles::new(std::process::id(), 0);
        let (tid, end) = sleeper("first");
        for _ in 0..2 {
            let read = files.statuses(&[tid]);
            assert_eq!(read[0].as_ref().unwrap().name, "first");
            assert_eq!(files.children(&[tid]), []);
            assert!(files.open.values().all(|f| f.children.is_some()));
        }
        let mut other = files.open.remove(&tid).unwrap();
        end();
        // The kernel takes it off its lists a moment later.
        while read_whole(&other.status.0, End::Short, &mut Vec::new()).is_ok() {
            std::thread::yield_now();
        }
        // As if the next thread had its number.
        let (tid, end) = sleeper("second");
        other.children = None;
        files.open.insert(tid, other);
        let read = files.statuses(&[tid]);
        assert_eq!(read[0].as_ref().unwrap().name, "second");
        end();
    }

    #[test]
    fn children_of_many_threads_are_those_of_each() {
        let child = std::process::Command::new("sleep").arg("100").spawn();
        let mut child = child.unwrap();
        let sleepers: Vec<_> = (0..70).map(|_| sleeper("s")).collect();
        let me = rustix::thread::gettid().as_raw_nonzero().get();
        let tids: Vec<u32> = sleepers.iter().map(|(tid, _)| *tid).collect();
        let tids = [&tids[..], &[me.cast_unsigned()]].concat();
        for helpers in [0, 1, 3] {
            let mut files = ThreadFiles::new(std::process::id(), helpers);
            let statuses = files.statuses(&tids);
            let told: Vec<u32> = statuses.into_iter().map(|s| s.unwrap().inner.tid).collect();
            assert_eq!(told, tids);
            assert_eq!(files.children(&tids), [child.id()]);
            files.retain(&tids[..3]);
            assert_eq!(files.open.len(), 3);
        }
        child.kill().unwrap();
        child.wait().unwrap();
        sleepers.into_iter().for_each(|(_, end)| end());
    }

    #[test]
    fn a_long_file_is_read_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        for length in [0, 1, 1023, 4096, 4097, 100_000] {
            std::fs::write(&path, vec![7; length]).unwrap();
            let text = read(path.to_str().unwrap()).unwrap();
            assert_eq!(text, vec![7; length]);
        }
    }
}
