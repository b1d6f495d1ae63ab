//! Making the empty processes of a tree: IDs, parents, sessions, process groups, and the ones that
//! had ended already.
//!
//! # Order
//! Who makes whom, and when sessions begin, is planned before ([`births`]). Ended children come when
//! all others are there, and process groups last, leaders before their members.

use super::saved::Saved;
use super::stub::{Step, Stub, step};
use super::{space, system_v};
use crate::ProcessError;
use crate::births::{self, Maker};
use outlive_linux::clock::TimeOffsets;
use outlive_linux::maps::Mapping;
use outlive_linux::pid_namespace::PidNamespace;
use outlive_linux::remote::Arg;
use std::collections::BTreeMap;

/// Free bytes behind working memory that steps may use.
pub const ASIDE: u64 = 8 << 20;

/// Where the processes are made.
#[derive(Clone, Copy)]
pub enum Place<'a> {
    /// In the caller's PID namespace, and in a time namespace with these offsets.
    Here(TimeOffsets),
    /// In a PID namespace made for them.
    In(&'a PidNamespace),
}

impl Place<'_> {
    /// A process whose parent is not in the tree: the root is our child everywhere; the others are
    /// those of a namespace's init, which has processes whose parents have ended.
    fn parentless(self, id: u32, saved: &Saved, arena_at: u64) -> Result<Stub, ProcessError> {
        match self {
            Self::Here(time) => Stub::new(id, time, arena_at),
            Self::In(namespace) if id == saved.subject.root_process => {
                Stub::new_in(namespace, id, arena_at)
            }
            Self::In(namespace) => Stub::orphan_in(namespace, (id, saved.unused_id()), arena_at),
        }
    }

    /// An ID that is free there, and that none of the processes has.
    fn free_id(self, saved: &Saved) -> u32 {
        /// Below it the kernel's own processes are, which come and go.
        const FIRST: u32 = 300;
        match self {
            Self::In(_) => saved.unused_id(),
            Self::Here(_) => saved.unused_from(FIRST, &|id| {
                std::path::Path::new(&format!("/proc/{id}")).exists()
            }),
        }
    }
}

/// Makes all processes, in the order of the epoch, as they are planned. `before_children` is called
/// with each, and its place in that order, before its children are made as copies of it.
pub fn make(
    saved: &Saved,
    ours: &[Mapping],
    place: Place<'_>,
    before_children: &mut dyn FnMut(usize, &mut Stub) -> Result<(), ProcessError>,
) -> Result<Vec<Stub>, ProcessError> {
    let memories: Vec<_> = saved.processes.iter().map(|p| &p.memory).collect();
    let room = (Stub::arena_length() + ASIDE).saturating_add(system_v::longest(saved));
    let mut nursery = Nursery {
        saved,
        place,
        arena_at: space::find_hole(&memories, ours, room)?,
        stubs: saved.processes.iter().map(|_| None).collect(),
        has_given: vec![false; saved.processes.len()],
        before_children,
    };
    for step in &saved.plan {
        nursery.take(step)?;
    }
    for at in 0..saved.processes.len() {
        nursery.ended_children(at)?;
    }
    let mut stubs = BTreeMap::new();
    for stub in nursery.stubs.into_iter().flatten() {
        stubs.insert(stub.target.id, stub);
    }
    groups(saved, &mut stubs)?;
    let in_order = saved.subject.processes.iter().map(|pid| {
        stubs
            .remove(pid)
            .ok_or_else(|| ProcessError::Image(format!("process {pid} has no parent")))
    });
    in_order.collect()
}

/// The processes that are made so far.
struct Nursery<'a, 'b> {
    saved: &'a Saved,
    place: Place<'a>,
    arena_at: u64,
    stubs: Vec<Option<Stub>>,
    has_given: Vec<bool>,
    before_children: &'b mut dyn FnMut(usize, &mut Stub) -> Result<(), ProcessError>,
}

impl Nursery<'_, '_> {
    fn stub(&mut self, at: usize) -> Result<&mut Stub, ProcessError> {
        let stub = self.stubs.get_mut(at).and_then(Option::as_mut);
        stub.ok_or_else(|| ProcessError::Image(format!("process number {at} has no maker")))
    }

    /// The same of one from which others are copied.
    fn giver(&mut self, at: usize) -> Result<&mut Stub, ProcessError> {
        if !std::mem::replace(&mut self.has_given[at], true)
            && let Some(stub) = &mut self.stubs[at]
        {
            (self.before_children)(at, stub)?;
        }
        self.stub(at)
    }

    fn take(&mut self, step_of_plan: &births::Step) -> Result<(), ProcessError> {
        match *step_of_plan {
            births::Step::Make(at, maker, flags) => {
                let made = self.born(at, maker, flags)?;
                self.stubs[at] = Some(made);
                Ok(())
            }
            births::Step::BeginSession(at) => {
                let begin = step(libc::SYS_setsid, [], "beginning a session");
                self.stub(at)?.steps(vec![begin]).map(drop)
            }
            births::Step::Leave(at, flags) => {
                let what = "leaving what it shared to be made";
                let leave = step(libc::SYS_unshare, [flags], what);
                self.stub(at)?.steps(vec![leave]).map(drop)
            }
        }
    }

    fn born(&mut self, at: usize, maker: Maker, flags: u64) -> Result<Stub, ProcessError> {
        let process = &self.saved.processes[at].process;
        let (id, exit_signal) = (process.pid, process.exit_signal);
        match maker {
            Maker::Us => self.place.parentless(id, self.saved, self.arena_at),
            Maker::Parent(parent) => self.giver(parent)?.child(id, exit_signal, flags),
            Maker::Sibling(sibling) => self.giver(sibling)?.sibling(id, flags),
            Maker::Through(other) => {
                // Its parent is to be ours, or the init of its namespace.
                let parentless = self.saved.processes[other].process.parent == 0;
                let same_parent = match self.place {
                    Place::Here(_) => parentless,
                    Place::In(_) => parentless && other != 0,
                };
                if same_parent {
                    return self.giver(other)?.sibling(id, flags);
                }
                if let Place::Here(_) = self.place {
                    adopt_orphans()?;
                }
                let passing = self.place.free_id(self.saved);
                self.giver(other)?.orphan(id, passing, flags)
            }
        }
    }

    /// Makes the ended children of a process.
    fn ended_children(&mut self, at: usize) -> Result<(), ProcessError> {
        let pid = self.saved.processes[at].process.pid;
        let saved = self.saved;
        let parent = self.giver(at)?;
        let zombies = || {
            saved
                .subject
                .zombies
                .iter()
                .filter(move |z| z.parent == pid)
        };
        for zombie in zombies() {
            parent
                .child(zombie.pid, libc::SIGCHLD as u32, 0)?
                .become_zombie(zombie.status)?;
        }
        if zombies().next().is_none() {
            return Ok(());
        }
        // What the ended children told their parent is in the epoch, if it is still to be told.
        let chld = 1u64 << (libc::SIGCHLD - 1);
        let args = [
            Arg::In(chld.to_ne_bytes().to_vec()),
            Arg::Value(0),
            Arg::In(vec![0; 16]),
            Arg::Value(8),
        ];
        let mut forget = Step::new(libc::SYS_rt_sigtimedwait, args, "forgetting a signal");
        forget.tolerate = &[libc::EAGAIN];
        parent.steps(vec![forget]).map(drop)
    }
}

/// From now on, whoever loses its parent becomes our child: so it was when the epoch was taken of
/// processes without parents that are no namespace's.
fn adopt_orphans() -> Result<(), ProcessError> {
    let own = rustix::process::getpid();
    rustix::process::set_child_subreaper(Some(own))
        .map_err(|e| super::internal("adopting processes without parents", e.into()))
}

/// Process groups whose leaders are in the tree. A process of another group stays in the one that
/// it inherits.
fn groups(saved: &Saved, stubs: &mut BTreeMap<u32, Stub>) -> Result<(), ProcessError> {
    for leaders in [true, false] {
        for p in saved.processes.iter().map(|p| &p.process) {
            let leads = p.pgid == p.pid;
            let known = stubs.contains_key(&p.pgid);
            // A session's leader leads a group already.
            if leads != leaders || !known || p.sid == p.pid {
                continue;
            }
            if let Some(stub) = stubs.get_mut(&p.pid) {
                let args = [0, u64::from(p.pgid)];
                stub.steps(vec![step(
                    libc::SYS_setpgid,
                    args,
                    "joining a process group",
                )])?;
            }
        }
    }
    Ok(())
}
