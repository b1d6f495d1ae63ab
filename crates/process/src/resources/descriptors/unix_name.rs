//! Names of unix sockets other than listening ones: an abstract name, or a file.
//!
//! An abstract name of a connection whose listening socket is not in the subject is taken while all is
//! checked, by a socket that stands for it until the connection is made ([`UnixName::reserve`]): where
//! somebody else has it, the restore is refused.

use super::context::{About, CheckContext};
use super::inet::holder_of_sockets;
use super::probe::{Probe, failed};
use super::unix_fresh::{UnixKind, name};
use super::unix_listen::{SocketFile, file_type, own, socket_file};
use crate::ProcessError;
use outlive_state_tree::StateNode;
use rustix::fs::FileType;
use rustix::io::Errno;
use rustix::net::{SocketAddrUnix, bind, connect};
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// What a socket is bound to: one of both.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,unix-name-v1")]
pub struct UnixName {
    /// An abstract name.
    pub abstract_name: Option<Vec<u8>>,
    /// A file.
    #[state(child)]
    pub file: Option<SocketFile>,
}

impl UnixName {
    /// The name of a socket, if it has one.
    pub(crate) fn collect(probe: &Probe<'_>) -> Result<Option<Self>, ProcessError> {
        let Some(address) = name(probe)? else {
            return Ok(None);
        };
        if let Some(name) = address.abstract_name() {
            return Ok(Some(Self {
                abstract_name: Some(name.to_vec()),
                file: None,
            }));
        }
        let path = address.path_bytes().unwrap_or_default();
        Ok(Some(Self {
            abstract_name: None,
            file: Some(socket_file(probe, path)?),
        }))
    }

    /// The same; none where its file is gone.
    pub(crate) fn if_found(probe: &Probe<'_>) -> Result<Option<Self>, ProcessError> {
        match Self::collect(probe) {
            Err(ProcessError::Refused(_)) => Ok(None),
            other => other,
        }
    }

    pub(crate) fn address(&self) -> Result<SocketAddrUnix, ProcessError> {
        let made = match (&self.abstract_name, &self.file) {
            (Some(name), None) => SocketAddrUnix::new_abstract_name(name),
            (None, Some(file)) => SocketAddrUnix::new(&file.path[..]),
            _ => Err(Errno::INVAL),
        };
        made.map_err(|_| ProcessError::Image("a unix socket has no usable name".into()))
    }

    /// Whether it is abstract, and its bytes.
    pub(crate) fn key(&self) -> (bool, Vec<u8>) {
        match (&self.abstract_name, &self.file) {
            (Some(name), _) => (true, name.clone()),
            (None, file) => (false, file.as_ref().map_or(Vec::new(), |f| f.path.clone())),
        }
    }

    pub(crate) fn shown(&self) -> String {
        let (is_abstract, bytes) = self.key();
        let mark = if is_abstract { "@" } else { "" };
        format!("{mark}{}", super::probe::show(&bytes))
    }

    /// Who has the name now, as far as it can be found; to be appended to what is said of it.
    pub(crate) fn holder(&self) -> String {
        let table = std::fs::read("/proc/net/unix").unwrap_or_default();
        let (is_abstract, name) = self.key();
        let inodes: Vec<u64> = table
            .split(|byte| *byte == b'\n')
            .filter_map(|line| socket_named(line, is_abstract, &name))
            .collect();
        let holder = holder_of_sockets(&inodes);
        holder.map_or_else(String::new, |(pid, comm)| {
            format!(": process {pid} ({comm})")
        })
    }

    /// Takes an abstract name for one end of a connection, or refuses if somebody else has it.
    pub(crate) fn reserve(
        &self,
        about: &About,
        kind: UnixKind,
        cx: &mut CheckContext<'_>,
    ) -> Result<(), ProcessError> {
        let what = || format!("take the name {} of fd {}", self.shown(), about.number);
        let fail = |errno| failed(cx.request.pid, what(), errno);
        let address = self.address()?;
        let socket = kind.socket().map_err(fail)?;
        match bind(&socket, &address) {
            Ok(()) => cx.hold(about, socket),
            Err(Errno::ADDRINUSE) => {
                let (shown, holder) = (self.shown(), self.holder());
                return Err(cx.refuse(
                    about,
                    format!("somebody else has the name {shown} of this unix socket{holder}"),
                    "end the program that has it, then restore again",
                ));
            }
            Err(errno) => return Err(fail(errno)),
        }
        Ok(())
    }

    /// Whether somebody else has the name, or something else lies in the place of the file.
    pub(crate) fn is_taken(&self, kind: UnixKind) -> Result<bool, ProcessError> {
        let address = self.address()?;
        let Some(file) = &self.file else {
            let attempt = || bind(&kind.socket()?, &address);
            return Ok(attempt().is_err());
        };
        Ok(match file_type(&file.path) {
            Ok(None) => false,
            Ok(Some(FileType::Socket)) => {
                let attempt = || connect(&kind.socket()?, &address);
                attempt() != Err(Errno::CONNREFUSED)
            }
            Ok(Some(_)) | Err(_) => true,
        })
    }

    /// Binds a socket to it, replacing the file that was left behind.
    pub(crate) fn bind(
        &self,
        socket: &OwnedFd,
        created: &mut Vec<PathBuf>,
    ) -> Result<(), ProcessError> {
        let address = self.address()?;
        let fail = |errno: Errno| ProcessError::Kernel {
            pid: std::process::id(),
            what: format!("bind unix socket {}", self.shown()),
            source: errno.into(),
        };
        let Some(file) = &self.file else {
            return bind(socket, &address).map_err(fail);
        };
        match rustix::fs::unlink(&file.path[..]) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(fail(errno)),
        }
        bind(socket, &address).map_err(fail)?;
        created.push(PathBuf::from(OsString::from_vec(file.path.clone())));
        own(file).map_err(fail)
    }

    /// Binds a socket to its file where nobody else has that; otherwise the socket stays without a name.
    pub(crate) fn bind_if_free(
        &self,
        socket: &OwnedFd,
        kind: UnixKind,
        created: &mut Vec<PathBuf>,
    ) {
        if self.is_taken(kind).is_ok_and(|taken| !taken) {
            // The connection works without its name.
            let _ = self.bind(socket, created);
        }
    }
}

/// The inode of the socket in a line of `/proc/net/unix`, if it is bound to this name. Zeros of an
/// abstract name are shown as `@`.
fn socket_named(line: &[u8], is_abstract: bool, name: &[u8]) -> Option<u64> {
    let mut rest = line;
    let mut word = || {
        rest = rest.trim_ascii_start();
        let end = rest.iter().position(|b| *b == b' ').unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        rest = after;
        word
    };
    // Address, references, protocol, flags, type, state.
    for _ in 0..6 {
        word();
    }
    let inode = std::str::from_utf8(word()).ok()?.parse().ok()?;
    let shown = rest.strip_prefix(b" ")?;
    let same = match is_abstract {
        true => shown.strip_prefix(b"@").is_some_and(|shown| {
            let byte = |b: &u8| if *b == 0 { b'@' } else { *b };
            shown.iter().copied().eq(name.iter().map(byte))
        }),
        false => shown == name,
    };
    same.then_some(inode)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_in_the_table_of_the_kernel() {
        let line = b"00000000d5b6a1c4: 00000002 00000000 00010000 0001 01   4711 @a name@with";
        assert_eq!(socket_named(line, true, b"a name\0with"), Some(4711));
        assert_eq!(socket_named(line, false, b"@a name@with"), Some(4711));
        assert_eq!(socket_named(line, true, b"a name"), None);
        for bad in [
            &b""[..],
            b"Num RefCount Protocol",
            b"0: 1 2 3 4 5 6",
            b"0: 1 2 3 4 5 x @a",
        ] {
            assert_eq!(socket_named(bad, true, b"a"), None);
        }
    }
}
