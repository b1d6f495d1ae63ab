//! Threads: registers, extended state, and everything else that the kernel keeps for each of them.

use crate::ProcessError;
use crate::freeze::Held;
use crate::resources::credentials::Credentials;
use crate::target::{Status, Target};
use crate::waits::{Call, Interruption, Limit, interruption};
use outlive_linux::ptrace::Registers;
use outlive_linux::remote::{Arg, Batch, CallId, Results};
use outlive_linux::{memory, thread};
use outlive_state_tree::StateNode;
use std::io;

/// A thread.
#[derive(StateNode, Clone, Debug, PartialEq)]
#[state(compatible = "outlive,thread-v1")]
pub struct ThreadState {
    /// Its ID.
    pub tid: u32,
    /// Its name, without a terminating zero.
    pub comm: Vec<u8>,
    /// General registers.
    #[state(child)]
    pub registers: RegistersState,
    /// Extended registers in the standard XSAVE format.
    pub xstate: Vec<u8>,
    /// Blocked signals, bit n-1 for signal n.
    pub signal_mask: u64,
    /// Queued signals of this thread, 128 bytes each.
    pub pending_signals: Vec<u8>,
    /// Alternate signal stack.
    #[state(child)]
    pub alternate_stack: AlternateStack,
    /// Where the kernel writes zero when the thread ends.
    pub clear_tid_address: u64,
    /// Head of the list of robust futexes.
    pub robust_list: u64,
    /// Length of that head, bytes; 0 where there is no list.
    pub robust_list_length: u64,
    /// Restartable sequences.
    #[state(child)]
    pub rseq: Option<RseqState>,
    /// Scheduling attributes (`struct sched_attr`).
    pub scheduling: Vec<u8>,
    /// Processors that it may run on, as a bit mask.
    pub affinity: Vec<u8>,
    /// I/O priority.
    pub io_priority: u32,
    /// `PR_GET_TIMERSLACK`, nanoseconds.
    pub timer_slack_ns: u64,
    /// Memory policy: mode and flags (`get_mempolicy(2)`), 0 for the default.
    pub memory_policy: u32,
    /// Its nodes, as a bit mask; empty for the default.
    pub memory_nodes: Vec<u8>,
    /// Segments of 32-bit code (`set_thread_area(2)`), a `struct user_desc` each.
    pub segments: Vec<u8>,
    /// Users, groups and capabilities.
    #[state(child)]
    pub credentials: Credentials,
    /// The thread was in a system call that must be made again.
    pub call_again: bool,
    /// Time that was left of that call, nanoseconds, where it has a limit.
    pub wait_left_ns: Option<u64>,
}

/// An alternate signal stack (`sigaltstack(2)`).
#[derive(StateNode, Clone, Debug, Default, PartialEq, Eq)]
#[state(compatible = "outlive,alternate-stack-v1")]
pub struct AlternateStack {
    /// Lowest address.
    pub address: u64,
    /// Flags.
    pub flags: u32,
    /// Length, bytes.
    pub size: u64,
}

/// A registration of restartable sequences (`rseq(2)`).
#[derive(StateNode, Clone, Debug, PartialEq, Eq)]
#[state(compatible = "outlive,rseq-v1")]
pub struct RseqState {
    /// Address of the thread's structure.
    pub address: u64,
    /// Its length, bytes.
    pub size: u32,
    /// The signature before abort handlers.
    pub signature: u32,
    /// Flags.
    pub flags: u32,
}

macro_rules! registers {
    ($($name:ident)*) => {
        /// General registers of an x86-64 thread, as `PTRACE_GETREGS` gives them.
        #[derive(StateNode, Clone, Debug, Default, PartialEq, Eq)]
        #[state(compatible = "outlive,registers-x86-64-v1")]
        pub struct RegistersState { $(#[doc = stringify!($name)] pub $name: u64,)* }

        impl RegistersState {
            /// Takes over what `ptrace` gave.
            #[must_use]
            pub fn of(r: &Registers) -> Self {
                Self { $($name: r.$name,)* }
            }

            /// The form that `ptrace` takes.
            #[must_use]
            pub fn to_ptrace(&self) -> Registers {
                Registers { $($name: self.$name,)* }
            }
        }
    };
}

registers! {
    r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss
    fs_base gs_base ds es fs gs
}

/// The system call that these registers show a thread in.
#[must_use]
pub fn call_of(r: &Registers) -> Call {
    Call {
        number: r.orig_rax as i64,
        args: [r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9],
    }
}

/// How a stopped thread's system call was interrupted, and whether it may be made again.
#[must_use]
pub fn interruption_of(r: &Registers, status: &Status) -> Option<Interruption> {
    interruption(&call_of(r), r.rax as i64, status.deliverable() != 0)
}

/// The limit of an interrupted call.
#[must_use]
pub fn limit_of(i: Interruption) -> Limit {
    match i {
        Interruption::Returned(limit) | Interruption::RestartBlock(limit) => limit,
    }
}

/// What is asked of the thread itself.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    stack: CallId,
    tid_address: CallId,
    timer_slack: CallId,
    policy: CallId,
    segments: [CallId; 3],
}

/// Places of segments for 32-bit code in the table of a thread (`GDT_ENTRY_TLS_MIN` of x86-64 Linux).
const SEGMENTS: [u32; 3] = [12, 13, 14];
/// Length of a `struct user_desc`: number, base, limit, flags.
pub const SEGMENT: usize = 16;
/// Flags of one that is not there: not present, and not to be written.
const NO_SEGMENT: u64 = 0x28;

/// Most memory nodes that a kernel may be built for, and the bytes of their mask.
const NODES: u64 = 1024;
const NODE_BYTES: usize = 128;

/// Adds the questions that only the thread itself can answer.
pub fn ask(batch: &mut Batch) -> Asked {
    let stack = batch.push(libc::SYS_sigaltstack, [Arg::Value(0), Arg::Out(24)]);
    let get = libc::PR_GET_TID_ADDRESS as u64;
    let tid_address = batch.push(libc::SYS_prctl, [Arg::Value(get), Arg::Out(8)]);
    let get = libc::PR_GET_TIMERSLACK as u64;
    let timer_slack = batch.push(libc::SYS_prctl, [Arg::Value(get)]);
    let args = [
        Arg::Out(4),
        Arg::Out(NODE_BYTES),
        Arg::Value(NODES),
        Arg::Value(0),
        Arg::Value(0),
    ];
    let segment = |number: u32| {
        let mut entry = number.to_ne_bytes().to_vec();
        entry.resize(SEGMENT, 0);
        entry
    };
    Asked {
        stack,
        tid_address,
        timer_slack,
        segments: SEGMENTS.map(|n| batch.push(libc::SYS_get_thread_area, [Arg::InOut(segment(n))])),
        policy: batch.push(libc::SYS_get_mempolicy, args),
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..at + 8)
        .map_or(0, |b| b.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b)))
}

/// What is read of a thread from outside while it stands still, before remote calls are made.
pub struct Sight {
    /// Its status file.
    pub status: Status,
    /// Its extended registers: no remote call may come before this is read.
    xstate: Vec<u8>,
    /// Its queued signals.
    pending: Vec<[u8; 128]>,
    rseq: Option<RseqState>,
}

/// Refuses a thread in which no remote call may be made, or whose rights are not restored. Comes
/// after all threads were looked at, so that each can go on with what it was in.
pub fn refuse(target: &Target, held: &Held) -> Result<(), ProcessError> {
    let halted = held
        .halted()
        .map_err(|e| crate::freeze::remote_failed(target, e))?;
    let dispatched = "system calls are dispatched (PR_SET_SYSCALL_USER_DISPATCH)";
    for (set, what) in [
        (halted.dispatches_calls(), dispatched),
        (
            halted.accesses_ports(),
            "I/O ports may be accessed (ioperm)",
        ),
    ] {
        let place = format!("thread {}", held.tid);
        let asking = format!("{place}: asking for what it may do");
        if set.map_err(|e| target.kernel(asking, e))? {
            let refusal = target.refusal(place, what, "this cannot be saved yet");
            return Err(ProcessError::Refused(vec![refusal]));
        }
    }
    Ok(())
}

/// Looks at a stopped thread. If it stands inside a restartable sequence, it is moved to the
/// abort handler, as the kernel does with a thread that is preempted there.
pub fn look(
    target: &Target,
    held: &mut Held,
    status: io::Result<Status>,
) -> Result<Sight, ProcessError> {
    let kernel = |what: &str, e| target.kernel(format!("thread {}: {what}", held.tid), e);
    let status = status
        .map_err(|e| target.kernel(format!("reading the status of thread {}", held.tid), e))?;
    let halted = held
        .halted()
        .map_err(|e| crate::freeze::remote_failed(target, e))?;
    let xstate = halted
        .xstate()
        .map_err(|e| kernel("reading extended registers", e))?;
    let pending = match status.pending {
        0 => Vec::new(),
        _ => halted
            .queued_signals(false)
            .map_err(|e| kernel("reading signals", e))?,
    };
    let rseq = halted.rseq().map_err(|e| kernel("reading rseq", e))?;
    if let Some(rseq) = &rseq
        && let Some(abort) = rseq_abort(target.pid, rseq.address, held.registers.rip)
    {
        held.registers.rip = abort;
        held.go_on.rip = abort;
    }
    let rseq = rseq.map(|r| RseqState {
        address: r.address,
        size: r.size,
        signature: r.signature,
        flags: r.flags,
    });
    Ok(Sight {
        status,
        xstate,
        pending,
        rseq,
    })
}

/// The abort handler, if `rip` lies inside the thread's current critical section
/// (`struct rseq_cs`: version, flags, start, length, abort).
fn rseq_abort(pid: u32, rseq: u64, rip: u64) -> Option<u64> {
    let mut raw = [0u8; 8];
    memory::read_exact(pid, rseq + 8, &mut raw).ok()?;
    let section = u64::from_ne_bytes(raw);
    if section == 0 {
        return None;
    }
    let mut cs = [0u8; 32];
    memory::read_exact(pid, section, &mut cs).ok()?;
    let (start, length, abort) = (word(&cs, 8), word(&cs, 16), word(&cs, 24));
    (rip.wrapping_sub(start) < length).then_some(abort)
}

/// Puts together what was seen and what the thread answered.
pub fn collect(
    target: &Target,
    held: &Held,
    sight: Sight,
    asked: Asked,
    answers: &Results,
    wait_left_ns: Option<u64>,
) -> Result<ThreadState, ProcessError> {
    let kernel = |what: &str, e| target.kernel(format!("thread {}: {what}", held.tid), e);
    let tid = held.tid;
    answers
        .value(asked.stack)
        .map_err(|e| kernel("asking for its signal stack", e))?;
    let stack = answers.out(asked.stack, 1);
    let clear_tid_address = match answers.value(asked.tid_address) {
        Ok(_) => word(answers.out(asked.tid_address, 1), 0),
        Err(e) => return Err(kernel("asking for its TID address", e)),
    };
    let (robust_list, robust_list_length) =
        thread::robust_list(tid).map_err(|e| kernel("reading its robust list", e))?;
    // The status file has the name too, but for bytes that it escapes or that are no text.
    let name = &sight.status.name;
    let comm = if name.contains(['\\', '\n', char::REPLACEMENT_CHARACTER]) {
        target.proc_file(&format!("task/{tid}/comm"))?
    } else {
        name.as_bytes().to_vec()
    };
    // A kernel without memory nodes has no such call.
    let policy = answers.value(asked.policy).map_or(0, |_| {
        answers
            .out(asked.policy, 0)
            .iter()
            .rev()
            .fold(0, |n, &b| n << 8 | u32::from(b))
    });
    let nodes = if policy == 0 {
        &[][..]
    } else {
        answers.out(asked.policy, 1)
    };
    // A kernel that runs no 32-bit programs has no such call.
    let there = asked
        .segments
        .into_iter()
        .filter(|&id| answers.value(id).is_ok());
    let there = there.map(|id| answers.out(id, 0));
    let segments: Vec<&[u8]> = there.filter(|s| is_segment(s)).collect();
    Ok(ThreadState {
        tid: sight.status.inner.tid,
        comm: comm.strip_suffix(b"\n").unwrap_or(&comm).to_vec(),
        registers: RegistersState::of(&held.registers),
        xstate: sight.xstate,
        signal_mask: held.mask,
        pending_signals: sight.pending.concat(),
        alternate_stack: AlternateStack {
            address: word(stack, 0),
            // SS_ONSTACK only says where the thread stands; the kernel refuses it as an order.
            flags: (word(stack, 8) as u32) & !(libc::SS_ONSTACK as u32),
            size: word(stack, 16),
        },
        clear_tid_address,
        robust_list,
        robust_list_length: if robust_list == 0 {
            0
        } else {
            robust_list_length
        },
        rseq: sight.rseq,
        scheduling: thread::scheduling(tid)
            .map_err(|e| kernel("reading scheduling", e))?
            .to_vec(),
        affinity: thread::affinity(tid).map_err(|e| kernel("reading its affinity", e))?,
        timer_slack_ns: answers
            .value(asked.timer_slack)
            .map_err(|e| kernel("asking for its timer slack", e))?,
        io_priority: thread::io_priority(tid).map_err(|e| kernel("reading I/O priority", e))?,
        call_again: interruption_of(&held.registers, &sight.status).is_some(),
        memory_policy: policy,
        memory_nodes: nodes.to_vec(),
        segments: segments.concat(),
        credentials: Credentials::of(&sight.status),
        wait_left_ns,
    })
}

/// Whether a `struct user_desc` tells of a segment that is there.
fn is_segment(entry: &[u8]) -> bool {
    // Base and limit; then, in its last four bytes, the flags.
    word(entry, 4) != 0 || word(entry, 8) >> 32 != NO_SEGMENT
}

/// Adds the calls by which a new thread takes on its state. Registers come last, by `ptrace`.
pub fn recreate(state: &ThreadState, batch: &mut Batch) {
    let value = Arg::Value;
    batch.push(libc::SYS_set_tid_address, [value(state.clear_tid_address)]);
    if state.robust_list_length > 0 {
        let list = [value(state.robust_list), value(state.robust_list_length)];
        batch.push(libc::SYS_set_robust_list, list);
    }
    if let Some(rseq) = &state.rseq {
        let args = [
            value(rseq.address),
            value(u64::from(rseq.size)),
            value(u64::from(rseq.flags)),
            value(u64::from(rseq.signature)),
        ];
        batch.push(libc::SYS_rseq, args);
    }
    let mut stack = Vec::with_capacity(24);
    stack.extend_from_slice(&state.alternate_stack.address.to_ne_bytes());
    stack.extend_from_slice(&u64::from(state.alternate_stack.flags).to_ne_bytes());
    stack.extend_from_slice(&state.alternate_stack.size.to_ne_bytes());
    batch.push(libc::SYS_sigaltstack, [Arg::In(stack), value(0)]);
    let mut name = state.comm.clone();
    name.truncate(15);
    name.push(0);
    batch.push(
        libc::SYS_prctl,
        [value(libc::PR_SET_NAME as u64), Arg::In(name)],
    );
    let set = libc::PR_SET_TIMERSLACK as u64;
    batch.push(libc::SYS_prctl, [value(set), value(state.timer_slack_ns)]);
    for segment in state.segments.chunks(SEGMENT) {
        batch.push(libc::SYS_set_thread_area, [Arg::InOut(segment.to_vec())]);
    }
    if state.memory_policy != 0 {
        let mut nodes = state.memory_nodes.clone();
        nodes.resize(NODE_BYTES, 0);
        let mode = value(u64::from(state.memory_policy));
        batch.push(
            libc::SYS_set_mempolicy,
            [mode, Arg::In(nodes), value(NODES)],
        );
    }
}

/// Sets what can be set from outside: scheduling, affinity, I/O priority, where they differ.
/// The thread has the ID `tid` here.
pub fn recreate_outside(
    pid: u32,
    tid: u32,
    state: &ThreadState,
) -> Result<Vec<String>, ProcessError> {
    let kernel = |what: &str, e: outlive_linux::Errno| {
        crate::target::gone_or(pid, &format!("thread {tid}: {what}"), e.into())
    };
    let mut notices = Vec::new();
    let attr: [u8; 48] =
        state.scheduling.as_slice().try_into().map_err(|_| {
            ProcessError::Image(format!("thread {tid}: scheduling has a wrong size"))
        })?;
    if thread::scheduling(tid).map_err(|e| kernel("reading scheduling", e))? != attr
        && let Err(e) = thread::set_scheduling(tid, &attr)
    {
        notices.push(format!(
            "thread {tid}: scheduling policy or priority not restored: {e}"
        ));
    }
    if thread::affinity(tid).map_err(|e| kernel("reading affinity", e))? != state.affinity
        && let Err(e) = thread::set_affinity(tid, &state.affinity)
    {
        notices.push(format!(
            "thread {tid}: processor affinity not restored: {e}"
        ));
    }
    if thread::io_priority(tid).map_err(|e| kernel("reading I/O priority", e))? != state.io_priority
        && let Err(e) = thread::set_io_priority(tid, state.io_priority)
    {
        notices.push(format!("thread {tid}: I/O priority not restored: {e}"));
    }
    Ok(notices)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_that_is_not_there_is_told_from_one_that_is() {
        let entry = |words: [u32; 4]| words.map(u32::to_ne_bytes).concat();
        // As the kernel shows an entry of zeros, and one that begins at 0.
        assert!(!is_segment(&entry([12, 0, 0, 0x28])));
        assert!(is_segment(&entry([12, 0, 0, 0x51])));
        assert!(is_segment(&entry([12, 0x1000, 0xfffff, 0x51])));
        assert!(is_segment(&entry([14, 0, 1, 0x28])));
    }
}
