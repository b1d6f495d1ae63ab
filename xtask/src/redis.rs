//! A real Redis server: how it is started, and what it says of itself.

use crate::{cleanup, resp::Client, tools};
use anyhow::{Context, Result, bail};
use std::{
    fs,
    net::{Ipv4Addr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// How long an answer may take before the server counts as stuck.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Where a server lives.
#[derive(Clone, Debug)]
pub struct Place {
    /// Its port on the loopback interface.
    pub port: u16,
    /// Its working folder.
    pub folder: PathBuf,
}

/// What a server says of itself (`INFO server`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Its process ID as it sees it.
    pub pid: u32,
    /// Its port as it sees it.
    pub port: u16,
    /// A random number that it drew at its start.
    pub run_id: String,
    /// Seconds since its start.
    pub uptime: u64,
    /// Its version.
    pub version: String,
}

impl Place {
    /// A free port and a new folder below `parent`.
    pub fn new(parent: &Path, name: &str) -> Result<Self> {
        tools::ensure(&["redis-server"])?;
        let folder = parent.join(name);
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let probe = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no port is free")?;
        Ok(Self {
            port: probe.local_addr()?.port(),
            folder,
        })
    }

    /// The command line: the server's own persistence is off, so that whatever comes back was
    /// kept by somebody else.
    pub fn command_line(&self) -> Vec<String> {
        let (port, folder) = (self.port.to_string(), self.folder.display().to_string());
        let log = self.folder.join("redis.log").display().to_string();
        let words = [
            "redis-server",
            "--port",
            &port,
            "--bind",
            "127.0.0.1",
            "--unixsocket",
            "",
            "--save",
            "",
            "--appendonly",
            "no",
            "--daemonize",
            "no",
            "--dir",
            &folder,
            "--logfile",
            &log,
            "--enable-debug-command",
            "yes",
        ];
        words.iter().map(ToString::to_string).collect()
    }

    /// Starts it as our own child, without Outlive.
    pub fn start_plain(&self) -> Result<Child> {
        let line = self.command_line();
        let mut command = Command::new("redis-server");
        command
            .args(line.iter().skip(1))
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        command
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start redis-server")
    }

    /// Waits until it answers, and asks who it is. `alive` says why waiting is in vain.
    pub fn wait(&self, mut alive: impl FnMut() -> Result<()>) -> Result<(Client, Identity)> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.try_once() {
                Ok(found) => return Ok(found),
                Err(error) if Instant::now() > deadline => {
                    let log = self.last_log_lines();
                    return Err(
                        error.context(format!("redis does not answer; its log ends:\n{log}"))
                    );
                }
                Err(_) => alive()?,
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn try_once(&self) -> Result<(Client, Identity)> {
        let mut client = Client::connect(self.port, PATIENCE)?;
        let identity = Identity::ask(&mut client)?;
        Ok((client, identity))
    }

    /// Whether nobody accepts connections at the port.
    pub fn is_silent(&self) -> bool {
        TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).is_err()
    }

    /// The end of the server's log.
    pub fn last_log_lines(&self) -> String {
        let text = fs::read_to_string(self.folder.join("redis.log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(8)..].join("\n")
    }
}

impl Identity {
    /// Asks a server who it is.
    pub fn ask(client: &mut Client) -> Result<Self> {
        Self::parse(&client.ask_text(&["INFO", "server"])?)
    }

    fn parse(info: &str) -> Result<Self> {
        let field = |name: &str| {
            info.lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
                .map(str::trim_end)
                .with_context(|| format!("INFO server has no {name}"))
        };
        Ok(Self {
            pid: field("process_id")?.parse()?,
            port: field("tcp_port")?.parse()?,
            run_id: field("run_id")?.to_owned(),
            uptime: field("uptime_in_seconds")?.parse()?,
            version: field("redis_version")?.to_owned(),
        })
    }

    /// Refuses where this is not the same server as `before`, living on.
    pub fn must_continue(&self, before: &Self) -> Result<()> {
        let same = self.pid == before.pid
            && self.port == before.port
            && self.run_id == before.run_id
            && self.uptime >= before.uptime;
        if !same {
            bail!(
                "the server that answers does not continue the old one:\n  was {before:?}\n  is  {self:?}"
            );
        }
        Ok(())
    }
}

/// Ends a server by its process ID and waits until it is gone.
pub fn end(pid: u32) -> Result<()> {
    cleanup::kill(pid)?;
    cleanup::wait_gone(pid)
}

#[cfg(test)]
mod tests {
    use super::*;

    const INFO: &str = "# Server\r\nredis_version:7.0.15\r\nprocess_id:42\r\nrun_id:abc\r\n\
                        tcp_port:7777\r\nuptime_in_seconds:5\r\nuptime_in_days:0\r\n";

    #[test]
    fn identity_is_read_and_compared() {
        let before = Identity::parse(INFO).unwrap();
        assert_eq!((before.pid, before.port, before.uptime), (42, 7777, 5));
        before.must_continue(&before).unwrap();
        let later = Identity {
            uptime: 6,
            ..before.clone()
        };
        later.must_continue(&before).unwrap();
        before.must_continue(&later).unwrap_err();
        Identity {
            pid: 43,
            ..before.clone()
        }
        .must_continue(&before)
        .unwrap_err();
        Identity {
            run_id: "x".into(),
            ..before.clone()
        }
        .must_continue(&before)
        .unwrap_err();
        Identity {
            port: 1,
            ..before.clone()
        }
        .must_continue(&before)
        .unwrap_err();
        assert!(Identity::parse("").is_err());
    }
}
