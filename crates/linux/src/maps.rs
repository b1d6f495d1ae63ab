//! The mappings of a process: `/proc/PID/maps` and `/proc/PID/smaps` (`proc_pid_maps(5)`).
//!
//! `maps` alone costs about a tenth of `smaps`, which walks page tables: the flags of mappings are
//! read apart. Whoever reads `maps` again and again has a [`Reader`]: mostly nothing changed.

use crate::Errno;
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::io::{self, Read, Seek};
use std::sync::Arc;

/// One line of `maps`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Address of the first byte.
    pub start: u64,
    /// Address one past the last byte.
    pub end: u64,
    /// `PROT_READ`, `PROT_WRITE`, `PROT_EXEC`.
    pub prot: u32,
    /// `MAP_SHARED` rather than `MAP_PRIVATE`.
    pub shared: bool,
    /// Offset into the file, bytes.
    pub offset: u64,
    /// Device of the file: major, minor.
    pub device: (u32, u32),
    /// Inode of the file, 0 where there is none.
    pub inode: u64,
    /// Path or bracketed name, as the kernel prints it; empty for anonymous memory.
    pub name: Vec<u8>,
}

impl Mapping {
    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Never true: a mapping has at least one page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.end == self.start
    }
}

/// The flags of a mapping that outlast a restore, out of the `VmFlags` of `smaps`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VmFlags(u64);

macro_rules! vm_flags {
    ($($name:ident = $bit:literal, $code:literal, $doc:literal;)*) => {
        impl VmFlags {
            $(#[doc = $doc] pub const $name: Self = Self(1 << $bit);)*
            fn of_code(code: &[u8]) -> Self {
                $(if code == $code { return Self::$name; })*
                Self(0)
            }

            /// The flags as the kernel's two-letter codes.
            #[must_use]
            pub fn codes(self) -> Vec<String> {
                let mut codes = Vec::new();
                $(if self.has(Self::$name) {
                    codes.push(String::from_utf8_lossy($code).into_owned());
                })*
                codes
            }
        }
    };
}

vm_flags! {
    GROWS_DOWN = 0, b"gd", "A stack that grows.";
    LOCKED = 1, b"lo", "`mlock`.";
    SEQUENTIAL = 2, b"sr", "`MADV_SEQUENTIAL`.";
    RANDOM = 3, b"rr", "`MADV_RANDOM`.";
    DONT_COPY = 4, b"dc", "`MADV_DONTFORK`.";
    NO_RESERVE = 5, b"nr", "`MAP_NORESERVE`.";
    HUGETLB = 6, b"ht", "Explicit huge pages.";
    DONT_DUMP = 7, b"dd", "`MADV_DONTDUMP`.";
    HUGEPAGE = 8, b"hg", "`MADV_HUGEPAGE`.";
    NO_HUGEPAGE = 9, b"nh", "`MADV_NOHUGEPAGE`.";
    MERGEABLE = 10, b"mg", "`MADV_MERGEABLE`.";
    WIPE_ON_FORK = 11, b"wf", "`MADV_WIPEONFORK`.";
    IO = 12, b"io", "Device memory.";
    PFN = 13, b"pf", "Page frames without page structures.";
    MISSING = 14, b"um", "Registered with a userfaultfd for missing pages.";
    WRITE_PROTECT = 15, b"uw", "Registered with a userfaultfd for write protection.";
    SEALED = 16, b"sl", "`mseal`.";
    SHADOW_STACK = 17, b"ss", "A shadow stack.";
    SYNC = 18, b"sf", "`MAP_SYNC`.";
    DROPPABLE = 19, b"dp", "`MAP_DROPPABLE`.";
    MAY_WRITE = 21, b"mw", "It may be made writable.";
    SHARED = 23, b"sh", "It was shared through a descriptor that may write.";
    MAY_READ = 22, b"mr", "It may be made readable: true of all that was looked at.";
    LOCKED_ON_FAULT = 24, b"lf", "Locked page by page as it is touched (`MLOCK_ONFAULT`).";
    PROTECTION_KEY = 25, b"pk", "Protected by a key (`pkeys(7)`); no code of the kernel's, which says it in a line of its own.";
    MIXED = 20, b"mm", "Mixed page frames and pages.";
}

impl VmFlags {
    /// Whether all flags of `other` are set.
    #[must_use]
    pub fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Flags from codes; `None` where one is not known.
    #[must_use]
    pub fn from_codes(codes: &[String]) -> Option<Self> {
        codes.iter().try_fold(Self::default(), |all, code| {
            let one = Self::of_code(code.as_bytes());
            (one != Self::default()).then_some(Self(all.0 | one.0))
        })
    }

    /// These flags and those of `other`.
    #[must_use]
    pub fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// These flags without those of `other`.
    #[must_use]
    pub fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

/// The mappings of a process, in address order, without `[vsyscall]`, which every process has.
pub fn read(pid: u32) -> io::Result<Vec<Mapping>> {
    let text = std::fs::read(format!("/proc/{pid}/maps"))?;
    parse(&text)
}

/// Reads the mappings of one address space again and again.
///
/// The file stays open, and stands for the address space that the process had when it was opened: of one
/// that is no more there are no mappings. A text that is byte for byte the last one is not taken apart
/// again.
#[derive(Debug)]
pub struct Reader {
    file: OwnedFd,
    text: Vec<u8>,
    /// The text that was taken apart last, and what it says.
    known: Vec<u8>,
    mappings: Arc<[Mapping]>,
}

impl Reader {
    /// Opens the file.
    pub fn open(pid: u32) -> Result<Self, Errno> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = rustix::fs::open(format!("/proc/{pid}/maps"), flags, Mode::empty())?;
        Ok(Self {
            file,
            text: Vec::new(),
            known: Vec::new(),
            mappings: Arc::new([]),
        })
    }

    /// The mappings, in address order, without `[vsyscall]`: the same value as last time, where nothing
    /// changed.
    pub fn read(&mut self) -> io::Result<Arc<[Mapping]>> {
        /// The kernel gives no more than a page at a time.
        const PAGE: usize = 4096;
        let mut length = 0;
        loop {
            if self.text.len() < length + PAGE {
                self.text.resize((length + PAGE).next_power_of_two(), 0);
            }
            // A gap in what the kernel says would be one in the mappings: it has a place by addresses,
            // so that nothing comes twice, whatever changes meanwhile.
            match rustix::io::pread(&self.file, &mut self.text[length..], length as u64) {
                Ok(0) => break,
                Ok(n) => length += n,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        let text = &self.text[..length];
        if text != self.known {
            self.mappings = parse(text)?.into();
            self.known.clear();
            self.known.extend_from_slice(text);
        }
        Ok(Arc::clone(&self.mappings))
    }
}

/// The mappings of a process with their flags.
pub fn read_with_flags(pid: u32) -> io::Result<Vec<(Mapping, VmFlags)>> {
    let text = std::fs::read(format!("/proc/{pid}/smaps"))?;
    parse_smaps(&text)
}

/// The same, over and over, where there may be no descriptor to be had by then. Of an address space that
/// is no more there are no mappings.
#[derive(Debug)]
pub struct FlagsReader(File);

impl FlagsReader {
    /// Opens the file.
    pub fn open(pid: u32) -> io::Result<Self> {
        File::open(format!("/proc/{pid}/smaps")).map(Self)
    }

    /// The mappings, with their flags.
    pub fn read(&self) -> io::Result<Vec<(Mapping, VmFlags)>> {
        let mut text = Vec::new();
        (&self.0).rewind()?;
        (&self.0).read_to_end(&mut text)?;
        parse_smaps(&text)
    }
}

fn malformed(line: &[u8]) -> io::Error {
    let text = String::from_utf8_lossy(line);
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("unexpected line in maps: {text}"),
    )
}

fn parse(text: &[u8]) -> io::Result<Vec<Mapping>> {
    let mut all = Vec::with_capacity(128);
    for line in text.split(|&b| b == b'\n').filter(|l| !l.is_empty()) {
        let mapping = parse_line(line).ok_or_else(|| malformed(line))?;
        if mapping.name != b"[vsyscall]" {
            all.push(mapping);
        }
    }
    Ok(all)
}

fn parse_smaps(text: &[u8]) -> io::Result<Vec<(Mapping, VmFlags)>> {
    let mut all: Vec<(Mapping, VmFlags)> = Vec::with_capacity(128);
    for line in text.split(|&b| b == b'\n').filter(|l| !l.is_empty()) {
        if let Some(codes) = line.strip_prefix(b"VmFlags:") {
            if let Some((_, flags)) = all.last_mut() {
                for code in codes.split(|&b| b == b' ') {
                    flags.0 |= VmFlags::of_code(code).0;
                }
            }
        } else if let Some(key) = line.strip_prefix(b"ProtectionKey:") {
            if let Some((_, flags)) = all.last_mut()
                && key.trim_ascii() != b"0"
            {
                flags.0 |= VmFlags::PROTECTION_KEY.0;
            }
        } else if !line[0].is_ascii_uppercase() {
            all.push((
                parse_line(line).ok_or_else(|| malformed(line))?,
                VmFlags::default(),
            ));
        }
    }
    all.retain(|(m, _)| m.name != b"[vsyscall]");
    Ok(all)
}

fn parse_line(line: &[u8]) -> Option<Mapping> {
    let mut words = line.splitn(6, |&b| b == b' ');
    let mut range = words.next()?.split(|&b| b == b'-');
    let (start, end) = (hex(range.next()?)?, hex(range.next()?)?);
    let perms = words.next()?;
    let offset = hex(words.next()?)?;
    let mut device = words.next()?.split(|&b| b == b':');
    let device = (hex(device.next()?)? as u32, hex(device.next()?)? as u32);
    let rest = words.next()?;
    let inode = std::str::from_utf8(rest).ok()?.parse().ok()?;
    let name = words.next().unwrap_or_default();
    let name = name
        .iter()
        .position(|&b| b != b' ')
        .map_or(&[][..], |at| &name[at..]);
    if perms.len() != 4 || end <= start {
        return None;
    }
    let bit = |at: usize, c: u8, value: u32| if perms[at] == c { value } else { 0 };
    Some(Mapping {
        start,
        end,
        prot: bit(0, b'r', 1) | bit(1, b'w', 2) | bit(2, b'x', 4),
        shared: perms[3] == b's',
        offset,
        device,
        inode,
        name: unescape(name),
    })
}

fn hex(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || digits.len() > 16 {
        return None;
    }
    digits.iter().try_fold(0u64, |n, &d| {
        Some(n << 4 | u64::from((d as char).to_digit(16)?))
    })
}

/// `maps` writes a newline in a path as `\012`.
fn unescape(name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((&b, tail)) = rest.split_first() {
        if let Some(tail) = rest.strip_prefix(b"\\012") {
            out.push(b'\n');
            rest = tail;
        } else {
            out.push(b);
            rest = tail;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_each_sort_is_understood() {
        let text = b"00400000-00452000 r-xp 00001000 08:02 173521      /usr/bin/a b\\012c\n\
            7ffc27126000-7ffc27147000 rw-p 00000000 00:00 0                          [stack]\n\
            35b1a21000-35b1a22000 rw-s 00000000 00:00 0 \n\
            ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\n";
        let maps = parse(text).unwrap();
        assert_eq!(maps.len(), 3);
        assert_eq!(maps[0].name, b"/usr/bin/a b\nc");
        assert_eq!(
            (maps[0].prot, maps[0].shared, maps[0].inode),
            (5, false, 173_521)
        );
        assert_eq!(maps[0].device, (8, 2));
        assert_eq!(maps[1].name, b"[stack]");
        assert!(maps[2].shared && maps[2].name.is_empty());
    }

    #[test]
    fn flags_are_read_from_smaps() {
        let text = b"1000-2000 rw-p 00000000 00:00 0 \nRss: 4 kB\nVmFlags: rd wr mr gd lo \n";
        let maps = parse_smaps(text).unwrap();
        assert!(maps[0].1.has(VmFlags::GROWS_DOWN) && maps[0].1.has(VmFlags::LOCKED));
        assert!(!maps[0].1.has(VmFlags::SEALED));
        let codes = maps[0].1.codes();
        assert_eq!(codes, ["gd", "lo", "mr"]);
        assert_eq!(VmFlags::from_codes(&codes), Some(maps[0].1));
        assert_eq!(VmFlags::from_codes(&["??".to_owned()]), None);
    }

    #[test]
    fn protection_keys_are_read_from_smaps() {
        let text = b"1000-2000 rw-p 00000000 00:00 0 \nProtectionKey:         3\nVmFlags: rd wr \n\
            2000-3000 rw-p 00000000 00:00 0 \nProtectionKey:         0\nVmFlags: rd wr \n";
        let maps = parse_smaps(text).unwrap();
        let has = |n: usize| maps[n].1.has(VmFlags::PROTECTION_KEY);
        assert!(has(0) && !has(1));
    }

    #[test]
    fn rubbish_is_an_error() {
        for bad in [
            &b"x"[..],
            b"2000-1000 rw-p 0 0:0 0",
            b"1000-2000 rw 0 0:0 0 a",
        ] {
            assert!(parse(bad).is_err());
        }
    }

    #[test]
    fn a_reader_gives_the_same_value_where_nothing_changed_and_none_of_who_has_ended() {
        let mut cat = std::process::Command::new("cat");
        cat.stdin(std::process::Stdio::piped());
        cat.stdout(std::process::Stdio::piped());
        let mut child = cat.spawn().unwrap();
        // It answers once it is loaded, and waits then.
        io::Write::write_all(child.stdin.as_mut().unwrap(), b"x").unwrap();
        io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0]).unwrap();
        let mut reader = Reader::open(child.id()).unwrap();
        let first = reader.read().unwrap();
        assert_eq!(*first, *read(child.id()).unwrap());
        assert!(Arc::ptr_eq(&first, &reader.read().unwrap()));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(reader.read().is_err(), "it has no address space");
    }

    #[test]
    fn a_reader_sees_what_comes_and_what_changes() {
        let mut reader = Reader::open(std::process::id()).unwrap();
        let before = reader.read().unwrap();
        // More than a page of text.
        let areas: Vec<_> = (0..300)
            .map(|n| crate::area::Area::new(4096 * (n + 1)).unwrap())
            .collect();
        let after = reader.read().unwrap();
        assert!(after.len() >= before.len() + areas.len());
        assert!(after.windows(2).all(|two| two[0].end <= two[1].start));
    }

    #[test]
    fn our_own_mappings_are_readable() {
        let pid = std::process::id();
        let maps = read(pid).unwrap();
        assert!(maps.iter().any(|m| m.name == b"[stack]"));
        let flags = read_with_flags(pid).unwrap();
        let reader = FlagsReader::open(pid).unwrap();
        for _ in 0..2 {
            let stack = |all: Vec<(Mapping, VmFlags)>| {
                all.into_iter().find(|(m, _)| m.name == b"[stack]").unwrap()
            };
            assert_eq!(stack(reader.read().unwrap()), stack(flags.clone()));
        }
        let stack = flags.iter().find(|(m, _)| m.name == b"[stack]").unwrap();
        assert!(stack.1.has(VmFlags::GROWS_DOWN));
    }
}
