//! Terminals and standard streams: what the program shares with whoever started it.
//!
//! A terminal, or the pipe or socket that somebody else holds the other end of at descriptors 0
//! to 2 of the root process, cannot be made again: it is *re-attached*. The restored program gets
//! the standard stream of the restorer that has the same role, and so do the processes that
//! inherited it. A terminal open at other numbers becomes the stream
//! that was the same terminal, else the restorer's controlling terminal.
//!
//! The modes of a terminal are those of the program again ([`terminal_modes`]).
//!
//! `0`, `1` and `2` are re-attached one by one even where they were one description, because they
//! need not be one at the restorer.

use super::context::{About, Around, CheckContext, CollectContext, RecreateContext};
use super::pipe;
use super::probe::{Probe, failed};
use super::table::{Holder, OpenDescription};
use super::terminal_modes::{self, Change};
use super::unix_fresh::is_connected;
use super::{Description, Descriptor};
use crate::ProcessError;
use outlive_state_tree::{StateNode, StateValue};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::AddressFamily;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Which stream of the restorer.
#[derive(StateValue, Debug, Clone, Copy, PartialEq, Eq)]
pub enum StandardStream {
    /// Descriptor 0.
    Input,
    /// Descriptor 1.
    Output,
    /// Descriptor 2.
    Error,
    /// The controlling terminal.
    Terminal,
}

impl StandardStream {
    fn of_number(number: u32) -> Option<Self> {
        match number {
            0 => Some(Self::Input),
            1 => Some(Self::Output),
            2 => Some(Self::Error),
            _ => None,
        }
    }

    fn fd(self) -> Option<BorrowedFd<'static>> {
        match self {
            Self::Input => Some(rustix::stdio::stdin()),
            Self::Output => Some(rustix::stdio::stdout()),
            Self::Error => Some(rustix::stdio::stderr()),
            Self::Terminal => None,
        }
    }
}

/// A stream that is re-attached.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,fd-stream-v1")]
pub struct StreamState {
    /// To which stream of the restorer.
    pub stream: StandardStream,
    /// What it was.
    pub was: Vec<u8>,
    /// Of a terminal: its modes (`struct termios2`).
    pub modes: Option<Vec<u8>>,
}

/// Major numbers of character devices which are terminals: consoles and serial lines (4), the
/// controlling terminal and the console (5), pseudo-terminals (136 to 143), serial over USB.
fn is_terminal(major: u32, minor: u32) -> bool {
    match major {
        // 5:2 is /dev/ptmx, the other side.
        5 => minor < 2,
        4 | 136..=143 | 188 | 204 => true,
        _ => false,
    }
}

fn is_terminal_probe(probe: &Probe<'_>) -> Result<bool, ProcessError> {
    if !probe.link.starts_with(b"/dev/") || probe.has(OFlags::PATH) {
        return Ok(false);
    }
    let stat = probe.stat()?;
    Ok(probe.file_type()? == FileType::CharacterDevice
        && is_terminal(stat.stx_rdev_major, stat.stx_rdev_minor))
}

impl Descriptor for StreamState {
    const NAME: &'static str = "standard stream or terminal";
    const SETS_FLAGS: bool = false;

    fn claims(probe: &Probe<'_>, around: &Around) -> Result<bool, ProcessError> {
        if is_terminal_probe(probe)? {
            return Ok(true);
        }
        if around.same_stream(probe).is_none() || probe.has(OFlags::PATH) {
            return Ok(false);
        }
        if probe.link.starts_with(b"pipe:[") {
            // A pipe that nobody writes to any more is at its end, wherever it came from.
            return Ok(!around.both_ends(probe) && !pipe::is_abandoned(probe)?);
        }
        if let Some(socket) = probe.socket()? {
            // A unix socket to a supervisor or a log; connected, and its peer is not ours.
            return Ok(socket.family == AddressFamily::UNIX
                && !socket.listens
                && is_connected(probe)?
                && !is_inside(probe, around));
        }
        let named = probe.has_path() && probe.file_type()? == FileType::Fifo;
        Ok(named && !around.both_ends(probe))
    }

    fn collect(probe: &Probe<'_>, cx: &mut CollectContext<'_>) -> Result<Self, ProcessError> {
        let stream = cx
            .around
            .same_stream(probe)
            .and_then(StandardStream::of_number)
            .unwrap_or(StandardStream::Terminal);
        Ok(Self {
            stream,
            was: probe.link.clone(),
            modes: if is_terminal_probe(probe)? {
                terminal_modes::read(probe.duplicate()?)
            } else {
                None
            },
        })
    }

    fn check(&self, about: &About, cx: &mut CheckContext<'_>) -> Result<(), ProcessError> {
        let missing = |what: &str, remedy: &str| Err(cx.refuse(about, what, remedy));
        match self.stream.fd() {
            Some(fd) => match rustix::io::fcntl_getfd(fd) {
                Ok(_) => Ok(()),
                Err(_) => missing(
                    "standard stream which the restorer does not have",
                    "restore with standard input, output and error open",
                ),
            },
            None => match open_terminal() {
                Ok(fd) => {
                    cx.hold(about, fd);
                    Ok(())
                }
                Err(_) => missing(
                    "terminal, but the restorer has none",
                    "restore from within a terminal",
                ),
            },
        }
    }

    fn recreate(&self, about: &About, cx: &mut RecreateContext) -> Result<OwnedFd, ProcessError> {
        let Some(stream) = self.stream.fd() else {
            let terminal = cx.take(about)?;
            self.change_modes(&terminal, cx);
            return Ok(terminal);
        };
        let attach = || {
            let fd = rustix::io::fcntl_dupfd_cloexec(stream, 3)?;
            // A program which waits with poll and must not block would hang.
            let flags = rustix::fs::fcntl_getfl(&fd)?;
            let wanted = OFlags::from_bits_retain(about.flags) & OFlags::NONBLOCK;
            if !flags.contains(wanted) {
                rustix::fs::fcntl_setfl(&fd, flags | wanted)?;
            }
            Ok(fd)
        };
        let attached = attach().map_err(|errno: Errno| {
            failed(
                cx.pid,
                format!("re-attach the stream of fd {}", about.number),
                errno,
            )
        })?;
        self.change_modes(&attached, cx);
        Ok(attached)
    }
}

impl StreamState {
    /// The first terminal decides: streams are those of one restorer.
    fn change_modes(&self, fd: &OwnedFd, cx: &mut RecreateContext) {
        if let (Some(modes), None) = (&self.modes, &cx.modes) {
            cx.modes = Change::prepare(fd.as_fd(), modes);
        }
    }
}

/// Whether the peer of a unix socket is in the subject: then it is no stream to the outside. Where
/// the kernel does not tell, the outside is assumed.
fn is_inside(probe: &Probe<'_>, around: &Around) -> bool {
    let facts = around.unix(probe).ok().flatten();
    facts
        .and_then(|facts| facts.peer)
        .is_some_and(|peer| around.sockets.contains(&peer))
}

fn open_terminal() -> Result<OwnedFd, Errno> {
    rustix::fs::open("/dev/tty", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
}

/// Adds a description to the list, one per standard stream of the root process if it is several.
/// Another process' descriptor goes with the stream of its own number.
pub(crate) fn split(description: OpenDescription, root: u32, list: &mut Vec<OpenDescription>) {
    let Description::Stream(state) = &description.object else {
        list.push(description);
        return;
    };
    let holders = &description.holders;
    let streams: Vec<u32> = holders
        .iter()
        .filter(|h| h.process == root && h.number < 3)
        .map(|h| h.number)
        .collect();
    // The further descriptors go with the output if there is one.
    let main = streams.iter().find(|&&n| n == 1).or(streams.first());
    let Some(&main) = main else {
        list.push(description);
        return;
    };
    let role = |holder: &Holder| match holder.number {
        number if streams.contains(&number) => number,
        _ => main,
    };
    for &number in &streams {
        let stream = StandardStream::of_number(number).unwrap_or(state.stream);
        list.push(OpenDescription {
            holders: holders
                .iter()
                .copied()
                .filter(|holder| role(holder) == number)
                .collect(),
            flags: description.flags,
            owner: description.owner.clone(),
            locks: description.locks.clone(),
            object: Description::Stream(StreamState {
                stream,
                was: state.was.clone(),
                modes: state.modes.clone(),
            }),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: u32 = 10;

    fn described(places: &[(u32, u32)]) -> OpenDescription {
        let state = StreamState {
            stream: StandardStream::Input,
            was: b"/dev/pts/0".to_vec(),
            modes: None,
        };
        OpenDescription {
            holders: places
                .iter()
                .map(|&(process, number)| Holder {
                    process,
                    number,
                    close_on_exec: false,
                })
                .collect(),
            flags: 2,
            owner: None,
            locks: vec![],
            object: Description::Stream(state),
        }
    }

    fn split_places(places: &[(u32, u32)]) -> Vec<Vec<(u32, u32)>> {
        let mut list = Vec::new();
        split(described(places), ROOT, &mut list);
        list.into_iter()
            .map(|d| d.holders.iter().map(|h| (h.process, h.number)).collect())
            .collect()
    }

    fn split_numbers(numbers: &[u32]) -> Vec<Vec<u32>> {
        let places: Vec<_> = numbers.iter().map(|&n| (ROOT, n)).collect();
        let numbers = |list: Vec<(u32, u32)>| list.into_iter().map(|(_, n)| n).collect();
        split_places(&places).into_iter().map(numbers).collect()
    }

    #[test]
    fn streams_of_children_go_with_those_of_the_root() {
        let child = 11;
        assert_eq!(
            split_places(&[(ROOT, 1), (ROOT, 2), (child, 0), (child, 2)]),
            [vec![(ROOT, 1), (child, 0)], vec![(ROOT, 2), (child, 2)]]
        );
        assert_eq!(
            split_places(&[(child, 0), (child, 1)]),
            [vec![(child, 0), (child, 1)]]
        );
    }

    #[test]
    fn standard_streams_are_re_attached_one_by_one() {
        assert_eq!(split_numbers(&[0, 1, 2]), [vec![0], vec![1], vec![2]]);
        assert_eq!(split_numbers(&[0, 2, 9]), [vec![0, 9], vec![2]]);
        assert_eq!(split_numbers(&[1, 7, 8]), [vec![1, 7, 8]]);
        assert_eq!(split_numbers(&[7, 8]), [vec![7, 8]]);
    }

    #[test]
    fn terminals_are_told_from_other_devices() {
        assert!(is_terminal(136, 5) && is_terminal(5, 0) && is_terminal(4, 64));
        assert!(!is_terminal(5, 2) && !is_terminal(1, 3) && !is_terminal(10, 200));
    }
}
