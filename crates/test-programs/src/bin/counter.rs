//! Counts, and makes every number durable before the next one: `counter FILE`.
//!
//! A single thread appends one number a line and flushes it (`fdatasync`). Whoever kills it at a
//! random moment and restores it must find every number exactly once.
//!

use outlive_test_programs::{fail, say};
use std::fs::OpenOptions;
use std::io::Write;

fn main() {
    let Some(path) = std::env::args_os().nth(1) else {
        fail("usage: counter FILE")
    };
    let opened = OpenOptions::new().create(true).append(true).open(&path);
    let Ok(mut file) = opened else {
        fail("the file cannot be opened")
    };
    let limit: u64 = std::env::args()
        .nth(2)
        .and_then(|n| n.parse().ok())
        .unwrap_or(u64::MAX);
    say("ready");
    for number in 0..limit {
        let line = format!("{number}\n");
        match file.write(line.as_bytes()) {
            Ok(n) if n == line.len() => {}
            other => fail(&format!("writing {number}: {other:?}")),
        }
        if let Err(e) = file.sync_data() {
            fail(&format!("flushing {number}: {e}"));
        }
    }
}
