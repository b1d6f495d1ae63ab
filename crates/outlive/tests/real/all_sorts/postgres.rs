//! PostgreSQL under pgbench, as another user than root.
//!
//! A database writes to the middle of its files all the time, its log too: all of them go back with
//! its memory.

use super::{Program, all_were_counted, file, words};
use crate::all_sorts::spoil::Spot;
use crate::support::{Place, installed};
use std::os::unix::fs::chown;
use std::path::PathBuf;
use std::process::{Command, Stdio};

const PROGRAM: Program = Program {
    name: "PostgreSQL",
    load: "pgbench: one long session and many short ones, over a unix socket, within the program",
    compared: "pgbench's sums; acknowledged transactions; a table; pg_amcheck of heap and indexes",
    prepare,
    judge: all_were_counted,
    spot: Spot {
        process: "postgres",
        text: b"cell 0001",
        // Buffers of the log hold what the pages of the table hold.
        copies: true,
    },
};

/// `nobody`, who is everywhere.
const USER: u32 = 65534;

fn prepare(place: &Place) -> Vec<String> {
    let script = file(place, "postgres.py", include_str!("loads/postgres.py"));
    chown(place.dir.path(), Some(USER), Some(USER)).unwrap();
    let (setpriv, python, binaries) = (installed("setpriv"), installed("python3"), binaries());
    let user = ["--reuid=65534", "--regid=65534", "--clear-groups"];
    let mut initdb = Command::new(&setpriv);
    initdb.args(user).arg(binaries.join("initdb"));
    initdb.args(["-D", "data", "-A", "trust", "-U", "keeper", "--no-sync"]);
    initdb.current_dir(place.dir.path()).stdout(Stdio::null());
    assert!(initdb.status().unwrap().success());
    let mut line = words([&setpriv]);
    line.extend(words(user));
    line.extend(words([
        &python,
        "-I",
        &script,
        "0.01",
        binaries.to_str().unwrap(),
    ]));
    line
}

/// Where the server is, which is in nobody's PATH.
fn binaries() -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten();
    let mut all: Vec<PathBuf> = versions
        .map(|entry| entry.unwrap().path().join("bin"))
        .collect();
    all.retain(|path| path.join("postgres").exists());
    all.pop()
        .expect("postgresql is not installed: `cargo xtask test` installs it")
}

tests!(PROGRAM);
