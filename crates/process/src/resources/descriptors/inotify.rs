//! Inotify instances with their watches.
//!
//! The kernel tells a watched file by its handle, from which its path is found. At the restore the
//! watches are added under their old numbers, last of all, so that the program is not told of what
//! the restore itself does.
//!
//! # What it refuses
//! Events that were not read yet: the kernel shows their number only. A watched file that is
//! deleted, or on a file system which cannot find files by their handles.

use super::Descriptor;
use super::context::{About, Around, CheckContext, CollectContext, RecreateContext, Rewatch};
use super::file::look_up;
use super::probe::{Probe, failed, show};
use crate::ProcessError;
use outlive_linux::inotify::{open_by_handle, set_next_watch};
use outlive_state_tree::StateNode;
use rustix::fs::inotify::{CreateFlags, WatchFlags, add_watch, init};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags};
use rustix::io::Errno;
use std::collections::HashSet;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// A watch.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,inotify-watch-v1")]
pub struct WatchState {
    /// Its number (the watch descriptor).
    pub number: u32,
    /// Which events are reported, and how (`IN_…`).
    pub mask: u32,
    /// The absolute path of the file.
    pub path: Vec<u8>,
}

/// An inotify instance.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,fd-inotify-v1")]
pub struct InotifyState {
    /// Its watches, the newest first.
    #[state(children)]
    pub watches: Vec<WatchState>,
}

/// One line of `fdinfo`.
#[derive(Debug, PartialEq)]
struct Line {
    number: u32,
    mask: u32,
    inode: u64,
    /// Major and minor number of the file system.
    device: (u32, u32),
    handle_type: i32,
    handle: Vec<u8>,
}

/// Reads `inotify wd:X ino:X sdev:X mask:X ignored_mask:X fhandle-bytes:X fhandle-type:X
/// f_handle:X`; all but the handle in hexadecimal.
fn parse(line: &str) -> Option<Line> {
    let field = |wanted: &str| {
        let mut words = line.split_whitespace();
        words.find_map(|word| word.strip_prefix(wanted)?.strip_prefix(':'))
    };
    let number = |wanted| u64::from_str_radix(field(wanted)?, 16).ok();
    let device = u32::try_from(number("sdev")?).ok()?;
    let text = field("f_handle")?.as_bytes();
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    Some(Line {
        number: u32::try_from(number("wd")?).ok()?,
        mask: u32::try_from(number("mask")?).ok()?,
        inode: number("ino")?,
        device: (device >> 20, device & 0xf_ffff),
        handle_type: i32::try_from(number("fhandle-type")?).ok()?,
        handle: text.chunks(2).map(byte).collect::<Option<_>>()?,
    })
}

/// Where the file systems are mounted that have this device number.
fn mounts(device: (u32, u32)) -> Vec<Vec<u8>> {
    let text = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
    let wanted = format!("{}:{}", device.0, device.1);
    let lines = text.split(|&b| b == b'\n');
    let point = |line: &[u8]| {
        let mut words = line.split(|&b| b == b' ').skip(2);
        (words.next()? == wanted.as_bytes()).then_some(())?;
        Some(unescape(words.nth(1)?))
    };
    lines.filter_map(point).collect()
}

/// Takes back `\040` and the like.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail
            .get(..3)
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match octal {
            Some(byte) if first == b'\\' => {
                out.push(byte);
                rest = &tail[3..];
            }
            _ => {
                out.push(first);
                rest = tail;
            }
        }
    }
    out
}

/// The path of a watched file, if one leads to it.
fn find(line: &Line) -> Option<Vec<u8>> {
    mounts(line.device).into_iter().find_map(|point| {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let mount = rustix::fs::open(point, flags, Mode::empty()).ok()?;
        let file = open_by_handle(mount.as_fd(), line.handle_type, &line.handle).ok()?;
        let link = format!("/proc/self/fd/{}", file.as_raw_fd());
        let path = rustix::fs::readlink(link, Vec::new()).ok()?.into_bytes();
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let found = rustix::fs::statx(CWD, &path[..], flags, StatxFlags::INO).ok()?;
        (found.stx_ino == line.inode).then_some(path)
    })
}

impl Descriptor for InotifyState {
    const NAME: &'static str = "inotify";

    fn claims(probe: &Probe<'_>, _: &Around) -> Result<bool, ProcessError> {
        Ok(probe.link.starts_with(b"anon_inode:inotify"))
    }

    fn collect(probe: &Probe<'_>, cx: &mut CollectContext<'_>) -> Result<Self, ProcessError> {
        let waiting = rustix::io::ioctl_fionread(probe.duplicate()?)
            .map_err(|errno| probe.failed("count the events of", errno))?;
        if cx.stopped && waiting != 0 {
            return Err(probe.refuse(
                "inotify events that were not read yet",
                "try again when the program has read them",
            ));
        }
        let mut watches = Vec::new();
        let lines = probe.info.rest.lines();
        for line in lines.filter(|line| line.starts_with("inotify ")) {
            let path = parse(line).and_then(|line| Some((find(&line)?, line)));
            let Some((path, line)) = path else {
                return Err(probe.refuse(
                    format!("inotify watch of a file that cannot be found (`{line}`)"),
                    "have the program remove the watch",
                ));
            };
            watches.push(WatchState {
                number: line.number,
                mask: line.mask,
                path,
            });
        }
        Ok(Self { watches })
    }

    fn check(&self, about: &About, cx: &mut CheckContext<'_>) -> Result<(), ProcessError> {
        let bad = |what: &str| {
            let what = format!("an inotify watch of fd {} {what}", about.number);
            Err(ProcessError::Image(what))
        };
        let mut seen = HashSet::new();
        for watch in &self.watches {
            if watch.number == 0 || i32::try_from(watch.number).is_err() {
                return bad("has an impossible number");
            }
            if !seen.insert(watch.number) {
                return bad("is there twice");
            }
            if !watch.path.starts_with(b"/") || watch.path.contains(&0) {
                return bad("has no path");
            }
            if look_up(&watch.path).is_err() {
                let what = format!("{}, which inotify watches, is gone", show(&watch.path));
                return Err(cx.refuse(about, what, "put it back where it was at the epoch"));
            }
        }
        Ok(())
    }

    fn recreate(&self, about: &About, cx: &mut RecreateContext) -> Result<OwnedFd, ProcessError> {
        let fail = |errno| failed(cx.pid, format!("make inotify fd {}", about.number), errno);
        let instance = init(CreateFlags::CLOEXEC).map_err(fail)?;
        let watcher = rustix::io::fcntl_dupfd_cloexec(&instance, 3).map_err(fail)?;
        cx.rewatches.push(Rewatch {
            instance: watcher,
            state: self.clone(),
        });
        Ok(instance)
    }
}

impl InotifyState {
    /// Adds the watches, the oldest first, so that the next new one gets a number after them.
    pub(crate) fn watch(&self, instance: &OwnedFd, pid: u32) -> Result<(), ProcessError> {
        for watch in self.watches.iter().rev() {
            let add = || {
                let number = i32::try_from(watch.number).map_err(|_| Errno::INVAL)?;
                set_next_watch(instance.as_fd(), number)?;
                let flags = WatchFlags::from_bits_retain(watch.mask) | WatchFlags::DONT_FOLLOW;
                if add_watch(instance, &watch.path[..], flags)? == number {
                    return Ok(());
                }
                // It has become the same file as another one.
                Err(Errno::EXIST)
            };
            add().map_err(|errno| {
                let path = show(&watch.path);
                failed(pid, format!("watch {path} by inotify again"), errno)
            })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn watches_are_read() {
        let text = "inotify wd:1f ino:9e7e sdev:800013 mask:80000fce ignored_mask:0 \
            fhandle-bytes:8 fhandle-type:1 f_handle:7e9e0000640d1b6d";
        let line = Line {
            number: 0x1f,
            mask: 0x8000_0fce,
            inode: 0x9e7e,
            device: (8, 0x13),
            handle_type: 1,
            handle: vec![0x7e, 0x9e, 0, 0, 0x64, 0x0d, 0x1b, 0x6d],
        };
        assert_eq!(parse(text), Some(line));
        assert_eq!(parse("inotify wd:1 ino:9e7e sdev:800013 mask:1"), None);
        assert_eq!(parse(&text.replace("7e9e", "7x9e")), None);
    }

    #[test]
    fn escapes_of_mount_points_are_taken_back() {
        assert_eq!(unescape(br"/a\040b\134c"), br"/a b\c");
        assert_eq!(unescape(br"/a\04"), br"/a\04");
        assert_eq!(unescape(br"/a\999"), br"/a\999");
    }
}
