//! The bytes of one simulated medium, in blocks that copies share until they are written: a disk that
//! is tried in a thousand ways is copied a thousand times.

use crate::BLOCK;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, OnceLock};

/// A block, with its hash once somebody asked for it.
#[derive(Clone, Debug)]
struct Block {
    bytes: [u8; BLOCK],
    hash: OnceLock<u64>,
}

/// Bytes beyond the length are zeros.
#[derive(Clone, Debug, Default)]
pub struct Bytes {
    blocks: Vec<Arc<Block>>,
    len: usize,
}

impl Bytes {
    pub fn len(&self) -> usize {
        self.len
    }

    /// Changes the length; what is new holds zeros.
    pub fn resize(&mut self, len: usize) {
        let (count, rest) = (len.div_ceil(BLOCK), len % BLOCK);
        if self.blocks.len() < count {
            let zeros = Arc::new(Block {
                bytes: [0; BLOCK],
                hash: OnceLock::new(),
            });
            self.blocks.resize(count, zeros);
        }
        self.blocks.truncate(count);
        if let Some(last) = self
            .blocks
            .last_mut()
            .filter(|_| rest > 0 && len < self.len)
        {
            block_mut(last)[rest..].fill(0);
        }
        self.len = len;
    }

    /// Writes bytes that lie within the length.
    pub fn put(&mut self, at: usize, bytes: &[u8]) {
        let (mut at, mut left) = (at, bytes);
        while let Some(block) = self.blocks.get_mut(at / BLOCK).filter(|_| !left.is_empty()) {
            let from = at % BLOCK;
            let (now, later) = left.split_at(left.len().min(BLOCK - from));
            if let Some(whole) = now.first_chunk::<BLOCK>() {
                *block = Arc::new(Block {
                    bytes: *whole,
                    hash: OnceLock::new(),
                });
            } else {
                block_mut(block)[from..from + now.len()].copy_from_slice(now);
            }
            (at, left) = (at + now.len(), later);
        }
    }

    /// Reads bytes; `false` where they go beyond the end.
    pub fn read(&self, at: usize, into: &mut [u8]) -> bool {
        let end = at.checked_add(into.len());
        if end.is_none_or(|end| end > self.len) {
            return false;
        }
        let (mut at, mut left) = (at, into);
        while !left.is_empty() {
            let from = at % BLOCK;
            let (now, later) = left.split_at_mut(left.len().min(BLOCK - from));
            let to = from + now.len();
            now.copy_from_slice(&self.blocks[at / BLOCK].bytes[from..to]);
            (at, left) = (at + (to - from), later);
        }
        true
    }

    /// All of them.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut all = vec![0; self.len];
        self.read(0, &mut all);
        all
    }
}

/// The bytes of a block, which becomes one of its own if it is shared.
fn block_mut(block: &mut Arc<Block>) -> &mut [u8; BLOCK] {
    let block = Arc::make_mut(block);
    block.hash = OnceLock::new();
    &mut block.bytes
}

impl From<&[u8]> for Bytes {
    fn from(bytes: &[u8]) -> Self {
        let mut all = Self::default();
        all.resize(bytes.len());
        all.put(0, bytes);
        all
    }
}

/// Of what the bytes are, by the hashes of the blocks, which are made once.
impl Hash for Bytes {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.len.hash(state);
        for block in &self.blocks {
            let hash = block.hash.get_or_init(|| {
                let mut hasher = DefaultHasher::new();
                block.bytes.hash(&mut hasher);
                hasher.finish()
            });
            hash.hash(state);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(bytes: &Bytes) -> u64 {
        let mut hasher = DefaultHasher::new();
        bytes.hash(&mut hasher);
        hasher.finish()
    }

    #[test]
    fn they_are_as_plain_bytes_would_be_and_copies_are_apart() {
        let (mut bytes, mut plain) = (Bytes::default(), Vec::new());
        let mut seed = 1u64;
        let mut next = |n: usize| {
            seed = seed
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (seed >> 33) as usize % n
        };
        for _ in 0..400 {
            let (before, was) = (bytes.clone(), plain.clone());
            if next(3) == 0 {
                let len = next(5 * BLOCK);
                bytes.resize(len);
                plain.resize(len, 0);
            }
            let at = next(plain.len() + 1);
            let part = vec![next(256) as u8; next(plain.len() - at + 1)];
            bytes.put(at, &part);
            plain[at..at + part.len()].copy_from_slice(&part);
            assert!(bytes.to_vec() == plain && bytes.len() == plain.len());
            assert!(before.to_vec() == was);
            assert_eq!(hash(&bytes) == hash(&before), plain == was);
            assert_eq!(hash(&bytes), hash(&Bytes::from(&plain[..])));
            let mut some = vec![0; next(plain.len() + 1)];
            assert!(bytes.read(plain.len() - some.len(), &mut some));
            assert!(some == plain[plain.len() - some.len()..]);
            assert!(!bytes.read(plain.len(), &mut [0]));
        }
    }
}
