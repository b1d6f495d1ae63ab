//! What belongs to a process as a whole and is no memory, thread, signal or descriptor: names,
//! directories, limits, job control, interval timers, and the switches of `prctl(2)`.

use crate::ProcessError;
use crate::births::Kind;
use crate::resources::protection_keys;
use crate::target::{Stat, Status, Target};
use outlive_linux::remote::{Arg, Batch, CallId, Results};
use outlive_state_tree::StateNode;
use std::os::unix::fs::MetadataExt;

/// A process.
#[derive(StateNode, Clone, Debug, Default, PartialEq, Eq)]
#[state(compatible = "outlive,process-v1")]
pub struct ProcessState {
    /// Process ID. This and all other IDs are those of the PID namespace in which the program
    /// lives.
    pub pid: u32,
    /// Parent within the subject; 0 for the root, and where the parent has ended.
    pub parent: u32,
    /// The signal by which its parent is told of its end; 0 for none.
    pub exit_signal: u32,
    /// Process group, 0 where it is one of an outer PID namespace.
    pub pgid: u32,
    /// Session, 0 where it is one of an outer PID namespace.
    pub sid: u32,
    /// It led a session that had a controlling terminal.
    pub led_terminal_session: bool,
    /// The program (`/proc/PID/exe`).
    pub executable: Vec<u8>,
    /// The process with whose address space it works, as it does itself: it has no memory of its
    /// own then. 0 where that is its own. This one may say so in turn of no other, and so below.
    pub shares_memory_with: u32,
    /// The process whose table of descriptors it has. It is no holder of descriptors then.
    pub shares_descriptors_with: u32,
    /// The process whose working directory, root directory and file mode mask it has. Its own say
    /// nothing then.
    pub shares_directories_with: u32,
    /// The process whose signal actions it has; it has its memory too. It has no actions then.
    pub shares_signals_with: u32,
    /// Its arguments, each ended by a zero byte, as they are now.
    pub command_line: Vec<u8>,
    /// Working directory.
    pub working_directory: Vec<u8>,
    /// Root directory.
    pub root_directory: Vec<u8>,
    /// File mode creation mask.
    pub umask: u32,
    /// Resource limits: soft and hard in turn, in the order of their numbers (`getrlimit(2)`).
    pub limits: Vec<u64>,
    /// `setitimer(2)` for ITIMER_REAL, VIRTUAL, PROF: interval and value, seconds and microseconds.
    pub interval_timers: Vec<u64>,
    /// `personality(2)`.
    pub personality: u32,
    /// `PR_GET_DUMPABLE`.
    pub dumpable: u64,
    /// `PR_GET_PDEATHSIG`.
    pub parent_death_signal: u32,
    /// `PR_GET_KEEPCAPS`.
    pub keep_caps: u64,
    /// `PR_GET_SECUREBITS`.
    pub secure_bits: u64,
    /// `PR_GET_CHILD_SUBREAPER`.
    pub child_subreaper: u32,
    /// `PR_GET_THP_DISABLE`.
    pub thp_disable: u64,
    /// `PR_MCE_KILL_GET`.
    pub machine_check_policy: u64,
    /// `PR_GET_MEMORY_MERGE`.
    pub memory_merge: u64,
    /// `PR_GET_IO_FLUSHER`.
    pub io_flusher: u64,
    /// `PR_GET_SPECULATION_CTRL` for store bypass, indirect branches and the L1 data cache.
    pub speculation: Vec<u64>,
    /// `PR_GET_TIMERSLACK`, nanoseconds, of the leading thread.
    pub timer_slack_ns: u64,
    /// Registrations of `membarrier(2)`, as a bit mask of its commands.
    pub membarrier: u64,
    /// `/proc/PID/oom_score_adj`.
    pub oom_score_adj: i32,
    /// `/proc/PID/coredump_filter`.
    pub coredump_filter: u64,
    /// Nice value of its session as a scheduling group (`/proc/PID/autogroup`), told by the process
    /// that leads it; else 0.
    pub session_nice: i32,
    /// Protection keys that are taken in its address space (`pkey_alloc(2)`), as a bit mask.
    pub protection_keys: u32,
}

impl ProcessState {
    /// The process with which it shares this; 0 for none that stands for it.
    #[must_use]
    pub fn shares_with(&self, kind: Kind) -> u32 {
        match kind {
            Kind::Memory => self.shares_memory_with,
            Kind::Descriptors => self.shares_descriptors_with,
            Kind::Directories => self.shares_directories_with,
            Kind::Signals => self.shares_signals_with,
        }
    }
}

/// Questions to the leading thread.
#[derive(Clone, Debug)]
pub struct Asked {
    timers: [CallId; 3],
    values: [CallId; 5],
    words: [CallId; 2],
    membarrier: CallId,
    /// What kernels of some age, or without the feature, do not answer.
    optional: [CallId; OPTIONAL.len()],
    keys: Option<protection_keys::Asked>,
    refused: RefusedIfSet,
}

/// Switches that may be unknown: then they are as at the start of every process.
const OPTIONAL: [(u64, u64); 6] = [
    (PR_MCE_KILL_GET, 0),
    (PR_GET_MEMORY_MERGE, 0),
    (PR_GET_IO_FLUSHER, 0),
    (libc::PR_GET_SPECULATION_CTRL as u64, 0),
    (libc::PR_GET_SPECULATION_CTRL as u64, 1),
    (libc::PR_GET_SPECULATION_CTRL as u64, 2),
];

const PR_MCE_KILL_GET: u64 = libc::PR_MCE_KILL_GET as u64;
const PR_GET_IO_FLUSHER: u64 = 58;
const PR_SET_IO_FLUSHER: u64 = 57;
const PR_GET_MDWE: u64 = 66;
const PR_SET_MEMORY_MERGE: u64 = 67;
const PR_GET_MEMORY_MERGE: u64 = 68;
const PR_SCHED_CORE: u64 = 62;
const ARCH_GET_CPUID: u64 = 0x1011;

/// Questions about what is not restored, so that a program that uses it is refused.
#[derive(Clone, Debug)]
struct RefusedIfSet {
    write_or_execute: CallId,
    time_stamp_counter: CallId,
    core_scheduling: CallId,
    processor_id: CallId,
    local_descriptors: CallId,
}

impl RefusedIfSet {
    fn ask(batch: &mut Batch) -> Self {
        let v = Arg::Value;
        let zero = || Arg::Value(0);
        Self {
            write_or_execute: batch.push(
                libc::SYS_prctl,
                [v(PR_GET_MDWE), zero(), zero(), zero(), zero()],
            ),
            time_stamp_counter: prctl(batch, libc::PR_GET_TSC, Arg::Out(4)),
            core_scheduling: batch.push(
                libc::SYS_prctl,
                [v(PR_SCHED_CORE), zero(), zero(), zero(), Arg::Out(8)],
            ),
            processor_id: batch.push(libc::SYS_arch_prctl, [v(ARCH_GET_CPUID), zero()]),
            local_descriptors: batch.push(libc::SYS_modify_ldt, [zero(), Arg::Out(16), v(16)]),
        }
    }

    /// What is set of these. A question that is not understood is about something that is not there.
    fn found(&self, answers: &Results) -> Vec<&'static str> {
        let nonzero = |id| answers.value(id).is_ok_and(|v| v != 0);
        let written = |id, arg: usize| {
            answers.value(id).is_ok() && answers.out(id, arg).iter().any(|&b| b != 0)
        };
        let off = answers.value(self.time_stamp_counter).is_ok()
            && answers.out(self.time_stamp_counter, 1).first()
                == Some(&(libc::PR_TSC_SIGSEGV as u8));
        let list = [
            (
                nonzero(self.write_or_execute),
                "memory that may not become executable (PR_SET_MDWE)",
            ),
            (off, "the time stamp counter is switched off (PR_SET_TSC)"),
            (
                written(self.core_scheduling, 4),
                "a core-scheduling group (PR_SCHED_CORE)",
            ),
            (
                answers.value(self.processor_id) == Ok(0),
                "the CPUID instruction is switched off (ARCH_SET_CPUID)",
            ),
            (
                nonzero(self.local_descriptors),
                "a local descriptor table (modify_ldt)",
            ),
        ];
        list.into_iter()
            .filter(|(set, _)| *set)
            .map(|(_, what)| what)
            .collect()
    }
}

const MEMBARRIER_GET_REGISTRATIONS: u64 = 1 << 9;

fn prctl(batch: &mut Batch, option: libc::c_int, arg: Arg) -> CallId {
    let zero = || Arg::Value(0);
    batch.push(
        libc::SYS_prctl,
        [Arg::Value(option as u64), arg, zero(), zero(), zero()],
    )
}

/// Adds the questions.
pub fn ask(batch: &mut Batch) -> Asked {
    let timers =
        [0u64, 1, 2].map(|n| batch.push(libc::SYS_getitimer, [Arg::Value(n), Arg::Out(32)]));
    let values = [
        libc::PR_GET_DUMPABLE,
        libc::PR_GET_KEEPCAPS,
        libc::PR_GET_SECUREBITS,
        libc::PR_GET_THP_DISABLE,
        libc::PR_GET_TIMERSLACK,
    ]
    .map(|option| prctl(batch, option, Arg::Value(0)));
    let words = [libc::PR_GET_PDEATHSIG, libc::PR_GET_CHILD_SUBREAPER]
        .map(|option| prctl(batch, option, Arg::Out(4)));
    let args = [
        Arg::Value(MEMBARRIER_GET_REGISTRATIONS),
        Arg::Value(0),
        Arg::Value(0),
    ];
    let optional = OPTIONAL.map(|(option, argument)| {
        let zero = || Arg::Value(0);
        let args = [
            Arg::Value(option),
            Arg::Value(argument),
            zero(),
            zero(),
            zero(),
        ];
        batch.push(libc::SYS_prctl, args)
    });
    Asked {
        timers,
        values,
        words,
        membarrier: batch.push(libc::SYS_membarrier, args),
        optional,
        keys: protection_keys::ask(batch),
        refused: RefusedIfSet::ask(batch),
    }
}

/// Puts together what is seen from outside and what the leading thread answered.
pub fn collect(
    target: &Target,
    status: &Status,
    asked: &Asked,
    answers: &Results,
) -> Result<ProcessState, ProcessError> {
    refuse(target, asked.refused.found(answers))?;
    let optional = asked.optional.map(|id| answers.value(id).unwrap_or(0));
    let stat = Stat::read(target.pid).map_err(|e| target.kernel("reading its stat", e))?;
    let mut interval_timers = Vec::with_capacity(12);
    for id in asked.timers {
        answers
            .value(id)
            .map_err(|e| target.kernel("asking for its interval timers", e))?;
        let (words, _) = answers.out(id, 1).as_chunks::<8>();
        interval_timers.extend(words.iter().map(|w| u64::from_ne_bytes(*w)));
    }
    let mut values = [0; 5];
    for (value, id) in values.iter_mut().zip(asked.values) {
        *value = answers
            .value(id)
            .map_err(|e| target.kernel("asking with prctl", e))?;
    }
    let mut words = [0; 2];
    for (word, id) in words.iter_mut().zip(asked.words) {
        answers
            .value(id)
            .map_err(|e| target.kernel("asking with prctl", e))?;
        let raw = answers.out(id, 1);
        *word = u32::from_ne_bytes([raw[0], raw[1], raw[2], raw[3]]);
    }
    Ok(ProcessState {
        pid: target.id,
        parent: 0,
        exit_signal: stat.exit_signal,
        pgid: status.inner.pgid,
        sid: status.inner.sid,
        led_terminal_session: stat.sid == target.pid && stat.tty != 0,
        executable: target.proc_link("exe")?,
        shares_memory_with: 0,
        shares_descriptors_with: 0,
        shares_directories_with: 0,
        shares_signals_with: 0,
        command_line: target.proc_file("cmdline")?,
        working_directory: directory(target, "cwd", "working directory")?,
        root_directory: directory(target, "root", "root directory")?,
        umask: status.umask,
        limits: parse_limits(&target.proc_record("limits")?),
        interval_timers,
        personality: number(&target.proc_record("personality")?, 16) as u32,
        dumpable: values[0],
        parent_death_signal: words[0],
        keep_caps: values[1],
        secure_bits: values[2],
        child_subreaper: words[1],
        thp_disable: values[3],
        machine_check_policy: optional[0],
        memory_merge: optional[1],
        io_flusher: optional[2],
        speculation: optional[3..].to_vec(),
        timer_slack_ns: values[4],
        // Kernels before 6.3 cannot tell; programs there register again at their next use or not.
        membarrier: answers.value(asked.membarrier).unwrap_or(0),
        oom_score_adj: number(&target.proc_record("oom_score_adj")?, 10) as i32,
        coredump_filter: target
            .proc_record("coredump_filter")
            .map_or(0x33, |t| number(&t, 16) as u64),
        session_nice: session_nice(target, status),
        protection_keys: protection_keys::taken(asked.keys.as_ref(), answers),
    })
}

/// The nice value of the session that it leads. A kernel without such groups has no such file.
fn session_nice(target: &Target, status: &Status) -> i32 {
    if status.inner.sid != target.id {
        return 0;
    }
    let text = target.proc_file("autogroup").unwrap_or_default();
    // `/autogroup-53 nice 7`
    let text = String::from_utf8_lossy(&text);
    let last = text.split_whitespace().next_back();
    last.and_then(|nice| nice.parse().ok()).unwrap_or(0)
}

fn refuse(target: &Target, found: Vec<&'static str>) -> Result<(), ProcessError> {
    if found.is_empty() {
        return Ok(());
    }
    let refusal = |what| target.refusal("", what, "this cannot be saved yet");
    Err(ProcessError::Refused(
        found.into_iter().map(refusal).collect(),
    ))
}

/// The path of a directory that the process stands in, which must still be there.
fn directory(target: &Target, link: &str, what: &str) -> Result<Vec<u8>, ProcessError> {
    let path = target.proc_link(link)?;
    let followed = std::fs::metadata(format!("/proc/{}/{link}", target.pid));
    if path.ends_with(b" (deleted)") && followed.is_ok_and(|m| m.nlink() == 0) {
        let what = format!("its {what} was deleted: {}", String::from_utf8_lossy(&path));
        let remedy = "have the program change to another directory";
        return Err(ProcessError::Refused(vec![
            target.refusal("", what, remedy),
        ]));
    }
    Ok(path)
}

fn number(text: &[u8], radix: u32) -> i64 {
    let text = String::from_utf8_lossy(text);
    i64::from_str_radix(text.trim(), radix).unwrap_or(0)
}

/// The resource limits in the order of their numbers, by the names in `/proc/PID/limits`.
const LIMITS: [&str; 16] = [
    "Max cpu time",
    "Max file size",
    "Max data size",
    "Max stack size",
    "Max core file size",
    "Max resident set",
    "Max processes",
    "Max open files",
    "Max locked memory",
    "Max address space",
    "Max file locks",
    "Max pending signals",
    "Max msgqueue size",
    "Max nice priority",
    "Max realtime priority",
    "Max realtime timeout",
];

fn parse_limits(text: &[u8]) -> Vec<u64> {
    let text = String::from_utf8_lossy(text);
    let mut values = vec![u64::MAX; LIMITS.len() * 2];
    for line in text.lines() {
        let Some(at) = LIMITS.iter().position(|name| line.starts_with(name)) else {
            continue;
        };
        let words = line[LIMITS[at].len()..].split_whitespace();
        for (i, word) in words.take(2).enumerate() {
            values[at * 2 + i] = word.parse().unwrap_or(u64::MAX);
        }
    }
    values
}

fn path_argument(path: &[u8]) -> Arg {
    let mut path = path.to_vec();
    path.push(0);
    Arg::In(path)
}

/// Adds the calls that change limits from `now` to `state`, named for messages.
pub fn recreate_limits(state: &ProcessState, now: &[u8], batch: &mut Batch) -> Vec<&'static str> {
    let now = parse_limits(now);
    let mut names = Vec::new();
    for (i, name) in LIMITS.iter().enumerate() {
        let pair = i * 2..i * 2 + 2;
        if state.limits.get(pair.clone()) != Some(&now[pair.clone()])
            && let Some(wanted) = state.limits.get(pair)
        {
            let raw: Vec<u8> = wanted.iter().flat_map(|v| v.to_ne_bytes()).collect();
            let args = [
                Arg::Value(0),
                Arg::Value(i as u64),
                Arg::In(raw),
                Arg::Value(0),
            ];
            batch.push(libc::SYS_prlimit64, args);
            names.push(*name);
        }
    }
    names
}

/// Adds the calls that the leading thread makes before credentials are set: directories,
/// switches. Returns what each call is for.
pub fn recreate(state: &ProcessState, batch: &mut Batch) -> Vec<String> {
    let mut what = Vec::new();
    let v = Arg::Value;
    if state.shares_directories_with == 0 {
        recreate_directories(state, batch, &mut what);
    }
    batch.push(libc::SYS_personality, [v(u64::from(state.personality))]);
    what.push("setting the personality".into());
    let set = [
        (libc::PR_SET_THP_DISABLE, state.thp_disable),
        (libc::PR_SET_TIMERSLACK, state.timer_slack_ns),
        (
            libc::PR_SET_CHILD_SUBREAPER,
            u64::from(state.child_subreaper),
        ),
    ];
    for (option, value) in set {
        prctl(batch, option, v(value));
        what.push(format!("prctl option {option}"));
    }
    what.extend(recreate_optional(state, batch));
    if state.shares_memory_with == 0 {
        what.extend(protection_keys::recreate(state.protection_keys, batch));
    }
    // Each bit is a registration command of its own.
    for bit in (0..64).filter(|b| state.membarrier & 1 << b != 0) {
        batch.push(libc::SYS_membarrier, [v(1 << bit), v(0), v(0)]);
        what.push("registering for membarrier".into());
    }
    what
}

fn recreate_directories(state: &ProcessState, batch: &mut Batch, what: &mut Vec<String>) {
    batch.push(libc::SYS_chdir, [path_argument(&state.working_directory)]);
    what.push(format!(
        "entering {}",
        String::from_utf8_lossy(&state.working_directory)
    ));
    if state.root_directory != b"/" {
        batch.push(libc::SYS_chroot, [path_argument(&state.root_directory)]);
        what.push(format!(
            "changing root to {}",
            String::from_utf8_lossy(&state.root_directory)
        ));
    }
    batch.push(libc::SYS_umask, [Arg::Value(u64::from(state.umask))]);
    what.push("setting the file mode mask".into());
}

/// Adds the calls for switches that not every kernel has, where they are not as at the start.
/// Threads that are made afterwards inherit what belongs to a thread.
fn recreate_optional(state: &ProcessState, batch: &mut Batch) -> Vec<String> {
    /// `PR_MCE_KILL_DEFAULT`.
    const MACHINE_CHECK_DEFAULT: u64 = 2;
    /// It can be chosen for each thread (`PR_SPEC_PRCTL`).
    const CHOSEN: u64 = 1;
    /// It was chosen otherwise than allowed: `PR_SPEC_DISABLE` and the stronger forms.
    const RESTRICTED: u64 = 0x4 | 0x8 | 0x10;
    let mut calls = Vec::new();
    if state.machine_check_policy < MACHINE_CHECK_DEFAULT {
        let set = libc::PR_MCE_KILL_SET as u64;
        calls.push([libc::PR_MCE_KILL as u64, set, state.machine_check_policy]);
    }
    if state.memory_merge != 0 {
        calls.push([PR_SET_MEMORY_MERGE, 1, 0]);
    }
    if state.io_flusher != 0 {
        calls.push([PR_SET_IO_FLUSHER, 1, 0]);
    }
    for (which, &value) in state.speculation.iter().take(3).enumerate() {
        if value & CHOSEN != 0 && value & RESTRICTED != 0 {
            let set = libc::PR_SET_SPECULATION_CTRL as u64;
            calls.push([set, which as u64, value & RESTRICTED]);
        }
    }
    let zero = || Arg::Value(0);
    let mut what = Vec::new();
    for [option, first, second] in calls {
        let args = [
            Arg::Value(option),
            Arg::Value(first),
            Arg::Value(second),
            zero(),
            zero(),
        ];
        batch.push(libc::SYS_prctl, args);
        what.push(format!("prctl option {option}"));
    }
    what
}

/// Adds the calls that come after credentials were set, because setting these resets them or needs
/// them.
pub fn recreate_late(state: &ProcessState, batch: &mut Batch) -> Vec<String> {
    let mut what = Vec::new();
    let (timers, _) = state.interval_timers.as_chunks::<4>();
    for (n, timer) in timers.iter().take(3).enumerate() {
        let mut timer = *timer;
        if timer[2..] == [0, 0] {
            // It has just fired, and its signal is still queued: the kernel would have set it
            // again when that is taken.
            timer.copy_within(..2, 2);
        }
        if timer[2..] != [0, 0] {
            let raw = timer.iter().flat_map(|w| w.to_ne_bytes()).collect();
            batch.push(
                libc::SYS_setitimer,
                [Arg::Value(n as u64), Arg::In(raw), Arg::Value(0)],
            );
            what.push("setting an interval timer".into());
        }
    }
    let set = [
        (libc::PR_SET_SECUREBITS, state.secure_bits, 0),
        (libc::PR_SET_KEEPCAPS, state.keep_caps, 0),
        // 2 can only come from a privileged change of credentials, and is made by it. Any change
        // of users has reset it.
        (libc::PR_SET_DUMPABLE, state.dumpable.min(1), u64::MAX),
        (
            libc::PR_SET_PDEATHSIG,
            u64::from(state.parent_death_signal),
            u64::MAX,
        ),
    ];
    for (option, value, default) in set {
        if value != default {
            prctl(batch, option, Arg::Value(value));
            what.push(format!("prctl option {option}"));
        }
    }
    what
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_limits_are_understood() {
        let text = std::fs::read("/proc/self/limits").unwrap();
        let limits = parse_limits(&text);
        let files = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        assert_eq!(limits[14], files.current.unwrap_or(u64::MAX));
        assert_eq!(limits[15], files.maximum.unwrap_or(u64::MAX));
    }
}
