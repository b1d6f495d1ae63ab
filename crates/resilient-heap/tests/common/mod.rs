//! A heap with every kind of structure, what it should hold after each step, and memory that simulates
//! caches.
#![allow(dead_code, reason = "each test uses a part")]

use outlive_media::LineMemory;
use resilient_heap::memory::{Memory, Volatile};
use resilient_heap::{
    Error, Heap, Options, PBTreeMap, PBox, PHashMap, PRc, PString, PVec, Persist, Snapshot,
};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

/// Pages of a zone and of half a log, in the heaps of these tests.
pub const ZONE: usize = 16;
pub const LOG: usize = 20;

#[derive(Persist)]
#[repr(C)]
pub struct Root<'h> {
    pub steps: u64,
    pub names: PVec<'h, PString<'h>>,
    pub list: Option<PBox<'h, Node<'h>>>,
    pub shared: PVec<'h, PRc<'h, PString<'h>>>,
    pub large: PVec<'h, PVec<'h, u64>>,
    pub map: PHashMap<'h, PString<'h>, u64>,
    pub tree: PBTreeMap<'h, u64, u32>,
}

#[derive(Persist)]
#[repr(C)]
pub struct Node<'h> {
    pub value: u64,
    pub next: Option<PBox<'h, Node<'h>>>,
}

pub fn options() -> Options {
    Options::default()
        .zone_pages(ZONE as u64)
        .log_pages(LOG as u64)
        .turn_after(16)
        .identity(0x1234_5678)
}

pub fn open(options: Options, memory: impl Memory + 'static) -> Result<Heap<Root<'static>>, Error> {
    options.open(memory, |_| {
        Ok(Root {
            steps: 0,
            names: PVec::new(),
            list: None,
            shared: PVec::new(),
            large: PVec::new(),
            map: PHashMap::new(),
            tree: PBTreeMap::new(),
        })
    })
}

/// How many steps there are.
pub const STEPS: u64 = 9;

/// The step after so many others.
pub fn step(heap: &mut Heap<Root<'static>>, n: u64) -> Result<(), Error> {
    heap.transaction(|outer| {
        let (root, tx) = outer.parts()?;
        root.steps = n + 1;
        match n {
            0 => {
                root.names.push(tx, PString::new(tx, "first")?)?;
                root.names
                    .push(tx, PString::new(tx, &"second ".repeat(12))?)?;
                root.map.insert(tx, PString::new(tx, "a")?, 1)?;
            }
            1 | 2 => {
                let next = root.list.take();
                root.list = Some(PBox::new(tx, Node { value: n, next })?);
            }
            3 => {
                // A tree of two levels, and of one again with step 7.
                for key in 0..16 {
                    root.tree.insert(tx, key * 5 % 16, key as u32)?;
                }
                let text = PRc::new(tx, PString::new(tx, "shared")?)?;
                root.shared.push(tx, text.share(tx))?;
                root.shared.push(tx, text)?;
            }
            // Two growths.
            4 | 5 => {
                let mut large = PVec::new();
                large.reserve(tx, 8180)?;
                large.push(tx, n)?;
                root.large.push(tx, large)?;
            }
            6 => {
                root.names.swap_remove(tx, 0)?;
                root.shared.pop(tx)?;
                let failed: Result<(), Error> = outer.nested(|inner| {
                    let (root, tx) = inner.parts()?;
                    root.names.push(tx, PString::new(tx, "taken back")?)?;
                    tx.abort("on purpose")
                });
                assert!(failed.is_err());
            }
            7 => {
                let first = root.list.as_mut().ok_or(Error::NotAHeap)?.get_mut(tx)?;
                first.next = None;
                root.large.pop(tx)?;
                root.tree.remove(tx, &3)?;
                root.tree.pop_first(tx)?;
                root.map.remove(tx, "a")?;
            }
            _ => {
                root.names.as_mut_slice(tx)?[0].push_str(tx, "and more")?;
                root.map.insert(tx, PString::new(tx, "b")?, 2)?;
            }
        }
        Ok(())
    })
}

/// All that a heap holds, as text.
pub fn contents(heap: &Heap<Root<'static>>) -> Result<String, Error> {
    heap.read(show)
}

pub fn show<'h>(root: &Root<'h>, s: &Snapshot<'h>) -> Result<String, Error> {
    let mut text = format!("{} steps;", root.steps);
    for name in root.names.as_slice(s)? {
        text += &format!(" {:?}", name.as_str(s)?);
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
    for row in root.map.iter(s) {
        let (key, value) = row?;
        text += &format!(" {:?}={value}", key.as_str(s)?);
    }
    for row in root.tree.iter(s) {
        let (key, value) = row?;
        text += &format!(" {key}={value}");
    }
    for large in root.large.as_slice(s)? {
        text += &format!(" {:?}", large.as_slice(s)?);
    }
    Ok(text)
}

/// What a heap holds and has free after each number of steps.
pub fn expected() -> Vec<(String, usize)> {
    let mut heap = open(options(), Volatile::new(4 << 20).unwrap()).unwrap();
    let mut states = vec![(contents(&heap).unwrap(), occupied(&heap))];
    for n in 0..STEPS {
        step(&mut heap, n).unwrap();
        states.push((contents(&heap).unwrap(), occupied(&heap)));
    }
    states
}

/// Bytes that are not free, in all zones (which depend on what happened before).
pub fn occupied(heap: &Heap<Root<'static>>) -> usize {
    ZONE * 4096 - heap.free_bytes() % (ZONE * 4096)
}

/// What the bytes at a place are.
pub fn class(at: usize) -> &'static str {
    let zone_at = (6 + 2 * LOG) * 4096;
    match at / 4096 {
        0 => "superblock A",
        1 => "superblock B",
        2..6 => "schema",
        page if page < 6 + 2 * LOG => {
            if (at - 6 * 4096).is_multiple_of(LOG * 4096) {
                "head of the log"
            } else {
                "entries of the log"
            }
        }
        _ => match (at - zone_at) / 4096 % (ZONE + 2) {
            page if page < ZONE => "data",
            ZONE => "words",
            _ => "parity",
        },
    }
}

/// What is called before each fence, with the memory as it may be lost then.
type Look = Box<dyn FnMut(&LineMemory) + Send>;

/// Memory behind simulated caches, and a bug planted in how it is used.
#[derive(Clone)]
pub struct SimMemory(Arc<Sim>);

pub struct Sim {
    bytes: Volatile,
    lines: Mutex<LineMemory>,
    look: Mutex<Option<Look>>,
    /// Flushes of such places are left out.
    pub without_flush: Option<&'static str>,
    /// This fence is left out.
    pub without_fence: Option<u64>,
    fences: Mutex<u64>,
}

impl SimMemory {
    pub fn new(
        bytes: &[u8],
        without_flush: Option<&'static str>,
        without_fence: Option<u64>,
        look: Option<Look>,
    ) -> Self {
        let memory = volatile(bytes);
        Self(Arc::new(Sim {
            bytes: memory,
            lines: Mutex::new(LineMemory::new(bytes.to_vec())),
            look: Mutex::new(look),
            without_flush,
            without_fence,
            fences: Mutex::new(0),
        }))
    }

    /// Looks at what may be lost now.
    pub fn look(&self) {
        if let Some(look) = self.0.look.lock().unwrap().as_mut() {
            look(&self.0.lines.lock().unwrap());
        }
    }

    pub fn fences(&self) -> u64 {
        *self.0.fences.lock().unwrap()
    }
}

/// Ordinary memory with these bytes.
pub fn volatile(bytes: &[u8]) -> Volatile {
    let memory = Volatile::new(1 << 20).unwrap();
    memory.grow(bytes.len()).unwrap();
    // SAFETY: in bounds, and nobody refers to it.
    #[allow(unsafe_code)]
    unsafe {
        memory.store(0, bytes);
    }
    memory
}

// SAFETY: all is left to `Volatile`, and recorded besides.
#[allow(unsafe_code)]
unsafe impl Memory for SimMemory {
    fn base(&self) -> NonNull<u8> {
        self.0.bytes.base()
    }
    fn len(&self) -> usize {
        self.0.bytes.len()
    }
    fn grow(&self, len: usize) -> Result<(), Error> {
        self.0.bytes.grow(len)?;
        self.0.lines.lock().unwrap().grow(len);
        Ok(())
    }
    unsafe fn store(&self, at: usize, bytes: &[u8]) {
        // SAFETY: as the caller says.
        unsafe { self.0.bytes.store(at, bytes) };
        self.0.lines.lock().unwrap().store(at, bytes);
    }
    fn flush(&self, at: usize, len: usize) {
        let mut lines = self.0.lines.lock().unwrap();
        for line in at / 64..(at + len).div_ceil(64) {
            if Some(class(line * 64)) != self.0.without_flush {
                lines.flush(line * 64, 64);
            }
        }
    }
    fn fence(&self) -> Result<(), Error> {
        self.look();
        let mut fences = self.0.fences.lock().unwrap();
        *fences += 1;
        if Some(*fences) != self.0.without_fence {
            self.0.lines.lock().unwrap().fence();
        }
        Ok(())
    }
}
