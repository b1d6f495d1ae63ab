//! System V objects (`sysvipc(7)`): semaphores and message queues, and what shared memory segments
//! have in common with them. Contents of segments are shared memory ([`super::shared`]).
//!
//! # Which belong to a program
//! An object belongs to nobody; it is the program's if a member of the program made it (segments),
//! or changed it last (a semaphore, a queue). Segments that are mapped belong to who maps them.
//!
//! # What it refuses
//! Objects that somebody else uses too, as far as the kernel tells.
//!
//! # What is not known
//! A set of semaphores or a queue that nobody used yet, and an object whose only user or maker
//! among the members has ended, are not seen.

use crate::resources::semaphore_undo::UndoState;
use crate::target::Target;
use crate::{ProcessError, Refusal};
use outlive_linux::sysv::{self, Lists, Object, Segment, Sort};
use outlive_state_tree::StateNode;
use std::collections::BTreeMap;

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
    /// The member that used it last.
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

/// The System V objects of a tracked program.
#[derive(Debug, Default)]
pub struct SystemV {
    lists: Lists,
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
    /// All segments of the machine.
    pub fn segments(&mut self) -> Result<Vec<Segment>, ProcessError> {
        let segments = self.lists.segments();
        segments.map_err(|e| failed("listing System V shared memory", e))
    }

    /// Describes the semaphores and queues of the program, which stands still.
    pub fn collect(
        &mut self,
        root: &Target,
        members: &Members,
    ) -> Result<SystemVState, ProcessError> {
        let mut state = SystemVState::default();
        let sets = self.lists.semaphores();
        for set in sets.map_err(|e| failed("listing System V semaphores", e))? {
            state.semaphores.extend(semaphores(&set, root, members)?);
        }
        let queues = self.lists.queues();
        for found in queues.map_err(|e| failed("listing System V message queues", e))? {
            state.queues.extend(queue(&found, root, members)?);
        }
        Ok(state)
    }
}

fn semaphores(
    set: &sysv::Semaphores,
    root: &Target,
    members: &Members,
) -> Result<Option<SemaphoresState>, ProcessError> {
    let each = (0..set.count).map(|n| sysv::semaphore(set.object.id, n));
    let each: Vec<sysv::Semaphore> = match each.collect() {
        Ok(each) => each,
        // Removed meanwhile by somebody else, or none of ours.
        Err(_) => return Ok(None),
    };
    if !each.iter().any(|s| members.contains_key(&s.last)) {
        return Ok(None);
    }
    if let Some(stranger) = each.iter().find(|s| is_stranger(s.last, members)) {
        let who = format!("process {}", stranger.last);
        let refusal = shared_with(root, Sort::Semaphores, &set.object, &who);
        return Err(ProcessError::Refused(vec![refusal]));
    }
    let member = |id: u32| members.get(&id).copied().unwrap_or(0);
    Ok(Some(SemaphoresState {
        object: ObjectState::of(&set.object),
        values: each.iter().map(|s| s.value).collect(),
        last: each.iter().map(|s| member(s.last)).collect(),
    }))
}

fn queue(
    queue: &sysv::Queue,
    root: &Target,
    members: &Members,
) -> Result<Option<QueueState>, ProcessError> {
    let users = [queue.sender, queue.receiver];
    let Some(&user) = users.iter().find_map(|u| members.get(u)) else {
        return Ok(None);
    };
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
    Ok(Some(QueueState {
        object: ObjectState::of(&queue.object),
        capacity,
        user,
        messages,
    }))
}
