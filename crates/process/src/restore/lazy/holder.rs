//! A thread of the program that holds on to its missing pages.
//!
//! When the last descriptor of a userfaultfd is closed, the kernel fills missing pages with zeros. The
//! server has one, and the guard; whoever kills both at once would have the program read zeros. So the
//! process itself has one as long as pages are missing: not among its own descriptors, which it may close,
//! but in the table of a thread that has nothing else. The thread cannot be killed without the process.
//! If nobody serves, whoever touches a missing page waits until the process is killed; the root of the
//! program is killed by the kernel when the server ends (`PR_SET_PDEATHSIG`).
//!
//! # Rules
//! - The thread is made last, by a thread that has the program's credentials, and has those too. It
//!   waits in `pause(2)` with all signals blocked, and executes nothing.
//! - It is ended when no page is missing any more, before the server lets go.

use super::super::stub::{PATIENCE, Step, Stub};
use crate::ProcessError;
use crate::bootstrap;
use crate::freeze::{Held, remote_failed};
use crate::lodger::{self, Lodger};
use outlive_linux::ptrace::Running;
use outlive_linux::remote::{Arg, Batch};
use outlive_linux::spawn::clone_args;
use std::time::{Duration, Instant};

/// A thread of the same process with descriptors of its own, which is traced from birth.
const THREAD: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_PTRACE) as u64;
/// `CLONE_ARGS_SIZE_VER0`: without a chosen ID.
const CLONE_ARGS_WITHOUT_ID: usize = 64;
/// How long it may take to end.
const END_WITHIN: Duration = Duration::from_secs(2);

/// The thread.
#[derive(Debug)]
pub struct Holder {
    pid: u32,
    tid: u32,
    syscall_at: u64,
    lodger: Lodger,
}

impl Holder {
    /// Makes it in a process that has the descriptor of its missing pages; there it is closed. A root
    /// is killed if we end. `lodger` tells of it as long as it is there.
    pub fn make(
        stub: &mut Stub,
        is_root: bool,
        lodger: Lodger,
    ) -> Result<Option<Self>, ProcessError> {
        let Some(number) = stub.missing.take() else {
            return Ok(None);
        };
        let mappings = bootstrap::mappings_without(&stub.target, Some(stub.arena.range()))?;
        let syscall_at = bootstrap::find_syscall(stub.target.pid, &mappings);
        let syscall_at = syscall_at.ok_or_else(|| failed(stub, "finding a system call"))?;
        let args = [
            Arg::In(clone_args_of_holder()),
            Arg::Value(CLONE_ARGS_WITHOUT_ID as u64),
        ];
        let made = Step::new(libc::SYS_clone3, args, "making a thread for missing pages");
        let close = Step::new(
            libc::SYS_close,
            [Arg::Value(number)],
            "closing a userfaultfd",
        );
        let values = stub.steps(vec![made, close])?;
        let tid = values.first().copied().unwrap_or(0) as u32;
        let here = stub.ids_here()?;
        let tid = here.get(&tid).copied().unwrap_or(tid);
        let halted = Running::born_seized(tid).wait(Instant::now() + PATIENCE);
        let halted = halted.map_err(|(_, e)| failed(stub, &e.to_string()))?;
        let mut held = Held::new(halted).map_err(|e| stub.target.kernel("its registers", e))?;
        let results = held.run(&stub.arena, keeping_only(number, is_root));
        let results = results.map_err(|e| remote_failed(&stub.target, e))?;
        if let Some((_, e)) = results.first_error() {
            return Err(stub
                .target
                .kernel("preparing a thread for missing pages", e));
        }
        held.go_on.rip = syscall_at;
        held.go_on.rax = libc::SYS_pause as u64;
        held.go_on.orig_rax = u64::MAX;
        held.mask = u64::MAX;
        held.touch();
        held.release()
            .map_err(|e| stub.target.kernel("starting a thread for missing pages", e))?;
        lodger.moved_in(tid);
        let pid = stub.target.pid;
        Ok(Some(Self {
            pid,
            tid,
            syscall_at,
            lodger,
        }))
    }

    /// Ends it. Says whether it is gone; somebody else may be tracing it.
    pub fn end(&self) -> bool {
        let deadline = Instant::now() + END_WITHIN;
        while self.is_there() {
            if Instant::now() > deadline {
                return false;
            }
            let _ = self.try_end(deadline);
            std::thread::sleep(Duration::from_micros(100));
        }
        self.lodger.moved_out();
        true
    }

    fn try_end(&self, deadline: Instant) -> Option<()> {
        let running = Running::seize(self.tid, false).ok()?;
        running.interrupt().ok()?;
        let mut halted = running.wait_interrupted(deadline).ok()?;
        // Its number may belong to somebody else by now, who goes on as if nothing had been.
        if self.is_there() {
            let mut registers = halted.registers().ok()?;
            registers.rip = self.syscall_at;
            registers.rax = libc::SYS_exit as u64;
            registers.rdi = 0;
            registers.orig_rax = u64::MAX;
            halted.set_registers(&registers).ok()?;
        }
        halted.detach().ok()
    }

    fn is_there(&self) -> bool {
        lodger::is_there(self.pid, self.tid)
    }
}

/// With whichever ID the kernel likes.
fn clone_args_of_holder() -> Vec<u8> {
    clone_args(THREAD, 0, 0)[..CLONE_ARGS_WITHOUT_ID].to_vec()
}

/// The thread's own calls: it keeps one descriptor of the copies that it has.
fn keeping_only(number: u64, is_root: bool) -> Batch {
    let mut batch = Batch::new();
    let mut push = |call, args: [u64; 3]| {
        batch.push(call, args.map(Arg::Value));
    };
    if number > 0 {
        push(libc::SYS_close_range, [0, number - 1, 0]);
    }
    push(libc::SYS_close_range, [number + 1, u32::MAX.into(), 0]);
    if is_root {
        let kill = libc::SIGKILL as u64;
        push(libc::SYS_prctl, [libc::PR_SET_PDEATHSIG as u64, kill, 0]);
    }
    let name = Arg::In([lodger::NAME, b"\0"].concat());
    let name = [Arg::Value(libc::PR_SET_NAME as u64), name];
    batch.push(libc::SYS_prctl, name);
    batch
}

fn failed(stub: &Stub, what: &str) -> ProcessError {
    let what = format!("no thread can hold its missing pages: {what}");
    let refusal = stub.target.refusal("", what, "restore without --lazy");
    ProcessError::Refused(vec![refusal])
}
