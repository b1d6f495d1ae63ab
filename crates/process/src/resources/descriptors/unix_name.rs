//! Names of unix sockets other than listening ones: an abstract name, or a file.

use super::probe::Probe;
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

    /// Binds a socket to it where nobody else has it; otherwise the socket stays without a name.
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
