//! Starting the binary and programs, waiting for what must happen, and removing all of it.

use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, Once};
use std::time::{Duration, Instant};

/// How long anything may take that must happen.
const PATIENCE: Duration = Duration::from_secs(60);

/// One test at a time: a number that one test frees must not be taken by another's program.
pub fn alone() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    static REAP: Once = Once::new();
    // Programs whose keeper died become our children, so that somebody reaps them.
    REAP.call_once(|| {
        rustix::process::set_child_subreaper(Some(rustix::process::getpid())).unwrap();
        // What this process got from whoever runs the tests is none of the programs'.
        outlive_linux::inherited::withhold_pipes_and_sockets().unwrap();
    });
    LOCK.lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Whether the privileges are there; where they are not, the test says that it was skipped.
pub fn may_run(name: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("SKIPPED 1 test: {name}: needs root");
        println!("skipped: needs root");
    }
    root
}

/// How often something is done: more with `OUTLIVE_LONG`.
pub fn times(short: usize, long: usize) -> usize {
    let more = std::env::var_os("OUTLIVE_LONG").is_some();
    if more { long } else { short }
}

/// Waits until it holds.
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < PATIENCE, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A directory with a store in it, and everything a test makes.
pub struct Place {
    pub dir: tempfile::TempDir,
    started: std::cell::Cell<u32>,
}

/// What a command did.
#[derive(Debug)]
pub struct Done {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Done {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{self:?}: {e}"))
    }

    /// Checks the exit code, and that the message holds all of these words.
    #[track_caller]
    pub fn fails(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, code, "{self:?}");
        for word in words {
            assert!(self.err.contains(word), "{word:?} is missing: {self:?}");
        }
    }

    #[track_caller]
    pub fn succeeds(&self) {
        assert_eq!(self.code, 0, "{self:?}");
    }
}

pub fn finished(output: Output) -> Done {
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    Done {
        code: output.status.code().unwrap_or(-1),
        out: text(&output.stdout),
        err: text(&output.stderr),
    }
}

impl Place {
    pub fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("outlive-").tempdir();
        Self {
            dir: dir.unwrap(),
            started: 0.into(),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    pub fn store(&self) -> PathBuf {
        self.path("store")
    }

    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_outlive"));
        command
            .args(words)
            .env("OUTLIVE_STORE", self.store())
            .current_dir(self.dir.path())
            .stdin(Stdio::null());
        command
    }

    pub fn call(&self, words: &[&str]) -> Done {
        finished(self.command(words).output().unwrap())
    }

    /// Number of the newest epoch that can be restored; 0 where there is none, or no subject yet.
    pub fn newest(&self, name: &str) -> u64 {
        self.epochs(name).last().copied().unwrap_or(0)
    }

    /// Numbers of the epochs that can be restored; none where there is no subject yet.
    pub fn epochs(&self, name: &str) -> Vec<u64> {
        let list = self.call(&["history", name, "--json"]);
        if list.code == 1 && list.err.contains("no subject") {
            return Vec::new();
        }
        list.succeeds();
        let list = list.json();
        let list = list.as_array().unwrap().iter();
        list.map(|e| e["epoch"].as_u64().unwrap()).collect()
    }

    /// Waits for an epoch after this one.
    pub fn epoch_after(&self, name: &str, epoch: u64) -> u64 {
        let began = Instant::now();
        loop {
            let newest = self.newest(name);
            if newest > epoch {
                return newest;
            }
            let status = || self.call(&["ps", "--json"]).out;
            assert!(began.elapsed() < PATIENCE, "no epoch: {}", status());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What `ps` says of a subject.
    pub fn status(&self, name: &str) -> Value {
        let list = self.call(&["ps", "--json"]).json();
        let mut list = list.as_array().unwrap().iter();
        list.find(|entry| entry["name"] == name).unwrap().clone()
    }

    /// A new file for what is said on standard error: one that a program has is left alone.
    pub fn new_errors(&self) -> File {
        self.started.set(self.started.get() + 1);
        File::create(self.errors()).unwrap()
    }

    fn errors(&self) -> PathBuf {
        self.path(&format!("errors-{}", self.started.get()))
    }

    /// What was said on standard error by whoever was started last.
    pub fn said(&self) -> String {
        std::fs::read_to_string(self.errors()).unwrap()
    }

    /// Starts a program under the binary, in a process group of its own.
    pub fn start(&self, words: &[&str]) -> Kept {
        let errors = self.new_errors();
        let mut command = self.command(words);
        command
            .process_group(0)
            .stdout(Stdio::piped())
            .stderr(errors);
        let mut keeper = command.spawn().unwrap();
        let output = keeper.stdout.take().map(BufReader::new);
        Kept { keeper, output }
    }

    /// Starts a program without the binary.
    pub fn program(&self, program: &str, words: &[&str]) -> Kept {
        let mut command = Command::new(program);
        command
            .args(words)
            .current_dir(self.dir.path())
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(File::create(self.path("out")).unwrap())
            .stderr(File::create(self.path("err")).unwrap());
        let keeper = command.spawn().unwrap();
        Kept {
            keeper,
            output: None,
        }
    }

    /// The names in a directory.
    pub fn names(&self, name: &str) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.path(name)) else {
            return Vec::new();
        };
        let name = |e: std::io::Result<std::fs::DirEntry>| e.unwrap().file_name();
        entries.map(|e| name(e).into_string().unwrap()).collect()
    }

    /// Writes the image of `sleep 1000`, which is ended; returns its former process number.
    pub fn image_of_sleep(&self, name: &str) -> u32 {
        let mut sleep = self.program("sleep", &["1000"]);
        let pid = sleep.pid();
        until("sleep sleeps", || comm(pid) == "sleep");
        let words = ["checkpoint", "--pid", &pid.to_string(), "--image", name];
        self.call(&words).succeeds();
        sleep.keeper.wait().unwrap();
        assert!(is_free(pid));
        pid
    }
}

/// A process that is ended with its whole group when it is dropped.
pub struct Kept {
    pub keeper: Child,
    pub output: Option<BufReader<ChildStdout>>,
}

impl Kept {
    pub fn pid(&self) -> u32 {
        self.keeper.id()
    }

    pub fn line(&mut self) -> String {
        let mut line = String::new();
        let output = self.output.as_mut().unwrap();
        output.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    pub fn code(&mut self) -> i32 {
        self.keeper.wait().unwrap().code().unwrap_or(-1)
    }

    pub fn kill(&mut self) {
        self.keeper.kill().unwrap();
        self.keeper.wait().unwrap();
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let group = Pid::from_child(&self.keeper);
        let _ = rustix::process::kill_process_group(group, Signal::KILL);
        let _ = self.keeper.wait();
        // What was restored or left by a keeper is ours to reap.
        while let Ok(Some(_)) = rustix::process::waitpgid(group, WaitOptions::empty()) {}
    }
}

fn number(pid: u32) -> Pid {
    Pid::from_raw(pid.try_into().unwrap()).unwrap()
}

pub fn signal(pid: u32, signal: Signal) {
    kill_process(number(pid), signal).unwrap();
}

/// Ends a process and waits until its number is free; whoever its parent is.
pub fn end(pid: u32) {
    let _ = kill_process(number(pid), Signal::KILL);
    until("the process is gone", || {
        let _ = waitpid(Some(number(pid)), WaitOptions::NOHANG);
        is_free(pid)
    });
}

/// How a process ended whose keeper is dead, so that it is ours to reap.
pub fn reap(pid: u32) -> Option<String> {
    let reaped = waitpid(Some(number(pid)), WaitOptions::NOHANG);
    reaped.ok()?.map(|(_, status)| format!("{status:?}"))
}

pub fn is_free(pid: u32) -> bool {
    !Path::new(&format!("/proc/{pid}")).exists()
}

/// The program of a process; empty where there is none.
pub fn comm(pid: u32) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/comm"));
    text.unwrap_or_default().trim_end().to_owned()
}

/// Whether a process is there and not merely waiting to be reaped.
pub fn lives(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit(')').next().unwrap().trim_start().chars().next();
    state.is_some_and(|state| !"ZX".contains(state))
}

/// The test programs, built where this test was built.
pub fn test_program(name: &str) -> String {
    static BUILT: Once = Once::new();
    let own = std::env::current_exe().unwrap();
    let dir = own.parent().and_then(Path::parent).unwrap();
    BUILT.call_once(|| {
        let mut cargo = Command::new(env!("CARGO"));
        let package = ["build", "--quiet", "--package", "outlive-test-programs"];
        cargo.args(package);
        cargo.arg("--target-dir").arg(dir.parent().unwrap());
        if dir.ends_with("release") {
            cargo.arg("--release");
        }
        assert!(cargo.status().unwrap().success());
    });
    dir.join(name).to_str().unwrap().to_owned()
}

/// A program of the system that the tests need.
pub fn installed(program: &str) -> String {
    let places = ["/usr/bin", "/bin", "/usr/sbin", "/sbin", "/usr/local/bin"];
    let found = places.iter().map(|place| format!("{place}/{program}"));
    let mut found = found.filter(|path| Path::new(path).exists());
    found
        .next()
        .unwrap_or_else(|| panic!("{program} is not installed: `cargo xtask test` installs it"))
}

/// All processes below this one, and itself.
pub fn family(root: u32) -> Vec<u32> {
    let mut all = vec![root];
    let mut at = 0;
    while at < all.len() {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", all[at]));
        for task in tasks.into_iter().flatten().flatten() {
            let text = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
            let children = text.split_whitespace().map(|w| w.parse::<u32>().unwrap());
            all.extend(children.filter(|pid| !is_witness(*pid)));
        }
        at += 1;
    }
    all
}

/// Whether it is a child that a keeper has to be looked at by a program of another user: that is no part
/// of the program.
fn is_witness(pid: u32) -> bool {
    let read = |what: &str| std::fs::read(format!("/proc/{pid}/{what}"));
    let command = read("cmdline").unwrap_or_default();
    command == b"outlive-witness\0" && read("environ").is_ok_and(|all| all.is_empty())
}

/// A pipe with a name, on which a shell can wait without starting a program.
pub fn make_fifo(path: &Path) {
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    mknodat(CWD, path, FileType::Fifo, Mode::RWXU, 0).unwrap();
}
