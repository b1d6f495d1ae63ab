//! Media that are files in one directory.

use crate::{Access, Directory, FileMedium, Medium, MediumError, lock};
use rustix::fs::{AtFlags, Mode, OFlags};
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A directory of files, locked against other writers while it is open for writing.
///
/// It is held by a descriptor, so that renaming it, or mounting over it, does not lead astray.
#[derive(Debug)]
pub struct FileDirectory {
    path: PathBuf,
    dir: File,
    access: Access,
}

impl FileDirectory {
    /// Makes the directory with mode 0700 where it is missing (and its parents with the usual
    /// mode), makes its name durable, and opens it for writing.
    ///
    /// # Errors
    /// What `mkdir(2)`, `fsync(2)` or [`FileDirectory::open`] say.
    pub fn create(path: &Path) -> Result<Self, MediumError> {
        let fail = |e: io::Error| MediumError::io(path.display().to_string(), "create", 0, 0, e);
        let absolute = std::path::absolute(path).map_err(fail)?;
        let missing: Vec<&Path> = absolute.ancestors().take_while(|p| !p.exists()).collect();
        for (depth, dir) in missing.iter().enumerate().rev() {
            let mut builder = DirBuilder::new();
            if depth == 0 {
                builder.mode(0o700);
            }
            match builder.create(dir) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                other => other.map_err(fail)?,
            }
            if let Some(parent) = dir.parent() {
                File::open(parent)
                    .and_then(|parent| parent.sync_all())
                    .map_err(fail)?;
            }
        }
        Self::open(path, Access::Write)
    }

    /// Opens a directory that exists; for writing, nobody else may have it open so.
    ///
    /// # Errors
    /// [`MediumError::Busy`] with the holder; [`MediumError::Io`].
    pub fn open(path: &Path, access: Access) -> Result<Self, MediumError> {
        let place = path.display().to_string();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|e| MediumError::io(&place, "open", 0, 0, e))?;
        if access == Access::Write {
            lock::exclusive(&place, dir.as_fd())?;
        }
        Ok(Self {
            path: path.to_owned(),
            dir: File::from(dir),
            access,
        })
    }

    fn fail(&self, name: &str, op: &'static str, e: impl Into<io::Error>) -> MediumError {
        MediumError::io(self.path.join(name).display().to_string(), op, 0, 0, e)
    }

    fn writable(&self) -> Result<(), MediumError> {
        match self.access {
            Access::Write => Ok(()),
            Access::Read => Err(MediumError::Misuse {
                place: self.place(),
                what: "the directory was opened for reading only",
            }),
        }
    }
}

impl Directory for FileDirectory {
    fn place(&self) -> String {
        self.path.display().to_string()
    }

    fn list(&self) -> Result<Vec<String>, MediumError> {
        let fail = |e| self.fail("", "list", e);
        let through = format!(
            "/proc/self/fd/{}",
            std::os::fd::AsRawFd::as_raw_fd(&self.dir)
        );
        fs::read_dir(through)
            .map_err(fail)?
            .map(|entry| {
                Ok(entry
                    .map_err(fail)?
                    .file_name()
                    .to_string_lossy()
                    .into_owned())
            })
            .collect()
    }

    fn create(&self, name: &str) -> Result<Arc<dyn Medium>, MediumError> {
        self.writable()?;
        Ok(Arc::new(FileMedium::create_at(
            self.dir.as_fd(),
            &self.path,
            name,
        )?))
    }

    fn open(&self, name: &str, access: Access) -> Result<Arc<dyn Medium>, MediumError> {
        if access == Access::Write {
            self.writable()?;
        }
        Ok(Arc::new(FileMedium::open_at(
            self.dir.as_fd(),
            &self.path,
            name,
            access,
        )?))
    }

    fn rename(&self, from: &str, to: &str) -> Result<(), MediumError> {
        self.writable()?;
        rustix::fs::renameat(&self.dir, from, &self.dir, to).map_err(|e| self.fail(to, "rename", e))
    }

    fn remove(&self, name: &str) -> Result<(), MediumError> {
        self.writable()?;
        rustix::fs::unlinkat(&self.dir, name, AtFlags::empty())
            .map_err(|e| self.fail(name, "remove", e))
    }

    fn sync(&self) -> Result<(), MediumError> {
        self.dir.sync_all().map_err(|e| self.fail("", "fsync", e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_second_writer_is_told_who_holds_the_directory() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("a/b");
        let first = FileDirectory::create(&path).unwrap();
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o700
        );
        match FileDirectory::open(&path, Access::Write) {
            Err(MediumError::Busy { holder, .. }) => {
                assert!(holder.contains(&std::process::id().to_string()), "{holder}");
            }
            other => panic!("{other:?}"),
        }
        FileDirectory::open(&path, Access::Read).unwrap();
        drop(first);
        FileDirectory::open(&path, Access::Write).unwrap();
    }

    #[test]
    fn files_are_private_and_keep_their_bytes() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = FileDirectory::create(&tmp.path().join("s")).unwrap();
        let medium = dir.create("x").unwrap();
        assert!(dir.create("x").is_err());
        medium.write(4096, &[5; 8192]).unwrap();
        medium.flush().unwrap();
        dir.rename("x", "y").unwrap();
        dir.sync().unwrap();
        assert_eq!(dir.list().unwrap(), ["y"]);
        let mode = fs::metadata(tmp.path().join("s/y"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        let mut back = vec![1; 12288];
        dir.open("y", Access::Read)
            .unwrap()
            .read(0, &mut back)
            .unwrap();
        assert!(back[..4096].iter().all(|b| *b == 0) && back[4096..].iter().all(|b| *b == 5));
        dir.remove("y").unwrap();
        assert!(matches!(dir.open("y", Access::Read), Err(e) if e.is_not_found()));
    }
}
