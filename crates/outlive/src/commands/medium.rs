//! What is known of the medium before a keeper begins.

use crate::out;
use outlive_keeper::KeeperError;
use outlive_keeper::budget::calibration::{self, Measured};
use outlive_keeper::budget::keeping::HoldUp;
use outlive_keeper::budget::model::{Figures, Model};
use outlive_keeper::subject::Root;

/// The model that a keeper begins with. For a budget the medium is measured first, which takes a
/// second.
///
/// # Errors
/// Refused, where the budget cannot be kept on this medium; what the medium says.
pub fn model(root: &Root, hold_up: Option<HoldUp>, pages: u64) -> Result<Model, KeeperError> {
    let Some(hold_up) = hold_up else {
        let known = calibration::load(root.path());
        return Ok(known.map_or_else(|| Model::new(Figures::default()), |m| m.model(pages)));
    };
    let model = calibration::refresh(root.path())?.model(pages);
    enough(&model.figures(), hold_up.budget_ns)?;
    Ok(model)
}

/// The same for a program that is brought back: it must not fail for a medium that became slower.
pub fn model_again(root: &Root, hold_up: Option<HoldUp>, name: &str) -> Model {
    let known = calibration::load(root.path());
    let measured = match (known, hold_up) {
        (Some(known), _) => Ok(known),
        (None, Some(_)) => calibration::refresh(root.path()),
        (None, None) => return Model::new(Figures::default()),
    };
    let model = measured.map_or_else(|_| Model::new(Figures::default()), |m| m.model(0));
    if let Some(hold_up) = hold_up
        && let Err(error) = enough(&model.figures(), hold_up.budget_ns)
    {
        out::say(&format!("{name}: {error}; it is kept all the same"));
    }
    model
}

/// Leaves what the keeper learned of the medium for the next one.
pub fn remember(root: &Root, model: &Model) {
    let learned = Measured::of(model);
    if !learned.flush_ns.is_empty() && !learned.mib_ns.is_empty() {
        // It can be measured again.
        let _ = calibration::save(root.path(), &learned);
    }
}

/// Refuses a budget that is below the floor.
pub fn enough(figures: &Figures, budget_ns: u64) -> Result<(), KeeperError> {
    // One page at least must fit.
    let floor = figures.cost(4096);
    if budget_ns >= floor {
        return Ok(());
    }
    let time = |ns: u64| out::time_us(ns.div_ceil(1000));
    Err(KeeperError::Refused(format!(
        "a hold-up budget of {} cannot be kept here: with nothing to save at all an event takes {} \
         (threads stopped {}, state read {}, {} flushes of {} each, by the 99.9th percentile): give \
         --hold-up {}ms or more, or put the store on a faster medium",
        time(budget_ns),
        time(floor),
        time(figures.freeze_ns),
        time(figures.scan_ns),
        figures.flushes,
        time(figures.flush_ns),
        floor.div_ceil(1_000_000),
    )))
}
