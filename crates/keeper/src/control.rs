//! The conversation with a running keeper: one line of JSON each way over a unix socket.
//!
//! The socket `control` lies in the subject's directory (0700) with mode 0600, so that whoever may
//! read the epochs, and nobody else, may command the keeper. It is reached through the directory's
//! descriptor, because the path of a store may be longer than a socket address can be.
//!
//! # Rules
//! - A request is `{"op":"status"}`, `{"op":"checkpoint"}`, `{"op":"stop"}`, `{"op":"power"}`,
//!   `{"op":"power-back"}` or `{"op":"prune"}` and a newline, at most [`LONGEST_REQUEST`] bytes; anything else is answered with a failure.
//! - A client never holds up the keeper: its bytes are taken as they come, and at most
//!   [`MOST_CLIENTS`] are heard at a time.

use crate::KeeperError;
use crate::budget::keeping::{BudgetStatus, Events};
use crate::budget::model::Figures;
use crate::epoch::Taken;
use crate::power::PowerReport;
use crate::procfs::Pids;
use crate::retention::Keep;
use crate::subject::Capture;
use crate::table::Totals;
use crate::upkeep::Pruned;
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};
use std::fs::Permissions;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Longest request, bytes.
pub const LONGEST_REQUEST: usize = 4096;
/// Clients heard at a time; further ones wait in the socket's queue.
pub const MOST_CLIENTS: usize = 16;
/// Longest reply, bytes.
const LONGEST_REPLY: u64 = 1 << 20;

/// What a keeper can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// How things stand.
    Status,
    /// Take an epoch now; the program runs on.
    Checkpoint,
    /// Take a final epoch and end the program.
    Stop,
    /// The power fails.
    Power {
        /// A simulation: after so many microseconds the mains are back.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        mains_back_after_us: Option<u64>,
        /// When this was sent, nanoseconds of the monotonic clock.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        at_ns: Option<u64>,
    },
    /// The mains are back.
    PowerBack,
    /// Remove epochs.
    Prune {
        /// What stays; without it what the subject is kept with.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        keep: Option<Keep>,
    },
}

impl Request {
    /// The power fails, as far as is known.
    pub const POWER: Self = Self::Power {
        mains_back_after_us: None,
        at_ns: None,
    };
}

/// What a keeper answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// How things stand.
    Status(Box<Status>),
    /// It was heard, and is all there is to it.
    Heard,
    /// The epoch that was asked for is durable.
    Taken {
        /// Its figures.
        epoch: Taken,
        /// The process.
        #[serde(flatten)]
        pids: Pids,
        /// What came of the power event, where it was one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        power: Option<PowerReport>,
    },
    /// What is not wanted is gone.
    Pruned(Pruned),
    /// It could not be done.
    Failed {
        /// Why.
        error: String,
        /// The exit code for it.
        exit: u8,
    },
}

impl Reply {
    /// What this is to who asked for something else: the failure that it tells of, or no answer at all.
    #[must_use]
    pub fn into_error(self) -> KeeperError {
        match self {
            Self::Failed { error, exit } => KeeperError::Told {
                message: error,
                exit,
            },
            _ => KeeperError::Other("the keeper answered rubbish".into()),
        }
    }
}

/// How things stand with a subject that is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The process.
    #[serde(flatten)]
    pub pids: Pids,
    /// The keeper.
    pub keeper_pid: u32,
    /// Number of the newest committed epoch; 0 where there is none.
    pub epoch: u64,
    /// Epochs that this keeper committed.
    pub committed: u64,
    /// Time between epochs, nanoseconds.
    pub every_ns: u64,
    /// Since when this keeper keeps it, nanoseconds since the Unix epoch.
    pub since_ns: u64,
    /// Stop time of the last epoch, microseconds.
    pub last_stop_us: Option<u64>,
    /// Median of the last stops, microseconds.
    pub median_stop_us: Option<u64>,
    /// 99th percentile of the last stops, microseconds.
    pub p99_stop_us: Option<u64>,
    /// When the last epoch was taken, nanoseconds since the Unix epoch.
    pub last_time_ns: Option<u64>,
    /// Epochs that failed.
    pub failures: u64,
    /// Epochs that were given up because the program would have been stopped for too long.
    pub abandoned: u64,
    /// Why the last of them failed.
    pub last_failure: Option<String>,
    /// The last epoch failed because its medium is full: there is none until there is space.
    pub full: bool,
    /// How memory is captured.
    pub capture: Capture,
    /// How written pages are found: `write-protect`, `off` (everything is copied, as was asked
    /// for), `full-copy: why`, or `none yet` (`none until all its memory is there`).
    pub tracking: String,
    /// Bytes of the log.
    pub log_bytes: u64,
    /// Bytes of it that the newest epoch needs.
    pub live_bytes: u64,
    /// Bytes of all files.
    #[serde(default)]
    pub store_bytes: u64,
    /// Number of these files.
    #[serde(default)]
    pub generations: u64,
    /// Which epochs stay.
    #[serde(default)]
    pub keep: Option<Keep>,
    /// The hold-up budget, where there is one.
    pub budget: Option<BudgetStatus>,
    /// What an event takes, by what was measured.
    pub model: Figures,
    /// All is durable after a power event, and the program stands still until it is known whether
    /// the mains come back.
    pub frozen: bool,
    /// What became of power events.
    pub events: Events,
    /// Bytes that this keeper's epochs wrote.
    pub bytes_written: u64,
    /// What that would be in a day; `None` in the first second.
    pub bytes_per_day: Option<u64>,
    /// The cap on that.
    pub max_wear: Option<u64>,
    /// What this keeper and those before it counted, as far as it is durable.
    #[serde(default)]
    pub totals: Option<Totals>,
}

/// The keeper's end.
#[derive(Debug)]
pub struct Control {
    listener: UnixListener,
    clients: Vec<Client>,
    path: PathBuf,
}

#[derive(Debug)]
struct Client {
    stream: UnixStream,
    heard: Vec<u8>,
}

/// A client that asked something and waits.
#[derive(Debug)]
pub struct Asker {
    stream: UnixStream,
}

/// The socket's name as reached through the descriptor of its directory.
fn through(dir: &Path) -> Result<(rustix::fd::OwnedFd, PathBuf), KeeperError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = rustix::fs::open(dir, flags, Mode::empty())
        .map_err(KeeperError::io(format!("open {}", dir.display())))?;
    let path = PathBuf::from(format!("/proc/self/fd/{}/control", fd.as_raw_fd()));
    Ok((fd, path))
}

impl Control {
    /// Opens the socket in a subject's directory, replacing one that a dead keeper left. For the
    /// holder of the subject's lock.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn open(dir: &Path) -> Result<Self, KeeperError> {
        let path = dir.join("control");
        let place = path.display().to_string();
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(KeeperError::io(format!("remove {place}"))(error));
            }
            _ => {}
        }
        let (_dir, address) = through(dir)?;
        let listener = UnixListener::bind(address)
            .map_err(KeeperError::io::<std::io::Error>(format!("bind {place}")))?;
        std::fs::set_permissions(&path, Permissions::from_mode(0o600))
            .and_then(|()| listener.set_nonblocking(true))
            .map_err(KeeperError::io::<std::io::Error>(format!(
                "prepare {place}"
            )))?;
        Ok(Self {
            listener,
            clients: Vec::new(),
            path,
        })
    }

    /// What to poll: the listener and every client.
    pub fn poll_set(&self) -> Vec<PollFd<'_>> {
        let listener = (self.clients.len() < MOST_CLIENTS).then_some(&self.listener);
        let listener = listener.map(|l| PollFd::new(l, PollFlags::IN));
        let clients = self
            .clients
            .iter()
            .map(|c| PollFd::new(&c.stream, PollFlags::IN));
        listener.into_iter().chain(clients).collect()
    }

    /// Takes what has arrived; complete requests with those who wait for an answer.
    pub fn requests(&mut self) -> Vec<(Request, Asker)> {
        while self.clients.len() < MOST_CLIENTS {
            let Ok((stream, _)) = self.listener.accept() else {
                break;
            };
            if stream.set_nonblocking(true).is_ok() {
                self.clients.push(Client {
                    stream,
                    heard: Vec::new(),
                });
            }
        }
        let mut found = Vec::new();
        for mut client in std::mem::take(&mut self.clients) {
            match client.hear() {
                Heard::Nothing => self.clients.push(client),
                Heard::Gone => {}
                Heard::Line => match serde_json::from_slice(&client.heard) {
                    Ok(request) => found.push((
                        request,
                        Asker {
                            stream: client.stream,
                        },
                    )),
                    Err(error) => Asker {
                        stream: client.stream,
                    }
                    .answer(&failed(format!("not understood: {error}"), 2)),
                },
            }
        }
        found
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

enum Heard {
    Nothing,
    Gone,
    Line,
}

impl Client {
    fn hear(&mut self) -> Heard {
        let mut buffer = [0u8; 512];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => return Heard::Gone,
                Ok(n) => {
                    self.heard.extend_from_slice(&buffer[..n]);
                    if let Some(end) = self.heard.iter().position(|b| *b == b'\n') {
                        self.heard.truncate(end);
                        return Heard::Line;
                    }
                    if self.heard.len() > LONGEST_REQUEST {
                        return Heard::Gone;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Heard::Nothing,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Heard::Gone,
            }
        }
    }
}

impl Asker {
    /// One whose answer the other end hears.
    #[cfg(test)]
    pub(crate) fn pair() -> (Self, UnixStream) {
        let (stream, other) = UnixStream::pair().expect("a pair of sockets");
        (Self { stream }, other)
    }

    /// Sends the answer; a client that is gone, or that does not read, goes without.
    pub fn answer(mut self, reply: &Reply) {
        let Ok(mut text) = serde_json::to_vec(reply) else {
            return;
        };
        text.push(b'\n');
        let _ = self.stream.write_all(&text);
    }
}

/// A failure as an answer.
#[must_use]
pub fn failed(error: String, exit: u8) -> Reply {
    Reply::Failed { error, exit }
}

/// Asks the keeper of the subject in `dir`; `None` where no keeper runs. Waits for the answer as
/// long as `patience` (for ever without one).
///
/// # Errors
/// What the operating system says; an answer that does not make sense; a keeper that went away
/// without an answer.
pub fn ask(
    dir: &Path,
    request: Request,
    patience: Option<Duration>,
) -> Result<Option<Reply>, KeeperError> {
    let (_dir, address) = match through(dir) {
        Err(KeeperError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {
            return Ok(None);
        }
        other => other?,
    };
    let place = dir.join("control").display().to_string();
    let mut stream = match UnixStream::connect(address) {
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
            return Ok(None);
        }
        other => other.map_err(KeeperError::io(format!("connect to {place}")))?,
    };
    let wrap =
        |error: std::io::Error| KeeperError::io(format!("talk to the keeper at {place}"))(error);
    stream.set_read_timeout(patience).map_err(wrap)?;
    let mut line = serde_json::to_vec(&request).map_err(|e| wrap(e.into()))?;
    line.push(b'\n');
    stream.write_all(&line).map_err(wrap)?;
    let mut text = Vec::new();
    stream
        .take(LONGEST_REPLY)
        .read_to_end(&mut text)
        .map_err(wrap)?;
    if text.is_empty() {
        return Err(KeeperError::Other(format!(
            "the keeper at {place} went away without an answer"
        )));
    }
    serde_json::from_slice(&text).map(Some).map_err(|error| {
        KeeperError::Other(format!("the keeper at {place} answered rubbish: {error}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer_all(control: &mut Control, reply: &Reply) -> Vec<Request> {
        let mut seen = Vec::new();
        while seen.is_empty() {
            let mut set = control.poll_set();
            rustix::event::poll(&mut set, None).unwrap();
            drop(set);
            for (request, asker) in control.requests() {
                asker.answer(reply);
                seen.push(request);
            }
        }
        seen
    }

    #[test]
    fn a_question_gets_its_answer_also_in_a_deep_directory() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("d".repeat(120));
        std::fs::create_dir(&dir).unwrap();
        assert_eq!(ask(&dir, Request::Status, None).unwrap(), None, "no keeper");
        let mut control = Control::open(&dir).unwrap();
        let mode = std::fs::metadata(dir.join("control"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        let there = dir.clone();
        let client = std::thread::spawn(move || ask(&there, Request::POWER, None).unwrap());
        let reply = failed("no".into(), 3);
        assert_eq!(answer_all(&mut control, &reply), [Request::POWER]);
        assert_eq!(client.join().unwrap(), Some(reply));
        drop(control);
        assert_eq!(
            ask(&dir, Request::Status, None).unwrap(),
            None,
            "the socket is gone"
        );
        let missing = dir.join("x");
        assert_eq!(ask(&missing, Request::Status, None).unwrap(), None);
    }

    #[test]
    fn a_dead_keepers_socket_is_no_keeper_and_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        // A keeper that was killed leaves the file and no listener.
        let left = dir.path().join("control");
        drop(UnixListener::bind(&left).unwrap());
        assert!(left.exists());
        assert_eq!(ask(dir.path(), Request::Status, None).unwrap(), None);
        Control::open(dir.path()).unwrap();
    }

    #[test]
    fn rubbish_is_answered_and_slow_clients_do_not_block() {
        let dir = tempfile::tempdir().unwrap();
        let mut control = Control::open(dir.path()).unwrap();
        let slow = UnixStream::connect(dir.path().join("control")).unwrap();
        let mut bad = UnixStream::connect(dir.path().join("control")).unwrap();
        bad.write_all(b"{\"op\":\"format-the-disk\"}\n").unwrap();
        let mut huge = UnixStream::connect(dir.path().join("control")).unwrap();
        huge.write_all(&[b'x'; 2 * LONGEST_REQUEST]).unwrap();
        assert!(control.requests().is_empty());
        let mut text = String::new();
        bad.read_to_string(&mut text).unwrap();
        let reply: Reply = serde_json::from_str(&text).unwrap();
        assert!(matches!(reply, Reply::Failed { exit: 2, .. }), "{reply:?}");
        assert_eq!(
            control.clients.len(),
            1,
            "the slow one is still heard, the huge one is not"
        );
        drop(slow);
        assert!(control.requests().is_empty());
        assert!(control.clients.is_empty());
    }

    #[test]
    fn the_words_on_the_wire_are_fixed() {
        let words = |r| serde_json::to_string(&r).unwrap();
        assert_eq!(words(Request::Status), r#"{"op":"status"}"#);
        assert_eq!(words(Request::POWER), r#"{"op":"power"}"#);
    }
}
