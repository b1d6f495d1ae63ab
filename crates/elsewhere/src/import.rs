//! A stream into epochs.
//!
//! # Rules
//! - The order of frames is that of the writer, and anything else is damage: within an epoch trees,
//!   absent runs, pages, zero pages; between epochs nothing.
//! - An epoch is committed only after its own count of pages and groups was found right.
//! - What is kept in memory is bounded by what was received, and by [`TREES`].

use crate::Passed;
use crate::frame::{Kind, Receiver};
use outlive_epoch::{EpochFacts, EpochId, EpochWriter, PageSink, StoreError};
use outlive_epoch_store::Store;
use std::collections::BTreeMap;
use std::io::Read;

/// Most bytes of trees in one epoch.
const TREES: usize = 1 << 30;
/// Most groups in one epoch.
const GROUPS: usize = 1 << 16;

type Trees = BTreeMap<String, Vec<u8>>;

/// Reads a stream that errors call `place`, and writes its epochs to the store, without any epoch,
/// that `open` gives for what the stream says about its subject. `progress` hears how many bytes were
/// read. The store is closed when this returns.
///
/// Where this fails, the store may hold some of the epochs: the caller removes it.
///
/// # Errors
/// [`StoreError::Damaged`] with the place in the stream, [`StoreError::Newer`]; what the store
/// says, what the stream's source says.
pub fn import<E: From<StoreError>>(
    from: &mut dyn Read,
    place: &str,
    open: impl FnOnce(&[u8]) -> Result<Store, E>,
    progress: &mut dyn FnMut(u64),
) -> Result<Passed, E> {
    let mut from = Receiver::begin(from, place)?;
    if from.frame()? != Kind::About {
        return Err(from.damaged("it does not begin with its subject").into());
    }
    let mut store = open(from.contents())?;
    let mut passed = Passed::default();
    let (mut count, mut trees) = (0_u64, Trees::new());
    loop {
        match from.frame()? {
            Kind::Epoch => {
                let (id, pages) =
                    epoch(&mut from, &mut store, &mut trees, passed.epochs, progress)?;
                passed.epoch(id);
                passed.pages = passed.pages.saturating_add(pages);
                count += 1;
            }
            Kind::End if count > 0 && from.u64(0)? == count => break,
            Kind::End => return Err(from.damaged("epochs are missing").into()),
            _ => return Err(from.damaged("a frame is not in its place").into()),
        }
    }
    from.finish()?;
    store.close()?;
    passed.bytes = from.bytes;
    Ok(passed)
}

/// Takes one epoch; its first frame was read.
fn epoch(
    from: &mut Receiver<'_>,
    store: &mut Store,
    before: &mut Trees,
    range: Option<(u64, u64)>,
    progress: &mut dyn FnMut(u64),
) -> Result<(u64, u64), StoreError> {
    let (id, taken_at_ns, stop_us) = (from.u64(0)?, from.u64(8)?, from.u64(16)?);
    let facts = EpochFacts {
        taken_at_ns,
        stop_us,
    };
    // Epochs may have been left out.
    let follows = range.is_none_or(|(_, last)| last < id);
    if id == 0 || id == u64::MAX || !follows {
        return Err(from.damaged("its epochs are not in order"));
    }
    let mut writer = match range {
        None => store.begin_first(EpochId(id))?,
        Some(_) => store.begin_as(EpochId(id))?,
    };
    if writer.id().0 != id {
        return Err(from.damaged("its epochs are not in order"));
    }
    let (mut trees, mut stage, mut pages) = (Trees::new(), 0, 0_u64);
    let mut open = None;
    loop {
        let kind = from.frame()?;
        let rank = rank(kind);
        if rank < stage {
            return Err(from.damaged("a frame is not in its place"));
        }
        stage = rank;
        match kind {
            Kind::Tree | Kind::TreeMore | Kind::TreeSame => {
                tree(from, kind, before, &mut trees, &mut open)?;
            }
            Kind::Absent => {
                for run in from.runs()? {
                    writer.absent(run)?;
                }
            }
            Kind::Zero => {
                for run in from.runs()? {
                    writer.zero(run)?;
                }
            }
            Kind::Pages => {
                let (run, bytes) = from.pages()?;
                writer.put(run, bytes)?;
                pages = pages.saturating_add(run.count());
            }
            Kind::Commit => break,
            Kind::About | Kind::Epoch | Kind::End => {
                return Err(from.damaged("an epoch is not complete"));
            }
        }
        progress(from.bytes);
    }
    if from.u64(0)? != pages || from.u64(8)? != trees.len() as u64 {
        return Err(from.damaged("an epoch lacks pages or groups"));
    }
    for (group, bytes) in &trees {
        writer.tree(group, bytes)?;
    }
    writer.commit(facts)?;
    *before = trees;
    Ok((id, pages))
}

/// The order of frames in an epoch.
fn rank(kind: Kind) -> u8 {
    match kind {
        Kind::Tree | Kind::TreeMore | Kind::TreeSame => 0,
        Kind::Absent => 1,
        Kind::Pages => 2,
        Kind::Zero => 3,
        Kind::About | Kind::Epoch | Kind::Commit | Kind::End => 4,
    }
}

/// Takes a frame of a tree; `open` is the group to which more may come.
fn tree(
    from: &Receiver<'_>,
    kind: Kind,
    before: &mut Trees,
    trees: &mut Trees,
    open: &mut Option<String>,
) -> Result<(), StoreError> {
    let contents = from.contents();
    let wrong = || from.damaged("a tree is not in order");
    let name = |bytes: &[u8]| std::str::from_utf8(bytes).ok().map(str::to_owned);
    let held: usize = trees.values().map(Vec::len).sum();
    let (group, bytes) = match kind {
        Kind::TreeMore => {
            let group = open.as_ref().ok_or_else(wrong)?;
            let bytes = trees.get_mut(group).ok_or_else(wrong)?;
            if held.saturating_add(contents.len()) > TREES {
                return Err(from.damaged("its trees are larger than any may be"));
            }
            bytes.extend_from_slice(contents);
            return Ok(());
        }
        Kind::TreeSame => {
            *open = None;
            let group = name(contents).ok_or_else(wrong)?;
            let bytes = before.remove(&group).ok_or_else(wrong)?;
            (group, bytes)
        }
        _ => {
            let (len, rest) = contents.split_first_chunk::<2>().ok_or_else(wrong)?;
            let len = usize::from(u16::from_le_bytes(*len));
            let (group, bytes) = rest.split_at_checked(len).ok_or_else(wrong)?;
            let group = name(group).ok_or_else(wrong)?;
            *open = Some(group.clone());
            (group, bytes.to_vec())
        }
    };
    let sorted = trees.last_key_value().is_none_or(|(last, _)| *last < group);
    if !sorted || trees.len() == GROUPS || held.saturating_add(bytes.len()) > TREES {
        return Err(wrong());
    }
    trees.insert(group, bytes);
    Ok(())
}
