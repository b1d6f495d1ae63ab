//! Figures about the most recent stops.

/// How many stops are remembered.
const WINDOW: usize = 4096;

/// The stop times of the last epochs, microseconds.
#[derive(Clone, Debug, Default)]
pub struct Stops {
    ring: Vec<u64>,
    next: usize,
}

impl Stops {
    /// Adds one stop.
    pub fn add(&mut self, us: u64) {
        if self.ring.len() < WINDOW {
            self.ring.push(us);
        } else if let Some(slot) = self.ring.get_mut(self.next) {
            *slot = us;
        }
        self.next = (self.next + 1) % WINDOW;
    }

    /// The most recent stop.
    #[must_use]
    pub fn last(&self) -> Option<u64> {
        let at = (self.next + WINDOW - 1) % WINDOW;
        self.ring.get(at).copied()
    }

    /// The stop time that `percent` of the remembered stops do not exceed (nearest rank).
    #[must_use]
    pub fn percentile(&self, percent: usize) -> Option<u64> {
        percentile(&self.ring, percent)
    }
}

/// The smallest value that at least `percent` per cent of `values` do not exceed; `None` of none.
#[must_use]
pub fn percentile(values: &[u64], percent: usize) -> Option<u64> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    let rank = (sorted.len() * percent.min(100)).div_ceil(100).max(1);
    sorted.get(rank - 1).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_rank() {
        let values: Vec<u64> = (1..=200).rev().collect();
        assert_eq!(percentile(&values, 50), Some(100));
        assert_eq!(percentile(&values, 99), Some(198));
        assert_eq!(percentile(&values, 100), Some(200));
        assert_eq!(percentile(&values, 0), Some(1));
        assert_eq!(percentile(&[7], 99), Some(7));
        assert_eq!(percentile(&[], 50), None);
    }

    #[test]
    fn only_the_last_stops_count() {
        let mut stops = Stops::default();
        assert_eq!(stops.last(), None);
        for us in 0..(WINDOW as u64 + 10) {
            stops.add(us);
            assert_eq!(stops.last(), Some(us));
        }
        assert_eq!(stops.percentile(0), Some(10));
    }
}
