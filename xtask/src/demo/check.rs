//! What must hold after a restore.
//!
//! - The same process lives on: PID, port, run ID, and an uptime that is not smaller.
//! - Every key holds what exactly the first `p` writes left in it (see [`crate::model`]), and the
//!   database has no other key.
//! - `p` is not smaller than the number of writes that had been acknowledged when the newest
//!   committed epoch was taken (after a kill), or at all (after a planned event).

use super::{Demo, bar, now_nanos};
use crate::{
    model::{Found, Journal, key_name},
    redis::PATIENCE,
    resp::{Client, Reply},
};
use anyhow::{Result, anyhow, bail, ensure};

/// Keys asked for by one command.
const KEYS_A_COMMAND: u32 = 128;

/// Commands under way at once.
const COMMANDS: u32 = 16;

/// What a check found to be right.
#[derive(Clone, Copy, Debug)]
pub struct Checked {
    /// How many writes the restored state holds: the first so many.
    pub prefix: usize,
    /// How many acknowledged writes it does not hold.
    pub lost: usize,
    /// When the newest write that it holds had been acknowledged, if it was.
    pub newest_at: Option<u64>,
}

impl Demo {
    /// Compares every key, and refuses a state that is older than the first `at_least` writes.
    /// Afterwards the journal begins where the restored state is.
    pub(super) fn check_every_key(&mut self, at_least: usize) -> Result<Checked> {
        let mut client = Client::connect(self.place.port, PATIENCE)?;
        let found = read_every_key(&self.journal, &mut client)?;
        let prefix = self
            .journal
            .judge(&found)
            .map_err(|wrong| anyhow!("{wrong}"))?;
        let (wanted, there) = (
            self.journal.keys_after(prefix),
            client.ask_number(&["DBSIZE"])?,
        );
        ensure!(
            wanted == there,
            "redis has {there} keys (DBSIZE); the first {prefix} writes make {wanted}"
        );
        ensure!(
            prefix >= at_least,
            "the restored state holds the first {prefix} writes only; {at_least} must be there: \
             {} acknowledged writes are missing",
            at_least - prefix
        );
        let acknowledged = self.journal.acknowledged();
        let checked = Checked {
            prefix,
            lost: acknowledged.saturating_sub(prefix),
            newest_at: self.journal.acknowledged_at(prefix),
        };
        self.journal.go_back(prefix, now_nanos());
        Ok(checked)
    }
}

/// Reads every key that was ever written.
fn read_every_key(journal: &Journal, client: &mut Client) -> Result<Found> {
    let keys = journal.keys();
    let bar = bar(keys.into(), "comparing");
    let mut found = journal.nothing_found();
    let mut next = 0;
    while next < keys {
        let begin = next;
        let end = keys.min(begin.saturating_add(KEYS_A_COMMAND * COMMANDS));
        let mut lengths = Vec::new();
        while next < end {
            let part_end = end.min(next + KEYS_A_COMMAND);
            queue_read(client, next, part_end);
            lengths.push((part_end - next) as usize);
            next = part_end;
        }
        client.send()?;
        for length in lengths {
            take_answer(journal, &mut found, client.receive()?, length)?;
        }
        bar.inc(u64::from(end - begin));
    }
    bar.finish_and_clear();
    Ok(found)
}

fn queue_read(client: &mut Client, begin: u32, end: u32) {
    let names: Vec<[u8; 16]> = (begin..end).map(key_name).collect();
    let mut words: Vec<&[u8]> = vec![b"MGET"];
    words.extend(names.iter().map(<[u8; 16]>::as_slice));
    client.queue(&words);
}

fn take_answer(journal: &Journal, found: &mut Found, reply: Reply, length: usize) -> Result<()> {
    let Reply::Array(values) = reply else {
        bail!("redis answered MGET with {reply:?}")
    };
    ensure!(
        values.len() == length,
        "redis answered {length} keys with {} values",
        values.len()
    );
    for value in values {
        let Reply::Bulk(held) = value else {
            bail!("redis holds {value:?} where a string was")
        };
        journal.look(found, held.as_deref());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::writer;
    use super::*;
    use crate::redis::Place;
    use indicatif::ProgressBar;
    use std::sync::atomic::{AtomicBool, AtomicU64};

    struct Server(std::process::Child);

    impl Drop for Server {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    /// The whole chain of filling, writing and comparing, against a Redis that nobody harms, and
    /// then against one that lost, kept or changed something.
    #[test]
    fn a_real_redis_is_filled_written_and_compared() -> Result<()> {
        if crate::tools::find("redis-server").is_none() {
            println!("skipped: redis-server is not installed");
            return Ok(());
        }
        let folder = tempfile::tempdir()?;
        let place = Place::new(folder.path(), "redis")?;
        let mut server = Server(place.start_plain()?);
        let (mut client, identity) = place.wait(|| match server.0.try_wait()? {
            Some(status) => bail!("redis ended: {status}"),
            None => Ok(()),
        })?;
        assert_eq!((identity.pid, identity.port), (server.0.id(), place.port));

        let mut journal = Journal::new(1);
        writer::fill(&mut journal, &mut client, 3_000, &ProgressBar::hidden())?;
        let (stop, acknowledged) = (AtomicBool::new(false), AtomicU64::new(0));
        let mut random = fastrand::Rng::with_seed(1);
        std::thread::scope(|scope| -> Result<()> {
            let (journal, random) = (&mut journal, &mut random);
            let (client, stop, count) = (&mut client, &stop, &acknowledged);
            let writer = scope.spawn(|| writer::write_on(journal, client, random, stop, count));
            while count.load(std::sync::atomic::Ordering::Relaxed) < 2_000 && !writer.is_finished()
            {
                std::thread::yield_now();
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            writer
                .join()
                .map_err(|_| anyhow!("the writer panicked"))??;
            Ok(())
        })?;
        assert!(journal.issued() >= 5_000);
        assert_eq!(journal.issued(), journal.acknowledged());

        let verdict = |client: &mut Client| {
            journal
                .judge(&read_every_key(&journal, client)?)
                .map_err(|wrong| anyhow!("{wrong}"))
        };
        assert_eq!(verdict(&mut client)?, journal.issued());
        assert_eq!(
            client.ask_number(&["DBSIZE"])?,
            journal.keys_after(journal.issued())
        );

        client.ask(&["SETRANGE", "key:000000000007", "100", "x"])?;
        assert!(
            verdict(&mut client).is_err(),
            "a changed byte was not found"
        );
        Ok(())
    }
}
