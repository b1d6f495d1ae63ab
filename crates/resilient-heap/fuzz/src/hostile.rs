//! A heap whose bytes somebody changed, who may know its code: it is opened, read, written to, scrubbed,
//! opened again, and examined without its types.
//!
//! # What must hold
//! Nothing panics, overflows, or asks for much memory at once; what can be read stays the same over a
//! closing and an opening; text is text and a value is one of its type.
//!
//! # Safety
//! [`Kept`] and [`Counted`] leave all to what they wrap.
#![allow(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "all of this is test code")]

use resilient_heap::memory::{Memory, Volatile};
use resilient_heap::{
    Error, Heap, Options, PBTreeMap, PBox, PHashMap, PRc, PString, PVec, Persist, Snapshot, Tx,
};
use std::alloc::{GlobalAlloc, Layout, System};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

const PAGE: usize = 4096;
const LINE: usize = 64;
/// Data pages of a zone, and pages of half a log.
const ZONE: usize = 16;
const LOG: usize = 4;
/// Where the log and the first zone begin, and how long a zone is, as `docs/heap.md` draws it.
const LOG_AT: usize = 6 * PAGE;
const ZONE_AT: usize = LOG_AT + 2 * LOG * PAGE;
const ZONE_LEN: usize = (ZONE + 1 + 1) * PAGE;
/// What the superblock begins with.
const MAGIC: [u8; 8] = *b"resheap\x01";
/// The memory has room for so many zones.
const ZONES: usize = 3;
/// The most that may be asked for at once.
const MOST: usize = 16 << 20;

/// Remembers the most that was asked for at once.
pub struct Counted;

static LARGEST: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static ALLOCATOR: Counted = Counted;

// SAFETY: all is left to `System`.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller says.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as the caller says.
        unsafe { System.dealloc(at, layout) }
    }
}

#[derive(Persist)]
#[repr(C)]
struct Root<'h> {
    steps: u64,
    names: PVec<'h, PString<'h>>,
    list: Option<PBox<'h, Node<'h>>>,
    shared: PVec<'h, PRc<'h, PString<'h>>>,
    odd: PVec<'h, Odd>,
    map: PHashMap<'h, PString<'h>, u64>,
    deep: PHashMap<'h, u64, PVec<'h, u32>>,
    tree: PBTreeMap<'h, u64, PString<'h>>,
}

#[derive(Persist)]
#[repr(C)]
struct Node<'h> {
    value: u64,
    next: Option<PBox<'h, Node<'h>>>,
}

/// Values of which not all bytes are one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Persist)]
#[repr(C)]
struct Odd {
    letter: char,
    truth: bool,
    colour: Colour,
    pair: [bool; 2],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Persist)]
#[repr(u8)]
enum Colour {
    Red = 1,
    Green = 7,
}

/// Memory that outlives its heap.
#[derive(Clone)]
struct Kept(Arc<Volatile>);

// SAFETY: all is left to `Volatile`.
unsafe impl Memory for Kept {
    fn base(&self) -> NonNull<u8> {
        self.0.base()
    }
    fn len(&self) -> usize {
        self.0.len()
    }
    fn grow(&self, len: usize) -> Result<(), Error> {
        self.0.grow(len)
    }
    fn flush(&self, _: usize, _: usize) {}
    fn fence(&self) -> Result<(), Error> {
        Ok(())
    }
}

impl Kept {
    fn new(bytes: &[u8]) -> Self {
        let memory = Volatile::new(ZONE_AT + ZONES * ZONE_LEN).unwrap();
        memory.grow(bytes.len()).unwrap();
        // SAFETY: it is as long, and new.
        unsafe { memory.store(0, bytes) };
        Self(Arc::new(memory))
    }

    fn bytes(&self) -> Vec<u8> {
        // SAFETY: no heap is open in it.
        unsafe { std::slice::from_raw_parts(self.base().as_ptr(), self.len()) }.to_vec()
    }
}

fn open(memory: &Kept) -> Result<Heap<Root<'static>>, Error> {
    let options = Options::default()
        .zone_pages(ZONE as u64)
        .log_pages(LOG as u64)
        .identity(77);
    options.open(memory.clone(), |_| {
        Ok(Root {
            steps: 0,
            names: PVec::new(),
            list: None,
            shared: PVec::new(),
            odd: PVec::new(),
            map: PHashMap::new(),
            deep: PHashMap::new(),
            tree: PBTreeMap::new(),
        })
    })
}

/// A change that every heap of these types can stand.
fn step<'h>(root: &mut Root<'h>, tx: &Tx<'h>, n: u64) -> Result<(), Error> {
    root.steps = root.steps.wrapping_add(1);
    let name = format!("name {n}");
    match n % 8 {
        0 => root.names.push(tx, PString::new(tx, &name)?)?,
        1 => {
            let next = root.list.take();
            root.list = Some(PBox::new(tx, Node { value: n, next })?);
        }
        2 => {
            let text = PRc::new(tx, PString::new(tx, &name)?)?;
            root.shared.push(tx, text.share(tx))?;
            root.shared.push(tx, text)?;
        }
        3 => {
            root.map.insert(tx, PString::new(tx, &name)?, n)?;
            root.deep.insert(tx, n / 16, PVec::new())?;
            if let Some(numbers) = root.deep.get_mut(tx, &(n / 32))? {
                numbers.extend_from_slice(tx, &[7; 5])?;
            }
        }
        4 => {
            root.tree
                .insert(tx, n * 13 % 64, PString::new(tx, &name)?)?;
        }
        5 => {
            let odd = Odd {
                letter: 'ß',
                truth: n.is_multiple_of(3),
                colour: if n > 40 { Colour::Red } else { Colour::Green },
                pair: [true, false],
            };
            root.odd.push(tx, odd)?;
        }
        6 => {
            root.shared.pop(tx)?;
            root.tree.remove(tx, &(n * 5 % 64))?;
            root.map.remove(tx, &format!("name {}", n - 3))?;
        }
        _ => {
            if let Some(first) = root.list.as_mut() {
                first.get_mut(tx)?.next = None;
            }
            if let Some(name) = root.names.get_mut(tx, 0)? {
                name.push_str(tx, " and more")?;
            }
            root.tree.pop_first(tx)?;
            root.names.swap_remove(tx, 2)?;
        }
    }
    Ok(())
}

/// All that it holds, as text; and that all of it are values.
fn contents<'h>(root: &Root<'h>, s: &Snapshot<'h>) -> Result<String, Error> {
    let mut text = format!("{} steps;", root.steps);
    for name in root.names.as_slice(s)? {
        text += name.as_str(s)?;
    }
    let mut node = root.list.as_ref();
    while let Some(at) = node {
        let at = at.get(s)?;
        text += &format!(" -> {}", at.value);
        node = at.next.as_ref();
    }
    for one in root.shared.as_slice(s)? {
        text += &format!(" {:?}/{}", one.get(s)?.as_str(s)?, one.count(s)?);
    }
    for odd in root.odd.as_slice(s)? {
        let Odd {
            letter,
            truth,
            colour,
            pair,
        } = *odd;
        assert!(char::from_u32(letter as u32).is_some());
        assert!(
            [truth, pair[0], pair[1]]
                .iter()
                .all(|one| u8::from(*one) < 2)
        );
        assert!(matches!(colour as u8, 1 | 7));
        text += &format!(" {odd:?}");
    }
    for row in root.map.iter(s) {
        let (key, value) = row?;
        text += &format!(" {:?}={value}", key.as_str(s)?);
    }
    for row in root.deep.iter(s) {
        let (key, value) = row?;
        text += &format!(" {key}={:?}", value.as_slice(s)?);
    }
    for row in root.tree.iter(s) {
        let (key, value) = row?;
        text += &format!(" {key}={:?}", value.as_str(s)?);
    }
    Ok(text)
}

/// A heap after many changes: as a crash leaves it, and closed.
fn beginnings() -> &'static [Vec<u8>; 2] {
    static MADE: OnceLock<[Vec<u8>; 2]> = OnceLock::new();
    MADE.get_or_init(|| {
        let memory = Kept::new(&[]);
        let mut heap = open(&memory).unwrap();
        for n in 0..90 {
            heap.write(|root, tx| step(root, tx, n)).unwrap();
        }
        let crashed = memory.bytes();
        heap.close().unwrap();
        let closed = memory.bytes();
        // Whoever forges well changes nothing where nothing is to be changed.
        let mut sealed = closed.clone();
        seal_zones(&mut sealed);
        seal_superblocks(&mut sealed);
        assert!(sealed == closed, "the code is not what this takes it for");
        let mut sealed = crashed.clone();
        seal_log(&mut sealed);
        assert!(sealed == crashed, "the log is not what this takes it for");
        [crashed, closed]
    })
}

/// What somebody does to the bytes.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    /// A place that is a multiple of 4.
    fn place(&mut self, len: usize) -> Option<usize> {
        let n = usize::from(self.byte()?) | usize::from(self.byte()?) << 8;
        Some(n * 4 % len.saturating_sub(8).max(1) / 4 * 4)
    }
}

fn store(bytes: &mut [u8], at: usize, new: &[u8]) {
    if let Some(to) = bytes.get_mut(at..at + new.len()) {
        to.copy_from_slice(new);
    }
}

/// Does what `input` says; and makes codes fit, where it says so.
fn forged(input: &[u8]) -> Vec<u8> {
    let mut input = Input(input);
    let how = input.byte().unwrap_or(0);
    let mut bytes = beginnings()[usize::from(how & 1)].clone();
    while let Some(kind) = input.byte() {
        let Some(at) = input.place(bytes.len()) else {
            break;
        };
        match kind % 6 {
            // A bit.
            0 => {
                let n = input.byte().unwrap_or(0);
                if let Some(byte) = bytes.get_mut(at + usize::from(n >> 3 & 3)) {
                    *byte ^= 1 << (n & 7);
                }
            }
            // A byte.
            1 => store(&mut bytes, at, &[input.byte().unwrap_or(0)]),
            // A number, small or huge.
            2 => {
                let n = u32::from(input.byte().unwrap_or(0));
                let n = if kind & 64 == 0 { n } else { n.wrapping_neg() };
                store(&mut bytes, at, &n.to_le_bytes());
            }
            // What is elsewhere: a pointer that is right there.
            3 => {
                let from = input.place(bytes.len()).unwrap_or(0);
                let word: Vec<u8> = bytes.iter().skip(from).take(8).copied().collect();
                store(&mut bytes, at, &word);
            }
            // A pointer.
            4 => {
                let to = input.place(ZONE_LEN).unwrap_or(0) + ZONE_AT;
                store(&mut bytes, at, &(to as u64).to_le_bytes());
            }
            // Zeros, or the end.
            _ if kind & 64 == 0 => store(&mut bytes, at, &[0; 32]),
            _ => bytes.truncate(at),
        }
    }
    if how & 2 != 0 {
        seal_zones(&mut bytes);
    }
    if how & 4 != 0 {
        seal_superblocks(&mut bytes);
    }
    if how & 8 != 0 {
        seal_log(&mut bytes);
    }
    bytes
}

/// CRC-32C without its inversions.
fn crc(bytes: &[u8]) -> u32 {
    static TABLE: OnceLock<[u32; 256]> = OnceLock::new();
    let table = TABLE.get_or_init(|| {
        std::array::from_fn(|n| {
            (0..8).fold(n as u32, |crc, _| {
                crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 }
            })
        })
    });
    bytes.iter().fold(0, |crc, byte| {
        crc >> 8 ^ table[((crc ^ u32::from(*byte)) & 0xff) as usize]
    })
}

fn mix(a: u64, b: u64) -> u64 {
    let mut x = a ^ b.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for factor in [0xbf58_476d_1ce4_e5b9, 0x94d0_49bb_1331_11eb] {
        x = (x ^ x >> 30).wrapping_mul(factor);
    }
    x ^ x >> 31
}

fn seed(heap: u64, place: u64) -> u32 {
    (mix(heap, place) >> 16) as u32
}

fn number(bytes: &[u8], at: usize) -> u64 {
    let found = bytes
        .get(at..at + 8)
        .and_then(|found| found.try_into().ok());
    found.map_or(0, u64::from_le_bytes)
}

/// Ends a line with a word that fits.
fn seal(bytes: &mut [u8], at: usize, seed: u32) {
    if let Some(line) = bytes.get_mut(at..at + LINE) {
        line[60..].fill(0);
        let word = crc(line) ^ seed;
        line[60..].copy_from_slice(&word.to_le_bytes());
    }
}

/// Words and parity of all zones that are there.
fn seal_zones(bytes: &mut [u8]) {
    let id = number(bytes, 8);
    let mut zone = ZONE_AT;
    while zone + ZONE_LEN <= bytes.len() {
        let mut parity = vec![0; PAGE];
        for within in (0..ZONE * PAGE).step_by(LINE) {
            let line = bytes[zone + within..][..LINE].to_vec();
            let word = crc(&line) ^ seed(id, (zone + within) as u64);
            store(
                bytes,
                zone + ZONE * PAGE + within / LINE * 4,
                &word.to_le_bytes(),
            );
            for (sum, byte) in parity[within % PAGE..].iter_mut().zip(&line) {
                *sum ^= byte;
            }
        }
        store(bytes, zone + (ZONE + 1) * PAGE, &parity);
        zone += ZONE_LEN;
    }
}

fn seal_superblocks(bytes: &mut [u8]) {
    for copy in 0..2 {
        seal(
            bytes,
            copy * PAGE,
            seed(u64::from_le_bytes(MAGIC), copy as u64),
        );
    }
}

/// Both halves of the log: what they carry, as long as they say that it is.
fn seal_log(bytes: &mut [u8]) {
    let id = number(bytes, 8);
    for half in 0..2 {
        let mut at = LOG_AT + half * LOG * PAGE;
        let end = at + LOG * PAGE;
        // Record after record, as long as their numbers follow each other, and their end.
        loop {
            let commit = number(bytes, at);
            let len = (number(bytes, at + 8) & u64::from(u32::MAX)) as usize;
            let next = at + (len + 16).div_ceil(60) * LINE;
            if len == 0 || next > end.min(bytes.len()) {
                seal(bytes, at, seed(id, at as u64));
                break;
            }
            let mut stream = bytes[at + 16..at + 60].to_vec();
            for line in (at + LINE..next).step_by(LINE) {
                seal(bytes, line, seed(mix(id, commit), line as u64));
                stream.extend_from_slice(&bytes[line..line + 60]);
            }
            stream.truncate(len);
            let sum = crc(&stream);
            store(bytes, at + 12, &sum.to_le_bytes());
            seal(bytes, at, seed(id, at as u64));
            at = next;
            if at >= end || ![commit, commit.wrapping_add(1)].contains(&number(bytes, at)) {
                break;
            }
        }
    }
}

/// Reads and changes a heap that was opened, and opens it again.
fn use_up(mut heap: Heap<Root<'static>>, memory: &Kept) {
    let _ = heap.read(contents);
    for n in 0..16 {
        let _ = heap.write(|root, tx| step(root, tx, n));
    }
    let _ = heap.scrub();
    let before = heap.read(contents);
    let closed = heap.close();
    if let (Ok(before), Ok(())) = (before, closed) {
        let again = open(memory).and_then(|heap| heap.read(contents));
        assert_eq!(again, Ok(before), "it changed while it was closed");
    }
}

/// Does to a heap what `input` says, and uses it.
pub fn stand(input: &[u8]) {
    let bytes = forged(input);
    LARGEST.store(0, Ordering::Relaxed);
    let memory = Kept::new(&bytes);
    if let Ok(heap) = open(&memory) {
        use_up(heap, &memory);
    }
    if let Ok(report) = resilient_heap::examine(Kept::new(&bytes)) {
        for at in report
            .scrubbed
            .lost
            .iter()
            .chain(&report.scrubbed.corrected)
        {
            assert!(resilient_heap::what_is_at(&report, *at) != "unknown");
        }
    }
    let largest = LARGEST.load(Ordering::Relaxed);
    assert!(largest <= MOST, "{largest} bytes were asked for at once");
}
