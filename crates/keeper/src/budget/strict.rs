//! The bound that is handed to synchronous write protection.
//!
//! In strict mode a page is noted before it is written. What is not durable at an instant was written
//! since the last stop (which the mechanism counts, and beyond its limit holds the writer), or is on
//! its way to the medium. What is decided here is the limit of both, and the part of each.
//!
//! Pure.
//!
//! # Rules
//! - An event with residue at the limit fits into the budget, also where it first has to wait for an
//!   epoch that is on its way.
//! - Half of the limit is written behind while the program fills the other half: a writer that has
//!   filled its half is held until the next stop.
//! - The program is held during its first epoch, before which there is nothing to go back to.
//! - Where the budget has room for one commit only, the program is held during each epoch.
//! - *Exposed* memory (which nobody can guard: private mappings of files, shared memory) counts as
//!   written all the time, whole, before the stop and after it. Where that leaves no room, there is no bound.
//! - A part is kept free for memory that is mapped anew, until it is found and guarded.

use super::model::{Figures, MIB};

/// What the mechanism is to keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bound {
    /// Most bytes that are not durable at any instant.
    pub limit: u64,
    /// Most bytes that may be written between two stops, with what is exposed.
    pub flush_at: u64,
    /// So many, at which writers are held: what is left is for memory that is mapped anew.
    pub hold_at: u64,
    /// The program stays stopped until each epoch is durable.
    pub held: bool,
}

impl Bound {
    /// At how many bytes writers are held where failed epochs owe so many to the next one.
    #[must_use]
    pub fn holds_at(&self, owed: u64) -> u64 {
        self.limit.saturating_sub(owed).min(self.hold_at)
    }

    /// Whether so many bytes may be written between two stops, with what is owed.
    #[must_use]
    pub fn covers(&self, bytes: u64, owed: u64) -> bool {
        bytes <= self.flush_at && bytes.saturating_add(owed) <= self.limit
    }
}

/// Epochs during which a program is held that mapped more anew than could be bounded.
pub const WILD: u32 = 16;

/// The least limit that is of any use, bytes.
pub const LEAST_LIMIT: u64 = 64 << 10;

/// Most bytes that are kept free for memory that is mapped anew: what two processors can write for the
/// first time within about 2 ms …
pub const RESERVE: u64 = 16 << 20;
/// … and at most this part of what may be written.
const RESERVED: u64 = 4;

/// The bound for a budget in nanoseconds, with so many bytes exposed.
///
/// # Errors
/// The least budget, in nanoseconds, where this one is too small.
pub fn bound(figures: &Figures, budget: u64, exposed: u64) -> Result<Bound, u64> {
    let two = figures
        .floor()
        .saturating_add(figures.commit())
        .saturating_add(figures.transfer(0));
    let bytes = |left: u64| {
        let bytes = u128::from(left) * u128::from(MIB) / u128::from(figures.mib_ns.max(1));
        u64::try_from(bytes).unwrap_or(u64::MAX)
    };
    let running = budget.checked_sub(two).map(bytes);
    let held = figures.allowed(budget);
    let room = |limit: &u64| *limit >= LEAST_LIMIT.saturating_add(exposed);
    let (limit, held) = match (running.filter(|l| room(&(l / 2))), held.filter(room)) {
        (Some(limit), _) => (limit, false),
        (None, Some(limit)) => (limit, true),
        (None, None) => {
            let bytes = u128::from(LEAST_LIMIT) + u128::from(exposed);
            let least = (bytes * u128::from(figures.mib_ns)).div_ceil(u128::from(MIB));
            let least = u64::try_from(least).unwrap_or(u64::MAX);
            return Err(figures.floor().saturating_add(least));
        }
    };
    let flush_at = if held { limit } else { limit / 2 };
    let reserve = RESERVE.min((flush_at - exposed) / RESERVED);
    Ok(Bound {
        limit,
        flush_at,
        hold_at: flush_at - reserve,
        held,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn an_event_at_the_limit_fits_wherever_the_bytes_are(
            budget in 0u64..2_000_000_000, flush in 0u64..50_000_000, mib in 1_000u64..20_000_000,
            tables in 0u64..16 * MIB, on_the_way in 0u64..=1000, exposed in 0u64..64 * MIB,
        ) {
            let f = Figures { flush_ns: flush, mib_ns: mib, tables, ..Figures::default() };
            match bound(&f, budget, exposed) {
                Err(least) => {
                    prop_assert!(least > budget);
                    prop_assert!(bound(&f, least, exposed).is_ok());
                }
                Ok(bound) if bound.held => prop_assert!(f.cost(bound.limit) <= budget + 1),
                Ok(bound) => {
                    let first = u64::try_from(u128::from(bound.limit) * u128::from(on_the_way) / 1000).unwrap();
                    let way = f.transfer(first) + f.commit();
                    prop_assert!(way + f.cost(bound.limit - first) <= budget + 3);
                    // What was exposed at the stop is on its way, and exposed still.
                    prop_assert!(bound.flush_at * 2 <= bound.limit);
                    prop_assert!(exposed < bound.hold_at && bound.hold_at <= bound.flush_at);
                }
            }
        }
    }
}
