//! The client that writes.
//!
//! # Rules
//! - One connection, every write noted in the [`Journal`] *before* it is sent, every answer noted
//!   with the time at which it was read.
//! - A connection that breaks is the expected end; an answer other than `OK` is an error.

use super::now_nanos;
use crate::{
    model::{Journal, key_name},
    resp::{Client, Reply},
};
use anyhow::{Result, bail};
use indicatif::ProgressBar;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Writes under way at once while filling.
const FILL_BATCH: u32 = 512;

/// Writes under way at once while Redis is to be killed.
const BATCH: usize = 16;

/// One write in so many goes to a new key.
const NEW_KEY_EVERY: u32 = 50;

/// Writes each of the first `keys` keys once.
pub fn fill(
    journal: &mut Journal,
    client: &mut Client,
    keys: u32,
    bar: &ProgressBar,
) -> Result<()> {
    let mut next = 0;
    while next < keys {
        let end = keys.min(next.saturating_add(FILL_BATCH));
        for key in next..end {
            queue(journal, client, key);
        }
        client.send()?;
        for _ in next..end {
            acknowledge(journal, client.receive()?)?;
        }
        bar.inc(u64::from(end - next));
        next = end;
    }
    Ok(())
}

/// Writes random keys until the connection breaks or `stop` is set; returns how it ended.
pub fn write_on(
    journal: &mut Journal,
    client: &mut Client,
    random: &mut fastrand::Rng,
    stop: &AtomicBool,
    acknowledged: &AtomicU64,
) -> Result<String> {
    while !stop.load(Ordering::Relaxed) {
        for _ in 0..BATCH {
            let key = choose(journal.keys(), random);
            queue(journal, client, key);
        }
        if let Err(error) = client.send() {
            return Ok(format!("{error:#}"));
        }
        for _ in 0..BATCH {
            match client.receive() {
                Ok(reply) => acknowledge(journal, reply)?,
                Err(error) => return Ok(format!("{error:#}")),
            }
            acknowledged.fetch_add(1, Ordering::Relaxed);
        }
    }
    Ok("asked to stop".into())
}

fn choose(keys: u32, random: &mut fastrand::Rng) -> u32 {
    if random.u32(..NEW_KEY_EVERY) == 0 {
        keys
    } else {
        random.u32(..keys.max(1))
    }
}

fn queue(journal: &mut Journal, client: &mut Client, key: u32) {
    let value = journal.issue(key);
    client.queue(&[b"SET", &key_name(key), &value]);
}

fn acknowledge(journal: &mut Journal, reply: Reply) -> Result<()> {
    match reply {
        Reply::Status(text) if text == "OK" => {
            journal.acknowledge(now_nanos());
            Ok(())
        }
        other => bail!("redis answered a write with {other:?}"),
    }
}
