//! Beside CRIU, under a kernel that has both what Outlive and what CRIU track memory by.
//!
//! `outlive bench stop --only peer --peer criu=PATH` runs in a machine of the lab: a kernel of Debian
//! has soft-dirty bits, without which CRIU cannot dump only what was written after a pre-dump. The
//! machine is imitated, so that its times are those of no hardware; both run in it in alternation, so
//! that their ratios are worth something.

use super::kernels::Kernel;
use super::machine::Lab;
use super::{FULL, boot};
use crate::{tools, workspace};
use anyhow::{Context, Result, ensure};
use clap::Args;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What is asked for.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// CRIU's binary; its libraries go with it into the machine.
    #[arg(long, value_name = "PATH")]
    criu: PathBuf,
    /// Most memory of the program, MiB: 16 and 64 are measured up to that.
    #[arg(long, default_value_t = 64)]
    memory: u32,
    /// How often.
    #[arg(long, default_value_t = 10)]
    runs: u32,
}

/// How long the whole may take.
const PATIENCE: Duration = Duration::from_secs(3600);

/// What goes into the machine: CRIU, and Outlive as it is released.
pub fn programs(options: &Options) -> Result<Vec<PathBuf>> {
    tools::ensure(&["qemu-system-x86_64", "xz", "busybox", "strip", "mkfs.ext4"])?;
    ensure!(
        options.criu.is_file(),
        "{} is no program",
        options.criu.display()
    );
    Ok(vec![workspace::build_outlive()?, options.criu.clone()])
}

/// Runs it, and prints the table.
pub fn run(lab: &Lab, kernel: &Kernel, options: &Options) -> Result<()> {
    lab.new_disk()?;
    let machine = boot(lab, kernel, FULL)?;
    let criu = options.criu.file_name().map(Path::new);
    let criu = criu.context("a program without a name")?.display();
    // CRIU asks what can be frozen, and loads what it lacks by a program that is not there.
    machine.must("mkdir -p /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup; : >/tmp/said")?;
    machine.must(&format!(
        "outlive bench stop --only peer --peer criu=/bin/{criu} --memory {}MiB --runs {} \
         --dir /disk >/tmp/table 2>/tmp/said </dev/null & bench=$!",
        options.memory, options.runs
    ))?;
    machine.wait_for("the measurement", PATIENCE, || {
        let over = machine.ask("[ -d /proc/$bench ]")?.0 != 0;
        Ok(over.then_some(()))
    })?;
    let (status, _) = machine.ask("wait $bench")?;
    let table = machine.must("cat /tmp/table")?;
    ensure!(
        status == 0,
        "it ended with {status}: {table}\n{}",
        machine.must("cat /tmp/said")?
    );
    println!("{table}");
    machine.cut()
}
