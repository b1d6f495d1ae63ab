//! Signal dispositions, the signals queued for a whole process, and what queues them: its timers.

use crate::ProcessError;
use crate::freeze::Held;
use crate::resources::timers::{self, TimerState};
use crate::target::Target;
use outlive_linux::remote::{Arg, Batch, CallId, Results};
use outlive_state_tree::StateNode;
use std::collections::BTreeSet;

/// Number of signals.
const SIGNALS: u64 = 64;
/// Bytes of a `siginfo_t`.
pub const SIGINFO: usize = 128;
/// Words of the kernel's `struct sigaction`: handler, flags, restorer, mask.
const ACTION_WORDS: usize = 4;

/// What a process does with signals.
#[derive(StateNode, Clone, Debug, Default, PartialEq, Eq)]
#[state(compatible = "outlive,signals-v1")]
pub struct SignalsState {
    /// For each signal from 1 to 64: handler, flags, restorer, mask (`rt_sigaction(2)`).
    pub actions: Vec<u64>,
    /// Signals queued for the process, 128 bytes each.
    pub pending: Vec<u8>,
    /// Timers that send signals (`timer_create(2)`), by rising ID.
    #[state(children)]
    pub timers: Vec<TimerState>,
}

fn is_fixed(signal: u64) -> bool {
    signal == libc::SIGKILL as u64 || signal == libc::SIGSTOP as u64
}

/// Adds the questions.
pub fn ask(batch: &mut Batch) -> Vec<CallId> {
    (1..=SIGNALS)
        .map(|s| {
            let args = [
                Arg::Value(s),
                Arg::Value(0),
                Arg::Out(ACTION_WORDS * 8),
                Arg::Value(8),
            ];
            batch.push(libc::SYS_rt_sigaction, args)
        })
        .collect()
}

/// Puts the answers together.
pub fn collect(
    target: &Target,
    leader: &Held,
    asked: &[CallId],
    answers: &Results,
    timers: Vec<TimerState>,
) -> Result<SignalsState, ProcessError> {
    let mut actions = Vec::with_capacity(asked.len() * ACTION_WORDS);
    for &id in asked {
        answers
            .value(id)
            .map_err(|e| target.kernel("asking for its signal actions", e))?;
        let (words, _) = answers.out(id, 2).as_chunks::<8>();
        actions.extend(words.iter().map(|w| u64::from_ne_bytes(*w)));
    }
    let halted = leader
        .halted()
        .map_err(|e| crate::freeze::remote_failed(target, e))?;
    let pending = halted
        .queued_signals(true)
        .map_err(|e| target.kernel("reading its signals", e))?;
    Ok(SignalsState {
        actions,
        pending: pending.concat(),
        timers,
    })
}

/// Adds the calls that set all dispositions.
pub fn recreate(state: &SignalsState, batch: &mut Batch) -> Result<(), ProcessError> {
    if state.actions.len() != SIGNALS as usize * ACTION_WORDS {
        return Err(ProcessError::Image(
            "signals: a wrong number of actions".into(),
        ));
    }
    for (i, action) in state.actions.chunks(ACTION_WORDS).enumerate() {
        let signal = i as u64 + 1;
        if !is_fixed(signal) {
            let raw: Vec<u8> = action.iter().flat_map(|w| w.to_ne_bytes()).collect();
            let args = [
                Arg::Value(signal),
                Arg::In(raw),
                Arg::Value(0),
                Arg::Value(8),
            ];
            batch.push(libc::SYS_rt_sigaction, args);
        }
    }
    Ok(())
}

/// Adds the calls that queue signals again: for one thread, or (`tid` is `None`) for the process.
/// All signals must be blocked in the thread that runs them.
pub fn requeue(
    pid: u32,
    tid: Option<u32>,
    queued: &[u8],
    batch: &mut Batch,
) -> Result<(), ProcessError> {
    let (infos, rest) = queued.as_chunks::<SIGINFO>();
    if !rest.is_empty() {
        return Err(ProcessError::Image(
            "signals: a queue of a wrong size".into(),
        ));
    }
    let mut of_timers = BTreeSet::new();
    for info in infos {
        if timers::is_repeated(info, &mut of_timers) {
            continue;
        }
        let signal = u64::from(u32::from_ne_bytes([info[0], info[1], info[2], info[3]]));
        let (v, info) = (|n: u32| Arg::Value(u64::from(n)), Arg::In(info.to_vec()));
        match tid {
            Some(tid) => {
                let args = [v(pid), v(tid), Arg::Value(signal), info];
                batch.push(libc::SYS_rt_tgsigqueueinfo, args);
            }
            None => {
                batch.push(
                    libc::SYS_rt_sigqueueinfo,
                    [v(pid), Arg::Value(signal), info],
                );
            }
        }
    }
    Ok(())
}
