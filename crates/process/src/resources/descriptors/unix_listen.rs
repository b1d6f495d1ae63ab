//! Unix sockets that listen, under a path or an abstract name.
//!
//! A socket file that the program left behind when it died is replaced, once it is certain that
//! nobody listens there any more. A relative path is bound as the absolute one it stood for.

use super::Descriptor;
use super::context::{About, Around, CheckContext, CollectContext, RecreateContext};
use super::file::look_up;
use super::probe::{Probe, failed, show};
use super::socket_options::SocketOptions;
use super::unix_fresh::{UnixKind, name};
use crate::ProcessError;
use outlive_state_tree::StateNode;
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, StatxFlags, Uid};
use rustix::io::Errno;
use rustix::net::{SocketAddrUnix, bind, connect};
use std::ffi::OsString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// The file of a socket that is bound to a path.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,socket-file-v1")]
pub struct SocketFile {
    /// Its absolute path.
    pub path: Vec<u8>,
    /// Its permissions.
    pub mode: u32,
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
}

/// A listening unix socket.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,fd-unix-listen-v1")]
pub struct UnixListenState {
    /// Its type.
    pub kind: UnixKind,
    /// How many connections may wait to be accepted.
    pub backlog: u32,
    /// Its name, when that is abstract.
    pub abstract_name: Option<Vec<u8>>,
    /// Its file, when it has one.
    #[state(child)]
    pub file: Option<SocketFile>,
    /// What was set on it.
    #[state(child)]
    pub options: SocketOptions,
}

impl UnixListenState {
    fn address(&self) -> Result<SocketAddrUnix, ProcessError> {
        let made = match (&self.abstract_name, &self.file) {
            (Some(name), None) => SocketAddrUnix::new_abstract_name(name),
            (None, Some(file)) => SocketAddrUnix::new(&file.path[..]),
            _ => Err(Errno::INVAL),
        };
        made.map_err(|_| ProcessError::Image("a unix socket has no usable name".into()))
    }

    fn shown(&self) -> String {
        match (&self.abstract_name, &self.file) {
            (Some(name), _) => format!("@{}", show(name)),
            (_, Some(file)) => show(&file.path),
            _ => "?".into(),
        }
    }
}

impl Descriptor for UnixListenState {
    const NAME: &'static str = "listening unix socket";

    fn claims(probe: &Probe<'_>, _: &Around) -> Result<bool, ProcessError> {
        Ok(UnixKind::of(probe)?.is_some() && probe.socket()?.is_some_and(|facts| facts.listens))
    }

    fn collect(probe: &Probe<'_>, cx: &mut CollectContext<'_>) -> Result<Self, ProcessError> {
        let facts = cx.around.unix(probe)?.ok_or_else(|| {
            probe.refuse(
                "unix socket of another network namespace",
                "run outlive in the network namespace of the program",
            )
        })?;
        if facts.waiting.iter().any(|n| cx.around.sockets.contains(n)) {
            return Err(probe.refuse(
                "unix connection within the program that was not accepted yet",
                "try again in a moment",
            ));
        }
        let address = name(probe)?;
        let abstract_name = address
            .as_ref()
            .and_then(|a| a.abstract_name())
            .map(<[u8]>::to_vec);
        let path = address
            .as_ref()
            .and_then(|a| a.path_bytes())
            .map(<[u8]>::to_vec);
        let file = path.map(|path| socket_file(probe, &path)).transpose()?;
        if file.is_none() && abstract_name.is_none() {
            return Err(probe.refuse(
                "unix socket that listens without a name",
                "have the program close it",
            ));
        }
        Ok(Self {
            kind: UnixKind::required(probe)?,
            backlog: facts.backlog,
            abstract_name,
            file,
            options: SocketOptions::collect(probe, cx.memory)?,
        })
    }

    fn check(&self, about: &About, cx: &mut CheckContext<'_>) -> Result<(), ProcessError> {
        let shown = self.shown();
        let fail = |errno| {
            failed(
                cx.request.pid,
                format!("make unix socket fd {}", about.number),
                errno,
            )
        };
        let address = self.address()?;
        let busy = |remedy: &str| {
            Err(cx.refuse(
                about,
                format!("somebody listens on unix socket {shown}"),
                remedy,
            ))
        };
        let socket = self.kind.socket().map_err(fail)?;
        self.options
            .apply_before_bind(&socket)
            .map_err(|(name, errno)| {
                failed(
                    cx.request.pid,
                    format!("set {name} of fd {}", about.number),
                    errno,
                )
            })?;
        let remedy = "end the program that listens there, then restore again";
        let Some(file) = &self.file else {
            // An abstract name leaves nothing on disk: it is taken right now.
            return match bind(&socket, &address) {
                Ok(()) => {
                    cx.hold(about, socket);
                    Ok(())
                }
                Err(Errno::ADDRINUSE) => busy(remedy),
                Err(errno) => Err(fail(errno)),
            };
        };
        match file_type(&file.path) {
            Ok(None) => {}
            Ok(Some(FileType::Socket)) => {
                let probe = self.kind.socket().map_err(fail)?;
                match connect(&probe, &address) {
                    Err(Errno::CONNREFUSED) => {}
                    Ok(()) | Err(Errno::AGAIN) => return busy(remedy),
                    Err(Errno::PROTOTYPE) => return busy(remedy),
                    Err(errno) => return Err(fail(errno)),
                }
            }
            Ok(Some(_)) => {
                let what = format!("unix socket {shown}, in whose place something else is now");
                return Err(cx.refuse(about, what, format!("move {shown} away")));
            }
            Err(errno) => return Err(fail(errno)),
        }
        cx.hold(about, socket);
        Ok(())
    }

    fn recreate(&self, about: &About, cx: &mut RecreateContext) -> Result<OwnedFd, ProcessError> {
        let socket = cx.take(about)?;
        let pid = cx.pid;
        let fail = |what: &str| {
            let what = format!("{what} unix socket {} (fd {})", self.shown(), about.number);
            move |errno| failed(pid, what, errno)
        };
        if let Some(file) = &self.file {
            match rustix::fs::unlink(&file.path[..]) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(fail("remove the old file of")(errno)),
            }
            bind(&socket, &self.address()?).map_err(fail("bind"))?;
            cx.created
                .push(PathBuf::from(OsString::from_vec(file.path.clone())));
            own(file).map_err(fail("set owner and mode of"))?;
        }
        let backlog = i32::try_from(self.backlog).unwrap_or(i32::MAX);
        rustix::net::listen(&socket, backlog).map_err(fail("listen on"))?;
        self.options.apply_last(&socket).map_err(|(name, errno)| {
            failed(cx.pid, format!("set {name} of fd {}", about.number), errno)
        })?;
        Ok(socket)
    }
}

pub(crate) fn own(file: &SocketFile) -> Result<(), Errno> {
    let path = &file.path[..];
    let now = rustix::fs::statx(
        CWD,
        path,
        AtFlags::SYMLINK_NOFOLLOW,
        StatxFlags::BASIC_STATS,
    )?;
    if (now.stx_uid, now.stx_gid) != (file.uid, file.gid) {
        let (uid, gid) = (Uid::from_raw(file.uid), Gid::from_raw(file.gid));
        rustix::fs::chownat(CWD, path, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    }
    rustix::fs::chmod(path, Mode::from_raw_mode(file.mode & 0o777))
}

pub(crate) fn file_type(path: &[u8]) -> Result<Option<FileType>, Errno> {
    match rustix::fs::statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::TYPE) {
        Ok(stat) => Ok(Some(FileType::from_raw_mode(stat.stx_mode.into()))),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// The file that a socket is bound to; `bound` is the path as the program gave it.
pub(crate) fn socket_file(probe: &Probe<'_>, bound: &[u8]) -> Result<SocketFile, ProcessError> {
    let lost = || {
        probe.refuse(
            format!("unix socket whose file {} is gone", show(bound)),
            "have the program listen again",
        )
    };
    // The kernel knows the file, even after it was moved.
    let from_kernel = outlive_linux::sockopt::unix_file(probe.duplicate()?);
    let (file, path) = match from_kernel {
        Ok(file) => {
            let link = format!("/proc/self/fd/{}", file.as_raw_fd());
            let path = rustix::fs::readlink(link, Vec::new())
                .map_err(|errno| probe.failed("find the file of", errno))?;
            (file, path.into_bytes())
        }
        // Without the right to ask, an absolute path is taken at its word.
        Err(_) if bound.starts_with(b"/") => (look_up(bound).map_err(|_| lost())?, bound.to_vec()),
        Err(errno) => return Err(probe.failed("find the file of", errno)),
    };
    let stat = rustix::fs::statx(&file, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)
        .map_err(|errno| probe.failed("look at the file of", errno))?;
    if stat.stx_nlink == 0 || file_type(&path) != Ok(Some(FileType::Socket)) {
        return Err(lost());
    }
    if SocketAddrUnix::new(&path[..]).is_err() {
        return Err(probe.refuse(
            format!(
                "unix socket whose full path {} is too long to be bound",
                show(&path)
            ),
            "have the program use a shorter path",
        ));
    }
    let mode = u32::from(stat.stx_mode) & 0o777;
    Ok(SocketFile {
        path,
        mode,
        uid: stat.stx_uid,
        gid: stat.stx_gid,
    })
}
