//! One run of measurements: its directory, the programs it starts, and how it ends.
//!
//! # Rules
//! - Everything is done through the ordinary commands and the keeper's socket, as users do.
//! - Whatever was started is ended and reaped, and the directory removed, however the run ends; a
//!   signal (Ctrl-C) ends it between two steps.
//! - A keeper is asked to go, and killed only where it does not.

use crate::commands::run::withhold;
use crate::out;
use outlive_keeper::control::{Reply, Request, Status, ask};
use outlive_keeper::epoch::Taken;
use outlive_keeper::images::{Image, Summary};
use outlive_keeper::keep::SIGNALS;
use outlive_keeper::subject::{Root, Subject};
use outlive_keeper::{KeeperError, procfs};
use outlive_linux::signals::SignalQueue;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, set_child_subreaper, waitpid};
use serde_json::Value;
use std::cell::{Cell, RefCell};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a step that must come may take.
const PATIENCE: Duration = Duration::from_secs(300);
/// How long a keeper may take to go.
const GOODBYE: Duration = Duration::from_secs(10);
/// How often something is looked for.
const LOOK: Duration = Duration::from_millis(1);
/// Room that is left free on the disk, bytes.
const SPARE: u64 = 2 << 30;

/// Time between epochs where each epoch is asked for: none comes by itself.
pub const BY_REQUEST: &str = "24h";

/// A run; see the module's text.
pub struct Session {
    dir: PathBuf,
    root: Root,
    signals: RefCell<SignalQueue>,
    numbers: Cell<u64>,
}

impl Session {
    /// Begins a run, in a new directory below `parent`.
    ///
    /// # Errors
    /// Not permitted without root; what the operating system says.
    pub fn begin(parent: &Path) -> Result<Self, KeeperError> {
        if !rustix::process::geteuid().is_root() {
            return Err(KeeperError::Told {
                message:
                    "bench restores programs under their own process IDs and reads the memory \
                          of all it measures: run it as root"
                        .into(),
                exit: 5,
            });
        }
        // Programs with pipes and sockets of a shell's could not be captured.
        withhold()?;
        let parent = parent
            .canonicalize()
            .map_err(KeeperError::io(format!("open {}", parent.display())))?;
        let dir = parent.join(format!("outlive-bench-{}", std::process::id()));
        std::fs::create_dir(&dir).map_err(KeeperError::io(format!("make {}", dir.display())))?;
        let signals = SignalQueue::open(&SIGNALS).map_err(KeeperError::io("open signals"))?;
        // Restored programs become our children, so that they can be reaped.
        set_child_subreaper(Some(rustix::process::getpid()))
            .map_err(KeeperError::io("become the parent of restored programs"))?;
        Ok(Self {
            root: Root::find(Some(&dir.join("store")))?,
            dir,
            signals: RefCell::new(signals),
            numbers: Cell::new(0),
        })
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A number that was not given before.
    pub fn number(&self) -> u64 {
        self.numbers.set(self.numbers.get() + 1);
        self.numbers.get()
    }

    /// Fails where a signal has come.
    ///
    /// # Errors
    /// Told, with the exit status of a program that a signal ended.
    pub fn goes_on(&self) -> Result<(), KeeperError> {
        let taken = self.signals.borrow_mut().take();
        match taken.map_err(KeeperError::io("read the signal queue"))? {
            Some(received) if received.signal != Signal::WINCH.as_raw() => Err(KeeperError::Told {
                message: "interrupted; everything was cleaned up".into(),
                exit: u8::try_from(received.signal).map_or(1, |n| n.saturating_add(128)),
            }),
            _ => Ok(()),
        }
    }

    /// Waits for so long.
    ///
    /// # Errors
    /// As [`Session::goes_on`].
    pub fn pause(&self, time: Duration) -> Result<(), KeeperError> {
        let began = Instant::now();
        loop {
            self.goes_on()?;
            let rest = time.saturating_sub(began.elapsed());
            if rest.is_zero() {
                return Ok(());
            }
            std::thread::sleep(rest.min(Duration::from_millis(20)));
        }
    }

    /// Waits until `look` finds something.
    ///
    /// # Errors
    /// As [`Session::goes_on`]; what `look` says; where nothing comes.
    pub fn wait<T>(
        &self,
        what: &str,
        mut look: impl FnMut() -> Result<Option<T>, KeeperError>,
    ) -> Result<T, KeeperError> {
        let began = Instant::now();
        loop {
            if let Some(found) = look()? {
                return Ok(found);
            }
            self.goes_on()?;
            if began.elapsed() > PATIENCE {
                return Err(KeeperError::Other(format!("{what} did not come")));
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Starts a program, without any stream of ours.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn spawn(&self, command: &mut Command) -> Result<Program, KeeperError> {
        let program = command.get_program().to_string_lossy().into_owned();
        command.stdin(Stdio::null());
        let child = self
            .signals
            .borrow()
            .release_in(command)
            .spawn()
            .map_err(KeeperError::io(format!("start {program}")))?;
        Ok(Program { child, program })
    }

    /// Runs a program to its end; gives what it printed.
    ///
    /// # Errors
    /// Told, with its own message and exit status, where it fails.
    pub fn run(&self, command: &mut Command) -> Result<String, KeeperError> {
        self.run_beside(command, &mut [])
    }

    /// [`Session::run`], which meanwhile reaps those of `others` that end.
    ///
    /// # Errors
    /// As [`Session::run`].
    pub fn run_beside(
        &self,
        command: &mut Command,
        others: &mut [&mut Program],
    ) -> Result<String, KeeperError> {
        let mut streams = Streams::new(self)?;
        command.stdout(streams.stdout()?).stderr(streams.stderr()?);
        let mut program = self.spawn(command)?;
        let began = Instant::now();
        let status = loop {
            for other in &mut *others {
                let _ = other.child.try_wait();
            }
            if let Some(status) = program.ended()? {
                break status;
            }
            self.goes_on()?;
            let fine = began.elapsed() < Duration::from_millis(200);
            std::thread::sleep(if fine { LOOK / 10 } else { LOOK });
        };
        let (printed, said) = streams.read()?;
        if status.success() {
            return Ok(printed);
        }
        let exit = status.code().and_then(|code| u8::try_from(code).ok());
        Err(KeeperError::Told {
            message: told(&said, &printed)
                .unwrap_or_else(|| format!("{} ended with {status}", program.program)),
            exit: exit.unwrap_or(1),
        })
    }

    /// This binary, with the store of this run and JSON as its output.
    ///
    /// # Errors
    /// Where it is not known which binary this is.
    pub fn outlive(&self, words: &[&str]) -> Result<Command, KeeperError> {
        let itself = std::env::current_exe().map_err(KeeperError::io("find this program"))?;
        let mut command = Command::new(itself);
        command
            .arg("--store")
            .arg(self.dir.join("store"))
            .arg("--json")
            .args(words);
        Ok(command)
    }

    /// Whether its directory lies in a file system without a medium.
    pub fn in_memory(&self) -> bool {
        const TMPFS: i64 = 0x0102_1994;
        rustix::fs::statfs(&self.dir).is_ok_and(|stat| stat.f_type == TMPFS)
    }

    /// Whether there is so much memory and room on the disk, bytes; where not, what is missing.
    pub fn lacks(&self, memory: u64, disk: u64) -> Option<String> {
        let available = available_memory();
        if memory > available {
            let (needed, there) = (out::bytes(memory), out::bytes(available));
            return Some(format!("needs {needed} of memory, {there} are free"));
        }
        let free = rustix::fs::statvfs(&self.dir).map_or(0, |s| s.f_bavail * s.f_frsize);
        let needed = disk + SPARE;
        (needed > free).then(|| {
            let (needed, there) = (out::bytes(needed), out::bytes(free));
            format!("needs {needed} of disk, {there} are free")
        })
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// `MemAvailable`, bytes; 0 where it is not known.
fn available_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    let kilobytes = line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok());
    kilobytes.unwrap_or(0) * 1024
}

/// What a failed command said: the error of its JSON, or its first lines with
/// errors, or its last line.
fn told(said: &str, printed: &str) -> Option<String> {
    let json = printed
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let error = json
        .filter_map(|v| Some(v.get("error")?.as_str()?.to_owned()))
        .next_back();
    let lines = || {
        let all = said.lines().chain(printed.lines());
        all.map(str::trim).filter(|line| !line.is_empty())
    };
    let errors: Vec<&str> = lines()
        .filter(|line| line.contains("Error"))
        .take(3)
        .collect();
    let line = || match errors.as_slice() {
        [] => lines().next_back().map(str::to_owned),
        errors => Some(errors.join("; ")),
    };
    error.or_else(|| line().map(|line| out::tame(&line)))
}

/// Standard output and error of a program, as files.
struct Streams {
    paths: [PathBuf; 2],
}

impl Streams {
    fn new(session: &Session) -> Result<Self, KeeperError> {
        let number = session.number();
        let path = |what: &str| session.dir.join(format!("{what}-{number}"));
        Ok(Self {
            paths: [path("printed"), path("said")],
        })
    }

    fn stdout(&self) -> Result<Stdio, KeeperError> {
        open(&self.paths[0])
    }

    fn stderr(&self) -> Result<Stdio, KeeperError> {
        open(&self.paths[1])
    }

    fn read(&mut self) -> Result<(String, String), KeeperError> {
        let read = |path: &Path| -> Result<String, KeeperError> {
            let bytes =
                std::fs::read(path).map_err(KeeperError::io(format!("read {}", path.display())))?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        Ok((read(&self.paths[0])?, read(&self.paths[1])?))
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        for path in &self.paths {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn open(path: &Path) -> Result<Stdio, KeeperError> {
    let file = std::fs::File::create(path)
        .map_err(KeeperError::io(format!("create {}", path.display())))?;
    Ok(file.into())
}

/// A child that is killed and reaped when it is dropped.
pub struct Program {
    child: Child,
    program: String,
}

impl Program {
    /// Its number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, where it has.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn ended(&mut self) -> Result<Option<std::process::ExitStatus>, KeeperError> {
        self.child
            .try_wait()
            .map_err(KeeperError::io(format!("wait for {}", self.program)))
    }

    /// Sends a signal.
    pub fn signal(&mut self, signal: Signal) {
        // The number of one that was reaped may be another's by now.
        if let Ok(None) = self.child.try_wait() {
            let _ = kill_process(Pid::from_child(&self.child), signal);
        }
    }

    /// Waits for so long for its end; whether it ended.
    pub fn wait(&mut self, patience: Duration) -> bool {
        let began = Instant::now();
        loop {
            match self.child.try_wait() {
                Ok(None) if began.elapsed() < patience => std::thread::sleep(LOOK),
                Ok(None) => return false,
                _ => return true,
            }
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// A running load (see `loads`).
pub struct Load<'s> {
    session: &'s Session,
    /// The process.
    pub program: Program,
    place: PathBuf,
    port: u16,
}

impl<'s> Load<'s> {
    /// Starts one and waits until it listens.
    ///
    /// # Errors
    /// Where it does not come up.
    pub fn start(session: &'s Session) -> Result<Self, KeeperError> {
        let place = session.dir.join(format!("load-{}", session.number()));
        let mut command = load_command(session, &place)?;
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut program = session.spawn(&mut command)?;
        let port = session.wait("the load", || {
            if let Some(status) = program.ended()? {
                return Err(KeeperError::Other(format!("the load ended with {status}")));
            }
            Ok(taken_from(&place).and_then(|text| text.parse().ok()))
        })?;
        Ok(Self {
            session,
            program,
            place,
            port,
        })
    }

    /// Asks it something; gives its answer.
    ///
    /// # Errors
    /// Where it does not answer.
    pub fn ask(&self, line: &str) -> Result<u64, KeeperError> {
        self.session.goes_on()?;
        request(self.port, line).map_err(KeeperError::io(format!("ask the load: {line}")))
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Has it map, fill and unmap; the time of each pass, microseconds.
    ///
    /// # Errors
    /// Where it does not answer.
    pub fn cycle(&mut self, bytes: u64, times: u64, passes: u64) -> Result<Vec<f64>, KeeperError> {
        self.ask(&format!("cycle {bytes} {times} {passes}"))?;
        let (place, program) = (&self.place, &mut self.program);
        let text = self.session.wait("the load's times", || {
            if let Some(status) = program.ended()? {
                return Err(KeeperError::Other(format!("the load ended with {status}")));
            }
            Ok(taken_from(place))
        })?;
        Ok(text
            .split(' ')
            .filter_map(|word| word.parse().ok())
            .collect())
    }
}

/// The hidden command of a load.
///
/// # Errors
/// Where it is not known which binary this is.
pub fn load_command(session: &Session, place: &Path) -> Result<Command, KeeperError> {
    let itself = std::env::current_exe().map_err(KeeperError::io("find this program"))?;
    let mut command = Command::new(itself);
    command.args([
        "bench",
        "load",
        "--wanted-by",
        &std::process::id().to_string(),
        "--place",
    ]);
    command.arg(place).current_dir(session.dir());
    Ok(command)
}

/// What the load wrote there; it is removed.
pub fn taken_from(place: &Path) -> Option<String> {
    let text = std::fs::read_to_string(place).ok()?;
    std::fs::remove_file(place).ok()?;
    Some(text)
}

/// One request to whatever listens there.
///
/// # Errors
/// What the operating system says; an answer that is no number.
pub fn request(port: u16, line: &str) -> std::io::Result<u64> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    writeln!(stream, "{line}")?;
    let mut answer = String::new();
    BufReader::new(stream.take(64)).read_line(&mut answer)?;
    answer
        .trim()
        .parse()
        .map_err(|_| std::io::ErrorKind::InvalidData.into())
}

/// A keeper that `outlive attach` is; it is asked to go when it is dropped.
pub struct Keeper<'s> {
    session: &'s Session,
    program: Program,
    subject: Subject,
    streams: Streams,
}

impl<'s> Keeper<'s> {
    /// Keeps a running program.
    ///
    /// # Errors
    /// What `outlive attach` says, with its exit status.
    pub fn attach(
        session: &'s Session,
        pid: u32,
        every: &str,
        flags: &[&str],
    ) -> Result<Self, KeeperError> {
        let name = format!("bench-{}", session.number());
        let pid = pid.to_string();
        let mut words = vec!["attach", "--pid", &pid, "--name", &name, "--every", every];
        words.extend(flags);
        let mut streams = Streams::new(session)?;
        let mut command = session.outlive(&words)?;
        command.stdout(streams.stdout()?).stderr(streams.stderr()?);
        let mut program = session.spawn(&mut command)?;
        let subject = session.root.subject(&name)?;
        session.wait("the keeper", || {
            if let Some(status) = program.ended()? {
                let (printed, said) = streams.read()?;
                let exit = status.code().and_then(|code| u8::try_from(code).ok());
                return Err(KeeperError::Told {
                    message: told(&said, &printed)
                        .unwrap_or_else(|| format!("outlive attach ended with {status}")),
                    exit: exit.unwrap_or(1),
                });
            }
            Ok(ask(subject.dir(), Request::Status, Some(PATIENCE))?.map(|_| ()))
        })?;
        Ok(Self {
            session,
            program,
            subject,
            streams,
        })
    }

    /// Has it take an epoch now.
    ///
    /// # Errors
    /// What the keeper says.
    pub fn epoch(&self) -> Result<Taken, KeeperError> {
        self.session.goes_on()?;
        match self.ask(Request::Checkpoint)? {
            Reply::Taken { epoch, .. } => Ok(epoch),
            other => Err(other.into_error()),
        }
    }

    /// How things stand.
    ///
    /// # Errors
    /// Where it does not answer.
    pub fn status(&self) -> Result<Status, KeeperError> {
        match self.ask(Request::Status)? {
            Reply::Status(status) => Ok(*status),
            other => Err(other.into_error()),
        }
    }

    /// Waits until it has committed so many epochs.
    ///
    /// # Errors
    /// The reason, where epochs fail.
    pub fn committed(&self, count: u64) -> Result<Status, KeeperError> {
        self.session.wait("an epoch", || {
            let status = self.status()?;
            if status.committed >= count {
                return Ok(Some(status));
            }
            std::thread::sleep(Duration::from_millis(10));
            match &status.last_failure {
                Some(why) if status.committed == 0 => Err(KeeperError::Refused(format!(
                    "no epoch can be taken: {why}"
                ))),
                _ => Ok(None),
            }
        })
    }

    /// The epochs that are in its store now.
    ///
    /// # Errors
    /// What the store says.
    pub fn epochs(&self) -> Result<Vec<Summary>, KeeperError> {
        Ok(Image::open(&self.subject.epochs_dir())?.epochs())
    }

    /// The name of its subject.
    pub fn name(&self) -> &str {
        self.subject.name()
    }

    /// The keeper itself.
    pub fn program(&mut self) -> &mut Program {
        &mut self.program
    }

    /// Resident memory of the keeper, bytes.
    pub fn resident(&self) -> u64 {
        procfs::resident_pages(self.program.pid()).unwrap_or(0) * 4096
    }

    fn ask(&self, request: Request) -> Result<Reply, KeeperError> {
        ask(self.subject.dir(), request, Some(PATIENCE))?.ok_or_else(|| {
            let said = std::fs::read_to_string(&self.streams.paths[1]).unwrap_or_default();
            let said = told(&said, "").unwrap_or_default();
            KeeperError::Other(format!("the keeper is gone: {said}"))
        })
    }
}

impl Drop for Keeper<'_> {
    fn drop(&mut self) {
        self.program.signal(Signal::TERM);
        self.program.wait(GOODBYE);
        let _ = std::fs::remove_dir_all(self.subject.dir());
    }
}

/// A restored program, which is killed and reaped when it is dropped.
pub struct Restored(pub u32);

impl Drop for Restored {
    fn drop(&mut self) {
        let Some(pid) = i32::try_from(self.0).ok().and_then(Pid::from_raw) else {
            return;
        };
        let _ = kill_process(pid, Signal::KILL);
        let began = Instant::now();
        // Its parent is this process, as the nearest subreaper.
        while began.elapsed() < GOODBYE {
            match waitpid(Some(pid), WaitOptions::NOHANG) {
                Ok(None) => std::thread::sleep(LOOK),
                Ok(Some(_)) => break,
                Err(_) if procfs::start_time(self.0).is_none() && !procfs::lingers(self.0) => break,
                Err(_) => std::thread::sleep(LOOK),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_command_is_quoted_by_its_error() {
        assert_eq!(
            told("outlive: x\n\n", "{\"error\":\"y\",\"exit\":3}\n"),
            Some("y".into())
        );
        assert_eq!(
            told("a\n(00.1) Error (x): no\nError (y)\nb\n", ""),
            Some("(00.1) Error (x): no; Error (y)".into())
        );
        assert_eq!(told("", "\n"), None);
    }

    #[test]
    fn there_is_some_memory() {
        assert!(available_memory() > 1 << 20);
    }
}
