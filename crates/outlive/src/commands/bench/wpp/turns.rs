//! Turns of untracked, tracked, untracked: what drifts on the machine goes out of the ratio, and
//! what the machine varies by is measured along with it.

use super::super::figures::Samples;
use super::super::session::{Keeper, Session};
use outlive_keeper::KeeperError;

/// What was measured of one quantity.
#[derive(Debug, Default)]
pub struct Turns {
    /// Untracked.
    pub plain: Samples,
    /// Tracked.
    pub tracked: Samples,
    /// Tracked to untracked.
    pub ratio: Samples,
    /// Untracked to untracked.
    pub again: Samples,
}

impl Turns {
    fn add(&mut self, before: f64, tracked: f64, after: f64) {
        self.plain.0.extend([before, after]);
        self.tracked.add(tracked);
        self.ratio.add(tracked / f64::midpoint(before, after));
        self.again.add(after / before);
    }
}

/// So many turns, with a keeper of process `pid` in the middle of each; `measure` gives one value
/// for each quantity. Once before that it is called for nothing, to warm up.
///
/// # Errors
/// What `measure` and the keeper say.
pub fn turns(
    session: &Session,
    pid: u32,
    count: usize,
    every: &str,
    mut measure: impl FnMut() -> Result<Vec<f64>, KeeperError>,
) -> Result<Vec<Turns>, KeeperError> {
    let mut found: Vec<Turns> = Vec::new();
    measure()?;
    for _ in 0..count {
        let before = measure()?;
        let tracked = {
            let keeper = Keeper::attach(session, pid, every, &[])?;
            keeper.committed(1)?;
            let tracked = measure()?;
            // Epochs must have been taken all the while, or the figure says nothing.
            keeper.committed(2)?;
            tracked
        };
        let after = measure()?;
        found.resize_with(before.len(), Turns::default);
        let values = before.iter().zip(&tracked).zip(&after);
        for (turns, ((before, tracked), after)) in found.iter_mut().zip(values) {
            turns.add(*before, *tracked, *after);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drift_goes_out_of_the_ratio() {
        let mut turns = Turns::default();
        turns.add(10.0, 12.0, 14.0);
        assert_eq!(turns.ratio.0, [1.0]);
        assert_eq!(turns.again.0, [1.4]);
        assert_eq!(turns.plain.0, [10.0, 14.0]);
    }
}
