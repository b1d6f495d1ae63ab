//! Descriptors that our caller left open by mistake.
//!
//! Terminals and build systems leak descriptors into what they start: a pipe here, a log there.
//! A program started below us would inherit them, and Outlive rightly refuses to save a pipe whose
//! other end belongs to a stranger. So whatever is open beyond the three standard streams is
//! closed before anything is started.
//!
//! # How
//! Closing a descriptor by its number cannot be done in safe Rust (somebody may own it). A shell
//! may: it closes them and then becomes this program again.

use anyhow::{Context, Result, bail};
use std::{env, fs, os::unix::process::CommandExt, process::Command};

/// Set to our process ID for the second start, which must not lead to a third. (The ID, so that it
/// means nothing to processes below us.)
const MARK: &str = "OUTLIVE_XTASK_CLEAN";

/// Closes every descriptor it is given, then becomes what is asked for.
const SCRIPT: &str =
    r#"for fd in $1; do eval "exec $fd>&-"; done; shift; export OUTLIVE_XTASK_CLEAN=$$; exec "$@""#;

/// Returns where nothing is inherited beyond the standard streams; otherwise starts this program
/// again without.
pub fn close() -> Result<()> {
    let stray = stray()?;
    let cleaned = env::var(MARK).is_ok_and(|pid| pid == std::process::id().to_string());
    if stray.is_empty() || cleaned {
        return Ok(());
    }
    let program = env::current_exe().context("cannot find our own binary")?;
    let error = Command::new("bash")
        .args(["-c", SCRIPT, "xtask", &stray.join(" ")])
        .arg(program)
        .args(env::args_os().skip(1))
        .exec();
    bail!(
        "cannot close the inherited descriptors {}: bash: {error}",
        stray.join(", ")
    )
}

/// Descriptors above the standard streams that a started program would inherit.
fn stray() -> Result<Vec<String>> {
    const CLOSE_ON_EXEC: u32 = 0o2_000_000;
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc/self/fd").context("cannot read /proc/self/fd")? {
        let number = entry?.file_name().to_string_lossy().into_owned();
        // Gone already: it was the listing's own.
        let Ok(info) = fs::read_to_string(format!("/proc/self/fdinfo/{number}")) else {
            continue;
        };
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = flags.and_then(|octal| u32::from_str_radix(octal.trim(), 8).ok());
        let inherited = flags.is_some_and(|flags| flags & CLOSE_ON_EXEC == 0);
        if inherited && number.parse::<u32>().is_ok_and(|number| number > 2) {
            found.push(number);
        }
    }
    Ok(found)
}
