//! Capture and restore of unmodified Linux processes, from outside.
//!
//! Nothing is linked into the target and nothing stays resident in it: its state is read through
//! `/proc`, `ptrace(2)`, `pidfd_getfd(2)` and batches of remote system calls, and made again the
//! same way. This crate is mechanism only: *when* an epoch is taken is the keeper's business.
//!
//! # The sequence of an epoch
//! 1. [`Tracked::attach`] once: refuses by name, before any harm, what could not be restored.
//! 2. [`Tracked::precopy`]: copies what changed while the program runs.
//! 3. [`Tracked::stop`]: freezes the program and takes everything that is left into memory.
//! 4. [`Stopped::resume`] (or [`Stopped::end`] after the commit, for planned events).
//! 5. [`Captured::write`] and [`Captured::sync_files`] while the program runs on, then the commit.
//! 6. If any of this failed (but for [`ProcessError::GivenBack`]): [`Tracked::forget_progress`], so that the next epoch is a full one.

mod births;
mod bootstrap;
mod captured;
mod closed;
pub mod error;
mod family;
mod flags;
mod freeze;
mod guard;
pub mod holders;
pub mod image;
mod interval;
mod laps;
mod layout;
mod lodger;
mod member;
mod namespaces;
mod pages;
mod preflight;
mod procfs;
mod reentry;
mod residue;
pub mod resources;
pub mod restore;
mod sharing;
pub mod strategy;
mod target;
pub mod track;
mod vdso;
mod waits;

pub use captured::{Captured, StopTimes};
pub use error::{ProcessError, Refusal};
pub use outlive_linux::ptrace::release_stragglers;
pub use restore::lazy::{Lazy, Served, Source};
pub use restore::{FilesPolicy, Launched, Ready, RestoreOptions, Restored, restore};
pub use strategy::{Granularity, Strategy};
pub use track::{Stopped, TrackOptions, Tracked, Tracking};
