//! Committed epochs on a medium: the store of one subject.
//!
//! A [`Store`] is one directory, or one block device. [`Store::begin`] gives a writer for the next epoch, which holds
//! only what changed; [`Store::begin_base`] gives one for a full epoch in a file of its own, which
//! on commit takes the place of all earlier ones. [`Store::epoch`] reads any epoch that is there.
//! [`Store::begin_flattening`] makes a new base of what the store holds already, and
//! [`Store::begin_thinning`] leaves epochs out.
//! `docs/epoch-store.md` draws the bytes and argues why a commit is atomic.
//!
//! # Rules
//! - An epoch is acknowledged only after all of it and then its commit record were flushed. What
//!   an acknowledged epoch consists of is never written again.
//! - Whatever is read is checked: against its checksum, and against the bounds of its place.
//!   What fails is [`StoreError::Damaged`] with its place; it is never skipped silently.
//! - With a key ([`Secret`]) everything that tells something of the program is encrypted and authenticated, and
//!   what is not is refused.
//! - If the last step of a commit fails, the outcome is open: the next `begin` repeats the step,
//!   and the epoch is committed if that succeeds.
//!
//! # What it does not do
//! It knows nothing of processes, parses no state tree, decides nothing about when to write what,
//! and makes up for damage only as far as `docs/epoch-store.md` says.
//!
//! [`StoreError::Damaged`]: outlive_epoch::StoreError::Damaged

mod beside;
mod cipher;
mod damage;
mod format;
mod gather;
mod generation;
mod groups;
mod head;
mod host;
#[cfg(test)]
mod hostile_tests;
mod index;
mod locked;
mod map;
mod older;
mod opening;
mod pack;
mod place;
#[cfg(feature = "planted")]
pub mod planted;
#[cfg(not(feature = "planted"))]
mod planted {
    /// No bug is planted, so that nothing of the hooks is left in the code.
    pub(crate) const fn bug(_: &str) -> bool {
        false
    }
}
mod reader;
mod ready;
mod repair;
mod scrub;
mod store;
mod stored;
mod stripe;
mod tables;
mod verify;
mod writer;

pub use beside::Worked;
pub use cipher::{BadSecret, Fingerprint, SECRET_LEN, Secret};
pub use damage::{Damage, Outcome, Part};
pub use host::{Host, SystemHost};
pub use older::{GenerationSummary, Increment};
pub use opening::{repair, repair_with, verify, verify_with};
pub use outlive_media::Access;
pub use pack::{Codec, UnknownCodec};
pub use place::{clear, format};
pub use reader::Reader;
pub use ready::{APART, Ahead};
pub use repair::{repair_in, repair_in_with};
pub use scrub::Scrubbed;
pub use store::{CommitTimes, EpochSummary, Store};
pub use stripe::{REPAIRABLE, STRIPE, WIDTH};
pub use verify::{Progress, Report, verify_in, verify_in_with};
pub use writer::Writer;
