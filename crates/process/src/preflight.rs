//! What is refused before any harm: everything about a process that could not be made again.

use crate::family;
use crate::member;
use crate::namespaces;
use crate::resources::landlock::Question;
use crate::resources::{descriptors, timers};
use crate::sharing::outside::Outside;
use crate::target::{Status, Target};
use crate::{ProcessError, Refusal, sharing};
use outlive_linux::processor;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// How long a stop waits for processes that are about to begin a program of their own …
const SPAWN_PATIENCE: Duration = Duration::from_millis(500);
/// … looking again after so long.
const SPAWN_POLL: Duration = Duration::from_micros(200);

/// Waits a while (at most `patience`) for processes that are about to begin a program of their own:
/// their parents could not be stopped, while everything else stands still already. One that does not
/// come to it is refused. Where there is something to wait for, `begin` is called before.
pub fn let_spawn(
    root: u32,
    adopters: &[u32],
    patience: Duration,
    begin: impl FnOnce(),
) -> Result<(), ProcessError> {
    let spawning = || {
        let all = family::list(root, adopters).into_iter();
        all.filter(family::is_spawning)
            .map(|kin| kin.pid)
            .collect::<BTreeSet<u32>>()
    };
    let deadline = Instant::now() + SPAWN_PATIENCE.min(patience);
    let first = spawning();
    if !first.is_empty() {
        begin();
    }
    let mut now = first.clone();
    while !now.is_empty() && Instant::now() < deadline {
        std::thread::sleep(SPAWN_POLL);
        now = spawning();
    }
    let stuck = first
        .intersection(&now)
        .filter_map(|&pid| Target::open(pid).ok());
    let refusals: Vec<Refusal> = stuck
        .map(|target| {
            let what = "its parent waits until it begins a program of its own (vfork)";
            target.refusal("", what, "try again when it has")
        })
        .collect();
    if refusals.is_empty() {
        Ok(())
    } else {
        Err(ProcessError::Refused(refusals))
    }
}

/// Refuses what of a program could not be restored, before anything of it is touched.
pub fn of_program(
    root: u32,
    adopters: &[u32],
    patience: Duration,
    outside: &mut Outside,
) -> Result<(), ProcessError> {
    let_spawn(root, adopters, patience, || ())?;
    let mut refusals: Vec<Refusal> = Vec::new();
    let mut processes = Vec::new();
    let all = family::list(root, adopters);
    refusals.extend(outside.refusals(&all, || family::list(root, adopters)));
    for kin in all.into_iter().filter(|k| !k.zombie) {
        match Target::open(kin.pid) {
            Ok(target) if !family::is_spawning(&kin) => processes.push((kin, target)),
            // A child may end at any time.
            Err(e) if kin.pid == root => return Err(e),
            _ => {}
        }
    }
    refusals.extend(sharing::preflight(&processes));
    let targets: Vec<Target> = processes.into_iter().map(|(_, target)| target).collect();
    for target in &targets {
        match member::tracked_already(target) {
            Ok(found) => refusals.extend(found),
            Err(_) if target.pid != root && target.has_ended() => {}
            Err(e) => return Err(e),
        }
        match member::refusals(target, root) {
            // A child that has just ended looks like one whose leading thread has.
            Ok(found)
                if found.is_empty() || target.pid != root && family::is_ending(target.pid) => {}
            Ok(found) => refusals.extend(found),
            Err(_) if target.pid != root && target.has_ended() => {}
            Err(e) => return Err(e),
        }
    }
    let views: Vec<_> = targets.iter().map(Target::view).collect();
    match descriptors::preflight(&views) {
        Ok(()) => {}
        Err(ProcessError::Refused(more)) => refusals.extend(more),
        Err(ProcessError::Gone { pid, .. }) if pid != root => {}
        Err(e) => return Err(e),
    }
    if refusals.is_empty() {
        Ok(())
    } else {
        Err(ProcessError::Refused(refusals))
    }
}

/// Everything that would be refused later, as far as it can be seen while the program runs, of a
/// process of the program with this root.
pub fn of_process(target: &Target, root: u32) -> Result<Vec<Refusal>, ProcessError> {
    let mut found = namespaces::refusals(target, root)?;
    if processor::enabled_states() == 0 {
        let what = "the processor, or the kernel, has no XSAVE, by which registers are read";
        found.push(target.refusal("", what, "run it on a machine that has it"));
    }
    found.extend(of_threads(target)?);
    Ok(found)
}

/// Refusals that concern timers and threads of a process that runs.
pub fn of_threads(target: &Target) -> Result<Vec<Refusal>, ProcessError> {
    let mut found = timers::refusals(target)?;
    let mut landlock = Question::new(target);
    for tid in target.threads()? {
        if let Ok(status) = Status::read(target.pid, tid) {
            found.extend(landlock.prepare(tid, &status));
            found.extend(of_thread(target, tid, &status));
        }
    }
    Ok(found)
}

/// Refusals that concern one thread; also looked for at each stop.
pub fn of_thread(target: &Target, tid: u32, status: &Status) -> Vec<Refusal> {
    let mut found = Vec::new();
    // The kernel names the tracing thread, and ours is whichever thread calls this.
    let me = rustix::thread::gettid()
        .as_raw_nonzero()
        .get()
        .cast_unsigned();
    let place = format!("thread {tid}");
    if status.tracer != 0 && status.tracer != me {
        found.push(target.refusal(
            place.clone(),
            format!("it is traced by process {}", status.tracer),
            "end the debugger or strace first",
        ));
    }
    if status.seccomp != 0 {
        let what = "system calls are filtered (seccomp)";
        found.push(target.refusal(place.clone(), what, "filters cannot be saved yet"));
    }
    if tid == target.pid && matches!(status.state, b'Z' | b'X') {
        let what = "the leading thread has ended while others run";
        found.push(target.refusal(place.clone(), what, "this cannot be saved yet"));
    }
    found
}
