//! What can be learned about one descriptor of another process, each thing at most once.
//!
//! Reading `fdinfo` and the link under `/proc/PID/fd` is enough for most kinds; the rest is looked
//! up when a kind asks for it.

use super::inet::tcp_state;
use super::socket_options::SocketOptions;
use crate::error::{ProcessError, Refusal};
use crate::procfs::Kept;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Statx, StatxFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, sockopt};
use rustix::process::{ForeignRawFd, PidfdGetfdFlags, pidfd_getfd};
use std::cell::OnceCell;
use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// `O_CLOEXEC` as `fdinfo` shows it: the only flag there that belongs to the number.
pub(crate) const CLOEXEC: u32 = OFlags::CLOEXEC.bits();

/// `IPPROTO_TCP`
const TCP: u32 = 6;

/// A process whose descriptors are collected. It is stopped, or they may vanish meanwhile.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// Its ID.
    pub pid: u32,
    /// Its name (`comm`), for messages.
    pub program: &'a str,
    /// A pidfd of it.
    pub pidfd: BorrowedFd<'a>,
    /// Descriptor numbers that are not the program's own and are left out.
    pub ignore: &'a [u32],
}

impl Target<'_> {
    /// A refusal that names a descriptor.
    pub(crate) fn refuse(
        &self,
        number: u32,
        what: impl Into<String>,
        remedy: impl Into<String>,
    ) -> ProcessError {
        ProcessError::Refused(vec![Refusal {
            pid: self.pid,
            program: self.program.to_owned(),
            place: format!("fd {number}"),
            what: what.into(),
            remedy: remedy.into(),
        }])
    }
}

/// The error of a call about process `pid`, with what was tried.
pub(crate) fn failed(pid: u32, what: impl Into<String>, errno: Errno) -> ProcessError {
    let what = what.into();
    match errno {
        Errno::PERM | Errno::ACCESS => ProcessError::NotPermitted {
            pid,
            what: format!("{what} ({errno})"),
            remedy: "run outlive as root, or as the user whom this belongs to".into(),
        },
        Errno::SRCH => ProcessError::Gone {
            pid,
            what: format!("ended during: {what}"),
        },
        errno => ProcessError::Kernel {
            pid,
            what,
            source: errno.into(),
        },
    }
}

/// `/proc/PID/fdinfo/N`, taken apart.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct FdInfo {
    /// The file position.
    pub position: i64,
    /// `O_…` flags, with the number's own `O_CLOEXEC`.
    pub flags: u32,
    /// The mount.
    pub mount: u64,
    /// The inode number.
    pub inode: u64,
    /// The lines that depend on the kind.
    pub rest: String,
}

impl FdInfo {
    /// Reads the text; `None` when it is not of the known form.
    #[must_use]
    pub fn parse(text: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(text).ok()?;
        let mut info = Self::default();
        let mut seen = 0;
        let mut rest = text;
        while seen < 4 {
            let (line, tail) = rest.split_once('\n')?;
            let (key, value) = line.split_once(':')?;
            let value = value.trim();
            match key {
                "pos" => info.position = value.parse().ok()?,
                "flags" => info.flags = u32::from_str_radix(value, 8).ok()?,
                "mnt_id" => info.mount = value.parse().ok()?,
                "ino" => info.inode = value.parse().ok()?,
                _ => return None,
            }
            seen += 1;
            rest = tail;
        }
        info.rest = rest.to_owned();
        Some(info)
    }

    /// The kind's own lines as key and value.
    pub fn lines(&self) -> impl Iterator<Item = (&str, &str)> {
        self.rest.lines().filter_map(|line| {
            let (key, value) = line.split_once(':')?;
            Some((key.trim(), value.trim()))
        })
    }

    /// The value of one of the kind's own lines.
    #[must_use]
    pub fn field(&self, key: &str) -> Option<&str> {
        self.lines()
            .find(|&(k, _)| k == key)
            .map(|(_, value)| value)
    }

    /// The flags that belong to the open file description.
    #[must_use]
    pub fn status(&self) -> u32 {
        self.flags & !CLOEXEC
    }
}

/// The directories of a process under `/proc` that hold its descriptors.
#[derive(Debug)]
pub(crate) struct ProcDirs {
    pub(crate) links: OwnedFd,
    pub(crate) infos: OwnedFd,
}

impl ProcDirs {
    pub(crate) fn open(pid: u32) -> Result<Self, ProcessError> {
        let open = |name: &str| {
            let path = format!("/proc/{pid}/{name}");
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            rustix::fs::open(&path, flags, Mode::empty()).map_err(|errno| match errno {
                Errno::NOENT => ProcessError::Gone {
                    pid,
                    what: "there is no such process".into(),
                },
                errno => failed(pid, format!("open {path}"), errno),
            })
        };
        Ok(Self {
            links: open("fd")?,
            infos: open("fdinfo")?,
        })
    }
}

/// What of a socket never changes: family, type, protocol.
pub(crate) type SocketSort = (AddressFamily, SocketType, u32);

/// What a socket is.
#[derive(Clone, Copy, Debug)]
pub struct SocketFacts {
    /// `AF_…`.
    pub family: AddressFamily,
    /// `SOCK_…`.
    pub kind: SocketType,
    /// `IPPROTO_…`, 0 for none.
    pub protocol: u32,
    /// Whether it listens.
    pub listens: bool,
    /// The state of a TCP connection, as in `TCP_INFO`; `None` for every other socket.
    pub tcp_state: Option<u8>,
}

/// One descriptor of the target.
#[derive(Debug)]
pub struct Probe<'a> {
    /// The process.
    pub target: &'a Target<'a>,
    /// The lowest number of the open file description in the first process that holds it.
    pub number: u32,
    /// What `/proc/PID/fd/N` leads to, as the kernel prints it.
    pub link: Vec<u8>,
    /// What `/proc/PID/fdinfo/N` says.
    pub info: FdInfo,
    dirs: &'a ProcDirs,
    stat: OnceCell<Statx>,
    duplicate: OnceCell<OwnedFd>,
    socket: OnceCell<SocketFacts>,
    /// The options of the socket, all of them.
    pub(crate) options: OnceCell<SocketOptions>,
    /// What is known of the socket from earlier epochs.
    sort: Option<SocketSort>,
}

impl<'a> Probe<'a> {
    /// Reads link and `fdinfo`; `None` when the descriptor has been closed meanwhile.
    pub(crate) fn read(
        target: &'a Target<'a>,
        dirs: &'a ProcDirs,
        number: u32,
        file: &mut Option<Kept>,
        buffer: &mut Vec<u8>,
    ) -> Result<Option<Self>, ProcessError> {
        let pid = target.pid;
        let name = number.to_string();
        let link = match rustix::fs::readlinkat(&dirs.links, &name, Vec::new()) {
            Ok(link) => link.into_bytes(),
            Err(Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(failed(pid, format!("read the link of fd {number}"), errno)),
        };
        let info = match read_info(dirs, &name, file, buffer) {
            Ok(length) => FdInfo::parse(&buffer[..length]),
            Err(Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(failed(pid, format!("read fdinfo of fd {number}"), errno)),
        };
        let info = info.ok_or_else(|| ProcessError::Kernel {
            pid,
            what: format!("fdinfo of fd {number} has an unknown form"),
            source: Errno::PROTO.into(),
        })?;
        Ok(Some(Self {
            target,
            number,
            link,
            info,
            dirs,
            stat: OnceCell::new(),
            duplicate: OnceCell::new(),
            socket: OnceCell::new(),
            options: OnceCell::new(),
            sort: None,
        }))
    }

    /// Takes note of what is known of a socket from earlier epochs, by inode.
    pub(crate) fn remember(&mut self, sorts: &HashMap<u64, SocketSort>) {
        if self.link.starts_with(b"socket:[") {
            self.sort = sorts.get(&self.info.inode).copied();
        }
    }

    /// What is to be known of a socket at later epochs, where it was asked for.
    pub(crate) fn sort(&self) -> Option<(u64, SocketSort)> {
        let facts = self.socket.get()?;
        let sort = (facts.family, facts.kind, facts.protocol);
        Some((self.info.inode, sort))
    }

    /// Learns what will be asked for in any case. What fails will fail again when it is asked for.
    pub(crate) fn look_ahead(&self) {
        if self.has_path() {
            let _ = self.stat();
        } else {
            SocketOptions::look_ahead(self);
        }
    }

    /// Process and number.
    pub(crate) fn place(&self) -> (u32, u32) {
        (self.target.pid, self.number)
    }

    /// The link as text, for messages.
    #[must_use]
    pub fn shown(&self) -> String {
        show(&self.link)
    }

    /// What `fdinfo` says by now.
    ///
    /// # Errors
    /// What `open(2)` and `read(2)` say.
    pub(crate) fn info_now(&self) -> Result<FdInfo, ProcessError> {
        let mut buffer = Vec::new();
        let length = read_info(self.dirs, &self.number.to_string(), &mut None, &mut buffer)
            .map_err(|errno| self.failed("read fdinfo of", errno))?;
        FdInfo::parse(&buffer[..length])
            .ok_or_else(|| self.failed("understand fdinfo of", Errno::PROTO))
    }

    /// `O_RDONLY`, `O_WRONLY` or `O_RDWR`.
    #[must_use]
    pub fn access(&self) -> u32 {
        self.info.flags & OFlags::ACCMODE.bits()
    }

    /// Whether all of these `O_…` flags are set.
    #[must_use]
    pub fn has(&self, flags: OFlags) -> bool {
        self.info.flags & flags.bits() == flags.bits()
    }

    /// The object's `statx`.
    ///
    /// # Errors
    /// What `statx(2)` says.
    pub fn stat(&self) -> Result<&Statx, ProcessError> {
        if let Some(stat) = self.stat.get() {
            return Ok(stat);
        }
        let mask = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
        let stat = rustix::fs::statx(
            &self.dirs.links,
            self.number.to_string(),
            AtFlags::NO_AUTOMOUNT,
            mask,
        )
        .map_err(|errno| self.failed("look at", errno))?;
        Ok(self.stat.get_or_init(|| stat))
    }

    /// What sort of file the object is.
    ///
    /// # Errors
    /// What `statx(2)` says.
    pub fn file_type(&self) -> Result<FileType, ProcessError> {
        Ok(FileType::from_raw_mode(self.stat()?.stx_mode.into()))
    }

    /// Whether it has a path: everything else has a link such as `socket:[123]`.
    #[must_use]
    pub fn has_path(&self) -> bool {
        self.link.starts_with(b"/")
    }

    /// A duplicate of it in this process; it shares the open file description with the target.
    ///
    /// # Errors
    /// What `pidfd_getfd(2)` says.
    pub fn duplicate(&self) -> Result<BorrowedFd<'_>, ProcessError> {
        if let Some(fd) = self.duplicate.get() {
            return Ok(fd.as_fd());
        }
        let fd = self.another_duplicate()?;
        Ok(self.duplicate.get_or_init(|| fd).as_fd())
    }

    /// A duplicate that the caller keeps.
    ///
    /// # Errors
    /// What `pidfd_getfd(2)` says.
    pub fn another_duplicate(&self) -> Result<OwnedFd, ProcessError> {
        let flags = PidfdGetfdFlags::empty();
        pidfd_getfd(self.target.pidfd, self.number as ForeignRawFd, flags)
            .map_err(|errno| self.failed("duplicate", errno))
    }

    /// Opens the object anew, with an open file description of our own.
    ///
    /// # Errors
    /// What `open(2)` says.
    pub fn reopen(&self, flags: OFlags) -> Result<OwnedFd, Errno> {
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        rustix::fs::openat(
            &self.dirs.links,
            self.number.to_string(),
            flags,
            Mode::empty(),
        )
    }

    /// What the socket is; `None` when it is no socket.
    ///
    /// # Errors
    /// What `getsockopt(2)` says.
    pub fn socket(&self) -> Result<Option<&SocketFacts>, ProcessError> {
        if !self.link.starts_with(b"socket:[") {
            return Ok(None);
        }
        if self.socket.get().is_none() {
            let fd = self.duplicate()?;
            let facts = || socket_facts(fd, self.sort);
            let facts = facts().map_err(|errno| self.failed("read options of", errno))?;
            let _ = self.socket.set(facts);
        }
        Ok(self.socket.get())
    }

    /// A refusal that names this descriptor.
    pub fn refuse(&self, what: impl Into<String>, remedy: impl Into<String>) -> ProcessError {
        self.target.refuse(self.number, what, remedy)
    }

    /// The error of a call about this descriptor.
    pub(crate) fn failed(&self, what: &str, errno: Errno) -> ProcessError {
        let text = format!("{what} fd {} ({})", self.number, self.shown());
        failed(self.target.pid, text, errno)
    }

    /// A number from one of the kind's own `fdinfo` lines.
    pub(crate) fn number_field(&self, key: &str, radix: u32) -> Result<u64, ProcessError> {
        let found = self
            .info
            .field(key)
            .and_then(|text| u64::from_str_radix(text, radix).ok());
        found.ok_or_else(|| self.failed(&format!("find `{key}` in fdinfo of"), Errno::PROTO))
    }
}

fn socket_facts(fd: BorrowedFd<'_>, known: Option<SocketSort>) -> Result<SocketFacts, Errno> {
    let (family, kind, protocol) = match known {
        Some(sort) => sort,
        None => (
            sockopt::socket_domain(fd)?,
            sockopt::socket_type(fd)?,
            sockopt::socket_protocol(fd)?.map_or(0, |p| p.as_raw().get()),
        ),
    };
    let inet = matches!(family, AddressFamily::INET | AddressFamily::INET6);
    let mut facts = SocketFacts {
        family,
        kind,
        protocol,
        listens: false,
        tcp_state: None,
    };
    if inet && kind == SocketType::STREAM && protocol == TCP {
        facts.tcp_state = outlive_linux::sockopt::tcp_info(fd)?.map(|info| info.state);
        facts.listens = facts.tcp_state == Some(tcp_state::LISTEN);
    } else {
        facts.listens = sockopt::socket_acceptconn(fd)?;
    }
    Ok(facts)
}

/// Bytes of a path as text for messages.
pub(crate) fn show(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

/// Texts of `fdinfo`, read through files that stay open from epoch to epoch:
/// reading a number again is four times as fast as opening its file again.
///
/// Such a file belongs to the number, not to what is open there: it holds nothing of the
/// program's, and tells when the number is closed.
#[derive(Debug, Default)]
pub(crate) struct InfoFiles {
    open: HashMap<(u32, u32), Kept>,
}

impl InfoFiles {
    /// That of a number, if it is open.
    pub(crate) fn take(&mut self, place: (u32, u32)) -> Option<Kept> {
        self.open.remove(&place)
    }

    /// Keeps what was opened for these numbers, and what was taken and is still open.
    pub(crate) fn put(&mut self, place: (u32, u32), file: Option<Kept>) {
        self.open.extend(file.map(|file| (place, file)));
    }

    /// Forgets processes that are not among these any more.
    pub(crate) fn retain(&mut self, processes: &HashSet<u32>) {
        self.open
            .retain(|(process, _), _| processes.contains(process));
    }
}

/// Reads the text of a descriptor; `ENOENT` when it is not open.
fn read_info(
    dirs: &ProcDirs,
    name: &str,
    file: &mut Option<Kept>,
    buffer: &mut Vec<u8>,
) -> Result<usize, Errno> {
    if let Some(kept) = file {
        match read_whole(kept.file(), buffer) {
            Ok(length) => return Ok(length),
            // The file may be that of an earlier process with the same ID.
            Err(_) => *file = None,
        }
    }
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let opened = rustix::fs::openat(&dirs.infos, name, flags, Mode::empty())?;
    let length = read_whole(&opened, buffer)?;
    *file = Kept::new(opened);
    Ok(length)
}

fn read_whole(file: &OwnedFd, buffer: &mut Vec<u8>) -> Result<usize, Errno> {
    buffer.resize(buffer.len().max(1024), 0);
    loop {
        match rustix::io::pread(file, &mut buffer[..], 0) {
            // The text is one record, which the kernel hands out as far as there is room.
            Ok(n) if n < buffer.len() => return Ok(n),
            Ok(_) => buffer.resize(buffer.len() * 2, 0),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVENTFD: &[u8] = b"pos:\t0\nflags:\t02000002\nmnt_id:\t17\nino:\t1038\n\
        eventfd-count:                5\neventfd-id: 1\neventfd-semaphore: 0\n";

    #[test]
    fn fdinfo_is_taken_apart() {
        let info = FdInfo::parse(EVENTFD).unwrap();
        assert_eq!((info.position, info.mount, info.inode), (0, 17, 1038));
        assert_eq!(info.flags, 0o2_000_002);
        assert_eq!(info.status(), 2);
        assert_eq!(info.field("eventfd-count"), Some("5"));
        assert_eq!(info.field("eventfd"), None);
        assert_eq!(info.lines().count(), 3);
    }

    #[test]
    fn text_of_another_form_is_not_understood() {
        for cut in 0..40 {
            assert_eq!(FdInfo::parse(&EVENTFD[..cut]), None, "first {cut} bytes");
        }
        assert_eq!(
            FdInfo::parse(b"pos:\t0\nflags:\t9\nmnt_id:\t1\nino:\t1\n"),
            None
        );
        assert_eq!(
            FdInfo::parse(b"pos:\t0\nflags:\t1\nmnt_id:\t1\nother:\t1\n"),
            None
        );
    }
}
