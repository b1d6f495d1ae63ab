//! The process that is being made: born empty, then changed from outside, step by step.

use crate::ProcessError;
use crate::bootstrap::{self, Plan};
use crate::family;
use crate::freeze::{Held, remote_failed};
use crate::target::{Status, Target};
use outlive_linux::Errno;
use outlive_linux::clock::TimeOffsets;
use outlive_linux::maps;
use outlive_linux::pid_namespace::PidNamespace;
use outlive_linux::ptrace::Running;
use outlive_linux::remote::{Arena, Arg, Batch, InFlight};
use outlive_linux::single::Site;
use outlive_linux::spawn::{self, CLONE_ARGS_SIZE, SpawnError, clone_args};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// How long a step may take.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// Bytes of a batch.
const BATCH: usize = 256 * 1024;
const PLAN: Plan = Plan {
    private: true,
    at: None,
    slots: 16,
    slot: 512 * 1024,
};

/// A process that is being made. Dropping it kills it: nothing half-restored is left behind.
pub struct Stub {
    /// The process.
    pub target: Target,
    /// Working memory in it.
    pub arena: Arena,
    /// Its threads, the leading one first.
    pub threads: Vec<Held>,
    /// Whether it is to live.
    pub keep: bool,
    /// The number of a userfaultfd by which its missing pages are served.
    pub missing: Option<u64>,
}

/// One system call with what it is for.
pub struct Step {
    /// `SYS_…`.
    pub number: i64,
    /// Its arguments.
    pub args: Vec<Arg>,
    /// What it is for.
    pub what: String,
    /// Errors that do not matter.
    pub tolerate: &'static [i32],
}

impl Step {
    /// A step of which any error matters. Arguments are numbers or data.
    pub fn new(number: i64, args: impl IntoIterator<Item = Arg>, what: impl Into<String>) -> Self {
        Self {
            number,
            args: args.into_iter().collect(),
            what: what.into(),
            tolerate: &[],
        }
    }
}

/// A step with numbers only.
pub fn step<const N: usize>(number: i64, args: [u64; N], what: impl Into<String>) -> Step {
    Step::new(number, args.map(Arg::Value), what)
}

impl Stub {
    /// Makes the process, with working memory at `arena_at`.
    pub fn new(pid: u32, time: TimeOffsets, arena_at: u64) -> Result<Self, ProcessError> {
        spawn::waiting_process(pid, Some(time)).map_err(|e| spawn_failed(pid, e))?;
        Self::of_waiting(pid, arena_at)
    }

    /// Makes the process in a PID namespace, in which it has this ID.
    pub fn new_in(namespace: &PidNamespace, id: u32, arena_at: u64) -> Result<Self, ProcessError> {
        let pid = namespace.child(id).map_err(|e| spawn_failed(id, e))?;
        Self::of_waiting(pid, arena_at)
    }

    /// The same as a child of the namespace's init; `unused` is an ID that none of the processes
    /// has.
    pub fn orphan_in(
        namespace: &PidNamespace,
        (id, unused): (u32, u32),
        arena_at: u64,
    ) -> Result<Self, ProcessError> {
        let init = namespace.init();
        let made = namespace.child_of_init(id, unused);
        made.map_err(|e| spawn_failed(id, e))?;
        let pid = family::child_with_id(init, id).ok_or_else(|| lost(init, id))?;
        Self::of_waiting(pid, arena_at)
    }

    /// Takes charge of a process that waits.
    fn of_waiting(pid: u32, arena_at: u64) -> Result<Self, ProcessError> {
        let mut guard = KillOnDrop(Some(pid));
        let target = Target::open(pid)?;
        let leader =
            Running::seize(pid, target.own_child).map_err(|e| target.kernel("tracing it", e))?;
        leader
            .interrupt()
            .map_err(|e| target.kernel("stopping it", e))?;
        let halted = leader
            .wait_interrupted(Instant::now() + PATIENCE)
            .map_err(|(_, e)| target.kernel(e.to_string(), std::io::Error::other("no stop")))?;
        halted
            .die_with_us()
            .map_err(|e| target.kernel("tracing it", e))?;
        let mut leader = Held::new(halted).map_err(|e| target.kernel("reading registers", e))?;
        let syscall_at = syscall_in(&target)?;
        let plan = Plan {
            at: Some(arena_at),
            private: true,
            ..PLAN
        };
        let arena = bootstrap::make_arena(&target, &mut leader, Site::bare(syscall_at), plan)?;
        guard.0 = None;
        Ok(Self {
            target,
            arena,
            threads: vec![leader],
            keep: false,
            missing: None,
        })
    }

    /// Makes a child of this process, which is still empty and so is the child. It has this ID
    /// where it lives. Its end is told by this signal. It shares with this process what `flags` of
    /// `clone(2)` say.
    pub fn child(&mut self, id: u32, exit_signal: u32, flags: u64) -> Result<Self, ProcessError> {
        let parent = self.target.pid;
        self.make(id, exit_signal.into(), flags, parent)
    }

    /// Makes a further child of its parent; its end is told by the same signal.
    pub fn sibling(&mut self, id: u32, flags: u64) -> Result<Self, ProcessError> {
        let pid = self.target.pid;
        let status = Status::read(pid, pid);
        let status = status.map_err(|e| self.target.kernel("reading its status", e))?;
        self.make(id, 0, flags | libc::CLONE_PARENT as u64, status.ppid)
    }

    /// Makes a process whose parent, a child of this one with the free ID `passing`, ends at once.
    pub fn orphan(&mut self, id: u32, passing: u32, flags: u64) -> Result<Self, ProcessError> {
        let mut parent = self.child(passing, 0, flags)?;
        let made = parent.child(id, libc::SIGCHLD as u32, flags)?;
        parent.become_zombie(0)?;
        let args = [u64::from(passing), 0, libc::__WALL as u64, 0];
        let what = "waiting for a process in passing";
        self.steps(vec![step(libc::SYS_wait4, args, what)])?;
        Ok(made)
    }

    fn make(
        &mut self,
        id: u32,
        exit_signal: u64,
        flags: u64,
        parent: u32,
    ) -> Result<Self, ProcessError> {
        let at = self.scratch(&id.to_ne_bytes())?;
        let args = clone_args(libc::CLONE_PTRACE as u64 | flags, exit_signal, at);
        let args = [Arg::In(args.to_vec()), Arg::Value(CLONE_ARGS_SIZE as u64)];
        let made = Step::new(libc::SYS_clone3, args, format!("making process {id}"));
        self.steps(vec![made])?;
        let pid = if self.target.pid == self.target.id {
            id
        } else {
            family::child_with_id(parent, id).ok_or_else(|| lost(parent, id))?
        };
        let guard = KillOnDrop(Some(pid));
        let running = Running::born_seized(pid);
        let halted = running.wait(Instant::now() + PATIENCE).map_err(|(_, e)| {
            self.target
                .kernel(e.to_string(), std::io::Error::other("no first stop"))
        })?;
        let target = Target::open(pid)?;
        let leader = Held::new(halted).map_err(|e| target.kernel("reading registers", e))?;
        std::mem::forget(guard);
        Ok(Self {
            target,
            arena: self.arena.in_copy(pid),
            threads: vec![leader],
            keep: false,
            missing: None,
        })
    }

    /// Ends this process, which is still empty, with an exit status as `wait(2)` gives it; it
    /// stays as a zombie until its parent asks for it.
    pub fn become_zombie(mut self, status: u32) -> Result<(), ProcessError> {
        let (code, signal) = (status >> 8 & 0xff, status & 0x7f);
        if signal != 0 {
            let default = Arg::In(vec![0; 32]);
            let args = [
                Arg::Value(u64::from(signal)),
                default,
                Arg::Value(0),
                Arg::Value(8),
            ];
            let mut reset = Step::new(libc::SYS_rt_sigaction, args, "resetting a signal");
            reset.tolerate = &[libc::EINVAL];
            let no_core = Arg::In(vec![0; 16]);
            let args = [Arg::Value(0), Arg::Value(4), no_core, Arg::Value(0)];
            let no_core = Step::new(libc::SYS_prlimit64, args, "forbidding a core dump");
            self.steps(vec![reset, no_core])?;
        }
        let syscall_at = syscall_in(&self.target)?;
        let held = &mut self.threads[0];
        held.go_on.rip = syscall_at;
        held.go_on.orig_rax = u64::MAX;
        let exit = [libc::SYS_exit_group as u64, u64::from(code)];
        let raise = [libc::SYS_kill as u64, u64::from(self.target.id)];
        [held.go_on.rax, held.go_on.rdi] = if signal == 0 { exit } else { raise };
        held.go_on.rsi = u64::from(signal);
        held.mask = 0;
        held.touch();
        self.keep = true;
        let target = &self.target;
        for held in std::mem::take(&mut self.threads) {
            held.release().map_err(|e| target.kernel("ending it", e))?;
        }
        let deadline = Instant::now() + PATIENCE;
        while !self.target.has_ended() {
            if Instant::now() > deadline {
                // Nobody would kill it any more.
                let _ = outlive_linux::thread::kill(self.target.pid);
                let what = std::io::Error::other("it did not end");
                return Err(self.target.kernel("ending it", what));
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    /// The IDs that its threads have here, by those that they see themselves.
    pub fn ids_here(&self) -> Result<BTreeMap<u32, u32>, ProcessError> {
        let target = &self.target;
        let of = |tid| {
            let status = Status::read(target.pid, tid);
            let status = status.map_err(|e| target.kernel("reading the status of a thread", e))?;
            Ok((status.inner.tid, tid))
        };
        target.threads()?.into_iter().map(of).collect()
    }

    /// Removes the working memory, by way of the restored program's own code.
    pub fn remove_arena(&mut self) -> Result<(), ProcessError> {
        let range = self.arena.range();
        let mappings = bootstrap::mappings_without(&self.target, Some(range))?;
        let syscall_at = bootstrap::find_syscall(self.target.pid, &mappings)
            .ok_or_else(|| no_syscall(&self.target))?;
        let site = Site::bare(syscall_at);
        bootstrap::remove_arena(&self.target, &mut self.threads[0], site, range)
    }

    /// Bytes of working memory that a stub needs.
    #[must_use]
    pub fn arena_length() -> u64 {
        Arena::length(PLAN.slots, PLAN.slot)
    }

    /// Runs a batch in one thread and gives every call's result.
    pub fn run(
        &mut self,
        thread: usize,
        batch: Batch,
    ) -> Result<outlive_linux::remote::Results, ProcessError> {
        let (target, arena) = (&self.target, &self.arena);
        self.threads[thread]
            .run(arena, batch)
            .map_err(|e| remote_failed(target, e))
    }

    /// Runs a batch in one thread, of which every call must succeed.
    pub fn run_named(
        &mut self,
        thread: usize,
        batch: Batch,
        what: &[String],
    ) -> Result<(), ProcessError> {
        let results = self.run(thread, batch)?;
        match results.first_error() {
            None => Ok(()),
            Some((at, errno)) => {
                let what = what.get(at).map_or("a system call", String::as_str);
                Err(self.target.kernel(what, errno))
            }
        }
    }

    /// Sends the leading thread into a batch and comes back at once.
    pub fn begin(&mut self, batch: Batch) -> Result<InFlight, ProcessError> {
        let (target, arena) = (&self.target, &self.arena);
        self.threads[0]
            .begin(arena, batch)
            .map_err(|e| remote_failed(target, e))
    }

    /// Waits for it.
    pub fn finish(&mut self, flight: InFlight) -> Result<(), ProcessError> {
        let (target, arena) = (&self.target, &self.arena);
        self.threads[0]
            .finish(arena, flight)
            .map(drop)
            .map_err(|e| remote_failed(target, e))
    }

    /// Runs any number of steps in the leading thread; returns what each gave. Stops after the
    /// first batch in which one failed.
    pub fn steps(&mut self, steps: Vec<Step>) -> Result<Vec<u64>, ProcessError> {
        let mut values = Vec::with_capacity(steps.len());
        let mut rest = steps.into_iter().peekable();
        while rest.peek().is_some() {
            let mut batch = Batch::new();
            let mut ids = Vec::new();
            while let Some(step) = rest.next_if(|_| batch.size() < BATCH) {
                ids.push((batch.push(step.number, step.args), step.what, step.tolerate));
            }
            let results = self.run(0, batch)?;
            for (id, what, tolerate) in ids {
                match results.value(id) {
                    Ok(value) => values.push(value),
                    Err(e) if tolerate.contains(&e.raw_os_error()) => values.push(0),
                    Err(e) => return Err(self.target.kernel(what, e)),
                }
            }
        }
        Ok(values)
    }

    /// Writes into the working memory; returns the address.
    pub fn scratch(&self, bytes: &[u8]) -> Result<u64, ProcessError> {
        let (at, room) = self.arena.scratch();
        if bytes.len() as u64 > room {
            return Err(ProcessError::Image(format!(
                "{} bytes where {room} fit",
                bytes.len()
            )));
        }
        outlive_linux::memory::write(self.target.pid, at, bytes)
            .map_err(|e| self.target.kernel("writing working memory", e))?;
        Ok(at)
    }
}

impl Drop for Stub {
    fn drop(&mut self) {
        if !self.keep {
            // Killed while it is stopped; the threads' holders see it gone.
            let guard = KillOnDrop(Some(self.target.pid));
            let _ = outlive_linux::thread::kill(self.target.pid);
            let deadline = Instant::now() + PATIENCE;
            for halted in self.threads.drain(..).rev().filter_map(Held::into_halted) {
                let _ = halted.await_end(deadline);
            }
            drop(guard);
        }
    }
}

fn no_syscall(target: &Target) -> ProcessError {
    target.kernel(
        "looking for a syscall instruction",
        std::io::Error::other("none there"),
    )
}

fn lost(parent: u32, id: u32) -> ProcessError {
    ProcessError::Gone {
        pid: parent,
        what: format!("its new child {id} is not there"),
    }
}

fn syscall_in(target: &Target) -> Result<u64, ProcessError> {
    let mappings = maps::read(target.pid).map_err(|e| target.kernel("reading its mappings", e))?;
    bootstrap::find_syscall(target.pid, &mappings).ok_or_else(|| no_syscall(target))
}

/// Kills and reaps our child.
struct KillOnDrop(Option<u32>);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if let Some(pid) = self.0
            && let Some(raw) = i32::try_from(pid)
                .ok()
                .and_then(rustix::process::Pid::from_raw)
        {
            let _ = outlive_linux::thread::kill(pid);
            let _ = rustix::process::waitpid(Some(raw), rustix::process::WaitOptions::empty());
        }
    }
}

/// What it means for the user that a process or its namespace could not be made.
pub fn spawn_failed(pid: u32, e: SpawnError) -> ProcessError {
    let taken = |errno| matches!(e, SpawnError::Clone { source, .. } if source == errno);
    if taken(Errno::EXIST) {
        return ProcessError::Refused(vec![super::pid_taken(pid)]);
    }
    let source = match e {
        SpawnError::TimeNamespace(s)
        | SpawnError::PidNamespace { source: s, .. }
        | SpawnError::Clone { source: s, .. }
        | SpawnError::Other(s) => s,
    };
    match source {
        Errno::PERM | Errno::ACCESS => ProcessError::NotPermitted {
            pid,
            what: e.to_string(),
            remedy: match e {
                SpawnError::TimeNamespace(_) | SpawnError::PidNamespace { .. } => {
                    "restore as root (CAP_SYS_ADMIN)"
                }
                _ => "restore as root (CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE)",
            }
            .into(),
        },
        source => ProcessError::Kernel {
            pid,
            what: e.to_string(),
            source: source.into(),
        },
    }
}
