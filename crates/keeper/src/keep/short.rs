//! What the loop does to keep its store short: see [`crate::upkeep`].

use super::Keeper;
use crate::control::{Asker, failed};
use crate::epoch::Program;
use crate::retention::{Keep, Policy};
use crate::upkeep;

/// The flushes of the last step of upkeep: of what is left, of its record, of the records in all
/// places, of the directory.
const SWITCH_FLUSHES: u64 = 5;

/// What is said to somebody who asks for epochs to be removed, and not for which.
const UNSAID: &str = "it is not kept with --keep: say what is to stay, such as --keep last=1";

impl<P: Program> Keeper<'_, P> {
    /// Does a piece of what keeps the store short, if that is due and there is time.
    pub(super) fn keep_short(&mut self, wait: u64) {
        let now = self.now();
        if self.upkeep.wait(now, wait) == Some(0) && self.has_room(upkeep::PIECE) {
            self.upkeep_piece(upkeep::PIECE);
        }
    }

    /// The same right before an epoch, where the log grows faster than it is made shorter.
    pub(super) fn keep_up(&mut self) {
        let late = self.upkeep.late(self.log.log_bytes(), self.last_bytes);
        if let Some(limit) = late.filter(|limit| self.has_room(*limit)) {
            self.upkeep_piece(limit);
        }
    }

    fn upkeep_piece(&mut self, limit: u64) {
        let now = self.now();
        let Some(store) = self.log.store() else {
            self.upkeep.rest(now);
            return;
        };
        let done = self.upkeep.piece(now, limit, store);
        self.watch.wrote_ahead(done.written);
        self.readying |= done.switched && self.settings.hold_up.is_some();
        if let Some(warning) = done.warning {
            self.say(&warning);
        }
        if done.lost {
            self.plan.begins_anew();
        }
    }

    /// Whether the store may be worked on, and an event that came now could wait until so many bytes are read and written, and a few
    /// flushes are done, and would still be durable in time.
    pub(super) fn has_room(&self, bytes: u64) -> bool {
        if self.still_fills() {
            return false;
        }
        let Some(budget) = self.watch.budget_ns() else {
            return true;
        };
        let expected = self.watch.status(self.now()).map_or(0, |s| s.expected_ns);
        self.flattens() && expected.saturating_add(self.cost_of(bytes)) <= budget
    }

    /// What a piece of upkeep delays an event by, nanoseconds.
    fn cost_of(&self, bytes: u64) -> u64 {
        let figures = self.watch.figures();
        let copied = figures.transfer(bytes.saturating_mul(2));
        copied.saturating_add(figures.flush_ns.saturating_mul(SWITCH_FLUSHES))
    }

    /// Whether a log that is long can be made shorter from what is stored: in strict mode every
    /// moment belongs to the program, and a small budget has no room.
    pub(super) fn flattens(&self) -> bool {
        match self.settings.hold_up {
            None => true,
            Some(hold_up) if hold_up.strict => false,
            Some(hold_up) => {
                let idle = self.watch.figures().floor();
                idle.saturating_add(self.cost_of(upkeep::PIECE)) <= hold_up.budget_ns / 2
            }
        }
    }

    /// Removes what is not wanted, in pieces; whoever asked is answered when it is done.
    pub(super) fn prune(&mut self, keep: Option<Keep>, asker: Asker) {
        let standing = self.upkeep.policy();
        let policy = Policy {
            keep: keep.or(standing.keep),
            thorough: true,
            ..standing
        };
        match self.log.store() {
            Some(store) if policy.keep.is_some() => self.upkeep.ask(policy, asker, store),
            _ => asker.answer(&failed(UNSAID.into(), 2)),
        }
    }
}
