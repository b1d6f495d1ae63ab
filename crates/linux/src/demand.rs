//! Memory that is served on demand: `userfaultfd(2)` for missing pages.
//!
//! Whoever touches a page that is not there waits until it is copied in. What the program does to
//! its mappings meanwhile (`fork`, `mremap`, `munmap`, `madvise`) is told as events, and waits
//! until they are read.
//!
//! The same descriptor can track writes ([`crate::userfault`]), since a mapping can be registered with
//! one only: a missing page that is protected has a mark in the page tables, and no scan calls it
//! written; one that comes with its protection is called so once it was written to.
//!
//! When the last descriptor is closed, the kernel fills missing pages with zeros. That must not
//! happen while pages are missing, so a [`Guard`] holds all of them: a process that has its maker's
//! descriptors in common with it. Should the maker end first, it kills the program, and makes every
//! missing page one that cannot be read.
//!
//! # Safety
//! Each ioctl gets a pointer to one live local struct of the size encoded in its number, and
//! addresses of this process only from borrowed slices. The guard makes system calls only, on its
//! own stack and on memory prepared before it was made, so that locks which other threads of its
//! maker hold do not matter.
#![allow(unsafe_code)]

use crate::spawn::{fork_with_files, reap};
use crate::{Errno, last_error};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use rustix::process::{PidfdFlags, getpid, pidfd_open};

const UFFDIO_API: libc::c_ulong = 0xC018_AA3F;
const UFFDIO_REGISTER: libc::c_ulong = 0xC020_AA00;
const UFFDIO_UNREGISTER: libc::c_ulong = 0x8010_AA01;
const UFFDIO_WAKE: libc::c_ulong = 0x8010_AA02;
const UFFDIO_COPY: libc::c_ulong = 0xC028_AA03;
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xC020_AA04;
const UFFDIO_POISON: libc::c_ulong = 0xC020_AA08;
const UFFDIO_WRITEPROTECT: libc::c_ulong = 0xC018_AA06;
const UFFD_API: u64 = 0xAA;
const REGISTER_MODE_MISSING: u64 = 1;
const REGISTER_MODE_WP: u64 = 2;
const COPY_MODE_WP: u64 = 2;
const WRITEPROTECT_MODE_WP: u64 = 1;
const EVENT_FORK: u64 = 1 << 1;
const EVENT_REMAP: u64 = 1 << 2;
const EVENT_REMOVE: u64 = 1 << 3;
const EVENT_UNMAP: u64 = 1 << 6;
const POISON: u64 = 1 << 14;
/// Asynchronous write protection, of missing pages too.
const TRACKING: u64 = 1 | 1 << 12 | 1 << 13 | 1 << 15;
const PAGE: u64 = 4096;

/// Flags for the `userfaultfd` call: close on exec, do not block. Faults of the kernel are wanted
/// too (a `read(2)` into a missing page), which needs `CAP_SYS_PTRACE` or
/// `vm.unprivileged_userfaultfd`.
pub const FLAGS: u64 = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;

/// Serves the missing pages of one address space.
#[derive(Debug)]
pub struct PageServer {
    fd: OwnedFd,
    tracks: bool,
}

/// What a program did, or waits for.
#[derive(Debug)]
pub enum Event {
    /// A page is missing: its address.
    Missing(u64),
    /// A child was made, which has the same pages missing.
    Fork(PageServer),
    /// A mapping moved: from, to, length.
    Moved(u64, u64, u64),
    /// The pages of a range (start, end) were given back, with or without their mapping: they
    /// are not to be served any more.
    Gone(u64, u64),
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    words: [u64; 3],
}

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`, `uffdio_zeropage`, `uffdio_poison`: a range, a mode, and an answer.
#[repr(C)]
struct Ranged {
    start: u64,
    len: u64,
    mode: u64,
    answer: i64,
}

#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

impl PageServer {
    /// Agrees with the kernel on all events, and on tracking writes where that is wanted and the kernel
    /// can (Linux 6.7). [`Errno::INVAL`] where it is too old (Linux 6.6), [`Errno::PERM`] without
    /// `CAP_SYS_PTRACE`.
    pub fn new(fd: OwnedFd, tracking: bool) -> Result<Self, Errno> {
        let events = EVENT_FORK | EVENT_REMAP | EVENT_REMOVE | EVENT_UNMAP | POISON;
        let agree = |features| {
            let mut api = Api {
                api: UFFD_API,
                features,
                ioctls: 0,
            };
            ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api as usize)
        };
        let tracks = tracking && agree(events | TRACKING).is_ok();
        if !tracks {
            agree(events)?;
        }
        Ok(Self { fd, tracks })
    }

    /// Whether it tracks writes, too.
    #[must_use]
    pub fn tracks(&self) -> bool {
        self.tracks
    }

    /// Its missing pages are to be served from now on, and its writes tracked where that was agreed on.
    pub fn register(&self, start: u64, end: u64) -> Result<(), Errno> {
        let tracking = if self.tracks { REGISTER_MODE_WP } else { 0 };
        let mode = REGISTER_MODE_MISSING | tracking;
        self.ranged(UFFDIO_REGISTER, (start, end), mode).map(drop)
    }

    /// These pages, missing or not, count as unwritten from now on.
    pub fn protect(&self, start: u64, end: u64) -> Result<(), Errno> {
        protect(self.fd.as_raw_fd(), (start, end), WRITEPROTECT_MODE_WP)
    }

    /// Its missing pages are zeros from now on.
    pub fn unregister(&self, start: u64, end: u64) -> Result<(), Errno> {
        let mut arg = [start, end - start];
        let at = &raw mut arg as usize;
        ioctl(self.fd.as_raw_fd(), UFFDIO_UNREGISTER, at)
    }

    /// Fills missing pages at `to`, and wakes who waits for them; returns how many bytes of them,
    /// at least one page. They count as written, unless they are `clean`. [`Errno::EXIST`] where the first is there already, [`Errno::AGAIN`] where
    /// an event has to be read first, [`Errno::NOENT`] where nothing is mapped, [`Errno::SRCH`] when
    /// the program has ended.
    pub fn copy(&self, to: u64, bytes: &[u8], clean: bool) -> Result<u64, Errno> {
        let mut arg = Copy {
            to,
            from: bytes.as_ptr() as u64,
            len: bytes.len() as u64,
            mode: if clean { COPY_MODE_WP } else { 0 },
            copied: 0,
        };
        let done = ioctl(self.fd.as_raw_fd(), UFFDIO_COPY, &raw mut arg as usize);
        partly(done, arg.copied)
    }

    /// The same with zeros, which count as written.
    pub fn zero(&self, start: u64, end: u64) -> Result<u64, Errno> {
        unmarked(self.fd.as_raw_fd(), UFFDIO_ZEROPAGE, (start, end))
    }

    /// Wakes who waits for these pages, to look again.
    pub fn wake(&self, start: u64, end: u64) -> Result<(), Errno> {
        wake(self.fd.as_raw_fd(), start, end)
    }

    /// Who touches these missing pages gets `SIGBUS`.
    pub fn poison(&self, start: u64, end: u64) -> Result<u64, Errno> {
        unmarked(self.fd.as_raw_fd(), UFFDIO_POISON, (start, end))
    }

    /// The next event; `None` where there is none.
    pub fn event(&self) -> Result<Option<Event>, Errno> {
        loop {
            let Some(message) = read(self.fd.as_raw_fd())? else {
                return Ok(None);
            };
            let [a, b, c] = message.words;
            return Ok(Some(match message.event {
                0x12 => Event::Missing(b & !(PAGE - 1)),
                0x13 => {
                    // SAFETY: the kernel has just made this descriptor for us.
                    let fd = unsafe { OwnedFd::from_raw_fd(a as u32 as RawFd) };
                    let tracks = self.tracks;
                    Event::Fork(Self { fd, tracks })
                }
                0x14 => Event::Moved(a, b, c),
                0x15 | 0x16 => Event::Gone(a, b),
                _ => continue,
            }));
        }
    }

    fn ranged(&self, number: libc::c_ulong, range: (u64, u64), mode: u64) -> Result<u64, Errno> {
        ranged(self.fd.as_raw_fd(), number, range, mode)
    }
}

impl AsFd for PageServer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn read(fd: RawFd) -> Result<Option<Message>, Errno> {
    let mut message = Message::default();
    let len = size_of::<Message>();
    // SAFETY: message is live and as long as the call is told.
    let n = unsafe { libc::read(fd, (&raw mut message).cast(), len) };
    match usize::try_from(n) {
        Ok(n) if n == len => Ok(Some(message)),
        Ok(_) => Ok(None),
        Err(_) => match last_error() {
            Errno::AGAIN => Ok(None),
            e => Err(e),
        },
    }
}

fn ranged(
    fd: RawFd,
    number: libc::c_ulong,
    (start, end): (u64, u64),
    mode: u64,
) -> Result<u64, Errno> {
    let mut arg = Ranged {
        start,
        len: end - start,
        mode,
        answer: 0,
    };
    let done = ioctl(fd, number, &raw mut arg as usize);
    if number == UFFDIO_REGISTER {
        return done.map(|()| 0);
    }
    partly(done, arg.answer)
}

/// What leaves the mark of a page alone that is missing and protected: that goes first.
fn unmarked(fd: RawFd, number: libc::c_ulong, range: (u64, u64)) -> Result<u64, Errno> {
    match ranged(fd, number, range, 0) {
        // Where nothing is protected it fails again.
        Err(Errno::EXIST) if protect(fd, range, 0).is_ok() => ranged(fd, number, range, 0),
        done => done,
    }
}

fn protect(fd: RawFd, (start, end): (u64, u64), mode: u64) -> Result<(), Errno> {
    let mut arg = [start, end - start, mode];
    ioctl(fd, UFFDIO_WRITEPROTECT, &raw mut arg as usize)
}

/// What was done before an error counts.
fn partly(done: Result<(), Errno>, answer: i64) -> Result<u64, Errno> {
    match (done, u64::try_from(answer)) {
        (_, Ok(bytes)) if bytes > 0 => Ok(bytes),
        (Err(e), _) => Err(e),
        (Ok(()), _) => Err(Errno::AGAIN),
    }
}

fn wake(fd: RawFd, start: u64, end: u64) -> Result<(), Errno> {
    let mut arg = [start, end - start];
    ioctl(fd, UFFDIO_WAKE, &raw mut arg as usize)
}

fn ioctl(fd: RawFd, number: libc::c_ulong, arg: usize) -> Result<(), Errno> {
    // SAFETY: arg is the address of a live struct of the size that number encodes (callers above).
    if unsafe { libc::ioctl(fd, number, arg) } < 0 {
        Err(last_error())
    } else {
        Ok(())
    }
}

/// A process that ends the program if its maker ends first. Dropping it ends it.
#[derive(Debug)]
pub struct Guard {
    process: OwnedFd,
    /// The guard waits at this descriptor, which it has in common with us.
    _maker: OwnedFd,
}

impl Guard {
    /// Makes the guard. `program` are descriptors of the program's processes, which must be kept
    /// as long as the guard.
    ///
    /// # Errors
    /// What `clone3(2)` says.
    pub fn new(program: &[RawFd]) -> Result<Self, Errno> {
        let maker = pidfd_open(getpid(), PidfdFlags::empty())?;
        let ours = maker.as_raw_fd();
        // SAFETY: the child obeys the rule in the module heading.
        let process = unsafe { fork_with_files(|| stand_guard(ours, program)) }?;
        Ok(Self {
            process,
            _maker: maker,
        })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let kill = rustix::process::Signal::KILL;
        let _ = rustix::process::pidfd_send_signal(&self.process, kill);
        let _ = reap(&self.process);
    }
}

/// Descriptors that the guard looks through for those of missing pages.
const DESCRIPTORS: RawFd = 1 << 16;
/// Address spaces that the guard has room for.
const SPACES: usize = 1024;

/// The life of a guard.
fn stand_guard(maker: RawFd, program: &[RawFd]) {
    let all = u64::MAX;
    let none = std::ptr::null_mut::<u64>();
    // SAFETY: live locals of the sizes that the calls take, and numbers.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_BLOCK,
            &raw const all,
            none,
            8,
        );
        libc::setsid();
        libc::prctl(libc::PR_SET_NAME, c"outlive-guard".as_ptr());
        libc::prctl(libc::PR_SET_PDEATHSIG, 0);
    }
    loop {
        let mut ended = [pollfd(maker)];
        poll(&mut ended, -1);
        if ended[0].revents & libc::POLLIN != 0 {
            break;
        }
    }
    for process in program {
        // SAFETY: numbers, and a null pointer for no further information.
        unsafe {
            let none = std::ptr::null_mut::<u8>();
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                *process,
                libc::SIGKILL,
                none,
                0,
            );
        }
    }
    let mut spaces = [-1; SPACES];
    keep_spaces(&mut spaces);
    poison_all(&mut spaces);
}

/// Closes all descriptors but those of missing pages, which it lists.
fn keep_spaces(spaces: &mut [RawFd; SPACES]) {
    const KIND: &[u8] = b"anon_inode:[userfaultfd]";
    let mut count = 0;
    for fd in 0..DESCRIPTORS {
        let mut path = [0u8; 32];
        let (start, digits) = (b"/proc/self/fd/", decimal(fd));
        path[..start.len()].copy_from_slice(start);
        path[start.len()..start.len() + digits.1].copy_from_slice(&digits.0[..digits.1]);
        let mut link = [0u8; 64];
        // SAFETY: path ends in a zero byte; link is live and as long as the call is told.
        let n =
            unsafe { libc::readlink(path.as_ptr().cast(), link.as_mut_ptr().cast(), link.len()) };
        let Ok(n) = usize::try_from(n) else { continue };
        if &link[..n.min(link.len())] == KIND && count < SPACES {
            spaces[count] = fd;
            count += 1;
        } else {
            // SAFETY: this process has nothing to do with its other descriptors.
            unsafe { libc::close(fd) };
        }
    }
    let from = DESCRIPTORS as u32;
    // SAFETY: as above.
    unsafe { libc::syscall(libc::SYS_close_range, from, u32::MAX, 0) };
}

fn decimal(mut number: RawFd) -> ([u8; 10], usize) {
    let mut reversed = [0u8; 10];
    let mut len = 0;
    loop {
        reversed[len] = b'0' + (number % 10) as u8;
        number /= 10;
        len += 1;
        if number == 0 {
            break;
        }
    }
    reversed[..len].reverse();
    (reversed, len)
}

/// Until all processes have ended: whoever touches a missing page ends by `SIGBUS`.
fn poison_all(spaces: &mut [RawFd; SPACES]) {
    loop {
        let mut polled = [pollfd(-1); SPACES];
        let mut count = 0;
        let mut born = [-1; 16];
        let mut new = 0;
        for fd in spaces.iter_mut().filter(|fd| **fd >= 0) {
            while let Ok(Some(message)) = read(*fd) {
                let [a, b, _] = message.words;
                if message.event == 0x12 {
                    let at = b & !(PAGE - 1);
                    if unmarked(*fd, UFFDIO_POISON, (at, at + PAGE)).is_err() {
                        let _ = wake(*fd, at, at + PAGE);
                    }
                } else if message.event == 0x13 {
                    born[new] = a as u32 as RawFd;
                    new += 1;
                    if new == born.len() {
                        break;
                    }
                }
            }
            // Nothing is mapped there; that the program has ended is told first.
            let probe = ranged(*fd, UFFDIO_POISON, (PAGE, 2 * PAGE), 0);
            if probe == Err(Errno::SRCH) {
                // SAFETY: the address space of this descriptor is gone.
                unsafe { libc::close(*fd) };
                *fd = -1;
                continue;
            }
            polled[count] = pollfd(*fd);
            count += 1;
            if new == born.len() {
                break;
            }
        }
        let mut free = spaces.iter_mut().filter(|fd| **fd < 0);
        for fd in &born[..new] {
            if let Some(place) = free.next() {
                *place = *fd;
            }
        }
        if count == 0 && new == 0 {
            return;
        }
        poll(&mut polled[..count], if new > 0 { 0 } else { 50 });
    }
}

fn pollfd(fd: RawFd) -> libc::pollfd {
    libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    }
}

fn poll(fds: &mut [libc::pollfd], timeout: i32) {
    // SAFETY: fds is live and as long as the call is told.
    unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as u64, timeout) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_in_decimal() {
        for number in [0, 7, 10, 65535, i32::MAX] {
            let (digits, len) = decimal(number);
            assert_eq!(&digits[..len], number.to_string().as_bytes());
        }
    }
}
