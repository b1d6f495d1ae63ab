//! Where the memory that survives is: the firmware's table says so (ACPI, `NFIT`).
//!
//! # Safety
//! Reads where the firmware's tables say that others are, below the first GiB, all of which is mapped.
#![allow(unsafe_code)]

use alloc::string::{String, ToString};

/// The kind of memory that is persistent and plain, as the table writes it.
const PERSISTENT: [u8; 16] = [
    0x79, 0xd3, 0xf0, 0x66, 0xf3, 0xb4, 0x74, 0x40, 0xac, 0x43, 0x0d, 0x33, 0x18, 0xb7, 0x8c, 0xdb,
];

fn bytes<const N: usize>(at: u64) -> Result<[u8; N], String> {
    if at == 0 || at.saturating_add(N as u64) > 1 << 30 {
        return Err("a table of the firmware lies at a strange place".to_string());
    }
    // SAFETY: the first GiB is mapped; beyond the machine's memory its bytes read as anything.
    Ok(unsafe { core::ptr::with_exposed_provenance::<[u8; N]>(at as usize).read_unaligned() })
}

fn number(at: u64) -> Result<u64, String> {
    Ok(u32::from_le_bytes(bytes(at)?).into())
}

fn long(at: u64) -> Result<u64, String> {
    Ok(u64::from_le_bytes(bytes(at)?))
}

/// Its place and length. `info` is what the machine says about itself (PVH).
///
/// # Errors
/// Where there is none.
pub fn find_memory_that_survives(info: u32) -> Result<(u64, u64), String> {
    let info = u64::from(info);
    if number(info)? != 0x336e_c578 {
        return Err("this machine did not start us by PVH".to_string());
    }
    let tables = number(long(info + 32)? + 16)?;
    for entry in (tables + 36..tables + number(tables + 4)?).step_by(4) {
        let table = number(entry)?;
        if &bytes::<4>(table)? == b"NFIT"
            && let Some(found) = find_range(table)?
        {
            return Ok(found);
        }
    }
    Err("this machine has no memory that survives".to_string())
}

fn find_range(table: u64) -> Result<Option<(u64, u64)>, String> {
    let end = table + number(table + 4)?;
    let mut at = table + 40;
    while at + 4 <= end {
        let [kind, len] = [at, at + 2].map(|at| bytes(at).map(u16::from_le_bytes));
        let (kind, len) = (kind?, len?);
        if kind == 0 && bytes::<16>(at + 16)? == PERSISTENT {
            return Ok(Some((long(at + 32)?, long(at + 40)?)));
        }
        at += u64::from(len.max(4));
    }
    Ok(None)
}
