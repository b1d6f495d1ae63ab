//! How long the parts of a stop or a restore took, for `OUTLIVE_LOG=outlive_process=debug`.

use std::time::Instant;

/// A stopwatch with laps.
pub struct Laps {
    last: Instant,
    laps: [(&'static str, u128); MOST],
    count: usize,
}

/// Laps that are told; those beyond are not.
const MOST: usize = 16;

impl Laps {
    /// Starts.
    pub fn new() -> Self {
        Self {
            last: Instant::now(),
            laps: [("", 0); MOST],
            count: 0,
        }
    }

    /// Ends a lap, in microseconds, and begins the next.
    pub fn lap(&mut self, what: &'static str) {
        let now = Instant::now();
        if let Some(lap) = self.laps.get_mut(self.count) {
            *lap = (what, (now - self.last).as_micros());
            self.count += 1;
        }
        self.last = now;
    }

    /// Tells all laps.
    pub fn tell(&self, of: &str) {
        tracing::debug!(us = ?&self.laps[..self.count], "{of}");
    }
}
