//! What is taken of a process at a stop: its threads answer, its pages are looked at, its state is put together.
//!
//! # Rules
//! - The questions to threads and the look at pages go on at the same time, where nobody waits for us meanwhile.
//! - What was found to be written is never forgotten: an error after the look leaves it owed.

use super::{HeldSpace, Member, MemberState, Seen, Space};
use crate::ProcessError;
use crate::freeze::{Held, remote_failed, run_all, run_all_while};
use crate::image::ThreadsState;
use crate::laps::Laps;
use crate::pages::{Changes, World};
use crate::residue::Residue;
use crate::resources::semaphore_undo::{self, UndoState};
use crate::resources::shared::SharedObjects;
use crate::resources::system_v::SemaphoresState;
use crate::resources::{attributes, keyrings, landlock, memory, signals, thread, timers};
use crate::target::Target;
use crate::track::Limit;
use outlive_linux::remote::{Arena, Batch, CallId, Results};
use std::cell::RefCell;
use std::collections::BTreeSet;

/// So much private memory is surely looked at in a small part of the time after which a thread helps
/// itself, bytes.
const BRIEF: u64 = 16 << 30;

struct Asked {
    threads: Vec<thread::Asked>,
    confined: Vec<Confined>,
    process: attributes::Asked,
    signals: Vec<CallId>,
    memory: CallId,
}

/// Questions to a thread about keys of its own and rules in force.
type Confined = (keyrings::Asked, landlock::Asked);

impl Member {
    /// Takes everything but descriptors.
    pub fn capture(
        &mut self,
        threads: &mut [Held],
        seen: Vec<Seen>,
        shared: &mut SharedObjects,
        limit: &Limit,
    ) -> Result<MemberState, ProcessError> {
        let mut laps = Laps::new();
        let leader_status = seen[0].0.status.clone();
        let (asked, answers, changes) = self.ask_and_scan(threads, &seen, limit)?;
        laps.lap("remote");
        let (memory, residue) = match changes {
            Some(changes) => self.describe(changes, &asked, &answers[0], shared, limit)?,
            None => (memory::MemoryState::of_another(), Residue::default()),
        };
        laps.lap("memory");
        let process =
            attributes::collect(&self.target, &leader_status, &asked.process, &answers[0])?;
        let timers = timers::collect(&self.target, &self.arena, threads)?;
        let (leader, signals) = (&threads[0], &asked.signals);
        let signals = signals::collect(&self.target, leader, signals, &answers[0], timers)?;
        laps.lap("describe");
        let mut states = Vec::with_capacity(threads.len());
        for (((held, (sight, left)), asked), answers) in
            threads.iter().zip(seen).zip(&asked.threads).zip(&answers)
        {
            let state = thread::collect(&self.target, held, sight, *asked, answers, left)?;
            states.push(state);
        }
        for held in threads.iter_mut().filter(|_| self.has_fellows) {
            // Threads of other processes are to use the same working memory.
            let tid = held.tid;
            let settled = held.settle();
            settled.map_err(|e| self.target.kernel(format!("settling thread {tid}"), e))?;
        }
        laps.lap("threads");
        laps.tell("stop of a process");
        let threads = ThreadsState { threads: states };
        Ok(MemberState {
            process,
            signals,
            threads,
            memory,
            residue,
        })
    }

    /// Has all threads answer their questions, and looks for written pages meanwhile, where this process
    /// stands for its address space. What threads do then is to ask the kernel; it writes nothing of
    /// theirs but what it writes whenever a thread goes on (`rseq(2)`). Where writers to protected pages
    /// wait for us, or threads would wait so long that they help themselves, one comes after the other.
    fn ask_and_scan(
        &mut self,
        threads: &mut [Held],
        seen: &[Seen],
        limit: &Limit,
    ) -> Result<(Asked, Vec<Results>, Option<Changes>), ProcessError> {
        let Self {
            target,
            arena,
            space,
            ..
        } = self;
        let mut space = match space {
            Space::Held(space) => Some(space),
            Space::Of(_) => None,
        };
        let brief = |s: &&mut Box<HeldSpace>| {
            // Nothing is known of it at the first stop.
            s.pages.guard().is_none() && (1..=BRIEF).contains(&s.layout.private_bytes())
        };
        let meanwhile = space.as_ref().is_some_and(brief);
        let mut scanned = None;
        let mut scan = || scanned = space.as_mut().map(|s| s.scan(target, arena.range()));
        let mut uses = keyrings::Uses::default();
        let mut at_once = || {
            if self.in_session_of_user {
                uses.read(seen.iter().map(|(sight, _)| &sight.status));
            }
            if meanwhile {
                scan();
            }
        };
        let asked = ask((target, arena), threads, seen, &mut at_once);
        let asked = asked.and_then(|asked| limit.check().map(|()| asked));
        if !meanwhile && asked.is_ok() {
            scan();
        }
        let changes = scanned.transpose();
        let asked = asked.and_then(|(asked, answers)| {
            self.refuse_confined(threads, seen, (&asked.confined, &answers), uses)?;
            Ok((asked, answers))
        });
        let (done, owed) = both(asked, changes);
        if let (Space::Held(space), Some(changes)) = (&mut self.space, owed) {
            space.pages.owe_changes(&changes);
        }
        done.map(|((asked, answers), changes)| (asked, answers, changes))
    }

    /// Takes the address space, in which this changed.
    fn describe(
        &mut self,
        changes: Changes,
        asked: &Asked,
        answers: &Results,
        shared: &mut SharedObjects,
        limit: &Limit,
    ) -> Result<(memory::MemoryState, Residue), ProcessError> {
        let Space::Held(space) = &mut self.space else {
            return Ok((memory::MemoryState::of_another(), Residue::default()));
        };
        let mut laps = Laps::new();
        let guards = changes.guards.clone();
        if let Err(e) = limit.check_copy(changes.bytes_now()) {
            space.pages.owe_changes(&changes);
            return Err(e);
        }
        let bytes = usize::try_from(changes.bytes_now()).unwrap_or(usize::MAX);
        let spare = self.spare.take(bytes);
        let residue = space.pages.take(&self.target, changes, spare)?;
        laps.lap("copy");
        let HeldSpace { layout, pages, .. } = &mut **space;
        pages.take_over_served(&self.target, layout.areas(), limit);
        laps.lap("take over");
        let mut memory = memory::collect(
            &self.target,
            space.layout.mappings(),
            &guards,
            &mut space.build_ids,
            shared,
            asked.memory,
            answers,
        )?;
        memory.lock_future = space.lock_future.unwrap_or(0);
        laps.lap("describe");
        laps.tell("stop of an address space");
        Ok((memory, residue))
    }

    /// What the process is to undo in semaphores when it ends; it stands still.
    pub fn undo(
        &self,
        threads: &mut [Held],
        sets: &[SemaphoresState],
    ) -> Result<Vec<UndoState>, ProcessError> {
        let Some(leader) = threads.get_mut(..1) else {
            return Ok(Vec::new());
        };
        let mut found = Vec::new();
        let mut run = |batch| self.run(&mut *leader, batch);
        for set in sets {
            found.extend(semaphore_undo::collect(self.target.id, set, &mut run)?);
        }
        if self.has_fellows {
            let settled = leader[0].settle();
            settled.map_err(|e| self.target.kernel("settling its leading thread", e))?;
        }
        Ok(found)
    }

    /// Refuses a process of which a thread has keys of its own, or is restricted by rules.
    fn refuse_confined(
        &mut self,
        threads: &mut [Held],
        seen: &[Seen],
        (asked, answers): (&[Confined], &[Results]),
        mut uses: keyrings::Uses,
    ) -> Result<(), ProcessError> {
        let refuse = |found: Option<_>| match found {
            Some(found) => Err(ProcessError::Refused(vec![found])),
            None => Ok(()),
        };
        let thread = |sight: &thread::Sight, tid| keyrings::Thread {
            target: &self.target,
            tid,
            user: sight.status.uid[0],
        };
        let mut rest = Vec::new();
        let mut in_session_of_user = false;
        let of_each = seen.iter().zip(asked).zip(answers).zip(threads);
        for ((((sight, _), (keys, rules)), answers), held) in of_each {
            refuse(landlock::refusal(&self.target, held.tid, rules, answers)?)?;
            let one = std::slice::from_mut(&mut *held);
            let thread = thread(sight, one[0].tid);
            let mut run = |batch| self.run(&mut *one, batch);
            refuse(keyrings::own(&thread, *keys, answers, &mut run)?)?;
            in_session_of_user |= keys.finds_session_of_user(answers);
            let status = &sight.status;
            if let Some(how) = keys.session(answers, &mut uses, status) {
                rest.push((held, thread, how));
            }
        }
        let ids: RefCell<Vec<CallId>> = RefCell::default();
        let mut hows = rest
            .iter()
            .map(|(_, _, how)| *how)
            .collect::<Vec<_>>()
            .into_iter();
        let mut held: Vec<&mut Held> = Vec::with_capacity(rest.len());
        let mut who = Vec::with_capacity(rest.len());
        for (one, thread, how) in rest {
            held.push(one);
            who.push((thread, how));
        }
        let batch = |_: &Held| {
            let mut batch = Batch::new();
            let id = hows.next().map(|how| how.ask(&mut batch));
            ids.borrow_mut().extend(id);
            batch
        };
        let answers = run_all(&self.arena, &mut held, batch);
        let answers = answers.map_err(|e| remote_failed(&self.target, e))?;
        let mut harmless = BTreeSet::new();
        let each = held
            .into_iter()
            .zip(who)
            .zip(ids.into_inner())
            .zip(&answers);
        for (((held, (thread, how)), id), answers) in each {
            let mut run = |batch| self.run(std::slice::from_mut(&mut *held), batch);
            let answer = answers.value(id);
            refuse(keyrings::session(
                &thread,
                how,
                answer,
                &mut harmless,
                &mut run,
            )?)?;
        }
        self.in_session_of_user = in_session_of_user;
        Ok(())
    }

    /// Has one thread make calls.
    fn run(&self, one: &mut [Held], batch: Batch) -> Result<Results, ProcessError> {
        let mut batch = Some(batch);
        let answers = run_all(&self.arena, one, |_| batch.take().unwrap_or_default());
        let mut answers = answers.map_err(|e| remote_failed(&self.target, e))?;
        answers.pop().ok_or_else(|| ProcessError::Gone {
            pid: self.target.pid,
            what: "a thread has ended".into(),
        })
    }
}

type Outcome<T> = Result<T, ProcessError>;

/// What came of the questions and of the look at pages, or why the stop is over; and what was found and is to
/// be owed then. Where the look failed, what it had found by then is lost, so that everything is to be
/// taken anew: this must not pass for a stop that was too long.
fn both<A>(
    asked: Result<A, ProcessError>,
    changes: Result<Option<Changes>, ProcessError>,
) -> (Outcome<(A, Option<Changes>)>, Option<Changes>) {
    match (asked, changes) {
        (Ok(asked), Ok(changes)) => (Ok((asked, changes)), None),
        (_, Err(e)) => (Err(e), None),
        (Err(e), Ok(found)) => (Err(e), found),
    }
}

impl HeldSpace {
    /// Finds what changed; the program stands still.
    fn scan(&mut self, target: &Target, arena: (u64, u64)) -> Result<Changes, ProcessError> {
        let mut laps = Laps::new();
        self.layout.read(target, arena, &mut self.flags)?;
        laps.lap("mappings");
        let changes = self
            .pages
            .pass(target, self.layout.areas(), World::Stopped)?;
        laps.lap("pages");
        laps.tell("stop: scan of an address space");
        Ok(changes)
    }
}

/// Has every thread answer its own questions, the leading one also those for the process, and does
/// something meanwhile.
fn ask(
    (target, arena): (&Target, &Arena),
    threads: &mut [Held],
    seen: &[Seen],
    meanwhile: &mut dyn FnMut(),
) -> Result<(Asked, Vec<Results>), ProcessError> {
    let mut asked = Vec::with_capacity(threads.len());
    let mut confined = Vec::with_capacity(threads.len());
    let mut rules = landlock::Question::new(target);
    let mut of_leader = None;
    let mut seen = seen.iter().map(|(sight, _)| &sight.status);
    let batch = |held: &Held| {
        let mut batch = Batch::new();
        asked.push(thread::ask(&mut batch));
        if let Some(status) = seen.next() {
            let keys = keyrings::ask(&mut batch, status.uid[0]);
            confined.push((keys, rules.ask(&mut batch, held.tid, status)));
        }
        if held.tid == target.pid {
            of_leader = Some((
                attributes::ask(&mut batch),
                signals::ask(&mut batch),
                memory::ask(&mut batch),
            ));
        }
        batch
    };
    let answers = run_all_while(arena, threads, batch, meanwhile);
    let answers = answers.map_err(|e| remote_failed(target, e))?;
    let (process, signals, memory) = of_leader.ok_or_else(|| ProcessError::Gone {
        pid: target.pid,
        what: "its leading thread has ended".into(),
    })?;
    let asked = Asked {
        threads: asked,
        confined,
        process,
        signals,
        memory,
    };
    Ok((asked, answers))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_that_failed_never_passes_for_a_stop_that_was_too_long() {
        let long = || ProcessError::TooLong { limit_us: 1 };
        let failed = || ProcessError::Image("a look".into());
        for asked in [Ok(()), Err(long()), Err(failed())] {
            let done = both(asked, Err(failed()));
            assert!(matches!(done, (Err(ProcessError::Image(_)), None)));
        }
        let found = || Changes {
            written: vec![(0, 4096)],
            ..Changes::default()
        };
        let (done, owed) = both(Err::<(), _>(long()), Ok(Some(found())));
        assert!(matches!(done, Err(ProcessError::TooLong { .. })));
        assert!(owed.is_some_and(|c| c.written == [(0, 4096)]));
        let (done, owed) = both(Ok(()), Ok(Some(found())));
        assert!(done.is_ok_and(|(_, c)| c.is_some()) && owed.is_none());
    }
}
