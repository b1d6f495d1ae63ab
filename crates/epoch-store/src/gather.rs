//! Pages that wait until there are enough of them to be packed together.
//!
//! # Rules
//! - Order is kept: what is said of other pages meanwhile (they are zero, or absent) is said behind the pages that
//!   came before, since later words win over earlier ones.
//! - Pages wait only within one epoch: a commit stores what is left.

use crate::format::Kind;
use crate::index::{Cluster, Says};
use crate::pack::{Codec, MOST};
use crate::planted::bug;
use crate::stripe::Layout;
use crate::writer::Writer;
use outlive_epoch::{PAGE_SIZE, Run, StoreError};

/// Pages that wait, and what was said of others since.
#[derive(Default)]
pub(crate) struct Gathered {
    /// In the order in which they came; without words: pages that wait.
    parts: Vec<(Run, Option<Says>)>,
    /// The bytes of those.
    bytes: Vec<u8>,
}

impl Gathered {
    fn pages(&self) -> u64 {
        (self.bytes.len() / PAGE_SIZE) as u64
    }
}

/// `count` pages of a run, from the `from`-th on.
fn part(run: Run, from: u64, count: u64) -> Result<Run, StoreError> {
    let part = Run::new(run.space(), run.first() + from, count);
    part.ok_or_else(|| StoreError::Misuse("an empty run".to_owned()))
}

impl Writer<'_> {
    /// Says something of pages that have no bytes.
    pub(crate) fn say(&mut self, run: Run, says: Says) {
        if self.gathered.bytes.is_empty() || bug("said before what came before") {
            self.index.push(run, says);
        } else {
            self.gathered.parts.push((run, Some(says)));
        }
    }

    /// Takes pages of which none is zero.
    pub(crate) fn take_pages(&mut self, run: Run, bytes: &[u8]) -> Result<(), StoreError> {
        if !self.packs() {
            self.settle_gathered()?;
            return self.store_pages(run, bytes);
        }
        let mut done = 0;
        while done < run.count() {
            let left = run.count() - done;
            let from = done as usize * PAGE_SIZE;
            let waiting = self.gathered.pages();
            let packer = self.store.packer.as_mut().filter(|_| waiting == 0);
            let plain = packer.map_or(0, |packer| packer.unpacked(left));
            if plain > 0 {
                let bytes = &bytes[from..][..plain as usize * PAGE_SIZE];
                self.store_pages(part(run, done, plain)?, bytes)?;
                done += plain;
                continue;
            }
            let count = left.min(u64::from(MOST) - waiting);
            let next = part(run, done, count)?;
            let bytes = &bytes[from..][..count as usize * PAGE_SIZE];
            self.gathered.parts.push((next, None));
            self.gathered.bytes.extend_from_slice(bytes);
            done += count;
            if self.gathered.pages() == u64::from(MOST) {
                self.settle_gathered()?;
            }
        }
        Ok(())
    }

    /// Stores what waits: packed, if that pays.
    pub(crate) fn settle_gathered(&mut self) -> Result<(), StoreError> {
        if self.gathered.bytes.is_empty() {
            return Ok(());
        }
        let mut gathered = std::mem::take(&mut self.gathered);
        let packs = self.packs();
        // It is put back at once: what is stored needs the store.
        let mut packer = self.store.packer.take();
        let room = match bug("cluster over the end of a stripe") {
            true => u64::MAX,
            false => Layout::contiguous(self.index.crcs.len() as u64),
        };
        let packed = packer.as_mut().filter(|_| packs).and_then(|packer| {
            let codec = packer.codec();
            let (blocks, len) = packer.pack(&gathered.bytes, room)?;
            Some((blocks, len, codec))
        });
        let stored = match packed {
            Some((blocks, len, codec)) => self.store_cluster(&gathered, blocks, (len, codec)),
            None => self.store_apart(&gathered),
        };
        self.store.packer = packer;
        gathered.parts.clear();
        gathered.bytes.clear();
        // Its memory is used again.
        self.gathered = gathered;
        stored
    }

    /// Stores pages as they are, each run for itself.
    fn store_apart(&mut self, gathered: &Gathered) -> Result<(), StoreError> {
        let mut bytes = &gathered.bytes[..];
        for (run, says) in &gathered.parts {
            match says {
                Some(says) => self.index.push(*run, *says),
                None => {
                    let (these, rest) = bytes.split_at(run.bytes() as usize);
                    self.store_pages(*run, these)?;
                    bytes = rest;
                }
            }
        }
        Ok(())
    }

    /// Stores pages that are packed into these blocks, of which `len` bytes count.
    fn store_cluster(
        &mut self,
        gathered: &Gathered,
        blocks: &[u8],
        (len, codec): (u32, Codec),
    ) -> Result<(), StoreError> {
        let seed = self.generation.key.of(Kind::Contents, self.id);
        let number = self.index.clusters.len() as u32;
        self.index.clusters.push(Cluster {
            at: self.tail,
            first: self.index.crcs.len() as u64,
            pages: gathered.pages() as u32,
            len,
            codec,
            crc: seed.crc(self.tail, &gathered.bytes),
        });
        let mut skip = 0;
        for (run, says) in &gathered.parts {
            self.index.push(
                *run,
                says.unwrap_or(Says::Packed {
                    cluster: number,
                    skip,
                }),
            );
            if says.is_none() && !bug("place in the cluster not advanced") {
                skip += run.count() as u32;
            }
        }
        self.store_blocks(blocks)
    }
}
