//! System V objects (`sysvipc(7)`): semaphores and message queues, and what shared memory segments
//! have in common with them. Contents of segments are shared memory ([`super::shared`]).
//!
//! # Which belong to a program
//! An object belongs to nobody, and the kernel tells little of who uses it. It is the program's if
//! - a member made it (segments), or changed it last (a semaphore, a queue), or stands in a call on it;
//! - so did a member that was there at the stop before and has ended since;
//! - it was the program's at an earlier stop.
//!
//! Segments that are mapped belong to who maps them. All else belongs to the machine, like a file that
//! nobody has open: a program can come back to it by its key or number, and so can anybody.
//!
//! # What it refuses
//! Objects that somebody else uses too, as far as the kernel tells.

use crate::resources::semaphore_undo::UndoState;
use crate::target::Target;
use crate::{ProcessError, Refusal};
use outlive_linux::ptrace::Registers;
use outlive_linux::sysv::{self, Lists, Object, Segment, Sort};
use outlive_state_tree::StateNode;
use std::collections::{BTreeMap, BTreeSet};

/// The longest message that is asked for, bytes.
const LONGEST: u64 = 16 << 20;

/// By the ID of every thread of a program, as we see it: the ID under which its process is saved. The kernel calls a user of an object now by the ID of
/// its process, now by that of a thread.
pub type Members = BTreeMap<u32, u32>;

/// What all objects have.
#[derive(StateNode, Clone, Debug, PartialEq, Eq)]
#[state(compatible = "outlive,system-v-object-v1")]
pub struct ObjectState {
    /// Its ID.
    pub id: u32,
    /// The key under which it is found; 0 for none.
    pub key: u32,
    /// Its mode; a segment's also says whether it was removed already, or is locked in memory.
    pub mode: u32,
    /// Its owner and group.
    pub owner: Vec<u32>,
    /// Who made it: user and group.
    pub creator: Vec<u32>,
}

/// All semaphores and message queues of a subject.
#[derive(StateNode, Clone, Debug, Default, PartialEq, Eq)]
#[state(compatible = "outlive,system-v-v1")]
pub struct SystemVState {
    /// The sets of semaphores.
    #[state(children)]
    pub semaphores: Vec<SemaphoresState>,
    /// What is to be done to them when a process ends.
    #[state(children)]
    pub undo: Vec<UndoState>,
    /// The message queues.
    #[state(children)]
    pub queues: Vec<QueueState>,
}

/// A set of semaphores.
#[derive(StateNode, Clone, Debug, PartialEq, Eq)]
#[state(compatible = "outlive,system-v-semaphores-v1")]
pub struct SemaphoresState {
    /// What all objects have.
    #[state(child)]
    pub object: ObjectState,
    /// Their values.
    pub values: Vec<u32>,
    /// For each the process that changed it last; 0 for one that is no member.
    pub last: Vec<u32>,
}

/// A message queue.
#[derive(StateNode, Clone, Debug, PartialEq, Eq)]
#[state(compatible = "outlive,system-v-queue-v1")]
pub struct QueueState {
    /// What all objects have.
    #[state(child)]
    pub object: ObjectState,
    /// How many bytes it takes.
    pub capacity: u64,
    /// The member that used it last; 0 for one that is no member.
    pub user: u32,
    /// The messages that wait, first to last.
    #[state(children)]
    pub messages: Vec<MessageState>,
}

/// A message.
#[derive(StateNode, Clone, Debug, PartialEq, Eq)]
#[state(compatible = "outlive,system-v-message-v1")]
pub struct MessageState {
    /// Its type.
    pub sort: i64,
    /// Its text.
    pub text: Vec<u8>,
}

impl ObjectState {
    /// Describes an object.
    #[must_use]
    pub fn of(object: &Object) -> Self {
        Self {
            id: object.id.cast_unsigned(),
            key: object.key.cast_unsigned(),
            mode: object.mode,
            owner: vec![object.uid, object.gid],
            creator: vec![object.creator_uid, object.creator_gid],
        }
    }

    /// The object; an image is hostile: `None` where it makes no sense.
    #[must_use]
    pub fn object(&self) -> Option<Object> {
        let ([uid, gid], [creator_uid, creator_gid]) = (&self.owner[..], &self.creator[..]) else {
            return None;
        };
        Some(Object {
            key: self.key.cast_signed(),
            id: i32::try_from(self.id).ok()?,
            mode: self.mode,
            uid: *uid,
            gid: *gid,
            creator_uid: *creator_uid,
            creator_gid: *creator_gid,
        })
    }
}

/// Who is asked about objects at a stop.
#[derive(Clone, Debug, Default)]
pub struct Users {
    /// The threads of the program.
    pub members: Members,
    /// Objects on which one of them stands in a call.
    pub called: BTreeSet<(Sort, i32)>,
}

impl Users {
    /// Adds a thread that stands still, of a process that is saved under this ID.
    pub fn add(&mut self, tid: u32, id: u32, registers: &Registers) {
        self.members.insert(tid, id);
        let sort = match registers.orig_rax.cast_signed() {
            libc::SYS_semop | libc::SYS_semtimedop => Sort::Semaphores,
            libc::SYS_msgrcv | libc::SYS_msgsnd => Sort::Queue,
            _ => return,
        };
        // The kernel looks at the lower half.
        self.called.insert((sort, registers.rdi as i32));
    }
}

/// The System V objects of a tracked program.
#[derive(Debug, Default)]
pub struct SystemV {
    lists: Lists,
    /// IDs of processes and threads that were members since the last look at all objects. No longer: another
    /// process gets the ID of one that has ended, and its objects are not the program's.
    past: BTreeSet<u32>,
    /// Objects that were the program's at the last stop.
    owned: BTreeSet<Known>,
    /// What was found at this one.
    found: BTreeSet<Known>,
}

/// An object, and what stays the same as long as there is one: another one may get its ID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Known {
    sort: Sort,
    id: i32,
    /// Its key; that of a segment changes when it is removed.
    key: i32,
    creator: (u32, u32),
    /// The process that made a segment, the number of semaphores in a set.
    other: u32,
}

impl Known {
    fn segment(segment: &Segment) -> Self {
        Self {
            key: 0,
            ..Self::of(Sort::Memory, &segment.object, segment.creator)
        }
    }

    fn of(sort: Sort, object: &Object, other: u32) -> Self {
        Self {
            sort,
            id: object.id,
            key: object.key,
            creator: (object.creator_uid, object.creator_gid),
            other,
        }
    }
}

fn failed(what: &str, source: impl Into<std::io::Error>) -> ProcessError {
    ProcessError::Kernel {
        pid: 0,
        what: what.into(),
        source: source.into(),
    }
}

/// What to call an object in messages.
#[must_use]
pub fn shown(sort: Sort, object: &Object) -> String {
    let (what, flag) = match sort {
        Sort::Memory => ("shared memory", 'm'),
        Sort::Semaphores => ("semaphores", 's'),
        Sort::Queue => ("message queue", 'q'),
    };
    let id = object.id;
    format!(
        "System V {what} {id} (key {:#x}; ipcs -{flag} -i {id})",
        object.key
    )
}

/// Whether somebody lives who is none of these.
fn is_stranger(pid: u32, members: &Members) -> bool {
    pid != 0 && !members.contains_key(&pid) && !crate::family::has_ended(pid)
}

fn shared_with(root: &Target, sort: Sort, object: &Object, who: &str) -> Refusal {
    let what = format!(
        "{} is used by {who} outside the program",
        shown(sort, object)
    );
    root.refusal(
        "",
        what,
        "keep all that use it as one program, or end the others",
    )
}

impl SystemV {
    /// A stop begins: all segments of the machine.
    pub fn begin(&mut self, users: &Users) -> Result<Vec<Segment>, ProcessError> {
        self.found.clear();
        self.past.extend(users.members.keys());
        let segments = self.lists.segments();
        segments.map_err(|e| failed("listing System V shared memory", e))
    }

    /// Those of the program that nobody has mapped.
    pub fn unmapped(&mut self, segments: &[Segment], users: &Users) -> Vec<Segment> {
        // All are judged: the maker may have ended when the last one lets go of it.
        let own = |s: &&Segment| self.owns(Known::segment(s), &[s.creator], users);
        let own = segments.iter().filter(own);
        own.filter(|s| s.attached == 0).copied().collect()
    }

    /// Whether an object is the program's that these have used last, or made.
    fn owns(&mut self, which: Known, last: &[u32], users: &Users) -> bool {
        let was = |pid: u32| pid != 0 && self.past.contains(&pid);
        let lives = |pid: u32| is_stranger(pid, &users.members);
        let used = |pid: &u32| users.members.contains_key(pid) || was(*pid) && !lives(*pid);
        let called = users.called.contains(&(which.sort, which.id));
        let owns = last.iter().any(used) || called || self.owned.contains(&which);
        if owns {
            self.found.insert(which);
        }
        owns
    }

    /// Describes the semaphores and queues of the program, which stands still. The stop is over for
    /// this.
    pub fn collect(&mut self, root: &Target, users: &Users) -> Result<SystemVState, ProcessError> {
        let mut state = SystemVState::default();
        let sets = self.lists.semaphores();
        for set in sets.map_err(|e| failed("listing System V semaphores", e))? {
            let each = (0..set.count).map(|n| sysv::semaphore(set.object.id, n));
            // Removed meanwhile by somebody else, or none of ours.
            let Ok(each) = each.collect::<Result<Vec<_>, _>>() else {
                continue;
            };
            let last: Vec<u32> = each.iter().map(|s| s.last).collect();
            if self.owns(
                Known::of(Sort::Semaphores, &set.object, set.count),
                &last,
                users,
            ) {
                let set = semaphores(&set, &each, root, &users.members)?;
                state.semaphores.push(set);
            }
        }
        let queues = self.lists.queues();
        for found in queues.map_err(|e| failed("listing System V message queues", e))? {
            let last = [found.sender, found.receiver];
            if self.owns(Known::of(Sort::Queue, &found.object, 0), &last, users) {
                state.queues.push(queue(&found, root, &users.members)?);
            }
        }
        self.owned = std::mem::take(&mut self.found);
        self.past = users.members.keys().copied().collect();
        Ok(state)
    }
}

fn semaphores(
    set: &sysv::Semaphores,
    each: &[sysv::Semaphore],
    root: &Target,
    members: &Members,
) -> Result<SemaphoresState, ProcessError> {
    if let Some(stranger) = each.iter().find(|s| is_stranger(s.last, members)) {
        let who = format!("process {}", stranger.last);
        let refusal = shared_with(root, Sort::Semaphores, &set.object, &who);
        return Err(ProcessError::Refused(vec![refusal]));
    }
    let member = |id: u32| members.get(&id).copied().unwrap_or(0);
    Ok(SemaphoresState {
        object: ObjectState::of(&set.object),
        values: each.iter().map(|s| s.value).collect(),
        last: each.iter().map(|s| member(s.last)).collect(),
    })
}

fn queue(
    queue: &sysv::Queue,
    root: &Target,
    members: &Members,
) -> Result<QueueState, ProcessError> {
    let users = [queue.sender, queue.receiver];
    let user = users.iter().find_map(|u| members.get(u));
    if let Some(stranger) = users.into_iter().find(|&u| is_stranger(u, members)) {
        let who = format!("process {stranger}");
        let refusal = shared_with(root, Sort::Queue, &queue.object, &who);
        return Err(ProcessError::Refused(vec![refusal]));
    }
    let id = queue.object.id;
    let reading = |e| failed(&format!("reading {}", shown(Sort::Queue, &queue.object)), e);
    let capacity = sysv::queue_capacity(id).map_err(reading)?;
    let mut messages = Vec::new();
    // The capacity may have been lowered since they were sent.
    let largest = std::fs::read_to_string("/proc/sys/kernel/msgmax").unwrap_or_default();
    let largest = largest.trim().parse().unwrap_or(0);
    let longest = capacity.max(largest).min(LONGEST) as usize;
    for n in 0..queue.messages {
        match sysv::message(id, n, longest).map_err(reading)? {
            Some((sort, text)) => messages.push(MessageState { sort, text }),
            None => break,
        }
    }
    Ok(QueueState {
        object: ObjectState::of(&queue.object),
        capacity,
        user: user.copied().unwrap_or(0),
        messages,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resources::thread::RegistersState;

    /// The largest process ID (`PID_MAX_LIMIT`).
    const NOBODY: u32 = (1 << 22) - 1;

    fn users(tid: u32, call: i64, first: u64) -> Users {
        let mut users = Users::default();
        let registers = RegistersState {
            orig_rax: call.cast_unsigned(),
            rdi: first,
            ..RegistersState::default()
        };
        let registers = registers.to_ptrace();
        users.add(tid, tid, &registers);
        users
    }

    fn known(sort: Sort, id: i32) -> Known {
        let object = Object {
            id,
            ..Object::default()
        };
        Known::of(sort, &object, 0)
    }

    #[test]
    fn what_a_member_used_is_the_program_s_though_it_has_ended() {
        let (set, me) = (known(Sort::Semaphores, 5), std::process::id());
        let nothing = users(me, -1, 5);
        let mut all = SystemV::default();
        all.begin(&nothing).unwrap();
        assert!(all.owns(set, &[0, me], &nothing));
        assert!(!all.owns(set, &[0], &nothing), "nobody used it yet");
        assert!(!all.owns(set, &[NOBODY], &nothing), "somebody else did");
        // One that was a member, and has ended since.
        all.begin(&users(NOBODY, -1, 5)).unwrap();
        assert!(all.owns(set, &[NOBODY], &nothing));
        assert!(!all.owns(set, &[1], &nothing), "a stranger lives");
    }

    #[test]
    fn what_a_member_waits_for_is_the_program_s_and_stays_so() {
        let me = std::process::id();
        let mut all = SystemV::default();
        for (call, sort) in [
            (libc::SYS_msgrcv, Sort::Queue),
            (libc::SYS_msgsnd, Sort::Queue),
            (libc::SYS_semop, Sort::Semaphores),
            (libc::SYS_semtimedop, Sort::Semaphores),
        ] {
            let waits = users(me, call, 0xffff_ffff_0000_0007);
            assert!(all.owns(known(sort, 7), &[0], &waits));
            assert!(!all.owns(known(sort, 8), &[0], &waits));
        }
        assert!(!all.owns(known(Sort::Memory, 7), &[0], &users(me, -1, 7)));
        all.owned = std::mem::take(&mut all.found);
        assert!(all.owns(known(Sort::Queue, 7), &[0], &users(me, -1, 7)));
    }

    /// The number of a process that has ended, and that of an object that was removed, are given again.
    #[test]
    fn who_gets_a_number_again_gets_nothing_with_it() {
        let root = Target::open(std::process::id()).unwrap();
        let nothing = users(root.pid, -1, 5);
        let (set, other) = (known(Sort::Semaphores, 5), known(Sort::Semaphores, 6));
        let mut all = SystemV::default();
        all.begin(&users(NOBODY, -1, 5)).unwrap();
        assert!(all.owns(set, &[NOBODY], &nothing));
        all.collect(&root, &nothing).unwrap();
        // At the next stop it is no member any more, nor was it one at the stop before.
        all.begin(&nothing).unwrap();
        assert!(all.owns(set, &[0], &nothing), "it was the program's");
        assert!(!all.owns(other, &[NOBODY], &nothing));
        // Removed, and made by somebody else.
        for changed in [
            Known { key: 1, ..set },
            Known {
                creator: (1, 0),
                ..set
            },
            Known { other: 2, ..set },
        ] {
            assert!(!all.owns(changed, &[0], &nothing), "{changed:?}");
        }
        let segment = |key, creator| Segment {
            object: Object {
                key,
                ..Object::default()
            },
            creator,
            ..Segment::default()
        };
        let at = |s: Segment| Known::segment(&s);
        assert_eq!(at(segment(7, 1)), at(segment(0, 1)), "it is being removed");
        assert_ne!(at(segment(7, 1)), at(segment(7, 2)));
    }
}
