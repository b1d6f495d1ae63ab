//! The contents of files, compared as they are read from the epoch, and put back last.

use super::MAX_FILE;
use crate::ProcessError;
use outlive_epoch::PAGE_SIZE;
use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// A file with the contents that it is to have. Nothing is written before [`FileContents::apply`].
#[derive(Debug)]
pub struct FileContents {
    file: File,
    size: u64,
    /// Pages that were compared.
    seen: HashSet<u64>,
    /// Those that the file must get.
    wrong: BTreeMap<u64, Vec<u8>>,
    overwritten: bool,
}

/// How a file differs from the contents that it is to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Its length, bytes.
    pub length: u64,
    /// Some byte that it has is another one, one before the recorded end.
    pub overwritten: bool,
    /// Some byte before the recorded end is another one or is not there.
    pub incomplete: bool,
}

impl FileContents {
    /// A file that is to be all zero, as yet.
    pub fn new(file: File, size: u64) -> Result<Self, ProcessError> {
        if size > MAX_FILE {
            return Err(ProcessError::Image(format!(
                "contents of a file of {size} bytes"
            )));
        }
        Ok(Self {
            file,
            size,
            seen: HashSet::new(),
            wrong: BTreeMap::new(),
            overwritten: false,
        })
    }

    /// Notes contents, whole pages from this offset on.
    pub fn note(&mut self, at: u64, bytes: &[u8]) -> std::io::Result<()> {
        for (i, page) in bytes.chunks(PAGE_SIZE).enumerate() {
            let index = at / PAGE_SIZE as u64 + i as u64;
            if index.saturating_mul(PAGE_SIZE as u64) < self.size && self.seen.insert(index) {
                self.compare(index, page)?;
            }
        }
        Ok(())
    }

    fn compare(&mut self, index: u64, page: &[u8]) -> std::io::Result<()> {
        let at = index * PAGE_SIZE as u64;
        let wanted = &page[..page.len().min((self.size - at) as usize)];
        let mut now = [0; PAGE_SIZE];
        let there = read(&self.file, &mut now[..wanted.len()], at)?;
        self.overwritten |= now[..there] != wanted[..there];
        if now[..wanted.len()] != *wanted {
            self.wrong.insert(index, wanted.to_vec());
        }
        Ok(())
    }

    /// How the file differs, all contents being noted.
    pub fn difference(&mut self) -> std::io::Result<Difference> {
        for index in 0..self.size.div_ceil(PAGE_SIZE as u64) {
            if self.seen.insert(index) {
                self.compare(index, &[0; PAGE_SIZE])?;
            }
        }
        let length = self.file.metadata()?.len();
        Ok(Difference {
            length,
            overwritten: self.overwritten,
            incomplete: length < self.size || !self.wrong.is_empty(),
        })
    }

    /// Gives the file its contents; what is right already is not written.
    pub fn apply(&mut self) -> std::io::Result<()> {
        self.difference()?;
        self.file.set_len(self.size)?;
        for (index, bytes) in &self.wrong {
            self.file.write_all_at(bytes, index * PAGE_SIZE as u64)?;
        }
        Ok(())
    }
}

/// Reads as far as the file goes; returns how far that was.
fn read(file: &File, buffer: &mut [u8], at: u64) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], at + filled as u64) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create};

    fn file(bytes: &[u8]) -> File {
        let file = File::from(memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
        file.write_all_at(bytes, 0).unwrap();
        file
    }

    fn all(mut file: File) -> Vec<u8> {
        let mut text = Vec::new();
        std::io::Read::read_to_end(&mut file, &mut text).unwrap();
        text
    }

    #[test]
    fn a_file_gets_its_contents_back() {
        let file = file(b"changed since, and longer than it was");
        let mut contents = FileContents::new(file.try_clone().unwrap(), 5000).unwrap();
        contents.note(4096, &[7; PAGE_SIZE]).unwrap();
        contents.apply().unwrap();
        let wanted = [[0; 4096].to_vec(), [7; 904].to_vec()].concat();
        assert_eq!(all(file.try_clone().unwrap()), wanted);
        assert!(FileContents::new(file, MAX_FILE + 1).is_err());
    }

    #[test]
    fn differences_are_told_apart() {
        let wanted = [vec![1; 4096], vec![2; 904]].concat();
        let judge = |now: &[u8]| {
            let now = file(now);
            let mut contents = FileContents::new(now.try_clone().unwrap(), 5000).unwrap();
            let whole = [&wanted[..], &[0; 3192]].concat();
            contents.note(0, &whole).unwrap();
            let found = contents.difference().unwrap();
            contents.apply().unwrap();
            assert_eq!(all(now), wanted);
            (found.length, found.overwritten, found.incomplete)
        };
        assert_eq!(judge(&wanted), (5000, false, false));
        let longer = [&wanted[..], b"more"].concat();
        assert_eq!(judge(&longer), (5004, false, false));
        for shorter in [0, 4000, 4096, 4500] {
            assert_eq!(judge(&wanted[..shorter]), (shorter as u64, false, true));
        }
        for at in [0, 4095, 4096, 4999] {
            let mut other = longer.clone();
            other[at] = 9;
            assert_eq!(judge(&other), (5004, true, true));
            assert_eq!(judge(&other[..=at]), (at as u64 + 1, true, true));
        }
    }
}
