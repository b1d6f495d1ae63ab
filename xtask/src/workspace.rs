//! The workspace: where it is, and how its binary is built.

use anyhow::{Context, Result, bail};
use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// The root folder of the workspace.
pub fn root() -> &'static Path {
    // The manifest of this crate is one folder below the root.
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here)
}

/// The `cargo` that runs us, in the root folder.
pub fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// Builds `outlive` in release mode and returns the path of the binary.
pub fn build_outlive() -> Result<PathBuf> {
    println!("building outlive (release)…");
    let output = cargo()
        .args(["build", "--release", "-p", "outlive", "--bin", "outlive"])
        .arg("--message-format=json-render-diagnostics")
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start cargo")?;
    if !output.status.success() {
        bail!("outlive does not build: {}", output.status);
    }
    executable(&String::from_utf8_lossy(&output.stdout))
        .context("cargo built outlive but did not say where it is")
}

/// Where cargo builds.
pub fn target() -> PathBuf {
    let given = env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
    root().join(given)
}

/// Builds `outlive` and the programs that check themselves in the lab, as tests do; returns all.
pub fn build_for_lab() -> Result<[PathBuf; 5]> {
    println!("building outlive…");
    let status = cargo()
        .args(["build", "-p", "outlive", "--bin", "outlive"])
        .args(["-p", "outlive-test-programs", "--bin", "clocks"])
        .args(["--bin", "crowd", "--bin", "paging", "--bin", "scribe"])
        .status()
        .context("cannot start cargo")?;
    if !status.success() {
        bail!("outlive does not build: {status}");
    }
    let names = ["outlive", "clocks", "crowd", "paging", "scribe"];
    Ok(names.map(|name| target().join("debug").join(name)))
}

fn executable(messages: &str) -> Option<PathBuf> {
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["name"] == "outlive")
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
}

/// Where large temporary files go: a folder on a real disk, since a medium in memory would
/// measure nothing. `$OUTLIVE_TMP` overrides the choice.
pub fn scratch() -> Result<PathBuf> {
    const TMPFS: rustix::fs::FsWord = 0x0102_1994;
    if let Some(chosen) = env::var_os("OUTLIVE_TMP") {
        return Ok(chosen.into());
    }
    for candidate in [env::temp_dir(), "/var/tmp".into(), root().join("target")] {
        if let Ok(facts) = rustix::fs::statfs(&candidate)
            && facts.f_type != TMPFS
        {
            return Ok(candidate);
        }
    }
    bail!("no folder on a disk for temporary files; name one in OUTLIVE_TMP")
}

/// Refuses where the file system of `folder` has less than `needed` bytes free.
pub fn need_space(folder: &Path, needed: u64) -> Result<()> {
    let facts = rustix::fs::statvfs(folder)
        .with_context(|| format!("cannot ask for the free space of {}", folder.display()))?;
    let free = facts.f_bavail.saturating_mul(facts.f_frsize);
    if free < needed {
        bail!(
            "{} has {} MB free, and {} MB are needed; name a larger folder in OUTLIVE_TMP",
            folder.display(),
            free / 1_000_000,
            needed / 1_000_000
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_holds_the_workspace_manifest() {
        assert!(root().join("Cargo.toml").is_file());
        assert!(root().join("crates").is_dir());
    }

    #[test]
    fn the_executable_is_found_among_cargo_messages() {
        let messages = concat!(
            "{\"reason\":\"compiler-artifact\",\"target\":{\"name\":\"x\"},\"executable\":\"/x\"}\n",
            "not json\n",
            "{\"reason\":\"compiler-artifact\",\"target\":{\"name\":\"outlive\"},\"executable\":null}\n",
            "{\"reason\":\"compiler-artifact\",\"target\":{\"name\":\"outlive\"},\"executable\":\"/t/outlive\"}\n",
        );
        assert_eq!(executable(messages), Some(PathBuf::from("/t/outlive")));
        assert_eq!(executable(""), None);
    }
}
