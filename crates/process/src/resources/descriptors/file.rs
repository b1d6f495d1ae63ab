//! Regular files with a path.
//!
//! # Files go with the memory
//! A file that the program can write is recorded with its size and modification time, and with a
//! checksum: of all of it where all of its writers can only append, so that from epoch to epoch only
//! what was appended is read; else of the last bytes before its end. At the restore it is one of:
//! - *equal*: the same size and time;
//! - *grown*: longer, and the bytes before the recorded end are the same. It is truncated back,
//!   what is cut off goes to `PATH.outlive-tail.EPOCH`, and the recorded time is set again, so
//!   that a second restore finds it equal;
//! - *touched*: as long as it was, and the checksum covers all of it and says that every byte is as
//!   it was. The recorded time is set again. A writer that is killed inside `write(2)` leaves this:
//!   the kernel sets the time before it takes the first byte;
//! - anything else is refused, unless the user keeps files as they are.
//!
//! All this is for files whose contents the epoch does not hold (`resources::shared`): those that it
//! holds are what they were in any case.
//!
//! A file that is only read must be the same file, or have the same size and time.
//!
//! # What it refuses
//! Deleted files, memory files, files of `/proc` that belong to a process, and files whose path
//! no longer leads to them.

use super::Descriptor;
use super::collect::Memory;
use super::context::{About, Around, CheckContext, CollectContext, RecreateContext};
use super::file_action::{FileAction, cut_name};
use super::probe::{Probe, failed, show};
use crate::ProcessError;
use crate::restore::FilesPolicy;
use outlive_state_tree::StateNode;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, SeekFrom, Statx, StatxFlags};
use rustix::io::Errno;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// How many bytes before the end of a file vouch for the rest of it.
const TAIL: u64 = 4096;
/// How many bytes at most are read at a stop for the checksum of one file.
const MOST_READ: u64 = 16 << 20;

/// An open regular file.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,fd-file-v1")]
pub struct FileState {
    /// Its absolute path.
    pub path: Vec<u8>,
    /// Where the next read or write takes place.
    pub position: u64,
    /// Device number of its file system.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
    /// When it was created, nanoseconds since 1970, where the file system tells.
    pub born: Option<i64>,
    /// Its size in bytes.
    pub size: u64,
    /// When it was last modified, nanoseconds since 1970.
    pub modified: i64,
    /// Of a file that is open for writing: CRC32C of its bytes from `crc-from` to the end.
    pub tail_crc: Option<u32>,
    /// Where the checksummed bytes begin: 0 where all of it is.
    pub crc_from: u64,
    /// Whether the kernel makes up its contents (`/proc`, `/sys`): nothing to be compared.
    pub made_up: bool,
}

/// What the recorded file and the one found now have in common.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Equal,
    /// The same contents with another time.
    Touched,
    Grown {
        by: u64,
    },
    Changed(&'static str),
}

/// What of a file is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) device: u64,
    pub(crate) inode: u64,
    pub(crate) born: Option<i64>,
    pub(crate) size: u64,
    pub(crate) modified: i64,
}

impl Seen {
    pub(crate) fn of(stat: &Statx) -> Self {
        let born = (stat.stx_mask & StatxFlags::BTIME.bits() != 0)
            .then(|| nanoseconds(stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec));
        Self {
            device: rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor),
            inode: stat.stx_ino,
            born,
            size: stat.stx_size,
            modified: nanoseconds(stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec),
        }
    }

    pub(crate) fn of_fd(fd: BorrowedFd<'_>) -> Result<(Self, FileType), Errno> {
        let mask = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
        let stat = rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, mask)?;
        Ok((
            Self::of(&stat),
            FileType::from_raw_mode(stat.stx_mode.into()),
        ))
    }
}

fn nanoseconds(seconds: i64, nanoseconds: u32) -> i64 {
    seconds
        .saturating_mul(1_000_000_000)
        .saturating_add(nanoseconds.into())
}

impl FileState {
    fn seen(&self) -> Seen {
        Seen {
            device: self.device,
            inode: self.inode,
            born: self.born,
            size: self.size,
            modified: self.modified,
        }
    }

    /// The flags to open it with again.
    pub(crate) fn open_flags(flags: u32) -> OFlags {
        let lost = OFlags::NOFOLLOW | OFlags::CREATE | OFlags::EXCL | OFlags::TRUNC;
        (OFlags::from_bits_retain(flags) - lost) | OFlags::CLOEXEC | OFlags::NOCTTY
    }
}

/// Whether both are the same file, whatever it contains. Device numbers may change from boot to
/// boot; the time of birth does not, and tells a reused inode number.
pub(crate) fn same_file(then: &Seen, now: &Seen) -> bool {
    then.inode == now.inode
        && match (then.born, now.born) {
            (Some(a), Some(b)) => a == b,
            _ => then.device == now.device,
        }
}

/// Judges a file that the program could write. `tail_equal` says whether the checksummed bytes are
/// as they were, `vouched` whether they are all, or the file was cut by an earlier restore.
pub(crate) fn judge(
    then: &Seen,
    now: &Seen,
    vouched: bool,
    tail_equal: impl FnOnce() -> Result<bool, Errno>,
) -> Result<Verdict, Errno> {
    let equal_contents = then.size == now.size && then.modified == now.modified;
    if equal_contents {
        return Ok(Verdict::Equal);
    }
    if !same_file(then, now) {
        return Ok(Verdict::Changed("it is another file now"));
    }
    if now.size < then.size {
        return Ok(Verdict::Changed("it is shorter than at the epoch"));
    }
    let same_size = now.size == then.size;
    if same_size && !vouched {
        return Ok(Verdict::Changed("it was modified after the epoch"));
    }
    if !tail_equal()? {
        return Ok(Verdict::Changed("it was overwritten after the epoch"));
    }
    if same_size {
        return Ok(Verdict::Touched);
    }
    Ok(Verdict::Grown {
        by: now.size - then.size,
    })
}

/// What vouches for the contents of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Vouched {
    size: u64,
    modified: i64,
    from: u64,
    crc: u32,
}

impl Vouched {
    /// Of a file that looks like this, after an earlier look. Where it can only be appended to, that
    /// covers all of it, as far as not too much would have to be read.
    fn of(
        file: BorrowedFd<'_>,
        seen: &Seen,
        appended: bool,
        before: Option<&Self>,
    ) -> Result<Self, Errno> {
        let goes_on = |b: &&Self| b.from == 0 && b.size <= seen.size;
        let whole = before.filter(goes_on).map_or((0, 0), |b| (b.size, b.crc));
        let tail = seen.size.saturating_sub(TAIL);
        let (from, (read_from, crc)) = match appended && seen.size - whole.0 <= MOST_READ {
            true => (0, whole),
            false => (tail, (tail, 0)),
        };
        Ok(Self {
            size: seen.size,
            modified: seen.modified,
            from,
            crc: crc_of(file, read_from, seen.size, crc)?,
        })
    }
}

/// Goes on with the CRC32C of what comes before, as far as the file goes.
fn crc_of(file: BorrowedFd<'_>, from: u64, to: u64, mut crc: u32) -> Result<u32, Errno> {
    const PIECE: u64 = 256 << 10;
    let mut buffer = vec![0; to.saturating_sub(from).min(PIECE) as usize];
    let mut at = from;
    while at < to {
        let wanted = PIECE.min(to - at) as usize;
        match rustix::io::pread(file, &mut buffer[..wanted], at) {
            Ok(0) => break,
            Ok(n) => {
                crc = crc32c::crc32c_append(crc, &buffer[..n]);
                at += n as u64;
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(crc)
}

/// Opens anew what an `O_PATH` descriptor stands for.
fn reopen(held: &OwnedFd, flags: OFlags) -> Result<OwnedFd, Errno> {
    let path = format!("/proc/self/fd/{}", held.as_raw_fd());
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())
}

/// Looks up a path without following a link at its end and without opening what it finds.
pub(crate) fn look_up(path: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty())
}

fn is_made_up(path: &[u8]) -> bool {
    path.starts_with(b"/proc/") || path.starts_with(b"/sys/")
}

fn is_of_a_process(path: &[u8]) -> bool {
    path.strip_prefix(b"/proc/")
        .is_some_and(|rest| rest.first().is_some_and(u8::is_ascii_digit))
}

/// A path as the kernel prints it to us, in the mounts that a process sees. A root directory that
/// the process has of its own is part of what is printed.
fn in_its_mounts(pid: u32, path: &[u8]) -> Vec<u8> {
    let root = format!("/proc/{pid}/root");
    let own = std::fs::read_link(&root).is_ok_and(|to| to.as_os_str() != "/");
    let prefix = if own { "" } else { &root };
    [prefix.as_bytes(), path].concat()
}

/// Refuses a file that could not be found again under its path. What was found once is not looked
/// for again as long as the kernel prints the same path for the same inode.
pub(crate) fn refuse_lost(probe: &Probe<'_>, memory: &mut Memory) -> Result<(), ProcessError> {
    let stat = probe.stat()?;
    let seen = (probe.info.mount, stat.stx_ino);
    if memory
        .found
        .get(&probe.place())
        .is_some_and(|(key, link)| *key == seen && *link == probe.link)
    {
        return Ok(());
    }
    let link = probe.shown();
    let named = |what: &str, remedy: &str| Err(probe.refuse(format!("{what} ({link})"), remedy));
    if probe.link.starts_with(b"/SYSV") || probe.link == b"/dev/zero (deleted)" {
        return named("shared memory", "run the program without shared memory");
    }
    if probe.link.starts_with(b"/anon_hugepage") {
        return named(
            "huge page memory",
            "run the program without explicit huge pages",
        );
    }
    let inside = in_its_mounts(probe.target.pid, &probe.link);
    let found = rustix::fs::statx(
        rustix::fs::CWD,
        inside,
        AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT,
        StatxFlags::INO,
    );
    let same = found.is_ok_and(|found| {
        found.stx_ino == stat.stx_ino
            && (found.stx_dev_major, found.stx_dev_minor)
                == (stat.stx_dev_major, stat.stx_dev_minor)
    });
    if same {
        memory
            .found
            .insert(probe.place(), (seen, probe.link.clone()));
        Ok(())
    } else if probe.link.ends_with(b" (deleted)") {
        named(
            "deleted file",
            "have the program close it, or use a file with a name",
        )
    } else {
        // Internal mounts of the kernel, such as that of POSIX message queues, end here too.
        named(
            "file that its path does not lead to: a message queue, or a file that is mounted over",
            "have the program close it",
        )
    }
}

impl Descriptor for FileState {
    const NAME: &'static str = "regular file";

    fn claims(probe: &Probe<'_>, _: &Around) -> Result<bool, ProcessError> {
        let secret = probe.link.starts_with(b"/secretmem");
        Ok(probe.has_path() && !secret && probe.file_type()? == FileType::RegularFile)
    }

    fn collect(probe: &Probe<'_>, cx: &mut CollectContext<'_>) -> Result<Self, ProcessError> {
        let made_up = is_made_up(&probe.link);
        if is_of_a_process(&probe.link) {
            return Err(probe.refuse(
                format!("file about a process ({})", probe.shown()),
                "have the program close it",
            ));
        }
        refuse_lost(probe, cx.memory)?;
        let seen = Seen::of(probe.stat()?);
        let writable = probe.access() != OFlags::RDONLY.bits() && !probe.has(OFlags::PATH);
        let vouched = if writable && !made_up {
            written(probe, cx, &seen)?
        } else {
            None
        };
        Ok(Self {
            path: probe.link.clone(),
            position: u64::try_from(probe.info.position).unwrap_or(0),
            device: seen.device,
            inode: seen.inode,
            born: seen.born,
            size: seen.size,
            modified: seen.modified,
            tail_crc: vouched.map(|v| v.crc),
            crc_from: vouched.map_or(0, |v| v.from),
            made_up,
        })
    }

    fn check(&self, about: &About, cx: &mut CheckContext<'_>) -> Result<(), ProcessError> {
        let path = show(&self.path);
        if !self.path.starts_with(b"/") || self.path.contains(&0) {
            return Err(ProcessError::Image(format!(
                "the path of fd {} is none",
                about.number
            )));
        }
        if let Some(written) = cx.request.written.iter().find(|w| w.is(self)) {
            if written.path != self.path && !written.is_at(&self.path) {
                let what = format!("file {path} is not {} any more", show(&written.path));
                let remedy = "make it the same file again, or restore with --files keep";
                return Err(cx.refuse(about, what, remedy));
            }
            cx.hold(about, written.hold(cx.request.pid)?);
            return Ok(());
        }
        let held = match look_up(&self.path) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NOTDIR) => {
                let remedy = "put the file back where it was at the epoch";
                return Err(cx.refuse(about, format!("file {path} is gone"), remedy));
            }
            Err(errno) => return Err(failed(cx.request.pid, format!("look up {path}"), errno)),
        };
        let look = |errno| failed(cx.request.pid, format!("look at {path}"), errno);
        let (now, file_type) = Seen::of_fd(held.as_fd()).map_err(look)?;
        if file_type != FileType::RegularFile {
            let remedy = "put the file back where it was at the epoch";
            return Err(cx.refuse(about, format!("{path} is no regular file any more"), remedy));
        }
        let kept = cx.request.contents.contains(&self.path);
        if !self.made_up && !kept && cx.request.files == FilesPolicy::Reconcile {
            self.reconcile(about, cx, &held, &now, &path)?;
        }
        cx.hold(about, held);
        Ok(())
    }

    fn recreate(&self, about: &About, cx: &mut RecreateContext) -> Result<OwnedFd, ProcessError> {
        let held = cx.take(about)?;
        let path = show(&self.path);
        let file = reopen(&held, Self::open_flags(about.flags)).map_err(|errno| {
            failed(
                cx.pid,
                format!("open {path} for fd {}", about.number),
                errno,
            )
        })?;
        seek(cx.pid, about, &file, self.position, self.made_up)?;
        Ok(file)
    }
}

/// A file whose contents the epoch holds, opened to be put back, or to be put in its place.
#[derive(Debug)]
pub struct WrittenFile {
    /// How it looked.
    pub(crate) then: Seen,
    /// Its path.
    pub(crate) path: Vec<u8>,
    /// The file.
    pub(crate) file: File,
}

impl WrittenFile {
    fn is(&self, state: &FileState) -> bool {
        (self.then.device, self.then.inode) == (state.device, state.inode)
    }

    /// Whether this path leads to it too.
    fn is_at(&self, path: &[u8]) -> bool {
        let seen = |fd: BorrowedFd<'_>| Seen::of_fd(fd).map(|(now, _)| (now.device, now.inode));
        let there = look_up(path).and_then(|fd| seen(fd.as_fd()));
        there.is_ok_and(|there| seen(self.file.as_fd()) == Ok(there))
    }

    /// What stands for it.
    fn hold(&self, pid: u32) -> Result<OwnedFd, ProcessError> {
        let this = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        rustix::fs::open(this, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
            .map_err(|errno| failed(pid, format!("hold {}", show(&self.path)), errno))
    }
}

impl FileState {
    fn reconcile(
        &self,
        about: &About,
        cx: &mut CheckContext<'_>,
        held: &OwnedFd,
        now: &Seen,
        path: &str,
    ) -> Result<(), ProcessError> {
        let then = self.seen();
        let flags = OFlags::from_bits_retain(about.flags);
        let writable = flags & OFlags::ACCMODE != OFlags::RDONLY && !flags.contains(OFlags::PATH);
        let remedy = "put the file back as it was, or restore with --files keep";
        if !writable {
            let equal = then.size == now.size && then.modified == now.modified;
            if same_file(&then, now) || equal {
                return Ok(());
            }
            return Err(cx.refuse(about, format!("file {path} is another one now"), remedy));
        }
        let was_cut = || look_up(&cut_name(&self.path, cx.request.epoch)).is_ok();
        let vouched = self.crc_from == 0 || was_cut();
        let verdict = judge(&then, now, vouched, || match self.tail_crc {
            Some(crc) => {
                let file = reopen(held, OFlags::RDONLY | OFlags::NONBLOCK)?;
                Ok(crc_of(file.as_fd(), self.crc_from, then.size, 0)? == crc)
            }
            None => Ok(false),
        });
        match verdict.map_err(|errno| failed(cx.request.pid, format!("read {path}"), errno))? {
            Verdict::Equal => Ok(()),
            Verdict::Changed(how) => Err(cx.refuse(
                about,
                format!("file {path} is not as it was: {how}"),
                remedy,
            )),
            verdict @ (Verdict::Touched | Verdict::Grown { .. }) => {
                let grown_by = match verdict {
                    Verdict::Grown { by } => by,
                    _ => 0,
                };
                let file = reopen(held, OFlags::RDWR | OFlags::NONBLOCK).map_err(|errno| {
                    failed(cx.request.pid, format!("open {path} for writing"), errno)
                })?;
                cx.actions
                    .entry((now.device, now.inode))
                    .or_insert(FileAction {
                        path: self.path.clone(),
                        file,
                        size: then.size,
                        grown_by,
                        modified: then.modified,
                        epoch: cx.request.epoch,
                    });
                Ok(())
            }
        }
    }
}

/// Notes a file that the program can write, and computes what vouches for its contents.
fn written(
    probe: &Probe<'_>,
    cx: &mut CollectContext<'_>,
    seen: &Seen,
) -> Result<Option<Vouched>, ProcessError> {
    let key = (seen.device, seen.inode);
    if let Entry::Vacant(vacant) = cx.files.files.entry(key) {
        vacant.insert((probe.shown(), probe.another_duplicate()?));
    }
    let appended = !cx.around.overwriters.contains(&seen.inode);
    // Once it may have been overwritten, a checksum of its end says nothing that its contents do not.
    if !appended && cx.shared.space_of_written(probe)?.is_some() {
        return Ok(None);
    }
    let before = cx.memory.vouched.get(&key);
    if let Some(before) = before
        && (before.size, before.modified) == (seen.size, seen.modified)
    {
        return Ok(Some(*before));
    }
    // Not through a duplicate: it may be for writing only, or want aligned buffers.
    let file = probe.reopen(OFlags::RDONLY);
    let vouched = file.and_then(|file| Vouched::of(file.as_fd(), seen, appended, before));
    if let Ok(vouched) = vouched {
        cx.memory.vouched.insert(key, vouched);
    }
    Ok(vouched.ok())
}

/// Sets the position of what was opened anew.
pub(crate) fn seek(
    pid: u32,
    about: &About,
    file: &OwnedFd,
    position: u64,
    lenient: bool,
) -> Result<(), ProcessError> {
    if position == 0 || OFlags::from_bits_retain(about.flags).contains(OFlags::PATH) {
        return Ok(());
    }
    match rustix::fs::seek(file, SeekFrom::Start(position)) {
        Ok(_) => Ok(()),
        Err(_) if lenient => Ok(()),
        Err(errno) => {
            let what = format!("set the position of fd {} to {position}", about.number);
            Err(failed(pid, what, errno))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const THEN: Seen = Seen {
        device: 1,
        inode: 2,
        born: Some(3),
        size: 100,
        modified: 50,
    };

    fn verdict(now: Seen, was_cut: bool, tail: bool) -> Verdict {
        judge(&THEN, &now, was_cut, || Ok(tail)).unwrap()
    }

    #[test]
    fn an_untouched_file_is_equal_even_as_a_copy() {
        assert_eq!(verdict(THEN, false, false), Verdict::Equal);
        assert_eq!(
            verdict(
                Seen {
                    device: 9,
                    inode: 9,
                    ..THEN
                },
                false,
                false
            ),
            Verdict::Equal
        );
    }

    #[test]
    fn a_file_that_grew_is_cut_only_when_its_old_end_is_unchanged() {
        let grown = Seen {
            size: 130,
            modified: 60,
            ..THEN
        };
        assert_eq!(verdict(grown, false, true), Verdict::Grown { by: 30 });
        assert!(matches!(verdict(grown, false, false), Verdict::Changed(_)));
        let elsewhere = Seen { device: 7, ..grown };
        assert_eq!(verdict(elsewhere, false, true), Verdict::Grown { by: 30 });
    }

    #[test]
    fn what_was_rewritten_or_replaced_is_refused() {
        for now in [
            Seen { size: 99, ..THEN },
            Seen {
                size: 130,
                inode: 8,
                ..THEN
            },
            Seen {
                size: 130,
                born: Some(4),
                ..THEN
            },
            Seen {
                size: 130,
                born: None,
                device: 2,
                ..THEN
            },
        ] {
            assert!(
                matches!(verdict(now, false, true), Verdict::Changed(_)),
                "{now:?}"
            );
        }
    }

    /// As a writer leaves it that was killed inside `write(2)`.
    #[test]
    fn another_time_alone_is_no_change_where_every_byte_is_vouched_for() {
        for size in [0, 1, TAIL + 1] {
            let then = Seen { size, ..THEN };
            let now = Seen {
                modified: 60,
                ..then
            };
            let verdict = |vouched, tail| judge(&then, &now, vouched, || Ok(tail)).unwrap();
            assert_eq!(verdict(true, true), Verdict::Touched, "{size}");
            for (vouched, tail) in [(false, true), (true, false)] {
                let changed = matches!(verdict(vouched, tail), Verdict::Changed(_));
                assert!(changed, "{size}");
            }
        }
    }

    #[test]
    fn the_checksum_of_what_is_only_appended_to_goes_on() {
        let file = tempfile::tempfile().unwrap();
        let mut before: Option<Vouched> = None;
        let mut seen = THEN;
        let mut all = Vec::new();
        let read_from = |v: &Vouched| v.from;
        for length in [0, 10, 5000, 5000, 100_000] {
            let more = vec![all.len() as u8; length];
            std::os::unix::fs::FileExt::write_all_at(&file, &more, all.len() as u64).unwrap();
            all.extend(more);
            seen.size = all.len() as u64;
            let now = Vouched::of(file.as_fd(), &seen, true, before.as_ref()).unwrap();
            assert_eq!((read_from(&now), now.crc), (0, crc32c::crc32c(&all)));
            before = Some(now);
        }
        let tail = Vouched::of(file.as_fd(), &seen, false, before.as_ref()).unwrap();
        let start = all.len() - TAIL as usize;
        let crc = crc32c::crc32c(&all[start..]);
        assert_eq!((read_from(&tail), tail.crc), (start as u64, crc));
        file.set_len(MOST_READ * 3).unwrap();
        seen.size = MOST_READ * 3;
        let much = Vouched::of(file.as_fd(), &seen, true, before.as_ref()).unwrap();
        assert_eq!(much.from, seen.size - TAIL, "so much is not read at once");
        // What shrank is read from its beginning.
        seen.size = 10;
        let shrunk = Vouched::of(file.as_fd(), &seen, true, before.as_ref()).unwrap();
        assert_eq!((shrunk.from, shrunk.crc), (0, crc32c::crc32c(&all[..10])));
    }

    #[test]
    fn a_restore_that_was_interrupted_after_the_cut_goes_on() {
        let cut = Seen {
            modified: 70,
            ..THEN
        };
        assert_eq!(verdict(cut, true, true), Verdict::Touched);
        assert!(matches!(verdict(cut, true, false), Verdict::Changed(_)));
    }
}
