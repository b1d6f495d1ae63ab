//! Making threads, and setting what each of them goes on with.

use super::stub::{PATIENCE, Step, Stub};
use crate::ProcessError;
use crate::freeze::{Held, remote_failed, run_all};
use crate::reentry::made_again;
use crate::resources::credentials::{self, Credentials};
use crate::resources::signals::{self, SignalsState};
use crate::resources::thread::{self, ThreadState, call_of, limit_of};
use crate::target::Status;
use crate::waits::{Interruption, interruption};
use outlive_linux::ptrace::{Registers, Running, Stop};
use outlive_linux::remote::{Arg, Batch};
use outlive_linux::spawn::{CLONE_ARGS_SIZE, clone_args};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// Flags of a further thread of the same process, which is traced from birth.
const THREAD: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_PTRACE) as u64;
/// How long the ID of a thread that has ended may stay taken.
const IDS_FREE_WITHIN: Duration = Duration::from_millis(500);
/// Threads made by one batch: their IDs must fit into the working memory.
const GROUP: usize = 1024;

/// An image is hostile: the leading thread first, IDs sensible and unique, fixed lengths right.
pub fn validate(threads: &[ThreadState], pid: u32) -> Result<(), ProcessError> {
    let bad = |what: String| Err(ProcessError::Image(what));
    if threads.first().is_none_or(|t| t.tid != pid) {
        return bad("the leading thread is missing".into());
    }
    let mut seen = BTreeSet::new();
    for t in threads {
        if i32::try_from(t.tid).map_or(true, |t| t <= 0) || !seen.insert(t.tid) {
            return bad(format!(
                "thread ID {} is out of range or there twice",
                t.tid
            ));
        }
        if t.segments.len() % thread::SEGMENT != 0 {
            return bad(format!("thread {}: segments have a wrong length", t.tid));
        }
        if !t.credentials.is_well_formed() {
            return bad(format!("thread {}: credentials have a wrong length", t.tid));
        }
    }
    Ok(())
}

/// Makes all threads but the leading one.
pub fn make(stub: &mut Stub, threads: &[ThreadState]) -> Result<(), ProcessError> {
    threads[1..]
        .chunks(GROUP)
        .try_for_each(|group| make_group(stub, group))
}

/// Gives every thread its state but for registers. Returns what could not be restored and does no
/// harm. The signals come with whether the actions are its own.
pub fn recreate(
    stub: &mut Stub,
    threads: &[ThreadState],
    (signals, has_actions): (&SignalsState, bool),
) -> Result<Vec<String>, ProcessError> {
    let mut batch = Batch::new();
    if has_actions {
        signals::recreate(signals, &mut batch)?;
    }
    stub.run_named(0, batch, &[])?;
    let (pid, id) = (stub.target.pid, stub.target.id);
    let mut notices = Vec::new();
    for (held, t) in stub.threads.iter().zip(threads) {
        notices.extend(thread::recreate_outside(pid, held.tid, t)?);
    }
    let status = Status::read(pid, pid).map_err(|e| stub.target.kernel("reading its status", e))?;
    let now = Credentials::of(&status);
    let mut batches = Vec::with_capacity(threads.len());
    for t in threads {
        let mut batch = Batch::new();
        thread::recreate(t, &mut batch);
        signals::requeue(id, Some(t.tid), &t.pending_signals, &mut batch)?;
        if t.tid == id {
            signals::requeue(id, None, &signals.pending, &mut batch)?;
        }
        credentials::recreate(&t.credentials, &now, &mut batch);
        batches.push(batch);
    }
    let mut batches = batches.into_iter();
    let (arena, target) = (stub.arena, &stub.target);
    let results = run_all(&arena, &mut stub.threads, |_| {
        batches.next().unwrap_or_default()
    })
    .map_err(|e| remote_failed(target, e))?;
    for (t, result) in threads.iter().zip(results) {
        if let Some((at, e)) = result.first_error() {
            let what = format!("restoring state of thread {} (call {at})", t.tid);
            return Err(stub.target.kernel(what, e));
        }
    }
    Ok(notices)
}

fn make_group(stub: &mut Stub, threads: &[ThreadState]) -> Result<(), ProcessError> {
    let made = make_patiently(stub, threads);
    let here = if stub.target.pid == stub.target.id {
        BTreeMap::new()
    } else {
        stub.ids_here()?
    };
    let deadline = Instant::now() + PATIENCE;
    for t in threads {
        // One that was not made cannot be waited for under any number.
        let running = Running::born_seized(here.get(&t.tid).copied().unwrap_or(t.tid));
        match running.wait(deadline) {
            Ok(halted) if matches!(halted.stop(), Stop::Event(_)) => {
                let held = Held::new(halted);
                stub.threads
                    .push(held.map_err(|e| stub.target.kernel("reading registers", e))?);
            }
            Ok(_) => return Err(ProcessError::Image(format!("thread {} began oddly", t.tid))),
            // If it was not made, that is the error to tell of.
            Err((_, e)) => {
                made?;
                let other = std::io::Error::other("no first stop");
                return Err(stub.target.kernel(e.to_string(), other));
            }
        }
    }
    made
}

/// Makes threads. A process that was killed may be gone and reaped a moment before the IDs of its
/// threads are free again.
fn make_patiently(stub: &mut Stub, threads: &[ThreadState]) -> Result<(), ProcessError> {
    let deadline = Instant::now() + IDS_FREE_WITHIN;
    loop {
        let there = stub.ids_here()?;
        let missing = || threads.iter().filter(|t| !there.contains_key(&t.tid));
        let tids: Vec<u8> = missing().flat_map(|t| t.tid.to_ne_bytes()).collect();
        let at = stub.scratch(&tids)?;
        let steps = missing().enumerate().map(|(i, t)| {
            let args = clone_args(THREAD, 0, at + 4 * i as u64);
            let args = [Arg::In(args.to_vec()), Arg::Value(CLONE_ARGS_SIZE as u64)];
            Step::new(libc::SYS_clone3, args, format!("making thread {}", t.tid))
        });
        match stub.steps(steps.collect()) {
            Err(ProcessError::Kernel { source, .. })
                if source.raw_os_error() == Some(libc::EEXIST) && Instant::now() < deadline =>
            {
                std::thread::sleep(Duration::from_millis(1));
            }
            made => return made.map(drop),
        }
    }
}

fn interrupted(state: &ThreadState) -> Option<Interruption> {
    let r = state.registers.to_ptrace();
    interruption(&call_of(&r), r.rax as i64, !state.call_again)
}

/// What a call that was entered again returned: the kernel's order to go on by the restart block.
const RESTART_BLOCK: u64 = -516i64 as u64;

/// Gives calls that the kernel continues by a restart block such a block: the call is entered
/// again with the time that was left, and interrupted at once. Returns, thread by thread, the
/// result of a call that ended all the same, for example because its time was over.
pub fn rearm(stub: &mut Stub, threads: &[ThreadState]) -> Result<Vec<Option<u64>>, ProcessError> {
    let mut ended = Vec::with_capacity(threads.len());
    for (i, state) in threads.iter().enumerate() {
        let mut result = None;
        if let Some(how @ Interruption::RestartBlock(_)) = interrupted(state) {
            let saved = state.registers.to_ptrace();
            let again = made_again(stub.target.pid, &saved, limit_of(how), state.wait_left_ns);
            let held = stub.threads.remove(i);
            let (held, returned) = enter_and_interrupt(stub, held, &again)?;
            stub.threads.insert(i, held);
            result = Some(returned).filter(|&r| r != RESTART_BLOCK);
        }
        ended.push(result);
    }
    Ok(ended)
}

fn enter_and_interrupt(
    stub: &Stub,
    held: Held,
    again: &Registers,
) -> Result<(Held, u64), ProcessError> {
    let tid = held.tid;
    let failed = |what: &str, e: std::io::Error| {
        stub.target
            .kernel(format!("thread {tid}: entering its call again: {what}"), e)
    };
    let no_stop = || std::io::Error::other("no stop");
    let mut halted = held
        .into_halted()
        .ok_or_else(|| failed("the thread is gone", no_stop()))?;
    halted
        .set_signal_mask(u64::MAX)
        .map_err(|e| failed("mask", e.into()))?;
    halted
        .set_registers(again)
        .map_err(|e| failed("registers", e.into()))?;
    let deadline = Instant::now() + PATIENCE;
    // At its entry the interrupt is ordered, so that it does not sleep; the next stop is its exit.
    // Not one instruction of the program may run after it.
    for entered in [false, true] {
        loop {
            if entered {
                halted
                    .interrupt()
                    .map_err(|e| failed("interrupting", e.into()))?;
            }
            let running = halted
                .resume_to_syscall()
                .map_err(|e| failed("resuming", e.into()))?;
            halted = running
                .wait(deadline)
                .map_err(|(_, e)| failed(&e.to_string(), no_stop()))?;
            if halted.stop() == Stop::Syscall {
                break;
            }
        }
    }
    let returned = halted
        .registers()
        .map_err(|e| failed("reading registers", e.into()))?
        .rax;
    // That stop used the interrupt up. Another one brings the thread to where calls are restarted.
    halted
        .interrupt()
        .map_err(|e| failed("interrupting", e.into()))?;
    let running = halted.resume().map_err(|e| failed("resuming", e.into()))?;
    let halted = running
        .wait_interrupted(deadline)
        .map_err(|(_, e)| failed(&e.to_string(), no_stop()))?;
    let mut held = Held::new(halted).map_err(|e| failed("reading registers", e.into()))?;
    held.touch();
    Ok((held, returned))
}

/// Sets extended registers now, and what each thread goes on with when it is let go.
pub fn set_registers(
    stub: &mut Stub,
    threads: &[ThreadState],
    ended: &[Option<u64>],
) -> Result<(), ProcessError> {
    let pid = stub.target.pid;
    for ((held, state), ended) in stub.threads.iter_mut().zip(threads).zip(ended) {
        let kernel = |what: &str, e| {
            stub.target
                .kernel(format!("thread {}: {what}", state.tid), e)
        };
        let halted = held
            .halted_mut()
            .map_err(|e| remote_failed(&stub.target, e))?;
        halted.set_xstate(&state.xstate).map_err(|e| {
            kernel(
                "setting extended registers (does the processor have the same ones?)",
                e,
            )
        })?;
        let saved = state.registers.to_ptrace();
        held.go_on = match (interrupted(state), ended) {
            (Some(Interruption::RestartBlock(_)), Some(result)) => Registers {
                rax: *result,
                orig_rax: u64::MAX,
                ..saved
            },
            (Some(Interruption::Returned(limit)), _) => {
                made_again(pid, &saved, limit, state.wait_left_ns)
            }
            _ => saved,
        };
        held.mask = state.signal_mask;
        held.touch();
    }
    Ok(())
}
