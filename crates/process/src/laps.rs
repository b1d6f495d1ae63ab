//! How long the parts of a stop or a restore took, for `OUTLIVE_LOG=outlive_process=debug`.

use std::time::Instant;

/// A stopwatch with laps.
pub struct Laps {
    last: Instant,
    laps: Vec<(&'static str, u128)>,
}

impl Laps {
    /// Starts.
    pub fn new() -> Self {
        Self {
            last: Instant::now(),
            laps: Vec::with_capacity(16),
        }
    }

    /// Ends a lap, in microseconds, and begins the next.
    pub fn lap(&mut self, what: &'static str) {
        let now = Instant::now();
        self.laps.push((what, (now - self.last).as_micros()));
        self.last = now;
    }

    /// Tells all laps.
    pub fn tell(&self, of: &str) {
        tracing::debug!(us = ?self.laps, "{of}");
    }
}
