//! Making System V objects again: the same IDs, keys, owners and modes, made by members of the
//! program, so that the kernel names them as makers and last users.
//!
//! # Objects that are there already
//! System V objects outlive programs, so what a killed program used is mostly still there. An
//! object with the same ID, key, size and creator that no living process uses is taken for the very
//! same one, and gets the contents that it had at the epoch. Anything else that is in the way is a
//! refusal.

use super::saved::Saved;
use super::stub::{Step, Stub, step};
use crate::resources::memory::{Area, AreaKind, MemoryState};
use crate::resources::semaphore_undo::{self, UndoState};
use crate::resources::shared::{Memories, Memory, Origin, SegmentState, Writing};
use crate::resources::system_v::{ObjectState, QueueState, SemaphoresState, shown};
use crate::{ProcessError, Refusal, family};
use outlive_epoch::PAGE_SIZE;
use outlive_linux::maps::VmFlags;
use outlive_linux::remote::Arg;
use outlive_linux::sysv::{self, Lists, Object, Sort};
use rustix::fs::{FallocateFlags, fallocate};
use std::collections::{BTreeMap, HashSet};

/// Semaphores in one set, at most, as the kernel has it.
const MOST_SEMAPHORES: usize = 32_000;
/// The largest value of a semaphore.
const LARGEST_VALUE: u32 = 32_767;
const CREATE: u64 = (libc::IPC_CREAT | libc::IPC_EXCL) as u64;

/// What is to be made, of any sort.
struct Wanted<'a> {
    sort: Sort,
    object: &'a ObjectState,
    /// Bytes of a segment, or number of semaphores.
    size: u64,
    /// The member that makes it.
    maker: u32,
}

/// The objects of a program that is being restored. Dropping it removes those that were made.
#[derive(Debug, Default)]
pub struct Objects {
    made: Vec<(Sort, i32)>,
    /// IDs of objects that were left behind.
    left: HashSet<(u8, i32)>,
    /// By their spaces: ID and length of segments.
    segments: BTreeMap<u32, (i32, u64)>,
}

impl Drop for Objects {
    fn drop(&mut self) {
        for (sort, id) in self.made.drain(..) {
            // Best effort on a path that leads to an error already.
            let _ = sysv::remove(sort, id);
        }
    }
}

fn number(sort: Sort) -> u8 {
    sort as u8
}

fn image(what: String) -> ProcessError {
    ProcessError::Image(what)
}

fn object(state: &ObjectState) -> Result<Object, ProcessError> {
    let object = state.object();
    object.ok_or_else(|| image(format!("System V object {} makes no sense", state.id)))
}

fn segments(saved: &Saved) -> impl Iterator<Item = (u32, u64, &SegmentState)> {
    saved
        .shared
        .memories
        .iter()
        .filter_map(|m| match &m.origin {
            Origin::Segment(segment) => Some((m.space, m.size, segment)),
            _ => None,
        })
}

/// The length of the longest segment, bytes.
pub fn longest(saved: &Saved) -> u64 {
    let page = PAGE_SIZE as u64;
    let sizes = segments(saved).map(|(_, size, _)| size.div_ceil(page).saturating_mul(page));
    sizes.max().unwrap_or(0)
}

fn wanted(saved: &Saved) -> Vec<Wanted<'_>> {
    let memory = segments(saved).map(|(_, size, segment)| Wanted {
        sort: Sort::Memory,
        object: &segment.object,
        size,
        maker: segment.maker,
    });
    let sets = saved.system_v.semaphores.iter().map(|set| Wanted {
        sort: Sort::Semaphores,
        object: &set.object,
        size: set.values.len() as u64,
        maker: set.last.iter().copied().find(|&p| p != 0).unwrap_or(0),
    });
    let queues = saved.system_v.queues.iter().map(|queue| Wanted {
        sort: Sort::Queue,
        object: &queue.object,
        size: 0,
        maker: queue.user,
    });
    memory.chain(sets).chain(queues).collect()
}

/// What there is of one sort: the object, its size, and whether somebody alive uses it.
type Present = (Object, u64, bool);

fn alive(pid: u32) -> bool {
    pid != 0 && !family::has_ended(pid)
}

fn present(lists: &mut Lists, sort: Sort) -> std::io::Result<Vec<Present>> {
    Ok(match sort {
        Sort::Memory => {
            let all = lists.segments()?.into_iter();
            all.map(|s| (s.object, s.size, s.attached > 0)).collect()
        }
        Sort::Semaphores => {
            let used = |s: &sysv::Semaphores| {
                (0..s.count).any(|n| {
                    sysv::semaphore(s.object.id, n)
                        .is_ok_and(|one| one.waiting > 0 || alive(one.last))
                })
            };
            let all = lists.semaphores()?.into_iter();
            all.map(|s| (s.object, s.count.into(), used(&s))).collect()
        }
        Sort::Queue => {
            let all = lists.queues()?.into_iter();
            all.map(|q| (q.object, 0, alive(q.sender) || alive(q.receiver)))
                .collect()
        }
    })
}

impl Objects {
    /// Judges what is there already, before anything is made.
    pub fn check(saved: &Saved, refusals: &mut Vec<Refusal>) -> Result<Self, ProcessError> {
        let mut objects = Self::default();
        let mut lists = Lists::default();
        validate(saved)?;
        let mut seen = HashSet::new();
        for wanted in wanted(saved) {
            let target = object(wanted.object)?;
            if !seen.insert((number(wanted.sort), target.id)) {
                return Err(image(format!(
                    "System V object {} is there twice",
                    target.id
                )));
            }
            let all = present(&mut lists, wanted.sort)
                .map_err(|e| super::internal("listing System V objects", e))?;
            match judge(&target, wanted.size, &all) {
                Ok(true) => drop(objects.left.insert((number(wanted.sort), target.id))),
                Ok(false) => {}
                Err((why, id)) => {
                    let flag = ["-m", "-s", "-q"][wanted.sort as usize];
                    let what = format!("{} cannot be made: {why}", shown(wanted.sort, &target));
                    let remedy = format!("end who uses it, or remove it with: ipcrm {flag} {id}");
                    refusals.push(saved.refusal(what, &remedy));
                }
            }
        }
        Ok(objects)
    }

    /// Makes all objects, empty, and opens the segments.
    pub fn make(
        &mut self,
        saved: &Saved,
        stubs: &mut [Stub],
        memories: &mut Memories,
    ) -> Result<(), ProcessError> {
        for wanted in wanted(saved) {
            let target = object(wanted.object)?;
            if wanted.sort == Sort::Memory && wanted.maker == 0 {
                self.remove_left(&target)?;
            }
            if !self.left.contains(&(number(wanted.sort), target.id)) {
                let stub = member(stubs, wanted.maker)?;
                self.make_one(&wanted, &target, stub, saved)?;
            }
            sysv::set_access(wanted.sort, &target).map_err(|e| {
                let what = format!("setting the mode of {}", shown(wanted.sort, &target));
                super::internal(&what, e.into())
            })?;
        }
        for (space, size, segment) in segments(saved) {
            let id = object(&segment.object)?.id;
            let memory = open(id, size)
                .map_err(|e| super::internal(&format!("opening System V shared memory {id}"), e))?;
            if memories.insert(space, memory).is_some() {
                return Err(image(format!("shared memory {space:x} is there twice")));
            }
            self.segments.insert(space, (id, size));
        }
        self.fill(saved, stubs)
    }

    /// Removes a segment that was left behind and whose maker has ended before the epoch: of one that
    /// a member has made, the next epoch knows that it is the program's.
    fn remove_left(&mut self, target: &Object) -> Result<(), ProcessError> {
        if !self.left.remove(&(number(Sort::Memory), target.id)) {
            return Ok(());
        }
        sysv::remove(Sort::Memory, target.id).map_err(|e| {
            let what = format!("removing {}", shown(Sort::Memory, target));
            super::internal(&what, e.into())
        })
    }

    fn make_one(
        &mut self,
        wanted: &Wanted<'_>,
        target: &Object,
        stub: &mut Stub,
        saved: &Saved,
    ) -> Result<(), ProcessError> {
        let what = shown(wanted.sort, target);
        sysv::want_id(wanted.sort, target.id)
            .map_err(|e| crate::target::gone_or(stub.target.pid, &format!("making {what}"), e))?;
        let key = u64::from(target.key.cast_unsigned());
        let flags = CREATE | u64::from(target.mode & 0o777);
        let (call, args) = match wanted.sort {
            Sort::Memory => (libc::SYS_shmget, [key, wanted.size, flags]),
            Sort::Semaphores => (libc::SYS_semget, [key, wanted.size, flags]),
            Sort::Queue => (libc::SYS_msgget, [key, flags, 0]),
        };
        let make = step(call, args, format!("making {what}"));
        let us = (
            rustix::process::geteuid().as_raw(),
            rustix::process::getegid().as_raw(),
        );
        let them = (target.creator_uid, target.creator_gid);
        let keep = u64::from(u32::MAX);
        let become_who = |(uid, gid): (u32, u32), first: i64| {
            let mut both = vec![
                step(
                    libc::SYS_setresgid,
                    [keep, gid.into(), keep],
                    "being another group",
                ),
                step(
                    libc::SYS_setresuid,
                    [keep, uid.into(), keep],
                    "being another user",
                ),
            ];
            both.sort_by_key(|s| s.number != first);
            both
        };
        let steps = if us == them {
            vec![make]
        } else {
            let mut steps = become_who(them, libc::SYS_setresgid);
            steps.push(make);
            steps.extend(become_who(us, libc::SYS_setresuid));
            steps
        };
        let at = steps.iter().position(|s| s.number == call).unwrap_or(0);
        let id = stub.steps(steps)?[at] as i32;
        self.made.push((wanted.sort, id));
        if id == target.id {
            return Ok(());
        }
        let refusal = saved.refusal(
            format!("{what} cannot be made: the kernel gave it the ID {id}"),
            "try again: somebody else made such an object at the same moment",
        );
        Err(ProcessError::Refused(vec![refusal]))
    }

    /// Gives semaphores their values and queues their messages.
    fn fill(&self, saved: &Saved, stubs: &mut [Stub]) -> Result<(), ProcessError> {
        for set in &saved.system_v.semaphores {
            set_values(set, stubs)?;
        }
        set_undo(saved, stubs)?;
        for queue in &saved.system_v.queues {
            let id = object(&queue.object)?.id;
            if self.left.contains(&(number(Sort::Queue), id)) {
                while sysv::drop_message(id)
                    .map_err(|e| super::internal("emptying a message queue", e.into()))?
                {
                }
            }
            send(queue, id, member(stubs, queue.user)?)?;
        }
        Ok(())
    }

    /// Maps all segments of one process. `aside` is a free place for the longest.
    pub fn attach(
        &self,
        stub: &mut Stub,
        state: &MemoryState,
        aside: u64,
    ) -> Result<(), ProcessError> {
        // What one `shmat` mapped is one again: by space, place, and whether it can be written.
        let mut attached: BTreeMap<(u32, u64, bool), Vec<&Area>> = BTreeMap::new();
        for area in state.areas.iter().filter(|a| a.kind == AreaKind::Segment) {
            let base = area.start.wrapping_sub(area.offset);
            let writable = area.vm_flags().has(VmFlags::MAY_WRITE) || area.protection & 2 != 0;
            let key = (area.space.unwrap_or(0), base, writable);
            attached.entry(key).or_default().push(area);
        }
        for ((space, _, writable), areas) in attached {
            let Some(&(id, size)) = self.segments.get(&space) else {
                return Err(image(format!("segment {space:x} is missing")));
            };
            stub.steps(attach_one(id, size, writable, &areas, aside)?)?;
        }
        Ok(())
    }

    /// What comes when everybody has mapped what he had.
    pub fn finish(&self, saved: &Saved) -> Result<(), ProcessError> {
        for (_, _, segment) in segments(saved) {
            let object = object(&segment.object)?;
            let failed = |what: &str, e: outlive_linux::Errno| {
                let what = format!("{what} {}", shown(Sort::Memory, &object));
                super::internal(&what, e.into())
            };
            if object.mode & sysv::LOCKED != 0 {
                sysv::lock_segment(object.id).map_err(|e| failed("locking", e))?;
            }
            if object.mode & sysv::REMOVED != 0 {
                sysv::remove(Sort::Memory, object.id).map_err(|e| failed("removing", e))?;
            }
        }
        Ok(())
    }

    /// The program runs: what was made for it stays.
    pub fn keep(mut self) {
        self.made.clear();
    }
}

fn member(stubs: &mut [Stub], pid: u32) -> Result<&mut Stub, ProcessError> {
    let at = stubs.iter().position(|s| s.target.id == pid).unwrap_or(0);
    let stub = stubs.get_mut(at);
    stub.ok_or_else(|| image("there are no processes".into()))
}

/// An image is hostile.
fn validate(saved: &Saved) -> Result<(), ProcessError> {
    for set in &saved.system_v.semaphores {
        let (values, last) = (&set.values, &set.last);
        if values.len() != last.len()
            || values.is_empty()
            || values.len() > MOST_SEMAPHORES
            || values.iter().any(|&v| v > LARGEST_VALUE)
        {
            return Err(image(format!("semaphores {} make no sense", set.object.id)));
        }
    }
    let sets = saved.system_v.semaphores.iter();
    let lengths: BTreeMap<u32, usize> = sets.map(|s| (s.object.id, s.values.len())).collect();
    for undo in &saved.system_v.undo {
        let there = lengths
            .get(&undo.set)
            .is_some_and(|n| (undo.semaphore as usize) < *n);
        let bounds = 1..=semaphore_undo::LARGEST.unsigned_abs();
        let process = saved.subject.processes.contains(&undo.process);
        if !there || !process || !bounds.contains(&undo.adjustment.unsigned_abs()) {
            let what = format!("what is undone in semaphores {} makes no sense", undo.set);
            return Err(image(what));
        }
    }
    for queue in &saved.system_v.queues {
        if queue.messages.iter().any(|m| m.sort <= 0) {
            return Err(image(format!("queue {} makes no sense", queue.object.id)));
        }
    }
    Ok(())
}

/// Whether the object was left behind by the program; an error says what is in the way.
fn judge(target: &Object, size: u64, all: &[Present]) -> Result<bool, (String, i32)> {
    if let Some((found, found_size, used)) = all.iter().find(|p| p.0.id == target.id) {
        let same = |o: &Object| (o.key, o.creator_uid, o.creator_gid);
        // A removed segment has lost its key, and stays until the last process is gone.
        return if *used {
            Err(("it is used by others".into(), found.id))
        } else if same(found) != same(target) || *found_size != size {
            Err(("another object has its ID".into(), found.id))
        } else {
            Ok(true)
        };
    }
    match all
        .iter()
        .find(|p| p.0.key == target.key && target.key != 0)
    {
        Some((other, ..)) => Err((format!("object {} has its key", other.id), other.id)),
        None => Ok(false),
    }
}

/// Opens a segment, which is all zero then.
fn open(id: i32, size: u64) -> std::io::Result<Memory> {
    let file = sysv::open_segment(id, size, true)?;
    let length = file.metadata()?.len();
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&file, punch, 0, length.max(1))?;
    Ok(Memory {
        reading: file.try_clone()?,
        file,
        size: length,
        writing: Writing::Free,
    })
}

fn set_values(set: &SemaphoresState, stubs: &mut [Stub]) -> Result<(), ProcessError> {
    let id = object(&set.object)?.id;
    let id = u64::from(id.cast_unsigned());
    let mut by_member: BTreeMap<u32, Vec<Step>> = BTreeMap::new();
    for (n, (&value, &last)) in set.values.iter().zip(&set.last).enumerate() {
        let args = [id, n as u64, libc::SETVAL as u64, value.into()];
        let set = step(libc::SYS_semctl, args, "setting a semaphore");
        by_member.entry(last).or_default().push(set);
    }
    for (pid, steps) in by_member {
        member(stubs, pid)?.steps(steps)?;
    }
    Ok(())
}

/// What is to be undone, which setting values has cleared. It shows who used a semaphore last, so
/// that one uses it once more.
fn set_undo(saved: &Saved, stubs: &mut [Stub]) -> Result<(), ProcessError> {
    let by_id = saved.system_v.semaphores.iter().map(|s| (s.object.id, s));
    let by_id: BTreeMap<u32, &SemaphoresState> = by_id.collect();
    let place = |undo: &UndoState| {
        let (set, at) = (by_id.get(&undo.set)?, undo.semaphore as usize);
        Some((*set.values.get(at)?, *set.last.get(at)?))
    };
    let what = "setting what is undone in a semaphore";
    for undo in &saved.system_v.undo {
        if let Some((value, _)) = place(undo) {
            let args = semaphore_undo::recreate(undo, value);
            member(stubs, undo.process)?.steps(vec![Step::new(libc::SYS_semop, args, what)])?;
        }
    }
    for undo in &saved.system_v.undo {
        if let Some((value, last)) = place(undo) {
            let args = semaphore_undo::touch(undo.set, undo.semaphore, value);
            member(stubs, last)?.steps(vec![Step::new(libc::SYS_semop, args, what)])?;
        }
    }
    Ok(())
}

/// Sends all messages. One more is sent and received first: so the queue has been used by a member,
/// though it be empty.
fn send(queue: &QueueState, id: i32, stub: &mut Stub) -> Result<(), ProcessError> {
    let failed = |e: outlive_linux::Errno| super::internal("setting the size of a queue", e.into());
    // As many bytes as this may be in it, and as many messages; it may have held more.
    let bytes: u64 = queue.messages.iter().map(|m| m.text.len() as u64).sum();
    let room = queue
        .capacity
        .max(bytes)
        .max(queue.messages.len() as u64 + 1);
    if sysv::queue_capacity(id).map_err(failed)? != room {
        sysv::set_queue_capacity(id, room).map_err(failed)?;
    }
    let number = Arg::Value(u64::from(id.cast_unsigned()));
    let now = Arg::Value(libc::IPC_NOWAIT as u64);
    let message = |sort: i64, text: &[u8]| {
        let whole = [&sort.to_ne_bytes()[..], text].concat();
        let length = Arg::Value(text.len() as u64);
        let args = [number.clone(), Arg::In(whole), length, now.clone()];
        Step::new(libc::SYS_msgsnd, args, "sending a message")
    };
    let any = Arg::Value(0);
    let args = [number.clone(), Arg::Out(16), any.clone(), any, now.clone()];
    let mut steps = vec![
        message(1, b""),
        Step::new(libc::SYS_msgrcv, args, "receiving a message"),
    ];
    steps.extend(queue.messages.iter().map(|m| message(m.sort, &m.text)));
    stub.steps(steps)?;
    if room != queue.capacity {
        sysv::set_queue_capacity(id, queue.capacity).map_err(failed)?;
    }
    Ok(())
}

/// Attaches a segment aside, and moves its parts to their places.
fn attach_one(
    id: i32,
    size: u64,
    writable: bool,
    areas: &[&Area],
    aside: u64,
) -> Result<Vec<Step>, ProcessError> {
    let length = size.next_multiple_of(PAGE_SIZE as u64);
    let mut flags = if writable { 0 } else { libc::SHM_RDONLY };
    let mut full = if writable { 3 } else { 1 };
    if areas.iter().any(|a| a.protection & 4 != 0) {
        flags |= libc::SHM_EXEC;
        full |= 4;
    }
    let what = format!("attaching System V shared memory {id}");
    let number = u64::from(id.cast_unsigned());
    let mut steps = vec![step(libc::SYS_shmat, [number, aside, flags as u64], &*what)];
    for area in areas {
        let end = area.offset.checked_add(area.len());
        if end.is_none_or(|end| end > length) {
            return Err(image(format!("area {:x} leaves its segment", area.start)));
        }
        let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
        let from = aside + area.offset;
        let args = [from, area.len(), area.len(), flags, area.start];
        steps.push(step(libc::SYS_mremap, args, &*what));
        if area.protection != full {
            let args = [area.start, area.len(), area.protection.into()];
            steps.push(step(libc::SYS_mprotect, args, &*what));
        }
    }
    steps.push(step(libc::SYS_munmap, [aside, length], &*what));
    Ok(steps)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_the_way_is_told_from_what_was_left_behind() {
        let ours = Object {
            key: 7,
            id: 5,
            ..Object::default()
        };
        let other = Object { id: 6, ..ours };
        let stranger = Object {
            creator_uid: 1,
            ..ours
        };
        let private = Object { key: 0, ..ours };
        let judge = |target, found, used| judge(&target, 4096, &[(found, 4096, used)]);
        assert_eq!(judge(ours, ours, false), Ok(true));
        assert_eq!(
            judge(
                ours,
                Object {
                    mode: 0o777,
                    ..ours
                },
                false
            ),
            Ok(true)
        );
        assert!(
            judge(ours, ours, true)
                .unwrap_err()
                .0
                .contains("used by others")
        );
        assert!(judge(ours, stranger, false).is_err());
        assert!(
            judge(ours, other, false)
                .unwrap_err()
                .0
                .contains("object 6 has its key")
        );
        assert_eq!(judge(private, Object { key: 0, ..other }, true), Ok(false));
        assert!(super::judge(&ours, 1, &[(ours, 2, false)]).is_err());
        assert_eq!(super::judge(&ours, 1, &[]), Ok(false));
    }
}
