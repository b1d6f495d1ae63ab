//! What is refused before any harm: everything about a process that could not be made again.

use crate::namespaces;
use crate::resources::timers;
use crate::target::{Status, Target};
use crate::{ProcessError, Refusal};
use outlive_linux::processor;

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
    for tid in target.threads()? {
        if let Ok(status) = Status::read(target.pid, tid) {
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
