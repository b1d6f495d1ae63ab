//! Epochs in persistent memory (an NFIT NVDIMM, as QEMU imitates one), as a block device.
//!
//! The host keeps the memory in a file: what had reached it stays when QEMU is killed, and so does what
//! a real machine would have lost in the caches of its processor. So this shows that the way is there and that
//! a machine finds again what another one stored, and nothing about missing flushes.

use super::kernels::Kernel;
use super::machine::Lab;
use super::record::Record;
use super::{FULL, begin_on, restored_and_works, work};
use anyhow::{Result, ensure};

/// Runs it under one kernel.
pub fn run(lab: &Lab, kernel: &Kernel) -> Result<()> {
    lab.new_disk()?;
    let machine = lab.boot_with_memory(kernel, FULL)?;
    ensure!(
        machine.ask("[ -b /dev/pmem0 ]")?.0 == 0,
        "there is no persistent memory"
    );
    begin_on(&machine, "--medium /dev/pmem0")?;
    let mut last = work(&machine, &Record::default())?;
    machine.cut()?;
    let machine = lab.boot_with_memory(kernel, FULL)?;
    ensure!(
        restored_and_works(&machine, &mut last)?,
        "refused under its own kernel"
    );
    println!("lab:   epochs in persistent memory are found again");
    machine.cut()
}
