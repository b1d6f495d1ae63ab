//! The contents of mapped files, put back last.

use super::MAX_FILE;
use crate::ProcessError;
use outlive_epoch::PAGE_SIZE;
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// A mapped file with the contents that it is to have. Nothing is written before
/// [`FileContents::apply`].
#[derive(Debug)]
pub struct FileContents {
    file: File,
    size: u64,
    pages: HashMap<u64, Vec<u8>>,
}

impl FileContents {
    /// A file that is to be all zero, as yet.
    pub fn new(file: File, size: u64) -> Result<Self, ProcessError> {
        if size > MAX_FILE {
            return Err(ProcessError::Image(format!(
                "a mapped file of {size} bytes"
            )));
        }
        Ok(Self {
            file,
            size,
            pages: HashMap::new(),
        })
    }

    /// Notes contents, whole pages from this offset on.
    pub fn note(&mut self, at: u64, bytes: &[u8]) {
        for (i, page) in bytes.chunks(PAGE_SIZE).enumerate() {
            let index = at / PAGE_SIZE as u64 + i as u64;
            if index * (PAGE_SIZE as u64) < self.size {
                self.pages.insert(index, page.to_vec());
            }
        }
    }

    /// Gives the file its contents; what is right already is not written.
    pub fn apply(&self) -> std::io::Result<()> {
        self.file.set_len(self.size)?;
        let (zeros, mut now) = ([0u8; PAGE_SIZE], [0u8; PAGE_SIZE]);
        for at in (0..self.size).step_by(PAGE_SIZE) {
            let len = PAGE_SIZE.min((self.size - at) as usize);
            let wanted = self
                .pages
                .get(&(at / PAGE_SIZE as u64))
                .map_or(&zeros[..], Vec::as_slice);
            self.file.read_exact_at(&mut now[..len], at)?;
            if now[..len] != wanted[..len.min(wanted.len())] {
                self.file
                    .write_all_at(&wanted[..len.min(wanted.len())], at)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create};

    #[test]
    fn a_file_gets_its_contents_back() {
        let mut file = File::from(memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
        file.write_all_at(b"changed since, and longer than it was", 0)
            .unwrap();
        let mut contents = FileContents::new(file.try_clone().unwrap(), 5000).unwrap();
        contents.note(4096, &[7; PAGE_SIZE]);
        contents.apply().unwrap();
        let mut text = Vec::new();
        std::io::Read::read_to_end(&mut file, &mut text).unwrap();
        assert_eq!(text, [[0; 4096].to_vec(), [7; 904].to_vec()].concat());
        assert!(FileContents::new(file, MAX_FILE + 1).is_err());
    }
}
