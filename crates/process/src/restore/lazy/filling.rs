//! An address space that is tracked while pages of it are missing: what its tracker asks of whoever
//! serves them.
//!
//! A mapping can be registered with one userfaultfd only. So memory that comes later is tracked by the
//! same descriptor by which it is served, until nothing of it is missing; everything else by the
//! tracker's own.
//!
//! # Rules
//! - A page that is missing where the epoch has it is what the epoch holds: it is marked as unwritten, and
//!   comes so. What the program gives back loses the mark.
//! - What a mapping holds, missing or not, keeps its marks when it is moved, to where the epochs do not
//!   have it: the tracker is told where, and takes all of it.
//! - A registration ends only where nothing is missing, and while the program stands still, so that nothing
//!   can be moved there meanwhile. (A whole address space without missing pages may be let go of at any
//!   time.)
//! - A process that is made meanwhile is tracked when it has all its pages.

use super::pending::Part;
use super::serve::{A_MOMENT, AGAIN, Common, Space, State, TRIES, attend, bring_rest, fetch};
use crate::lodger::Lodger;
use outlive_epoch::{PAGE_SIZE, SpaceId};
use outlive_linux::Errno;
use std::fmt;
use std::sync::Arc;

const PAGE: u64 = PAGE_SIZE as u64;

/// Missing pages of one process that was restored. When this is dropped, nobody tracks it any more.
pub struct Filling {
    common: Arc<Common>,
    id: SpaceId,
    lodger: Lodger,
}

impl fmt::Debug for Filling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Filling").field(&self.id).finish()
    }
}

impl Filling {
    /// Of this process, which is tracked from now on; `None` where nothing of it comes later.
    pub(super) fn of(common: &Arc<Common>, id: u32) -> Option<Self> {
        let mut state = common.lock();
        let id = SpaceId(id);
        let space = state.spaces.iter_mut().find(|s| is(s, id))?;
        space.tracked = true;
        Some(Self {
            lodger: space.lodger.clone(),
            common: common.clone(),
            id,
        })
    }

    /// The thread of ours in the process.
    #[must_use]
    pub fn lodger(&self) -> &Lodger {
        &self.lodger
    }

    /// Where mappings were moved to since this was asked last, ranges of page indexes. The program stands
    /// still.
    #[must_use]
    pub fn moved(&self) -> Vec<(u64, u64)> {
        let mut state = self.common.urgently();
        let Some(at) = self.place(&state) else {
            return Vec::new();
        };
        attend(&self.common, &mut state, at);
        let moved = std::mem::take(&mut state.spaces[at].moved);
        moved.iter().collect()
    }

    /// Whether nothing of the whole program is missing, or it was ended.
    #[must_use]
    pub fn is_over(&self) -> bool {
        let state = self.common.lock();
        state.filled || state.failed.is_some()
    }

    /// Brings what is missing of a range. Fails where that cannot be, with what is to be said.
    pub fn bring(&self, start: u64, end: u64) -> Result<(), String> {
        for _ in 0..TRIES {
            let mut state = self.common.urgently();
            let Some(at) = self.place(&state) else {
                return Ok(());
            };
            let missing = state.spaces[at].pending.parts(start, end);
            if missing.is_empty() {
                return Ok(());
            }
            for part in missing {
                if let Err(why) = self.bring_part(&mut state, at, part) {
                    self.common.give_up(&mut state, why.clone());
                    return Err(why);
                }
            }
            let left = state.spaces[at].pending.parts(start, end);
            drop(state);
            if !left.is_empty() {
                std::thread::sleep(A_MOMENT);
            }
        }
        Err(format!(
            "missing pages at {start:x}-{end:x} cannot be brought"
        ))
    }

    fn bring_part(&self, state: &mut State, at: usize, part: Part) -> Result<(), String> {
        for from in (part.start..part.end).step_by(AGAIN as usize) {
            let piece = part.within(from, from + AGAIN);
            if let Some(piece) = piece {
                fetch(&self.common, state, at, piece)?;
            }
        }
        Ok(())
    }

    /// Puts zeros wherever there is no page in a range of which nothing is missing.
    pub fn fill_holes(&self, start: u64, end: u64) {
        let server = {
            let state = self.common.lock();
            let place = self.place(&state);
            place.map(|at| state.spaces[at].server.clone())
        };
        let zeros = [0; PAGE_SIZE];
        for at in (start..end).step_by(PAGE_SIZE) {
            // Most pages are there.
            let _ = server.as_ref().map(|s| s.copy(at, &zeros, false));
        }
    }

    /// Ends the registration of a mapping, if nothing of it is missing; the program stands still. Says
    /// whether it did. [`Errno::INVAL`] where it is none of ours.
    pub fn release(&self, start: u64, end: u64) -> Result<bool, Errno> {
        let state = self.common.urgently();
        let Some(at) = self.place(&state) else {
            return Ok(false);
        };
        let space = &state.spaces[at];
        if !space.pending.parts(start, end).is_empty() {
            return Ok(false);
        }
        space.server.unregister(start, end).map(|()| true)
    }

    /// Bytes that [`Filling::settle_children`] has to bring.
    #[must_use]
    pub fn missing_of_children(&self) -> u64 {
        let state = self.common.lock();
        let children = state.spaces.iter().filter(|s| s.pid.is_none());
        children.map(|s| s.pending.bytes()).sum()
    }

    /// Brings all that processes miss that were made meanwhile, and lets go of them: whoever wants to track
    /// one can, then.
    pub fn settle_children(&self) {
        let is_child = |s: &Space| s.pid.is_none();
        if !self.common.lock().spaces.iter().any(is_child) {
            return;
        }
        if let Err(why) = bring_rest(&self.common, &is_child) {
            self.common.give_up(&mut self.common.lock(), why);
        }
        self.common.let_go_of(is_child);
    }

    fn place(&self, state: &State) -> Option<usize> {
        let space = state.spaces.iter().position(|s| is(s, self.id))?;
        (!state.spaces[space].ended).then_some(space)
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        let filled = {
            let mut state = self.common.lock();
            let space = state.spaces.iter_mut().find(|s| is(s, self.id));
            space.into_iter().for_each(|s| s.tracked = false);
            state.filled
        };
        if filled {
            let id = self.id;
            self.common.let_go_of(|s| is(s, id));
        }
    }
}

fn is(space: &Space, id: SpaceId) -> bool {
    space.pid.is_some() && space.id == id
}

/// The page indexes of a range of addresses.
pub(super) fn pages((start, end): (u64, u64)) -> (u64, u64) {
    (start / PAGE, end.div_ceil(PAGE))
}
