//! Epochs in persistent memory (an NFIT NVDIMM, as QEMU imitates one): as a block device, and mapped, as
//! a file of a file system that is mounted with `-o dax`.
//!
//! The host keeps the memory in a file: what had reached it stays when QEMU is killed, and so does what
//! a real machine would have lost in the caches of its processor. So this shows that the ways are there and that
//! a machine finds again what another one stored, and nothing about missing flushes.

use super::kernels::Kernel;
use super::machine::{Lab, Machine};
use super::record::Record;
use super::{FULL, begin_on, restored_and_works, work};
use anyhow::{Result, ensure};

/// Has pages for the memory (mode "fsdax"), which mappings of files need, made where there are none
/// (kernel documentation `driver-api/nvdimm/nvdimm.rst`; what `ndctl create-namespace` does).
const WITH_PAGES: &str = "cd /sys/bus/nd && echo namespace0.0 >drivers/nd_pmem/unbind && \
     echo ram >devices/pfn0.0/mode && cat /proc/sys/kernel/random/uuid >devices/pfn0.0/uuid && \
     echo namespace0.0 >devices/pfn0.0/namespace && echo pfn0.0 >drivers/nd_pmem/bind; cd /";
/// Mounts what [`WITH_PAGES`] made.
const MOUNT: &str = "mkdir -p /memory && mount -t ext4 -o dax=always /dev/pmem0 /memory";

/// Runs it under one kernel.
pub fn run(lab: &Lab, kernel: &Kernel) -> Result<()> {
    as_device(lab, kernel)?;
    mapped(lab, kernel)
}

fn as_device(lab: &Lab, kernel: &Kernel) -> Result<()> {
    lab.new_disk()?;
    let machine = boot(lab, kernel)?;
    begin_on(&machine, "--medium /dev/pmem0")?;
    let mut last = work(&machine, &Record::default())?;
    machine.cut()?;
    let machine = boot(lab, kernel)?;
    ensure!(
        restored_and_works(&machine, &mut last)?,
        "refused under its own kernel"
    );
    println!("lab:   epochs in persistent memory are found again");
    machine.cut()
}

fn mapped(lab: &Lab, kernel: &Kernel) -> Result<()> {
    lab.new_disk()?;
    lab.new_memory()?;
    let machine = boot(lab, kernel)?;
    machine.must(WITH_PAGES)?;
    machine.must("mkfs.ext4 -q -F -b 4096 /dev/pmem0")?;
    machine.must(MOUNT)?;
    machine.must("fallocate -l 96M /memory/epochs")?;
    begin_on(&machine, "--medium /memory/epochs")?;
    let mut last = work(&machine, &Record::default())?;
    direct(&machine)?;
    machine.cut()?;
    let machine = boot(lab, kernel)?;
    machine.must(MOUNT)?;
    ensure!(
        restored_and_works(&machine, &mut last)?,
        "refused under its own kernel"
    );
    direct(&machine)?;
    println!("lab:   epochs in mapped persistent memory (MAP_SYNC) are found again");
    machine.cut()
}

fn boot(lab: &Lab, kernel: &Kernel) -> Result<Machine> {
    let machine = lab.boot_with_memory(kernel, FULL)?;
    ensure!(
        machine.ask("[ -b /dev/pmem0 ]")?.0 == 0,
        "there is no persistent memory"
    );
    Ok(machine)
}

/// The keeper has the file mapped with `MAP_SYNC` (`sf` among the flags, proc_pid_smaps(5)).
fn direct(machine: &Machine) -> Result<()> {
    let flags = "sed -n '/\\/memory\\/epochs/,/VmFlags/p' /proc/[0-9]*/smaps 2>/dev/null";
    let (_, said) = machine.ask(&format!("{flags} | grep VmFlags"))?;
    ensure!(
        !said.trim().is_empty()
            && said
                .lines()
                .all(|l| l.split_whitespace().any(|f| f == "sf")),
        "the memory is not mapped with MAP_SYNC: {said:?}"
    );
    Ok(())
}
