//! Programs from outside that tests, demo and benchmarks need; installed only where missing.
//!
//! # Rules
//! - By package name through `apt-get`, as root or through `sudo`; package lists are fetched only
//!   where an installation fails without.
//! - A package that brings a service leaves no service running: a server of the system on a
//!   usual port would be mistaken for one of ours.

use crate::cleanup;
use anyhow::{Context, Result, bail};
use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// A library, by the file by which it is found.
pub const SODIUM: &str = "/usr/include/sodium.h";
/// The same of another one.
pub const ZSTD: &str = "/usr/include/zstd.h";

/// Everything that `cargo xtask test` needs, and the package that brings it.
pub const ALL: &[Tool] = &[
    Tool {
        program: "redis-server",
        package: "redis-server",
        service: Some("redis-server"),
    },
    Tool {
        program: "redis-cli",
        package: "redis-tools",
        service: None,
    },
    Tool {
        program: "redis-benchmark",
        package: "redis-tools",
        service: None,
    },
    Tool {
        program: "dtc",
        package: "device-tree-compiler",
        service: None,
    },
    Tool {
        program: "cc",
        package: "gcc",
        service: None,
    },
    Tool {
        program: "c++",
        package: "g++",
        service: None,
    },
    Tool {
        program: "valgrind",
        package: "valgrind",
        service: None,
    },
    Tool {
        program: "nginx",
        package: "nginx-light",
        service: Some("nginx"),
    },
    Tool {
        program: "python3",
        package: "python3",
        service: None,
    },
    Tool {
        program: "bash",
        package: "bash",
        service: None,
    },
    Tool {
        program: "perl",
        package: "perl",
        service: None,
    },
    Tool {
        program: "busybox",
        package: "busybox-static",
        service: None,
    },
    Tool {
        program: "make",
        package: "make",
        service: None,
    },
    Tool {
        program: "node",
        package: "nodejs",
        service: None,
    },
    Tool {
        program: "java",
        package: "default-jdk-headless",
        service: None,
    },
    Tool {
        program: "javac",
        package: "default-jdk-headless",
        service: None,
    },
    Tool {
        program: "memcached",
        package: "memcached",
        service: Some("memcached"),
    },
    Tool {
        program: "nginx",
        package: "nginx",
        service: Some("nginx"),
    },
    Tool {
        program: "qemu-system-x86_64",
        package: "qemu-system-x86",
        service: None,
    },
    Tool {
        program: "mkfs.ext4",
        package: "e2fsprogs",
        service: None,
    },
    Tool {
        program: "mkfs.xfs",
        package: "xfsprogs",
        service: None,
    },
    Tool {
        program: "mkfs.btrfs",
        package: "btrfs-progs",
        service: None,
    },
    Tool {
        program: "sqlite3",
        package: "sqlite3",
        service: None,
    },
    Tool {
        program: "xz",
        package: "xz-utils",
        service: None,
    },
    Tool {
        program: "7zr",
        package: "p7zip",
        service: None,
    },
    Tool {
        program: "strip",
        package: "binutils",
        service: None,
    },
    // What Garage is built with.
    Tool {
        program: "pkg-config",
        package: "pkg-config",
        service: None,
    },
    Tool {
        program: SODIUM,
        package: "libsodium-dev",
        service: None,
    },
    Tool {
        program: ZSTD,
        package: "libzstd-dev",
        service: None,
    },
    // The server itself is in no PATH; this comes with it.
    Tool {
        program: "pg_lsclusters",
        package: "postgresql",
        service: Some("postgresql"),
    },
];

/// One program.
#[derive(Debug)]
pub struct Tool {
    /// How it is called; a path, where it is no program.
    pub program: &'static str,
    /// Which package brings it.
    pub package: &'static str,
    /// The service that the package would start.
    pub service: Option<&'static str>,
}

/// Makes sure that these programs (named in [`ALL`]) can be called.
pub fn ensure(programs: &[&str]) -> Result<()> {
    let missing: Vec<&Tool> = ALL
        .iter()
        .filter(|tool| programs.contains(&tool.program))
        .filter(|tool| find(tool.program).is_none())
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    install(&missing)?;
    match missing.iter().find(|tool| find(tool.program).is_none()) {
        None => Ok(()),
        Some(tool) => bail!(
            "the package {} is installed, but {} cannot be found in PATH",
            tool.package,
            tool.program
        ),
    }
}

/// Makes sure that a library can be compiled against: that its header is where such are.
pub fn ensure_header(header: &str, package: &'static str) -> Result<()> {
    let there = || Path::new("/usr/include").join(header).is_file();
    if !there() {
        install(&[&Tool {
            program: "",
            package,
            service: None,
        }])?;
    }
    if !there() {
        bail!("the package {package} is installed, but {header} is not in /usr/include");
    }
    Ok(())
}

/// Makes sure that everything in [`ALL`] can be called.
pub fn ensure_all() -> Result<()> {
    let programs: Vec<&str> = ALL.iter().map(|tool| tool.program).collect();
    ensure(&programs)
}

/// Where a program is, in PATH or in the folders of system programs.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        // A path stays what it is.
        .map(|folder| folder.join(program))
        .find(|candidate| candidate.is_file())
}

/// Whether we are root.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn install(missing: &[&Tool]) -> Result<()> {
    let mut packages: Vec<&str> = missing.iter().map(|tool| tool.package).collect();
    packages.dedup();
    let list = packages.join(" ");
    if find("apt-get").is_none() {
        bail!("missing: {list}. Install these (or what your system calls them) and try again");
    }
    println!("installing {list}…");
    let _whole = cleanup::uninterrupted();
    let _quiet = NoServices::begin()?;
    if !apt_install(&packages)? {
        let updated = as_root("apt-get", &["-q", "update"])?;
        if !updated || !apt_install(&packages)? {
            bail!("apt-get could not install {list}; install them by hand and try again");
        }
    }
    if Path::new("/run/systemd/system").exists() {
        for service in missing.iter().filter_map(|tool| tool.service) {
            // A service that is not there or not enabled is what is wanted.
            let _ = as_root("systemctl", &["disable", "--now", service]);
        }
    }
    Ok(())
}

fn apt_install(packages: &[&str]) -> Result<bool> {
    let mut words = vec!["DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-y"];
    words.extend(["--no-install-recommends", "install"]);
    words.extend(packages);
    as_root("env", &words)
}

/// Runs a program as root; `true` where it succeeded.
fn as_root(program: &str, words: &[&str]) -> Result<bool> {
    let mut command = if is_root() {
        Command::new(program)
    } else {
        let mut sudo = Command::new("sudo");
        sudo.arg(program);
        sudo
    };
    let status = command
        .args(words)
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("cannot run {program} as root (is sudo there?)"))?;
    Ok(status.success())
}

/// While this lives, installing a package starts no service (a `policy-rc.d` that says no, unless
/// the system has one of its own).
struct NoServices {
    ours: bool,
}

const POLICY: &str = "/usr/sbin/policy-rc.d";

impl NoServices {
    fn begin() -> Result<Self> {
        if Path::new(POLICY).exists() {
            return Ok(Self { ours: false });
        }
        let script = format!("printf '#!/bin/sh\\nexit 101\\n' > {POLICY} && chmod 755 {POLICY}");
        Ok(Self {
            ours: as_root("sh", &["-c", &script])?,
        })
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if self.ours && !as_root("rm", &["-f", POLICY]).unwrap_or(false) {
            eprintln!("xtask: cannot remove {POLICY}; remove it by hand");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_in_path() {
        assert!(find("sh").is_some());
        assert!(find("no-such-program-anywhere").is_none());
    }
}
