//! Fidelity of capture and restore: real programs are stopped, captured, killed and restored, and
//! compared with themselves.
//!
//! Two judges sit here. The programs check themselves at every moment and end loudly when anything
//! is off. And the tests look at the standing program with code of their own ([`view`], [`stand`])
//! before it is killed and after it is restored, and compare everything that can be seen.
//!
//! They need root: tracing alone does not, but process IDs can only be chosen with privilege.
//! `OUTLIVE_LONG=1` does everything many more times.

#![expect(
    clippy::expect_used,
    reason = "a test that finds what it relies on missing has failed"
)]

mod deaths;
mod eintr;
mod kernels;
mod kinds;
mod lazy;
mod limits;
mod path;
mod registers;
mod sharing;
mod stand;
mod store;
mod strategies;
mod streams;
mod strict;
mod support;
mod trees;
mod unharmed;
mod view;
mod zoo;

#[global_allocator]
static COUNTING: path::Counting = path::Counting;
