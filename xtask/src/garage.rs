//! Garage, a real S3 engine, for the tests of object stores.
//!
//! It is in no Debian release, so `cargo` builds it, once, into a folder beside the tree
//! (`$XDG_CACHE_HOME`, else `~/.cache`), where later runs find it. What it can do besides speaking S3
//! is left out, and it is optimised little: to build it must not take longer than to test with it.

use crate::{cleanup, tools, workspace};
use anyhow::{Context, Result, bail};
use std::{env, fs, path::PathBuf, time::Instant};

/// The version that is built; the tests look for it by this number, too.
const VERSION: &str = "2.5.0";

/// Makes sure that it is there, and says where.
pub fn ensure() -> Result<PathBuf> {
    if let Some(given) = env::var_os("OUTLIVE_GARAGE") {
        return Ok(given.into());
    }
    let folder = folder()?;
    let program = folder.join("bin/garage");
    if program.is_file() {
        return Ok(program);
    }
    tools::ensure(&["cc", "pkg-config", tools::SODIUM, tools::ZSTD])?;
    println!("building Garage {VERSION} (once; some minutes)…");
    let begun = Instant::now();
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let build = cleanup::folder(&folder)?;
    let status = workspace::cargo()
        .args(["install", "--locked", "--quiet", "--no-default-features"])
        .args(["--features", "system-libs,lmdb"])
        .arg(format!("garage@{VERSION}"))
        .arg("--root")
        .arg(&folder)
        .env("CARGO_TARGET_DIR", build)
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1")
        .status()
        .context("cannot start cargo")?;
    if !status.success() || !program.is_file() {
        bail!("Garage {VERSION} does not build: {status}");
    }
    println!("built Garage in {} s", begun.elapsed().as_secs());
    Ok(program)
}

fn folder() -> Result<PathBuf> {
    let variable = |name| env::var_os(name).map(PathBuf::from);
    let cache = variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")));
    let cache = cache.context("no place for what is built once: set XDG_CACHE_HOME")?;
    Ok(cache.join(format!("outlive/garage-{VERSION}")))
}
