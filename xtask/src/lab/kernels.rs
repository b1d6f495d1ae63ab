//! Kernels of Debian, by the package names of their suites: fetched with `apt-get` into a folder of
//! our own and unpacked there. Nothing is installed.
//!
//! A kernel that was fetched stays in `target/lab`; remove that folder to have newer ones.

use crate::workspace;
use anyhow::{Context, Result, bail, ensure};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// The package that every suite has, and that leads to its kernel for virtual machines.
const META: &str = "linux-image-cloud-amd64";
const SUFFIX: &str = "-cloud-amd64";
/// The keys of Debian, from the package `debian-archive-keyring`.
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Modules that bring the disk and its file system, in the order in which they are loaded; a kernel may have some of
/// them built in.
const MODULES: [&str; 20] = [
    "virtio",
    "virtio_ring",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
    "crc16",
    "mbcache",
    "jbd2",
    "crc32c_generic",
    "libcrc32c",
    "ext4",
    "xfs",
    "xor",
    "raid6_pq",
    "btrfs",
    "libnvdimm",
    "nd_btt",
    "nd_pmem",
    "nfit",
];

/// A kernel.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The suite that it comes from.
    pub suite: String,
    /// Its release (`uname -r`).
    pub release: String,
    /// The bootable image.
    pub image: PathBuf,
    /// Modules in the order in which they are loaded.
    pub modules: Vec<PathBuf>,
}

/// The kernels of these suites.
pub fn fetch(suites: &[&str]) -> Result<Vec<Kernel>> {
    suites.iter().map(|suite| kernel(suite)).collect()
}

fn kernel(suite: &str) -> Result<Kernel> {
    let folder = workspace::target().join("lab").join(suite);
    if !folder.join("complete").exists() {
        println!("lab: fetching the kernel of {suite}…");
        download(suite, &folder).with_context(|| format!("no kernel of Debian's {suite}"))?;
        fs::write(folder.join("complete"), "")?;
    }
    let contents = folder.join("contents");
    let image = find(&contents, &|name| name.starts_with("vmlinuz"))?
        .with_context(|| format!("no kernel in {}", contents.display()))?;
    let release = release(&contents)?;
    let mut modules = Vec::new();
    for module in MODULES {
        let plain = format!("{module}.ko");
        let packed = format!("{module}.ko.xz");
        match find(&contents, &|name| name == plain || name == packed)? {
            Some(path) => modules.push(unpacked(&path)?),
            None => continue,
        }
    }
    Ok(Kernel {
        suite: suite.to_owned(),
        release,
        image,
        modules,
    })
}

/// The name of the folder of modules.
fn release(contents: &Path) -> Result<String> {
    for place in ["usr/lib/modules", "lib/modules"] {
        if let Ok(mut entries) = fs::read_dir(contents.join(place))
            && let Some(entry) = entries.next()
        {
            return Ok(entry?.file_name().to_string_lossy().into_owned());
        }
    }
    bail!("no modules in {}", contents.display())
}

fn find(folder: &Path, wanted: &dyn Fn(&str) -> bool) -> Result<Option<PathBuf>> {
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            let sort = entry.file_type()?;
            if sort.is_dir() {
                folders.push(entry.path());
            } else if sort.is_file() && wanted(&entry.file_name().to_string_lossy()) {
                return Ok(Some(entry.path()));
            }
        }
    }
    Ok(None)
}

fn unpacked(module: &Path) -> Result<PathBuf> {
    if module.extension().is_some_and(|e| e == "xz") {
        succeed(Command::new("xz").arg("--decompress").arg(module))?;
    }
    Ok(match module.to_string_lossy().strip_suffix(".xz") {
        Some(plain) => plain.into(),
        None => module.to_owned(),
    })
}

fn download(suite: &str, folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder)?;
    }
    for inner in [
        "lists/partial",
        "cache/archives/partial",
        "packages",
        "contents",
    ] {
        fs::create_dir_all(folder.join(inner))?;
    }
    ensure!(Path::new(KEYS).exists(), "{KEYS} is not there");
    let source = format!("deb [signed-by={KEYS}] {} {suite} main\n", mirror()?);
    fs::write(folder.join("sources.list"), source)?;
    succeed(apt("apt-get", folder).args(["-q", "update"]))?;
    let mut packages = vec![META.to_owned()];
    let mut at = 0;
    while let Some(package) = packages.get(at).cloned() {
        for name in depends(folder, &package)? {
            if name.starts_with("linux-") && name.ends_with(SUFFIX) && !packages.contains(&name) {
                packages.push(name);
            }
        }
        at += 1;
    }
    // Those that only lead to others have no version in their names.
    packages.retain(|name| name.contains(|c: char| c.is_ascii_digit() && !"64".contains(c)));
    ensure!(!packages.is_empty(), "{META} leads to no kernel");
    let mut get = apt("apt-get", folder);
    get.current_dir(folder.join("packages"));
    succeed(get.args(["-q", "download"]).args(&packages))?;
    for package in fs::read_dir(folder.join("packages"))? {
        let mut unpack = Command::new("dpkg-deb");
        unpack.arg("--extract").arg(package?.path());
        succeed(unpack.arg(folder.join("contents")))?;
    }
    for inner in ["packages", "lists", "cache"] {
        fs::remove_dir_all(folder.join(inner))?;
    }
    Ok(())
}

/// What a package depends on.
fn depends(folder: &Path, package: &str) -> Result<Vec<String>> {
    let output = apt("apt-cache", folder)
        .args(["depends", package])
        .output()
        .context("cannot start apt-cache")?;
    ensure!(output.status.success(), "apt-cache knows no {package}");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let names = text.lines().filter_map(|line| {
        line.trim_start_matches([' ', '|'])
            .strip_prefix("Depends: ")
    });
    Ok(names.map(str::to_owned).collect())
}

/// An apt program that knows nothing of this system's packages and leaves them alone.
fn apt(program: &str, folder: &Path) -> Command {
    let mut command = Command::new(program);
    let mut set = |name: &str, value: &str| {
        command.arg("-o").arg(format!("{name}={value}"));
    };
    let inner = |name: &str| folder.join(name).to_string_lossy().into_owned();
    set("Dir::Etc::SourceList", &inner("sources.list"));
    set("Dir::Etc::SourceParts", "/dev/null");
    set("Dir::State::Lists", &inner("lists"));
    set("Dir::Cache", &inner("cache"));
    set("Acquire::Languages", "none");
    set("APT::Sandbox::User", "root");
    set("APT::Architecture", "amd64");
    command.env("LC_ALL", "C");
    command
}

/// The mirror of Debian that this system uses.
fn mirror() -> Result<String> {
    let output = Command::new("apt-get")
        .args([
            "indextargets",
            "--format",
            "$(ORIGIN) $(CODENAME) $(REPO_URI)",
        ])
        .output()
        .context("cannot start apt-get; the lab needs a Debian system")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    mirror_in(&text).context("this system's packages do not come from Debian")
}

fn mirror_in(targets: &str) -> Option<String> {
    let mut lines = targets.lines().filter_map(|line| {
        let (codename, address) = line.strip_prefix("Debian ")?.split_once(' ')?;
        (!codename.contains('-')).then(|| address.to_owned())
    });
    lines.next()
}

fn succeed(command: &mut Command) -> Result<()> {
    let output = command
        .output()
        .with_context(|| format!("cannot start {}", command.get_program().display()))?;
    if !output.status.success() {
        bail!(
            "{command:?}: {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_the_one_of_the_suite_itself() {
        let targets = "Debian stable-security http://a/security/\nOther x http://b/\n\
                       Debian stable http://c/debian/\n";
        assert_eq!(mirror_in(targets).as_deref(), Some("http://c/debian/"));
        assert_eq!(mirror_in("Other stable http://b/\n"), None);
    }
}
