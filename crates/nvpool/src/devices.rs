//! Which non-volatile memory a host has: what its firmware says, what its kernel says, and which devices stand
//! for it.
//!
//! Parsers over the files below a directory that is given (`/` on a real host):
//! - `sys/kernel/boot_params/data`: the E820 table as the firmware gave it, with the numbers of its types
//!   (`Documentation/arch/x86/zero-page.rst`);
//! - `sys/firmware/memmap`: the same with names instead of numbers, where there is no such table;
//! - `proc/iomem`: what the kernel made of it, which `memmap=` on its command line changes;
//! - `sys/bus/nd/devices`, `sys/bus/dax/devices`: namespaces and DAX devices.
//!
//! # Rules
//! - What is missing, unreadable or makes no sense is left out; nothing is guessed from a part of a line.
//! - Types 7 and 12 are non-volatile memory, and so are those whose numbers the caller gives: vendors have used
//!   codes of their own (such as 90). Any other type is shown with its number.

use std::fs;
use std::io::Read;
use std::path::Path;

/// The most that is read of one file, in bytes: a table of the firmware is far smaller.
const MOST: u64 = 1 << 20;

/// Where the E820 table stands in the boot parameters, and how many entries of 20 bytes it has at most.
const ENTRIES: usize = 0x1e8;
const TABLE: usize = 0x2d0;
const MOST_ENTRIES: usize = 128;

/// Who says that there is such memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The firmware.
    Firmware,
    /// The kernel.
    Kernel,
}

/// A range of physical memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Its first byte.
    pub start: u64,
    /// How many bytes.
    pub bytes: u64,
    /// The number of its type, where that is known.
    pub e820: Option<u32>,
    /// What that means.
    pub what: String,
    /// Whether it keeps its contents.
    pub nvram: bool,
    /// Who says so.
    pub source: Source,
    /// The device that stands for it, where there is one.
    pub device: Option<String>,
}

/// A device that a pool can lie on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its path.
    pub path: String,
    /// How many bytes.
    pub bytes: u64,
    /// Its first byte in physical memory, where that is known.
    pub start: Option<u64>,
    /// What the kernel says of it: the mode of a namespace, or the driver of a DAX device.
    pub mode: String,
}

/// What a host has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// What the firmware calls its memory, and what the kernel added, by address.
    pub memory: Vec<Memory>,
    /// The devices, by name.
    pub devices: Vec<Device>,
}

/// What the number of a type means; `None` where nobody says.
#[must_use]
pub fn e820_name(number: u32) -> Option<&'static str> {
    Some(match number {
        1 => "RAM",
        2 => "reserved",
        3 => "ACPI tables",
        4 => "ACPI non-volatile storage",
        5 => "unusable",
        7 => "persistent memory",
        12 => "persistent memory (legacy)",
        0xefff_ffff => "soft reserved",
        _ => return None,
    })
}

/// Looks at the host whose files are below `root`; types with the numbers in `vendor` are non-volatile too.
#[must_use]
pub fn look(root: &Path, vendor: &[u32]) -> Found {
    let devices = devices(root);
    let mut memory = boot_params(&bytes_of(&root.join("sys/kernel/boot_params/data")), vendor);
    if memory.is_empty() {
        memory = memmap(&root.join("sys/firmware/memmap"));
    }
    let iomem = bytes_of(&root.join("proc/iomem"));
    for more in self::iomem(&String::from_utf8_lossy(&iomem)) {
        let known = memory
            .iter()
            .any(|known| known.nvram && overlap(known, more.start, more.bytes));
        if !known {
            memory.push(more);
        }
    }
    memory.sort_by_key(|memory| memory.start);
    for part in memory.iter_mut().filter(|part| part.nvram) {
        let mut over = devices.iter();
        let device = over.find(|device| {
            let start = device.start;
            start.is_some_and(|start| overlap(part, start, device.bytes))
        });
        part.device = device.map(|device| device.path.clone());
    }
    Found { memory, devices }
}

fn overlap(memory: &Memory, start: u64, bytes: u64) -> bool {
    start < memory.start.saturating_add(memory.bytes) && memory.start < start.saturating_add(bytes)
}

fn bytes_of(path: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Ok(file) = fs::File::open(path) {
        // What could be read before an error is as good as what is not there.
        let _ = file.take(MOST).read_to_end(&mut bytes);
    }
    bytes
}

fn text_of(path: &Path) -> Option<String> {
    let bytes = bytes_of(path);
    let text = String::from_utf8(bytes).ok()?;
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}

/// A number as sysfs writes them: decimal, or hexadecimal after `0x`.
fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

/// The E820 table in the kernel's boot parameters.
fn boot_params(bytes: &[u8], vendor: &[u32]) -> Vec<Memory> {
    let count = bytes
        .get(ENTRIES)
        .map_or(0, |count| usize::from(*count))
        .min(MOST_ENTRIES);
    let table = bytes
        .get(TABLE..)
        .unwrap_or_default()
        .chunks_exact(20)
        .take(count);
    table
        .filter_map(|entry| {
            let eight = |at: usize| {
                entry
                    .get(at..at + 8)?
                    .try_into()
                    .ok()
                    .map(u64::from_le_bytes)
            };
            let (start, bytes) = (eight(0)?, eight(8)?);
            let number = u32::from_le_bytes(entry.get(16..20)?.try_into().ok()?);
            let nvram = [7, 12].contains(&number) || vendor.contains(&number);
            let what = match e820_name(number) {
                Some(name) => name.to_owned(),
                None if nvram => format!("non-volatile memory by the vendor's type {number}"),
                None => format!("unknown type {number}"),
            };
            let sound = bytes > 0 && start.checked_add(bytes).is_some();
            sound.then_some(Memory {
                start,
                bytes,
                e820: Some(number),
                what,
                nvram,
                source: Source::Firmware,
                device: None,
            })
        })
        .collect()
}

/// The firmware's map as sysfs shows it.
fn memmap(dir: &Path) -> Vec<Memory> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let field = |name: &str| text_of(&entry.path().join(name));
            let (start, last) = (number(&field("start")?)?, number(&field("end")?)?);
            let what = field("type")?;
            Some(Memory {
                start,
                bytes: last.checked_sub(start)?.checked_add(1)?,
                e820: None,
                nvram: what.starts_with("Persistent Memory"),
                what,
                source: Source::Firmware,
                device: None,
            })
        })
        .collect()
}

/// Persistent memory as the kernel has it now. Without privilege all its addresses read as zeros.
fn iomem(text: &str) -> Vec<Memory> {
    let lines = text.lines().filter(|line| !line.starts_with(' '));
    lines
        .filter_map(|line| {
            let (range, what) = line.split_once(" : ")?;
            let (start, last) = range.trim().split_once('-')?;
            let start = u64::from_str_radix(start, 16).ok()?;
            let last = u64::from_str_radix(last, 16).ok()?;
            let bytes = last.checked_sub(start)?.checked_add(1)?;
            (what.starts_with("Persistent Memory") && last > 0).then(|| Memory {
                start,
                bytes,
                e820: None,
                what: what.to_owned(),
                nvram: true,
                source: Source::Kernel,
                device: None,
            })
        })
        .collect()
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

fn devices(root: &Path) -> Vec<Device> {
    let nd = root.join("sys/bus/nd/devices");
    let mut all = Vec::new();
    for name in names(&nd)
        .iter()
        .filter(|name| name.starts_with("namespace"))
    {
        let own = nd.join(name);
        let field = |dir: &Path, name: &str| text_of(&dir.join(name));
        let bytes = field(&own, "size")
            .and_then(|size| number(&size))
            .unwrap_or(0);
        let start = field(&own, "resource").and_then(|start| number(&start));
        let mode = field(&own, "mode").unwrap_or_else(|| "unknown".to_owned());
        // What claimed the namespace has the disk then.
        let holder = field(&own, "holder").filter(|holder| !holder.contains('/'));
        let places = [Some(own.clone()), holder.map(|holder| nd.join(holder))];
        for disk in places
            .iter()
            .flatten()
            .flat_map(|place| names(&place.join("block")))
        {
            let path = format!("/dev/{disk}");
            all.push(Device {
                path,
                bytes,
                start,
                mode: mode.clone(),
            });
        }
    }
    let dax = root.join("sys/bus/dax/devices");
    for name in names(&dax).iter().filter(|name| name.starts_with("dax")) {
        let own = dax.join(name);
        let field = |name: &str| text_of(&own.join(name)).and_then(|text| number(&text));
        let driver = fs::read_link(own.join("driver")).ok();
        let driver = driver.as_deref().and_then(Path::file_name);
        all.push(Device {
            path: format!("/dev/{name}"),
            bytes: field("size").unwrap_or(0),
            start: field("resource"),
            mode: driver.map_or_else(|| "no driver".to_owned(), |name| name.display().to_string()),
        });
    }
    all
}

impl Memory {
    /// What to do where non-volatile memory has no device.
    #[must_use]
    pub fn remedy(&self) -> Option<String> {
        if !self.nvram || self.device.is_some() {
            return None;
        }
        Some(match self.e820 {
            Some(7) => {
                "its device comes from an NFIT table: load the modules nfit and nd_pmem".to_owned()
            }
            Some(12) | None => "load the modules nd_e820 and nd_pmem".to_owned(),
            Some(_) => format!(
                "boot with memmap={:#x}!{:#x}, which makes it persistent memory of Linux",
                self.bytes, self.start
            ),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn put(root: &Path, name: &str, bytes: impl AsRef<[u8]>) {
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    fn table(entries: &[(u64, u64, u32)]) -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        bytes[ENTRIES] = entries.len() as u8;
        for (slot, (start, len, kind)) in bytes[TABLE..].chunks_exact_mut(20).zip(entries) {
            slot[..8].copy_from_slice(&start.to_le_bytes());
            slot[8..16].copy_from_slice(&len.to_le_bytes());
            slot[16..].copy_from_slice(&kind.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn types_7_and_12_are_named_and_a_vendors_only_where_it_is_given() {
        let dir = tempfile::tempdir().unwrap();
        let entries = [
            (0, 0xa_0000, 1),
            (1 << 32, 1 << 30, 7),
            (2 << 32, 1 << 28, 12),
            (3 << 32, 1 << 20, 90),
        ];
        put(dir.path(), "sys/kernel/boot_params/data", table(&entries));
        let seen = |vendor: &[u32]| -> Vec<(String, bool)> {
            let found = look(dir.path(), vendor).memory.into_iter();
            found.map(|memory| (memory.what, memory.nvram)).collect()
        };
        let plain = [
            ("RAM".to_owned(), false),
            ("persistent memory".to_owned(), true),
            ("persistent memory (legacy)".to_owned(), true),
            ("unknown type 90".to_owned(), false),
        ];
        assert_eq!(seen(&[]), plain);
        let given = seen(&[90]);
        assert_eq!(given[..3], plain[..3]);
        assert_eq!(
            given[3],
            (
                "non-volatile memory by the vendor's type 90".to_owned(),
                true
            )
        );
        let remedies: Vec<Option<String>> = look(dir.path(), &[90])
            .memory
            .iter()
            .map(Memory::remedy)
            .collect();
        assert!(remedies[0].is_none() && remedies[1].as_ref().unwrap().contains("nfit"));
        assert!(remedies[2].as_ref().unwrap().contains("nd_e820"));
        assert!(
            remedies[3]
                .as_ref()
                .unwrap()
                .contains("memmap=0x100000!0x300000000")
        );
    }

    #[test]
    fn devices_stand_for_the_memory_they_lie_in() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        for (n, start, end, what) in [
            (0, "0x0", "0x9ffff", "System RAM"),
            (1, "0x100000000", "0x13fffffff", "Persistent Memory"),
            (2, "0x900000000", "0x9000fffff", "Unknown E820 type"),
        ] {
            let at = format!("sys/firmware/memmap/{n}");
            put(root, &format!("{at}/start"), start);
            put(root, &format!("{at}/end"), format!("{end}\n"));
            put(root, &format!("{at}/type"), what);
        }
        let iomem = "00000000-0009ffff : System RAM\n100000000-13fffffff : Persistent Memory\n  \
            100000000-13fffffff : namespace0.0\n20000000-23ffffff : Persistent Memory (legacy)\n\
            00000000-00000000 : Persistent Memory\nnonsense\n";
        put(root, "proc/iomem", iomem);
        let namespace = "sys/bus/nd/devices/namespace0.0";
        put(root, &format!("{namespace}/size"), "1073741824\n");
        put(root, &format!("{namespace}/resource"), "0x100000000\n");
        put(root, &format!("{namespace}/mode"), "fsdax\n");
        put(root, &format!("{namespace}/holder"), "pfn0.1\n");
        put(root, "sys/bus/nd/devices/pfn0.1/block/pmem0/size", "0");
        put(root, "sys/bus/nd/devices/region0/size", "1073741824\n");
        put(root, "sys/bus/dax/devices/dax1.0/size", "67108864\n");
        put(root, "sys/bus/dax/devices/dax1.0/resource", "0x20000000\n");
        let found = look(root, &[]);
        let device = |path: &str, bytes, start, mode: &str| Device {
            path: path.to_owned(),
            bytes,
            start: Some(start),
            mode: mode.to_owned(),
        };
        assert_eq!(
            found.devices,
            [
                device("/dev/pmem0", 1 << 30, 1 << 32, "fsdax"),
                device("/dev/dax1.0", 64 << 20, 0x2000_0000, "no driver"),
            ]
        );
        let memory: Vec<_> = found
            .memory
            .iter()
            .map(|m| (m.start, m.bytes, m.nvram, m.source, m.device.as_deref()))
            .collect();
        assert_eq!(
            memory,
            [
                (0, 0xa_0000, false, Source::Firmware, None),
                (
                    0x2000_0000,
                    64 << 20,
                    true,
                    Source::Kernel,
                    Some("/dev/dax1.0")
                ),
                (1 << 32, 1 << 30, true, Source::Firmware, Some("/dev/pmem0")),
                (9 << 32, 1 << 20, false, Source::Firmware, None),
            ]
        );
        assert_eq!(found.memory[3].what, "Unknown E820 type");
    }

    #[test]
    fn a_host_without_any_of_it_has_nothing() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(look(dir.path(), &[90]), Found::default());
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_much(bytes in proptest::collection::vec(any::<u8>(), 0..4096), text in ".{0,200}") {
            for memory in boot_params(&bytes, &[90]).iter().chain(&iomem(&text)) {
                prop_assert!(memory.bytes > 0 && memory.start.checked_add(memory.bytes - 1).is_some());
            }
        }
    }
}
