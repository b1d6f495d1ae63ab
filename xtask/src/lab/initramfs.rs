//! The first file system of a machine in the lab: a shell, Outlive, programs that check themselves,
//! their libraries, the modules for the disk. Written as a `cpio` archive of the "newc" form, which
//! the kernel unpacks (kernel documentation `driver-api/early-userspace/buffer-format.rst`).

use super::kernels::Kernel;
use anyhow::{Context, Result, ensure};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Runs first. It mounts the disk, then does what comes over the second serial line, one command a
/// line, and says how each ended.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin OUTLIVE_STORE=/disk/store
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
for module in $(cat /modules/order); do insmod /modules/$module; done
for kind in ext4 xfs btrfs; do
    mount -t $kind /dev/vda /disk 2>/dev/null && break
done
exec </dev/ttyS1 >/dev/ttyS1 2>&1
stty -echo -icrnl -onlcr
echo "lab ready"
while IFS= read -r line; do
    eval "$line"
    echo "lab done $?"
done
poweroff -f
"#;

/// An archive being written.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    fn entry(&mut self, name: &str, mode: u32, contents: &[u8]) {
        self.inode += 1;
        let length = contents.len() as u32;
        let fields = [
            self.inode,
            mode,
            0,
            0,
            1,
            0,
            length,
            0,
            0,
            0,
            0,
            name.len() as u32 + 1,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(contents);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn folder(&mut self, name: &str) {
        self.entry(name, 0o040_755, &[]);
    }

    fn program(&mut self, name: &str, contents: &[u8]) {
        self.entry(name, 0o100_755, contents);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

/// Programs that go into every machine, with their libraries.
pub struct Programs {
    files: Vec<(String, Vec<u8>)>,
}

impl Programs {
    /// Collects a shell, and these. `folder` is for what is made on the way.
    pub fn collect(folder: &Path, programs: &[PathBuf]) -> Result<Self> {
        let mut files = Vec::new();
        let busybox = crate::tools::find("busybox").context("there is no busybox")?;
        files.push(("bin/busybox".to_owned(), fs::read(busybox)?));
        let mut libraries: Vec<PathBuf> = Vec::new();
        for program in programs {
            let name = program.file_name().context("a program without a name")?;
            let stripped = folder.join(name);
            let status = Command::new("strip")
                .arg("-o")
                .arg(&stripped)
                .arg(program)
                .status();
            ensure!(status.is_ok_and(|s| s.success()), "strip failed");
            files.push((format!("bin/{}", name.display()), fs::read(&stripped)?));
            for library in libraries_of(program)? {
                if !libraries.contains(&library) {
                    libraries.push(library);
                }
            }
        }
        for library in libraries {
            let name = library.to_string_lossy();
            let contents = fs::read(&library).with_context(|| format!("cannot read {name}"))?;
            files.push((name.trim_start_matches('/').to_owned(), contents));
        }
        Ok(Self { files })
    }

    /// The archive for one kernel.
    pub fn archive(&self, kernel: &Kernel) -> Result<Vec<u8>> {
        let mut archive = Archive::default();
        for folder in ["bin", "dev", "disk", "modules", "proc", "sys", "tmp"] {
            archive.folder(folder);
        }
        let mut made: Vec<PathBuf> = Vec::new();
        for (name, contents) in &self.files {
            let mut parents: Vec<&Path> = Path::new(name).ancestors().skip(1).collect();
            parents.reverse();
            for parent in parents.into_iter().filter(|p| !p.as_os_str().is_empty()) {
                if !made.contains(&parent.to_owned()) {
                    archive.folder(&parent.to_string_lossy());
                    made.push(parent.to_owned());
                }
            }
            archive.program(name, contents);
        }
        let mut order = String::new();
        for module in &kernel.modules {
            let name = module.file_name().unwrap_or_default().to_string_lossy();
            archive.program(&format!("modules/{name}"), &fs::read(module)?);
            order += &format!("{name}\n");
        }
        archive.program("modules/order", order.as_bytes());
        archive.program("init", INIT.as_bytes());
        Ok(archive.finish())
    }
}

/// The libraries and the loader of a program, as the loader itself finds them.
fn libraries_of(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd")
        .arg(program)
        .output()
        .context("cannot start ldd")?;
    Ok(libraries_in(&String::from_utf8_lossy(&output.stdout)))
}

fn libraries_in(text: &str) -> Vec<PathBuf> {
    let of = |line: &str| {
        let words = line.split_whitespace();
        words
            .into_iter()
            .find(|w| w.starts_with('/'))
            .map(PathBuf::from)
    };
    text.lines().filter_map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_found_in_what_the_loader_says() {
        let text = "\tlinux-vdso.so.1 (0x00007)\n\tlibc.so.6 => /lib/x/libc.so.6 (0x7f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x7)\n";
        let wanted = ["/lib/x/libc.so.6", "/lib64/ld-linux-x86-64.so.2"];
        assert_eq!(libraries_in(text), wanted.map(PathBuf::from));
    }

    #[test]
    fn an_archive_is_aligned_and_ends_with_its_trailer() {
        let mut archive = Archive::default();
        archive.folder("bin");
        archive.program("bin/x", b"abcde");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        assert!(bytes.starts_with(b"07070100000001000041ed"));
        let trailer = bytes.windows(10).rposition(|w| w == b"TRAILER!!!");
        assert!(trailer.is_some_and(|at| at + 16 >= bytes.len()));
        let second = bytes[6..].windows(6).position(|w| w == b"070701").unwrap() + 6;
        assert_eq!(second % 4, 0);
        assert_eq!(&bytes[second + 54..second + 62], b"00000005");
    }
}
