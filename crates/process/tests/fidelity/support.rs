//! Starting, judging and removing the programs that are captured.
//!
//! # Safety
//! `waitpid`, `kill` and the removal of System V objects are called with numbers and one live
//! status word.
#![allow(unsafe_code)]

use crate::store::{Epoch, Nowhere, Store};
use crate::view::View;
use outlive_epoch::{EpochReader, EpochWriter};
use outlive_process::image::{self, ThreadsState, group, kinds};
use outlive_process::resources::attributes::ProcessState;
use outlive_process::{ProcessError, Ready, RestoreOptions, TrackOptions, Tracked, restore};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, Once};
use std::time::{Duration, Instant};

/// How long anything may take that must happen.
const PATIENCE: Duration = Duration::from_secs(30);

/// One test at a time: a tracer is a thread, and the processors are few.
pub fn alone() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(|e| e.into_inner())
}

/// Whether the privileges are there; where they are not, the test says that it was skipped.
pub fn may_run(name: &str) -> bool {
    // SAFETY: takes no argument.
    let root = unsafe { libc::geteuid() } == 0;
    if !root {
        println!("SKIPPED 1 test: {name}: needs root");
        println!("skipped: needs root");
    }
    root
}

/// How often something is done: more with `OUTLIVE_LONG`.
pub fn times(short: usize, long: usize) -> usize {
    if std::env::var_os("OUTLIVE_LONG").is_some() {
        long
    } else {
        short
    }
}

/// Where the test programs are, built once.
pub fn programs() -> PathBuf {
    static BUILT: Once = Once::new();
    let own = std::env::current_exe().expect("this test has a path");
    let dir = own
        .parent()
        .and_then(Path::parent)
        .expect("it lies in a build directory");
    BUILT.call_once(|| {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args([
            "build",
            "--quiet",
            "--package",
            "outlive-test-programs",
            "--target-dir",
        ]);
        cargo.arg(dir.parent().expect("a profile lies in the build directory"));
        if dir.ends_with("release") {
            cargo.arg("--release");
        }
        assert!(
            cargo.status().expect("cargo runs").success(),
            "the test programs do not build"
        );
    });
    dir.to_path_buf()
}

/// A test program that runs, with a directory of its own. Dropping it removes both.
pub struct Program {
    name: String,
    pub pid: u32,
    pub dir: tempfile::TempDir,
    alive: bool,
}

impl Program {
    #[expect(
        clippy::zombie_processes,
        reason = "waited for by its number, as is what it becomes after a restore"
    )]
    /// Starts it and waits until it says that it is ready. `{dir}` in an argument is its directory.
    pub fn start(name: &str, arguments: &[&str]) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("outlive-")
            .tempdir()
            .expect("a directory");
        let append = |file: &str| {
            let path = dir.path().join(file);
            OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)
                .expect("a file for output")
        };
        let shown = dir.path().to_str().expect("a plain path").to_owned();
        let mut command = Command::new(programs().join(name));
        // SAFETY: between fork and exec only system calls with numbers are made.
        unsafe {
            command.pre_exec(|| {
                // What this process got from whoever runs the tests is none of the program's.
                let cloexec = libc::CLOSE_RANGE_CLOEXEC as i32;
                libc::close_range(3, libc::c_uint::MAX, cloexec);
                // A test that is killed leaves nothing behind.
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        let child = command
            .args(arguments.iter().map(|a| a.replace("{dir}", &shown)))
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .stdout(append("out"))
            .stderr(append("err"))
            .spawn()
            .expect("the program starts");
        let program = Self {
            name: name.into(),
            pid: child.id(),
            dir,
            alive: true,
        };
        program.await_word("ready");
        program
    }

    pub fn output(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("out")).unwrap_or_default()
    }

    /// What it said, for a test that fails.
    pub fn story(&self) -> String {
        let errors = std::fs::read_to_string(self.dir.path().join("err")).unwrap_or_default();
        format!(
            "{} (pid {}) said:\n{}{errors}",
            self.name,
            self.pid,
            self.output()
        )
    }

    /// Whether it ended, without taking note of it.
    pub fn has_ended(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid));
        stat.is_ok_and(|s| s.rsplit(')').next().is_some_and(|r| r.starts_with(" Z")))
    }

    /// Fails the test if it ended of itself, which it does when anything is wrong.
    pub fn must_be_well(&self) {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid));
        let status = stat.unwrap_or_default();
        // The last word is its status, as `wait(2)` gives it.
        let status = status.split_whitespace().last().unwrap_or("?");
        let story = || format!("it ended, status {status}; {}", self.story());
        assert!(!self.has_ended(), "{}", story());
    }

    /// Has it report: it must have made progress in all it does.
    pub fn must_report(mut self) -> String {
        self.signal(libc::SIGUSR1);
        let deadline = Instant::now() + PATIENCE;
        while !self.has_ended() {
            assert!(Instant::now() < deadline, "no report; {}", self.story());
            outlive_process::release_stragglers();
            std::thread::sleep(Duration::from_millis(5));
        }
        let status = self.reap();
        assert_eq!(status, 0, "exit status {status:#x}; {}", self.story());
        self.output()
    }

    /// Waits until it has said this.
    pub fn await_word(&self, word: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.output().contains(word) {
            assert!(
                Instant::now() < deadline && !self.has_ended(),
                "{}",
                self.story()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: only numbers are passed; it is our child and was not waited for.
        unsafe { libc::kill(self.pid as i32, signal) };
    }

    /// Its `maps`.
    pub fn mappings(&self) -> String {
        std::fs::read_to_string(format!("/proc/{}/maps", self.pid)).expect("its mappings")
    }

    /// Its `maps` once they do not change any more: threads make their stacks for signals after
    /// they have begun.
    pub fn settled_mappings(&self) -> String {
        let mut before = self.mappings();
        loop {
            std::thread::sleep(Duration::from_millis(200));
            let now = self.mappings();
            if now == before {
                return now;
            }
            before = now;
        }
    }

    /// Pages of it that are in memory.
    pub fn resident_pages(&self) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/statm", self.pid));
        let text = text.expect("its statm");
        text.split(' ')
            .nth(1)
            .and_then(|w| w.parse().ok())
            .expect("a number")
    }

    /// Takes note that it was ended and waited for by somebody else.
    pub fn was_ended(&mut self) {
        self.alive = false;
    }

    /// Takes note that it was restored.
    pub fn was_restored(&mut self) {
        self.alive = true;
    }

    pub fn kill(&mut self) {
        if self.alive {
            // SAFETY: only numbers are passed; it is our child and was not waited for.
            unsafe { libc::kill(self.pid as i32, libc::SIGKILL) };
            self.reap();
        }
    }

    /// Waits until it ends, with this status.
    pub fn must_end_with(&mut self, code: i32) {
        let status = self.reap();
        assert_eq!(status, code << 8, "{}", self.story());
    }

    fn reap(&mut self) -> i32 {
        self.alive = false;
        let deadline = Instant::now() + PATIENCE;
        let mut status = 0;
        loop {
            // SAFETY: status is live.
            let r = unsafe { libc::waitpid(self.pid as i32, &raw mut status, libc::WNOHANG) };
            if r == self.pid as i32 {
                return status;
            }
            // A thread that is still traced cannot go, and its process is not told of.
            let late = r != 0 || Instant::now() > deadline;
            if late && std::thread::panicking() {
                return status;
            }
            assert!(!late, "{} (pid {}) does not go: {r}", self.name, self.pid);
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Program {
    /// Removes the System V objects that it made, as a boot does.
    pub fn remove_objects(&self) {
        let said = self.output();
        let words: Vec<&str> = said.split_whitespace().collect();
        for pair in words.windows(2) {
            let Ok(id) = pair[1].parse::<i32>() else {
                continue;
            };
            // SAFETY: only numbers are passed, of objects that the program made and named.
            let _ = unsafe {
                match pair[0] {
                    "sem" => libc::semctl(id, 0, libc::IPC_RMID),
                    "shm" => libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()),
                    "msg" => libc::msgctl(id, libc::IPC_RMID, std::ptr::null_mut()),
                    _ => 0,
                }
            };
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.kill();
        self.remove_objects();
    }
}

/// From now on, whoever loses its parent becomes this process's child.
pub fn adopt_orphans() {
    // SAFETY: only numbers are passed.
    unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) };
}

/// Kills somebody's child, and waits until it is a zombie.
pub fn kill_child(pid: u32) {
    // SAFETY: only numbers are passed.
    assert_eq!(unsafe { libc::kill(pid.cast_signed(), libc::SIGKILL) }, 0);
    let zombie = || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(") ")
            .is_none_or(|(_, rest)| rest.starts_with('Z'))
    };
    while !zombie() {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Ends a child of this process.
pub fn end(child: i32) {
    let mut status = 0;
    // SAFETY: status is live.
    unsafe {
        libc::kill(child, libc::SIGKILL);
        libc::waitpid(child, &raw mut status, libc::__WALL);
    }
}

/// Ends and reaps whatever a kind left behind.
pub fn clean_up() {
    let tasks = std::fs::read_dir("/proc/self/task")
        .into_iter()
        .flatten()
        .flatten();
    let children = tasks.filter_map(|t| std::fs::read_to_string(t.path().join("children")).ok());
    let pids: Vec<i32> = children
        .flat_map(|c| {
            c.split_whitespace()
                .filter_map(|w| w.parse().ok())
                .collect::<Vec<_>>()
        })
        .collect();
    for pid in pids {
        end(pid);
    }
}

/// Begins to track a program.
pub fn track(program: &Program) -> Tracked {
    Tracked::attach(program.pid, TrackOptions::default())
        .unwrap_or_else(|e| panic!("attaching: {e}; {}", program.story()))
}

pub fn moving(epoch: &Epoch) -> Vec<(u64, u64)> {
    let root = image::describe(epoch).expect("the subject").root_process;
    moving_of(epoch, root)
}

/// Where the time that is left of an interrupted call is written, by the kernel or by the capture,
/// and what else changes by itself: for all who have the address space.
fn moving_of(epoch: &Epoch, process: u32) -> Vec<(u64, u64)> {
    let holder = |pid: u32| {
        let state: ProcessState =
            image::get(epoch, &group(kinds::ATTRIBUTES, pid)).expect("a process of the epoch");
        match state.shares_memory_with {
            0 => pid,
            holder => holder,
        }
    };
    let processes = image::describe(epoch).expect("the subject").processes;
    let fellows = processes
        .into_iter()
        .filter(|p| holder(*p) == holder(process));
    let threads_of = |pid| -> ThreadsState {
        image::get(epoch, &group(kinds::THREADS, pid)).expect("the threads of the epoch")
    };
    let mut places = Vec::new();
    for thread in fellows.flat_map(|pid| threads_of(pid).threads) {
        let r = thread.registers;
        places.push((r.rsp - 288, r.rsp - 128));
        if let Some(rseq) = &thread.rseq {
            // On which processor it runs.
            let at = rseq.address;
            places.extend([(at, at + 8), (at + 20, at + 28)]);
        }
        match r.orig_rax as i64 {
            libc::SYS_nanosleep => places.push((r.rsi, r.rsi + 16)),
            libc::SYS_clock_nanosleep => places.push((r.r10, r.r10 + 16)),
            // Entered again, a poll whose event was there already has its result written.
            libc::SYS_poll => places.push((r.rdi, r.rdi + r.rsi.min(1024) * 8)),
            _ => {}
        }
    }
    places
}

/// Takes one epoch, with an independent look at the program while it stands, and lets it run on.
pub fn epoch(tracked: &mut Tracked, store: &mut Store) -> Result<View, ProcessError> {
    seen_epoch(tracked, store, View::take)
}

/// The same without a look at the program, which may be killed at any moment.
pub fn unseen_epoch(tracked: &mut Tracked, store: &mut Store) -> Result<(), ProcessError> {
    seen_epoch(tracked, store, |_, _| ())
}

fn seen_epoch<T>(
    tracked: &mut Tracked,
    store: &mut Store,
    look: impl FnOnce(u32, &[(u64, u64)]) -> T,
) -> Result<T, ProcessError> {
    let pid = tracked.pid();
    let mut writer = store.begin();
    tracked.precopy(&mut *writer, &mut || false)?;
    let (stopped, captured) = tracked.stop(&mut *writer, None)?;
    captured.write(&mut *writer)?;
    let seen = look(pid, &moving(&writer.epoch));
    stopped.resume()?;
    captured.sync_files()?;
    writer.commit(captured.facts)?;
    Ok(seen)
}

/// Stops the program and lets it go on.
pub fn stop_and_resume(program: &Program, tracked: &mut Tracked) {
    let stopped = tracked
        .stop(&mut Nowhere, None)
        .map(|(stopped, _)| stopped.resume());
    match stopped {
        Ok(Ok(_)) => program.must_be_well(),
        Ok(Err(e)) | Err(e) => panic!("{e}; {}", program.story()),
    }
}

/// Takes the last epoch, and ends the program.
pub fn last_epoch(program: &mut Program, mut tracked: Tracked, store: &mut Store) -> View {
    let mut writer = store.begin();
    let failed = |e: ProcessError| -> ! { panic!("{e}; {}", program.story()) };
    tracked
        .precopy(&mut *writer, &mut || false)
        .unwrap_or_else(|e| failed(e));
    let (stopped, captured) = tracked
        .stop(&mut *writer, None)
        .unwrap_or_else(|e| failed(e));
    captured.write(&mut *writer).expect("writing the epoch");
    let view = View::take(program.pid, &moving(&writer.epoch));
    captured.sync_files().expect("syncing files");
    writer.commit(captured.facts).expect("the commit");
    stopped.end().expect("the end");
    program.was_ended();
    let gone = !Path::new(&format!("/proc/{}", program.pid)).exists();
    assert!(gone, "it is not gone");
    view
}

/// Restores an epoch up to before its first instruction.
pub fn prepare(epoch: &Epoch) -> Ready {
    restore(epoch as &dyn EpochReader, &RestoreOptions::default())
        .unwrap_or_else(|e| panic!("restoring epoch {}: {e}", epoch.id()))
}

/// Looks at a process that stands still.
pub fn look_at(pid: u32, epoch: &Epoch) -> View {
    View::take(pid, &moving_of(epoch, pid))
}

/// Looks at a program that is restored and has not run yet.
pub fn look(ready: &Ready, epoch: &Epoch) -> View {
    View::take(ready.pid(), &moving(epoch))
}

/// Restores an epoch, compares it with what was seen at its capture, and lets it run.
pub fn bring_back(program: &mut Program, epoch: &Epoch, seen: &View) {
    let ready = prepare(epoch);
    assert_eq!(ready.pid(), program.pid);
    seen.must_equal(&look(&ready, epoch));
    ready.go().expect("letting it run");
    program.was_restored();
}

/// The same, with tracking that goes on from there.
pub fn bring_back_tracked(program: &mut Program, epoch: &Epoch, seen: &View) -> Tracked {
    let options = RestoreOptions {
        track: Some(TrackOptions::default()),
        ..RestoreOptions::default()
    };
    let ready = restore(epoch as &dyn EpochReader, &options)
        .unwrap_or_else(|e| panic!("restoring epoch {}: {e}", epoch.id()));
    seen.must_equal(&look(&ready, epoch));
    let launched = ready.launch().expect("letting it run");
    program.was_restored();
    let tracked = launched.tracked;
    tracked.unwrap_or_else(|| panic!("it is not tracked: {}", program.story()))
}

/// Restores an epoch into a PID namespace of its own, up to before its first instruction.
pub fn prepare_apart(epoch: &Epoch) -> Ready {
    let options = RestoreOptions {
        new_pid_ns: true,
        ..RestoreOptions::default()
    };
    restore(epoch as &dyn EpochReader, &options)
        .unwrap_or_else(|e| panic!("restoring epoch {}: {e}", epoch.id()))
}

/// Restores an epoch into a PID namespace of its own, compares it with what was seen at its capture,
/// and lets it run.
pub fn move_house(program: &mut Program, epoch: &Epoch, seen: &View) {
    let ready = prepare_apart(epoch);
    program.pid = ready.pid();
    let moved = look(&ready, epoch).wherever();
    seen.clone().wherever().must_equal(&moved);
    ready.go().expect("letting it run");
    program.was_restored();
}

/// The descriptors of a process: number and link.
pub fn descriptors(pid: u32) -> Vec<(String, PathBuf)> {
    let dir = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("its descriptors");
    let mut all: Vec<_> = dir
        .flatten()
        .filter_map(|e| {
            Some((
                e.file_name().into_string().ok()?,
                std::fs::read_link(e.path()).ok()?,
            ))
        })
        .collect();
    all.sort();
    all
}

/// Nobody in this process can open a file until it is dropped.
pub struct NoFiles(Rlimit);

impl NoFiles {
    pub fn begin() -> Self {
        Self::but(0)
    }

    /// But so many that lie next to those that are open.
    pub fn but_a_few(count: u64) -> Self {
        let next = std::fs::File::open("/dev/null").expect("a descriptor");
        Self::but(u64::from(next.as_raw_fd().unsigned_abs()) + count)
    }

    fn but(limit: u64) -> Self {
        let before = getrlimit(Resource::Nofile);
        let none = Rlimit {
            current: Some(limit),
            ..before
        };
        setrlimit(Resource::Nofile, none).expect("a lower limit");
        Self(before)
    }
}

impl Drop for NoFiles {
    fn drop(&mut self) {
        let _ = setrlimit(Resource::Nofile, self.0);
    }
}
