//! What the loop asks its program where a hold-up budget is strict, and tells it: how much may be unsaved.

use super::Keeper;
use crate::companion::timespec;
use crate::epoch::Program;
use outlive_epoch::PAGE_SIZE;
use rustix::event::{PollFd, PollFlags, poll};
use std::time::Duration;

impl<P: Program> Keeper<'_, P> {
    /// Strict: whether a writer is held at the limit.
    pub(super) fn is_pressed(&self) -> bool {
        let pressure = self.program.as_ref().map(P::pressure).unwrap_or_default();
        let mut set: Vec<_> = pressure
            .iter()
            .map(|fd| PollFd::new(fd, PollFlags::IN))
            .collect();
        !set.is_empty() && matches!(poll(&mut set, Some(&timespec(Duration::ZERO))), Ok(n) if n > 0)
    }

    /// Strict: asks how much may have been unsaved at most.
    pub(super) fn look(&mut self) {
        let Some(program) = self.program.as_ref().filter(|_| self.is_strict()) else {
            return;
        };
        let bytes = program.most_dirty().saturating_mul(PAGE_SIZE as u64);
        self.watch.found(bytes);
    }

    /// Bytes that the next epoch takes again.
    pub(super) fn owed(&self) -> u64 {
        let pages = self.program.as_ref().map_or(0, P::owed_pages);
        pages.saturating_mul(PAGE_SIZE as u64)
    }

    fn is_strict(&self) -> bool {
        self.settings.hold_up.is_some_and(|h| h.strict)
    }

    /// Strict: what nobody can guard, bytes.
    pub(super) fn exposed(&self) -> u64 {
        let Some(program) = self.program.as_ref().filter(|_| self.is_strict()) else {
            return 0;
        };
        program.expose();
        program.exposed_pages().saturating_mul(PAGE_SIZE as u64)
    }

    /// Strict: says where no bound can be kept.
    pub(super) fn say_unbounded(&mut self, exposed: u64) {
        if let Some(least) = self.watch.least_budget(exposed) {
            let text = format!(
                "--strict cannot be kept now, which counts as a violation: {} KiB can be guarded by \
                 nobody (private mappings of files, shared memory, new processes), and the least budget \
                 with that is {} ms here",
                exposed >> 10,
                least.div_ceil(1_000_000),
            );
            self.say(&text);
        }
    }

    /// Strict: tells the program's guard how much may be written until the next stop.
    pub(super) fn limit(&mut self) {
        let strict = self.is_strict();
        let pages = self.watch.limit().map(|bytes| bytes / PAGE_SIZE as u64);
        if let Some(program) = self.program.as_mut().filter(|_| strict) {
            program.limit_dirty(pages);
        }
    }
}
