//! The bytes of a stream: a head, and frames of which each has its checksum.
//!
//! # Invariants
//! - The checksum of a frame starts from its number in the stream, so that frames which are
//!   missing, repeated or in another order do not pass.
//! - A frame's length is bounded before anything is allocated for it, and its contents are handed
//!   out only after they passed their checksum.
//! - The last frame holds a BLAKE3 hash of all bytes before it, and nothing comes after it.

use outlive_epoch::{Run, SpaceId, StoreError};
use std::io::{self, ErrorKind, Read, Write};

/// Version of the stream that is written, and the newest that is read.
pub const VERSION: u32 = 1;
/// Most bytes of what is known of a subject besides its epochs.
pub const LARGEST_ABOUT: usize = 4 << 20;
/// Most bytes in a frame.
pub(crate) const LARGEST: usize = LARGEST_ABOUT;
/// Most pages in one frame.
pub(crate) const PAGES: u64 = 256;
/// Most runs in one frame.
pub(crate) const RUNS: usize = 4096;

const MAGIC: &[u8; 8] = b"OUTLIVE\x1a";
/// Magic, version, and the checksum of both.
const HEAD: usize = 16;
/// Kind, length and checksum of a frame.
const FRAME_HEAD: usize = 12;
/// Bytes of a run in a list: first page, number of pages, space.
const RUN: usize = 20;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Kind {
    /// What is known of the subject besides its epochs; the first frame.
    About = 1,
    /// An epoch begins: number, moment, stop time.
    Epoch = 2,
    /// The name of a group and the beginning of its tree.
    Tree = 3,
    /// More of the tree.
    TreeMore = 4,
    /// The name of a group whose tree is as in the epoch before.
    TreeSame = 5,
    /// Runs that are absent.
    Absent = 6,
    /// Runs of zero pages.
    Zero = 7,
    /// A run and its contents.
    Pages = 8,
    /// The epoch is complete: pages with contents, and groups.
    Commit = 9,
    /// The stream is complete: number of epochs, and the hash.
    End = 10,
}

impl Kind {
    fn of(number: u32) -> Option<Self> {
        use Kind::{About, Absent, Commit, End, Epoch, Pages, Tree, TreeMore, TreeSame, Zero};
        let all = [
            About, Epoch, Tree, TreeMore, TreeSame, Absent, Zero, Pages, Commit, End,
        ];
        all.into_iter().find(|kind| *kind as u32 == number)
    }
}

fn checksum(number: u64, kind: u32, bytes: &[u8]) -> u32 {
    let crc = crc32c::crc32c(&number.to_le_bytes());
    let crc = crc32c::crc32c_append(crc, &kind.to_le_bytes());
    crc32c::crc32c_append(crc, bytes)
}

/// Writes a stream.
pub(crate) struct Sender<'a> {
    out: &'a mut dyn Write,
    place: &'a str,
    hash: blake3::Hasher,
    number: u64,
    pub bytes: u64,
}

impl<'a> Sender<'a> {
    /// Begins a stream; `place` is what errors call it.
    pub fn begin(out: &'a mut dyn Write, place: &'a str) -> Result<Self, StoreError> {
        let mut sender = Self {
            out,
            place,
            hash: blake3::Hasher::new(),
            number: 0,
            bytes: 0,
        };
        let mut head = MAGIC.to_vec();
        head.extend_from_slice(&VERSION.to_le_bytes());
        let crc = crc32c::crc32c(&head);
        head.extend_from_slice(&crc.to_le_bytes());
        sender.write(&head)?;
        Ok(sender)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.hash.update(bytes);
        self.bytes += bytes.len() as u64;
        let written = self.out.write_all(bytes);
        written.map_err(|source| failed(self.place, source, bytes.len() as u64))
    }

    /// Writes a frame that consists of two parts.
    pub fn frame(&mut self, kind: Kind, first: &[u8], second: &[u8]) -> Result<(), StoreError> {
        let kind = kind as u32;
        let crc = crc32c::crc32c_append(checksum(self.number, kind, first), second);
        let len = u32::try_from(first.len() + second.len()).ok();
        let len = len.filter(|len| *len as usize <= LARGEST);
        let len = len.ok_or_else(|| StoreError::Misuse("a frame is too long".into()))?;
        let mut head = kind.to_le_bytes().to_vec();
        head.extend_from_slice(&len.to_le_bytes());
        head.extend_from_slice(&crc.to_le_bytes());
        head.extend_from_slice(first);
        self.number += 1;
        self.write(&head)?;
        self.write(second)
    }

    /// Writes runs, in as many frames as it takes.
    pub fn runs(&mut self, kind: Kind, runs: &[Run]) -> Result<(), StoreError> {
        for part in runs.chunks(RUNS) {
            let bytes: Vec<u8> = part.iter().flat_map(encode_run).collect();
            self.frame(kind, &bytes, &[])?;
        }
        Ok(())
    }

    /// Writes pages, in as many frames as it takes.
    pub fn pages(&mut self, run: Run, bytes: &[u8]) -> Result<(), StoreError> {
        let page = outlive_epoch::PAGE_SIZE;
        for (i, part) in bytes.chunks(PAGES as usize * page).enumerate() {
            let first = run.first() + i as u64 * PAGES;
            let here = Run::new(run.space(), first, (part.len() / page) as u64);
            let here = here.ok_or_else(|| StoreError::Misuse("a run of no pages".into()))?;
            self.frame(Kind::Pages, &encode_run(&here), part)?;
        }
        Ok(())
    }

    /// Writes the last frame; gives the length of the whole.
    pub fn end(mut self, epochs: u64) -> Result<u64, StoreError> {
        let hash = self.hash.finalize();
        self.frame(Kind::End, &epochs.to_le_bytes(), hash.as_bytes())?;
        let flushed = self.out.flush();
        flushed.map_err(|source| failed(self.place, source, 0))?;
        Ok(self.bytes)
    }
}

fn failed(place: &str, source: io::Error, needed: u64) -> StoreError {
    let place = place.to_owned();
    match source.kind() {
        ErrorKind::StorageFull => StoreError::Full { place, needed },
        _ => StoreError::Medium { place, source },
    }
}

fn encode_run(run: &Run) -> Vec<u8> {
    let mut out = run.first().to_le_bytes().to_vec();
    out.extend_from_slice(&run.count().to_le_bytes());
    out.extend_from_slice(&run.space().0.to_le_bytes());
    out
}

/// Reads a stream.
pub(crate) struct Receiver<'a> {
    from: &'a mut dyn Read,
    place: &'a str,
    hash: blake3::Hasher,
    number: u64,
    /// Bytes read, and where the frame begins that was read last.
    pub bytes: u64,
    frame_at: u64,
    buffer: Vec<u8>,
}

impl<'a> Receiver<'a> {
    /// Reads the head; `place` is what errors call the stream.
    pub fn begin(from: &'a mut dyn Read, place: &'a str) -> Result<Self, StoreError> {
        let mut receiver = Self {
            from,
            place,
            hash: blake3::Hasher::new(),
            number: 0,
            bytes: 0,
            frame_at: 0,
            buffer: Vec::new(),
        };
        let head: [u8; HEAD] = receiver.array()?;
        let (text, crc) = head.split_at(HEAD - 4);
        if !text.starts_with(MAGIC) {
            return Err(receiver.damaged("this is no export of outlive"));
        }
        if crc32c::crc32c(text).to_le_bytes() != *crc {
            return Err(receiver.damaged("its head does not have its checksum"));
        }
        let found = number(text, MAGIC.len()).unwrap_or(0);
        if found > VERSION {
            return Err(StoreError::Newer {
                place: place.to_owned(),
                found,
                supported: VERSION,
            });
        }
        if found != VERSION {
            return Err(receiver.damaged("its version is 0, which there never was"));
        }
        Ok(receiver)
    }

    /// An error about the frame that was read last.
    pub fn damaged(&self, what: &str) -> StoreError {
        StoreError::Damaged {
            place: format!("{} at offset {}", self.place, self.frame_at),
            what: what.to_owned(),
        }
    }

    /// Fills the buffer with so many bytes, and takes no more memory than there are bytes.
    fn fill(&mut self, len: usize) -> Result<(), StoreError> {
        self.buffer.clear();
        let wanted = len as u64;
        let read = self.from.take(wanted).read_to_end(&mut self.buffer);
        let read = read.map_err(|source| failed(self.place, source, 0))?;
        self.bytes += read as u64;
        if read < len {
            let what = format!(
                "it ends after {} bytes, before it is complete; nothing of it is used",
                self.bytes
            );
            return Err(self.damaged(&what));
        }
        Ok(())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], StoreError> {
        self.fill(N)?;
        self.hash.update(&self.buffer);
        let array = self.buffer.as_slice().try_into();
        array.map_err(|_| self.damaged("it is too short"))
    }

    /// Reads the next frame; its contents are in [`Receiver::contents`].
    pub fn frame(&mut self) -> Result<Kind, StoreError> {
        self.frame_at = self.bytes;
        // What the last frame holds is a hash of all before it.
        let before = self.hash.clone();
        let head: [u8; FRAME_HEAD] = self.array()?;
        let field = |at| number(&head, at).unwrap_or(0);
        let (kind, len, crc) = (field(0), field(4), field(8));
        if len as usize > LARGEST {
            return Err(self.damaged("a frame is longer than any may be"));
        }
        self.fill(len as usize)?;
        self.hash.update(&self.buffer);
        if checksum(self.number, kind, &self.buffer) != crc {
            return Err(self.damaged("a frame does not have its checksum"));
        }
        self.number += 1;
        let known = Kind::of(kind);
        let kind = known.ok_or_else(|| self.damaged("a frame is of no known kind"))?;
        if kind == Kind::End {
            let hash = before.finalize();
            let good = self.buffer.get(8..) == Some(hash.as_bytes().as_slice());
            if !good {
                return Err(self.damaged("the whole does not have its hash"));
            }
        }
        Ok(kind)
    }

    /// The contents of the frame that was read last.
    pub fn contents(&self) -> &[u8] {
        &self.buffer
    }

    /// The number at a place in the contents.
    pub fn u64(&self, at: usize) -> Result<u64, StoreError> {
        let bytes = self.buffer.get(at..at + 8);
        let bytes = bytes.and_then(|bytes| bytes.try_into().ok());
        bytes
            .map(u64::from_le_bytes)
            .ok_or_else(|| self.damaged("a frame is too short"))
    }

    /// The contents as a list of runs.
    pub fn runs(&self) -> Result<Vec<Run>, StoreError> {
        let (runs, rest) = self.buffer.as_chunks::<RUN>();
        let runs: Option<Vec<Run>> = runs.iter().map(decode_run).collect();
        runs.filter(|_| rest.is_empty())
            .ok_or_else(|| self.damaged("a list of runs is not in order"))
    }

    /// The contents as a run with its bytes.
    pub fn pages(&self) -> Result<(Run, &[u8]), StoreError> {
        let parts = self.buffer.split_first_chunk::<RUN>();
        let parts = parts.and_then(|(run, bytes)| Some((decode_run(run)?, bytes)));
        parts
            .filter(|(run, bytes)| run.count() <= PAGES && run.bytes() == bytes.len() as u64)
            .ok_or_else(|| self.damaged("a run of pages is not in order"))
    }

    /// Checks that nothing comes after the last frame.
    pub fn finish(&mut self) -> Result<(), StoreError> {
        self.frame_at = self.bytes;
        self.buffer.clear();
        let read = self.from.take(1).read_to_end(&mut self.buffer);
        match read.map_err(|source| failed(self.place, source, 0))? {
            0 => Ok(()),
            _ => Err(self.damaged("it goes on after its end")),
        }
    }
}

fn decode_run(bytes: &[u8; RUN]) -> Option<Run> {
    let wide = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    Run::new(SpaceId(number(bytes, 16)?), wide(0)?, wide(8)?)
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at + 4)?.try_into().ok()?;
    Some(u32::from_le_bytes(bytes))
}
