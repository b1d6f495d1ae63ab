//! A Redis under measurement.

use super::session::{Program, Session};
use outlive_keeper::{KeeperError, procfs};
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::{Command, Stdio};

/// Keys that are added at a time while a server is filled.
const STEP: u64 = 50_000;

/// What is not installed of what is needed.
pub fn lacking() -> Option<String> {
    let tools = ["redis-server", "redis-benchmark"];
    let missing = tools.into_iter().find(|tool| !installed(tool))?;
    Some(format!("not measured: {missing} is not installed"))
}

/// Whether a program can be called.
pub fn installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

/// A server that keeps nothing on disk itself.
pub struct Server {
    /// The process.
    pub program: Program,
    port: u16,
}

impl Server {
    /// Starts one on a free port.
    ///
    /// # Errors
    /// Where it does not come up.
    pub fn start(session: &Session) -> Result<Self, KeeperError> {
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|l| l.local_addr());
        let port = free
            .map_err(KeeperError::io("look for a free port"))?
            .port();
        let mut command = Command::new("redis-server");
        command.args(["--port", &port.to_string(), "--bind", "127.0.0.1"]);
        command.args([
            "--save",
            "",
            "--appendonly",
            "no",
            "--enable-debug-command",
            "yes",
        ]);
        command.current_dir(session.dir());
        let mut program = session.spawn(command.stdout(Stdio::null()).stderr(Stdio::null()))?;
        session.wait("redis-server", || {
            if let Some(status) = program.ended()? {
                return Err(KeeperError::Other(format!(
                    "redis-server ended with {status}"
                )));
            }
            Ok(TcpStream::connect((Ipv4Addr::LOCALHOST, port))
                .ok()
                .map(drop))
        })?;
        Ok(Self { program, port })
    }

    /// Sends one command whose answer is one line.
    ///
    /// # Errors
    /// What the operating system says, or Redis.
    pub fn ask(&self, line: &str) -> Result<(), KeeperError> {
        let ask = || -> std::io::Result<String> {
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port))?;
            write!(stream, "{line}\r\n")?;
            let mut answer = String::new();
            BufReader::new(stream).read_line(&mut answer)?;
            Ok(answer)
        };
        let answer = ask().map_err(KeeperError::io(format!("ask redis: {line}")))?;
        match answer.strip_prefix('-') {
            Some(error) => Err(KeeperError::Other(format!(
                "redis: {line}: {}",
                error.trim()
            ))),
            None => Ok(()),
        }
    }

    /// Adds keys `key:N` with values of so many bytes until so much is resident; gives how many
    /// keys there are.
    ///
    /// # Errors
    /// As [`Server::ask`].
    pub fn fill(&self, session: &Session, memory: u64, value: u64) -> Result<u64, KeeperError> {
        let mut keys = 0;
        while procfs::resident_pages(self.program.pid()).unwrap_or(u64::MAX) < memory / 4096 {
            session.goes_on()?;
            keys += STEP;
            self.ask(&format!("DEBUG POPULATE {keys} key {value}"))?;
        }
        Ok(keys)
    }

    /// `redis-benchmark` against it, printing CSV.
    pub fn benchmark(&self, words: &[&str]) -> Command {
        let mut command = Command::new("redis-benchmark");
        command.args(["-h", "127.0.0.1", "-p", &self.port.to_string(), "--csv"]);
        command.args(words);
        command
    }
}
