//! What is heard while nothing is due, and what is answered.

use super::{Ending, Keeper};
use crate::KeeperError;
use crate::budget::keeping::Watch;
use crate::budget::pacing::Step;
use crate::control::{Asker, Reply, Request, Status, failed};
use crate::epoch::{Fate, Manner, Program, Taken};
use crate::power::{Ears, Event, Heard};
use outlive_epoch::PAGE_SIZE;
use outlive_linux::signals::Received;
use outlive_process::ProcessError;
use rustix::process::Signal;

impl<P: Program> Keeper<'_, P> {
    pub(super) fn heard(&mut self, heard: Heard, ears: &mut Ears<'_>) -> Option<Ending> {
        match Event::of(heard) {
            Ok(event) => match self.take(Manner::Event, Some(event), ears) {
                Ok((taken, Fate::Ended)) => Some(Ending::Planned(taken)),
                _ => None,
            },
            Err(Heard::Signal(received)) => self.signal(received),
            Err(Heard::Request(request, asker)) => self.request(request, asker, ears),
        }
    }

    fn signal(&mut self, received: Received) -> Option<Ending> {
        if !self.settings.child {
            let harmless = [Signal::USR1, Signal::USR2, Signal::WINCH];
            let ends = harmless.iter().all(|s| s.as_raw() != received.signal);
            return ends.then_some(Ending::Detached);
        }
        self.companion.pass_on(received);
        None
    }

    pub(super) fn leave(&mut self, ending: Ending) -> Result<Ending, KeeperError> {
        if ending == Ending::Detached
            && let Some(program) = self.program.take()
        {
            program.detach()?;
        }
        Ok(ending)
    }

    fn request(&mut self, request: Request, asker: Asker, ears: &mut Ears<'_>) -> Option<Ending> {
        let manner = match request {
            Request::Status => {
                asker.answer(&Reply::Status(Box::new(self.status())));
                return None;
            }
            // Without an event, that is no news.
            Request::PowerBack | Request::Power { .. } => {
                asker.answer(&Reply::Heard);
                return None;
            }
            Request::Prune { keep } => {
                self.prune(keep, asker);
                return None;
            }
            Request::Checkpoint => Manner::Running,
            Request::Stop => Manner::Ending,
        };
        match self.take_asked(manner, ears) {
            Ok((taken, fate)) => {
                asker.answer(&Reply::Taken {
                    epoch: taken.clone(),
                    pids: self.status.pids,
                    power: None,
                });
                (fate == Fate::Ended).then_some(Ending::Planned(taken))
            }
            Err(error) => {
                let error = KeeperError::from(error);
                asker.answer(&failed(error.to_string(), error.exit_code()));
                None
            }
        }
    }

    /// Takes an epoch for somebody who waits for it. One that came to nothing because the program gave
    /// memory back is tried again at once: the next stop leaves nothing behind.
    fn take_asked(
        &mut self,
        manner: Manner,
        ears: &mut Ears<'_>,
    ) -> Result<(Taken, Fate), ProcessError> {
        let held = |watch: &Watch| match watch.pressed() {
            Step::Held if manner == Manner::Running => Manner::Held,
            _ => manner,
        };
        match self.take(held(&self.watch), None, ears) {
            Err(ProcessError::GivenBack { .. }) => self.take(held(&self.watch), None, ears),
            done => done,
        }
    }

    pub(super) fn status(&mut self) -> Status {
        let files = self.log.store().map(|store| store.generations());
        let files = files.unwrap_or_default();
        let mut budget = self.watch.status(self.now());
        if let Some(budget) = budget.as_mut().filter(|b| b.hold_up.strict) {
            let pages = self.program.as_ref().and_then(P::dirty_pages);
            let bytes = pages.map(|n| n.saturating_mul(PAGE_SIZE as u64));
            if let Some(bytes) = bytes {
                // At least so many: what an epoch that failed had taken is not among them.
                let cost = self.watch.figures().cost(bytes);
                budget.expected_bytes = budget.expected_bytes.max(bytes);
                budget.expected_ns = budget.expected_ns.max(cost);
            }
            budget.dirty_bytes = bytes.filter(|_| self.counts);
            let exposed = self.program.as_ref().map(P::exposed_pages);
            budget.exposed_bytes = exposed.map(|n| n.saturating_mul(PAGE_SIZE as u64));
        }
        Status {
            epoch: self.log.newest(),
            last_stop_us: self.stops.last(),
            median_stop_us: self.stops.percentile(50),
            p99_stop_us: self.stops.percentile(99),
            log_bytes: self.log.log_bytes(),
            live_bytes: self.log.live_bytes(),
            store_bytes: files.iter().map(|file| file.bytes).sum(),
            generations: files.len() as u64,
            budget,
            model: self.watch.figures(),
            events: self.watch.events,
            bytes_written: self.watch.wear().bytes(),
            bytes_per_day: self.watch.wear().per_day(self.now()),
            totals: self.totals(),
            ..self.status.clone()
        }
    }
}
