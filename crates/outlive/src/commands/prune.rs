//! `prune`: epochs that are not to be kept.

use crate::cli::PruneArgs;
use crate::out;
use outlive_epoch_store::{Access, Store};
use outlive_keeper::KeeperError;
use outlive_keeper::control::{Reply, Request, ask};
use outlive_keeper::images::Image;
use outlive_keeper::keys;
use outlive_keeper::retention::{Keep, Moment, Policy};
use outlive_keeper::subject::{Card, Root, Subject};
use outlive_keeper::upkeep::{self, Pruned};
use serde_json::json;

/// `outlive prune`
pub fn prune(root: &Root, args: &PruneArgs, json: bool) -> Result<u8, KeeperError> {
    let subject = root.existing(&args.name)?;
    let card = subject.card()?;
    let name = &args.name;
    let keep = args.keep.or(card.keep).ok_or_else(|| {
        KeeperError::Usage(format!(
            "{name} is not kept with --keep: say what is to stay, such as --keep last=1"
        ))
    })?;
    if args.dry_run {
        return plan(&subject, keep, json);
    }
    let pruned = match ask(subject.dir(), Request::Prune { keep: Some(keep) }, None)? {
        Some(Reply::Pruned(pruned)) => pruned,
        Some(other) => return Err(other.into_error()),
        None => alone(&subject, keep, &card, args)?,
    };
    if json {
        let mut told = json!(pruned);
        told["name"] = json!(name);
        out::json(&told);
    } else {
        out::line(&format!(
            "{name}: {} removed, {} left; {} of {} bytes are free now",
            out::plural(pruned.removed, "epoch", "epochs"),
            out::count(pruned.left),
            out::bytes(pruned.bytes_before.saturating_sub(pruned.bytes)),
            out::bytes(pruned.bytes_before),
        ));
    }
    Ok(0)
}

/// Of a subject that nobody keeps.
fn alone(
    subject: &Subject,
    keep: Keep,
    card: &Card,
    args: &PruneArgs,
) -> Result<Pruned, KeeperError> {
    let _lock = subject.lock()?;
    let secret = keys::of_subject(args.key.source()?.as_ref(), subject, card)?;
    let mut store = Store::open_with(subject.epochs_dir(), Access::Write, secret)?;
    store.pack(card.codec()?);
    let policy = Policy {
        keep: Some(keep),
        max_size: card.max_size,
        thorough: true,
    };
    let pruned = upkeep::prune(&mut store, policy)?;
    store.close()?;
    Ok(pruned)
}

/// What would go and what would stay.
fn plan(subject: &Subject, keep: Keep, json: bool) -> Result<u8, KeeperError> {
    let image = Image::open(&subject.epochs_dir())?;
    let moment = |epoch: &outlive_keeper::images::Summary| (epoch.epoch, epoch.time_ns);
    let epochs: Vec<Moment> = image.epochs().iter().map(moment).collect();
    let wanted = keep.wanted(&epochs);
    let (stay, go): (Vec<Moment>, Vec<Moment>) = epochs
        .iter()
        .partition(|(number, _)| wanted.contains(number));
    if json {
        let numbers = |list: &[Moment]| list.iter().map(|(n, _)| *n).collect::<Vec<_>>();
        out::json(&json!({
            "name": subject.name(),
            "keep": keep.to_string(),
            "would_remove": numbers(&go),
            "would_stay": numbers(&stay),
        }));
        return Ok(0);
    }
    for (number, time) in &stay {
        out::line(&format!(
            "{number} of {} would stay",
            out::short_moment(*time)
        ));
    }
    out::line(&format!(
        "{}: {} would go, {} would stay",
        subject.name(),
        out::plural(go.len() as u64, "epoch", "epochs"),
        out::count(stay.len() as u64),
    ));
    Ok(0)
}
