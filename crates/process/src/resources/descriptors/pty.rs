//! Pseudo-terminals whose masters the program holds: those of `script`, `tmux`, `sshd`.
//!
//! A terminal is saved with its master: modes, window, whose it is, and which session it controls.
//! At restore it gets its number again where that is free; who has the other side open gets it
//! opened anew, and the leader of the session takes it as its controlling terminal.
//!
//! # What is lost
//! What was written to either side and not read yet: the kernel does not show it, and taking it out
//! and putting it in again could lose it for the program that goes on. It is told of at the restore,
//! but for a line of input that has no end yet. Whether output is stopped (Ctrl-S).

use super::context::{About, Around, CheckContext, CollectContext, RecreateContext, RemoteCall};
use super::probe::{Probe, failed};
use super::table::FdTable;
use super::{Description, Descriptor};
use crate::ProcessError;
use crate::target::Stat;
use outlive_linux::remote::Arg;
use outlive_linux::terminal::{self, MODES, Switch};
use outlive_state_tree::StateNode;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use rustix::termios::{Winsize, tcgetwinsize, tcsetwinsize};
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// How many terminals are opened in search of a number, at most: as many as there can be.
const MOST: u32 = 4096;

/// The master of a pseudo-terminal, with the terminal.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,fd-pty-master-v1")]
pub struct PtyMasterState {
    /// Its number, which its path has.
    pub number: u32,
    /// The other side cannot be opened.
    pub locked: bool,
    /// Packet mode.
    pub packets: bool,
    /// Modes (`struct termios2`).
    pub modes: Vec<u8>,
    /// Rows, columns, width and height in pixels.
    pub window: Vec<u32>,
    /// User, group and permissions of the file.
    pub owner: Vec<u32>,
    /// Leader of the session whose controlling terminal it is.
    pub session: Option<u32>,
    /// The process group in its foreground.
    pub foreground: Option<u32>,
    /// Something was written and not read by the master.
    pub unread: bool,
}

/// The other side of a pseudo-terminal whose master the program holds.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,fd-pty-v1")]
pub struct PtyState {
    /// Its number.
    pub number: u32,
    /// Something was typed and not read.
    pub unread: bool,
}

/// Of a master: its number.
pub(crate) fn number_of_master(probe: &Probe<'_>) -> Option<u32> {
    let number = probe.info.field("tty-index")?;
    number.parse().ok()
}

/// The number of a pseudo-terminal by its device (`makedev(3)`, or a field of `stat`).
fn number_of_device(major: u32, minor: u32) -> Option<u32> {
    (136..=143)
        .contains(&major)
        .then(|| (major - 136) * 256 + minor)
}

/// The controlling terminal of a process, if it is a pseudo-terminal.
fn controlling(pid: u32) -> Option<u32> {
    let tty = Stat::read(pid).ok()?.tty as u32;
    number_of_device(tty >> 8 & 0xfff, tty & 0xff | tty >> 12 & 0xf_ff00)
}

fn number_of(probe: &Probe<'_>) -> Result<Option<u32>, ProcessError> {
    if !probe.link.starts_with(b"/dev/") || probe.has(OFlags::PATH) {
        return Ok(None);
    }
    if probe.file_type()? != FileType::CharacterDevice {
        return Ok(None);
    }
    let stat = probe.stat()?;
    let (major, minor) = (stat.stx_rdev_major, stat.stx_rdev_minor);
    Ok(match (major, minor) {
        (5, 0) => controlling(probe.target.pid),
        _ => number_of_device(major, minor),
    })
}

/// Whether output waits for the master.
fn is_unread(master: BorrowedFd<'_>) -> Result<bool, Errno> {
    let mut fds = [PollFd::new(&master, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default()))?;
    Ok(fds[0].revents().contains(PollFlags::IN))
}

impl Descriptor for PtyMasterState {
    const NAME: &'static str = "pseudo-terminal master";

    fn claims(probe: &Probe<'_>, _: &Around) -> Result<bool, ProcessError> {
        Ok(number_of_master(probe).is_some())
    }

    fn collect(probe: &Probe<'_>, cx: &mut CollectContext<'_>) -> Result<Self, ProcessError> {
        let master = probe.duplicate()?;
        let fail = |errno| probe.failed("look at the terminal of", errno);
        let number = terminal::number(master).map_err(fail)?;
        let window = tcgetwinsize(master).map_err(fail)?;
        let packets = terminal::switch(master, Switch::Packets).map_err(fail)?;
        let path = format!("/dev/pts/{number}");
        let stat = rustix::fs::stat(&path).map_err(fail)?;
        let mut processes = cx.around.processes.iter().copied();
        let led = |pid: u32| Stat::read(pid).is_ok_and(|stat| stat.sid == pid);
        let session = processes.find(|&pid| controlling(pid) == Some(number) && led(pid));
        let foreground = session.and_then(|pid| Stat::read(pid).ok()?.foreground);
        Ok(Self {
            number,
            locked: terminal::switch(master, Switch::Locked).map_err(fail)?,
            packets,
            modes: terminal::modes(master).map_err(fail)?.to_vec(),
            window: [
                window.ws_row,
                window.ws_col,
                window.ws_xpixel,
                window.ws_ypixel,
            ]
            .map(u32::from)
            .to_vec(),
            owner: vec![stat.st_uid, stat.st_gid, stat.st_mode & 0o7777],
            session,
            foreground,
            unread: is_unread(master).map_err(fail)?,
        })
    }

    fn recreate(&self, about: &About, cx: &mut RecreateContext) -> Result<OwnedFd, ProcessError> {
        cx.ptys.get(&self.number).map_or_else(
            || {
                let text = format!("fd {} is of no terminal", about.number);
                Err(ProcessError::Image(text))
            },
            |(master, _)| {
                rustix::io::fcntl_dupfd_cloexec(master, 3)
                    .map_err(|e| failed(cx.pid, "duplicate a terminal", e))
            },
        )
    }

    fn finish(&self, _: &About, table: &FdTable, calls: &mut Vec<RemoteCall>) {
        let Some((leader, number)) = self.session.and_then(|leader| {
            let of_this = |d: &&super::OpenDescription| {
                matches!(&d.object, Description::Pty(side) if side.number == self.number)
            };
            let mut sides = table.descriptions.iter().filter(of_this);
            Some((leader, sides.find_map(|d| d.number_in(leader))?))
        }) else {
            return;
        };
        let mut call = |order: u64, arg, what: &str, tolerate| {
            calls.push(RemoteCall {
                process: leader,
                number: libc::SYS_ioctl,
                args: vec![Arg::Value(number.into()), Arg::Value(order), arg],
                what: format!("{what} terminal {}", self.number),
                tolerate,
            });
        };
        let order = libc::TIOCSCTTY;
        call(order, Arg::Value(0), "taking as its own", &[]);
        if let Some(group) = self.foreground {
            let arg = Arg::In(group.to_ne_bytes().to_vec());
            let order = libc::TIOCSPGRP;
            // A group of which nobody is left.
            let gone = &[libc::ESRCH, libc::EPERM, libc::EINVAL];
            call(order, arg, "choosing the foreground of", gone);
        }
    }

    fn rename(&mut self, name: &dyn Fn(u32) -> u32) {
        self.session = self.session.map(name);
        self.foreground = self.foreground.map(name);
    }
}

impl Descriptor for PtyState {
    const NAME: &'static str = "pseudo-terminal";

    fn claims(probe: &Probe<'_>, around: &Around) -> Result<bool, ProcessError> {
        if around.ptys.is_empty() {
            return Ok(false);
        }
        Ok(number_of(probe)?.is_some_and(|number| around.ptys.contains(&number)))
    }

    fn collect(probe: &Probe<'_>, _: &mut CollectContext<'_>) -> Result<Self, ProcessError> {
        let number = number_of(probe)?;
        let number = number.ok_or_else(|| probe.failed("find the number of", Errno::NOTTY))?;
        // One that was hung up says nothing, and has nothing.
        let unread = rustix::io::ioctl_fionread(probe.duplicate()?).is_ok_and(|bytes| bytes > 0);
        Ok(Self { number, unread })
    }

    fn recreate(&self, about: &About, cx: &mut RecreateContext) -> Result<OwnedFd, ProcessError> {
        let number = cx.ptys.get(&self.number).map(|(_, number)| *number);
        if self.unread {
            cx.notices.push(format!(
                "what was typed and not read yet is lost of the terminal /dev/pts/{}",
                number.unwrap_or(self.number)
            ));
        }
        let path = format!("/dev/pts/{}", number.unwrap_or(self.number));
        let access = OFlags::from_bits_retain(about.flags) & OFlags::ACCMODE;
        let flags = access | OFlags::NOCTTY | OFlags::CLOEXEC;
        rustix::fs::open(&path, flags, Mode::empty())
            .map_err(|e| failed(cx.pid, format!("open {path} for fd {}", about.number), e))
    }

    fn check(&self, _: &About, _: &mut CheckContext<'_>) -> Result<(), ProcessError> {
        Ok(())
    }
}

fn masters(table: &FdTable) -> impl Iterator<Item = &PtyMasterState> {
    table.descriptions.iter().filter_map(|d| match &d.object {
        Description::PtyMaster(state) => Some(state),
        _ => None,
    })
}

/// Locks the terminals again whose other sides could not be opened; comes after all were opened.
pub(crate) fn lock(
    table: &FdTable,
    made: &HashMap<u32, (OwnedFd, u32)>,
    process: u32,
) -> Result<(), ProcessError> {
    for master in masters(table).filter(|master| master.locked) {
        if let Some((fd, number)) = made.get(&master.number) {
            terminal::set_switch(fd.as_fd(), Switch::Locked, true)
                .map_err(|e| failed(process, format!("lock the terminal /dev/pts/{number}"), e))?;
        }
    }
    Ok(())
}

/// Whether a process is to have one of the subject's own terminals as its controlling one.
#[must_use]
pub(crate) fn controls(table: &FdTable, process: u32) -> bool {
    masters(table).any(|master| master.session == Some(process))
}

/// An image is hostile: each terminal has one master, and sizes are what they must be.
pub(crate) fn validate(table: &FdTable) -> Result<(), ProcessError> {
    let bad =
        |number: u32, what: &str| Err(ProcessError::Image(format!("terminal {number} {what}")));
    let mut known = HashMap::new();
    for master in masters(table) {
        let sizes = (master.modes.len(), master.window.len(), master.owner.len());
        let window = master.window.iter().all(|&n| u16::try_from(n).is_ok());
        if sizes != (MODES, 4, 3) || !window {
            return bad(master.number, "makes no sense");
        }
        if known.insert(master.number, ()).is_some() {
            return bad(master.number, "has two masters");
        }
    }
    for description in &table.descriptions {
        if let Description::Pty(side) = &description.object
            && !known.contains_key(&side.number)
        {
            return bad(side.number, "has no master");
        }
    }
    Ok(())
}

/// Makes all terminals of a table: by their numbers of old, the masters and the numbers of now.
pub(crate) fn make(
    table: &FdTable,
    pid: u32,
    notices: &mut Vec<String>,
) -> Result<HashMap<u32, (OwnedFd, u32)>, ProcessError> {
    let mut made = HashMap::new();
    for state in masters(table) {
        let make = || {
            let (master, number) = open(state.number)?;
            state.fill(&master, number)?;
            Ok((master, number))
        };
        let (master, number) =
            make().map_err(|e| failed(pid, format!("make terminal {}", state.number), e))?;
        if number != state.number {
            let was = state.number;
            notices.push(format!(
                "the terminal /dev/pts/{was} is /dev/pts/{number} now"
            ));
        }
        if state.unread {
            let what = "is lost of what was written to the terminal /dev/pts";
            notices.push(format!("what nobody had read {what}/{number}"));
        }
        made.insert(state.number, (master, number));
    }
    Ok(made)
}

fn open(wanted: u32) -> Result<(OwnedFd, u32), Errno> {
    let open = || {
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let master = rustix::fs::open("/dev/ptmx", flags, Mode::empty())?;
        let number = terminal::number(master.as_fd())?;
        Ok::<_, Errno>((master, number))
    };
    // The kernel hands out the lowest that is free.
    let mut lower = Vec::new();
    for _ in 0..MOST {
        match open() {
            Ok(found) if found.1 == wanted => return Ok(found),
            Ok(found) if found.1 < wanted => lower.push(found),
            Ok(_) | Err(_) => break,
        }
    }
    drop(lower);
    open()
}

impl PtyMasterState {
    fn fill(&self, master: &OwnedFd, number: u32) -> Result<(), Errno> {
        let fd = master.as_fd();
        terminal::set_switch(fd, Switch::Locked, false)?;
        let modes = <[u8; MODES]>::try_from(&self.modes[..]).map_err(|_| Errno::INVAL)?;
        terminal::set_modes(fd, &modes)?;
        let [rows, columns, width, height] = self.window[..] else {
            return Err(Errno::INVAL);
        };
        let window = Winsize {
            ws_row: rows as u16,
            ws_col: columns as u16,
            ws_xpixel: width as u16,
            ws_ypixel: height as u16,
        };
        tcsetwinsize(fd, window)?;
        let [user, group, mode] = self.owner[..] else {
            return Err(Errno::INVAL);
        };
        let path = format!("/dev/pts/{number}");
        rustix::fs::chown(&path, Some(Uid::from_raw(user)), Some(Gid::from_raw(group)))?;
        rustix::fs::chmod(&path, Mode::from_raw_mode(mode & 0o777))?;
        terminal::set_switch(fd, Switch::Packets, self.packets)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_numbers() {
        assert_eq!(number_of_device(136, 7), Some(7));
        assert_eq!(number_of_device(137, 1), Some(257));
        assert_eq!(number_of_device(5, 0), None);
    }
}
