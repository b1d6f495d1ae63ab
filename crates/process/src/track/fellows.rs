//! Members that have an address space together, and what else members share.
//!
//! # Rules
//! - One of them stands for the address space: its foothold is that of all, and it alone is asked for
//!   memory.
//! - When that one ends, or begins another program, the next takes its place, and all of the memory
//!   is copied again under its name.
//! - Where none can take its place they are members no longer: whoever of them is still there is
//!   adopted anew, with all of its memory. Nobody is saved as having the memory of one that is not
//!   saved.

use super::Tracked;
use crate::ProcessError;
use crate::member::{Member, MemberState};
use crate::reentry::WaitBook;
use crate::sharing::{self, Shares};
use crate::target::Target;
use std::collections::{BTreeMap, BTreeSet};

impl Tracked {
    /// Takes a process on that has the address space of a member, and with it a foothold; gives any
    /// other one back.
    pub(super) fn join(&mut self, target: Target, waits: &mut WaitBook) -> Option<Target> {
        let pid = target.pid;
        let holder = |m: &&Member| m.holder() == m.target.pid;
        let mut holders = self.members.values().filter(holder);
        let holder = holders.find(|m| sharing::same_memory(m.target.pid, pid));
        let Some(holder) = holder else {
            return Some(target);
        };
        let member = holder.join(target, std::mem::take(waits));
        self.members.insert(pid, member);
        None
    }

    /// Some member that stands for an address space.
    pub(super) fn any_holder(&self) -> Option<u32> {
        let mut members = self.members.values();
        members
            .find(|m| m.holder() == m.target.pid)
            .map(|m| m.target.pid)
    }

    /// Forgets a member. Its address space stays with another one that has it, if there is one.
    pub(super) fn drop_member(&mut self, pid: u32) {
        let Some(mut gone) = self.members.remove(&pid) else {
            return;
        };
        self.sharing.forget(pid);
        let fellows = self.members.values_mut().filter(|m| m.holder() == pid);
        let mut heir = None;
        for member in fellows.filter(|m| m.is_intact()) {
            if let Ok(old) = member.take_over(&mut gone) {
                self.retired.extend(old);
                heir = Some(member.target.pid);
                break;
            }
        }
        let fellows = self.members.values_mut().filter(|m| m.holder() == pid);
        if let Some(heir) = heir {
            fellows.for_each(|m| m.set_holder(heir));
        } else {
            let orphans: Vec<u32> = fellows.map(|m| m.target.pid).collect();
            for orphan in orphans {
                self.members.remove(&orphan);
                self.sharing.forget(orphan);
            }
        }
        self.retired.extend(gone.retire());
    }

    /// The holders of address spaces that several of these members have.
    pub(super) fn fellows(&self, pids: &[u32]) -> BTreeSet<u32> {
        let members = pids.iter().filter_map(|pid| self.members.get(pid));
        let joined = members.filter(|m| m.holder() != m.target.pid);
        joined.map(Member::holder).collect()
    }

    /// Says in the state of a process what it shares with which other one; that is saved there only.
    /// `pids` are all that are saved.
    pub(super) fn note_shares(
        &self,
        (pid, pids): (u32, &[u32]),
        shares: &BTreeMap<u32, Shares>,
        state: &mut MemberState,
    ) -> Result<(), ProcessError> {
        let shares = shares.get(&pid).copied().unwrap_or_default();
        let holder = self.members.get(&pid).map_or(pid, Member::holder);
        if !pids.contains(&holder) {
            return Err(ProcessError::Gone {
                pid: holder,
                what: format!("it stood for the address space of process {pid}"),
            });
        }
        let process = &mut state.process;
        process.shares_memory_with = if holder == pid { 0 } else { self.id_of(holder) };
        process.shares_descriptors_with = self.id_of(shares.descriptors);
        process.shares_directories_with = self.id_of(shares.directories);
        process.shares_signals_with = self.id_of(shares.signals);
        if shares.directories != 0 {
            process.working_directory.clear();
            process.root_directory.clear();
            process.umask = 0;
        }
        if shares.signals != 0 {
            state.signals.actions.clear();
        }
        Ok(())
    }

    pub(super) fn refuse_shares(&self, states: &[MemberState]) -> Result<(), ProcessError> {
        let processes: Vec<_> = states.iter().map(|s| &s.process).collect();
        sharing::refuse(&processes, &|id| {
            let member = self.members.values().find(|m| m.target.id == id);
            member.map(|m| sharing::refusing(&m.target))
        })
    }
}
