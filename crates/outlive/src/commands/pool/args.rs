//! The words of `outlive pool`.

use crate::cli::parse_bytes;
use clap::{Args, Subcommand};
use std::path::PathBuf;

/// Pools.
#[derive(Debug, Subcommand)]
pub enum PoolCommand {
    /// Show which non-volatile memory this host has: what its firmware and kernel say, and its devices
    Devices(DevicesArgs),
    /// Make a pool in a new file, or of a block device, a DAX device or a file that is there
    Create(CreateArgs),
    /// Show owners, extents and what is free; the pool stays as it is
    Status(PoolPath),
    /// Give an owner an extent, all zeros
    Allocate(AllocateArgs),
    /// Take an extent, or an owner with all its extents, back; its pages are zeroed
    Release(ReleaseArgs),
    /// Write the contents of an owner that does not run to its file, and take its pages back
    PageOut(PageOutArgs),
    /// Bring an owner's contents back from its file, and note who uses them
    Start(StartArgs),
    /// Note that nobody uses an owner's contents
    Stop(OwnerArgs),
    /// Read the tables of a pool and check every line; exit code 4 if anything is lost
    Verify(VerifyArgs),
    /// Show who has what, as text or as a drawing
    Map(MapArgs),
}

/// A pool.
#[derive(Debug, Args)]
pub struct PoolPath {
    /// The file or device
    pub pool: PathBuf,
}

/// `outlive pool devices`
#[derive(Debug, Args)]
pub struct DevicesArgs {
    /// A vendor's type of non-volatile memory in the firmware's table, such as 90; may be repeated
    #[arg(long, value_name = "N")]
    pub e820_type: Vec<u32>,
}

/// `outlive pool create`
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// The file or device
    pub pool: PathBuf,
    /// Size of the new file
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub size: Option<u64>,
    /// Make a new pool even where there is one, or anything else that is not zeros, which is lost
    #[arg(long)]
    pub force: bool,
}

/// `outlive pool allocate`
#[derive(Debug, Args)]
pub struct AllocateArgs {
    /// The file or device
    pub pool: PathBuf,
    /// For whom; an owner that is not known yet becomes one
    #[arg(long)]
    pub owner: String,
    /// How much, in multiples of 4 KiB
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub size: u64,
    /// Promise it now, and give pages when they are written
    #[arg(long)]
    pub thin: bool,
    /// All pages before this place of the medium
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub below: Option<u64>,
    /// From now on the most that all extents of the owner may have
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub quota: Option<u64>,
    /// From now on where the owner's contents go when it is paged out
    #[arg(long)]
    pub file: Option<PathBuf>,
}

/// `outlive pool release`
#[derive(Debug, Args)]
pub struct ReleaseArgs {
    /// The file or device
    pub pool: PathBuf,
    /// The extent
    #[arg(
        long,
        value_name = "N",
        conflicts_with = "owner",
        required_unless_present = "owner"
    )]
    pub extent: Option<u64>,
    /// The owner, with all its extents
    #[arg(long)]
    pub owner: Option<String>,
}

/// An owner of a pool.
#[derive(Debug, Args)]
pub struct OwnerArgs {
    /// The file or device
    pub pool: PathBuf,
    /// The owner
    pub owner: String,
}

/// `outlive pool page-out`
#[derive(Debug, Args)]
pub struct PageOutArgs {
    /// The file or device
    pub pool: PathBuf,
    /// The owner
    #[arg(required_unless_present = "orphans", conflicts_with = "orphans")]
    pub owner: Option<String>,
    /// All owners that are noted as running and are not, as after a power cut
    #[arg(long)]
    pub orphans: bool,
}

/// `outlive pool start`
#[derive(Debug, Args)]
pub struct StartArgs {
    /// The file or device
    pub pool: PathBuf,
    /// The owner
    pub owner: String,
    /// The process that uses the contents
    #[arg(long)]
    pub pid: Option<u32>,
}

/// `outlive pool verify`
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// The file or device
    pub pool: PathBuf,
    /// Read all free pages, too, and see whether those are zeros that should be
    #[arg(long)]
    pub free: bool,
}

/// `outlive pool map`
#[derive(Debug, Args)]
pub struct MapArgs {
    /// The file or device
    pub pool: PathBuf,
    /// Write a drawing there instead
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
}
