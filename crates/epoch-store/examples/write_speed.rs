//! Measures a store against its medium: `write_speed DIR MB [REPEATS]`.
//!
//! In one run, alternating: raw `O_DIRECT` writes of 4 MiB, writing and committing of an epoch of
//! as many bytes (straight from memory, and through one more copy, as when another address space is read), and
//! reading it back. Prints the median of each in GB/s (10^9 bytes).

use outlive_epoch::{EpochFacts, EpochReader, EpochWriter, PAGE_SIZE, PageSink, Run, SpaceId};
use outlive_epoch_store::{Access, Store};
use outlive_media::TRANSFER;
use std::error::Error;
use std::path::Path;
use std::time::Instant;

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() -> Outcome<()> {
    let mut args = std::env::args().skip(1);
    let dir = args.next().ok_or("usage: write_speed DIR MB [REPEATS]")?;
    let megabytes: usize = args
        .next()
        .ok_or("usage: write_speed DIR MB [REPEATS]")?
        .parse()?;
    let repeats: usize = args.next().map_or(Ok(5), |n| n.parse())?;
    let dir = Path::new(&dir);
    std::fs::create_dir_all(dir)?;
    let memory = noise((megabytes * 1_000_000).next_multiple_of(TRANSFER));
    let mut figures: [(&str, Vec<f64>); 4] = [
        ("raw O_DIRECT writes of 4 MiB + fdatasync", vec![]),
        ("epoch: put + commit", vec![]),
        ("epoch: copy + put + commit", vec![]),
        ("epoch: open + read all pages", vec![]),
    ];
    for _ in 0..repeats {
        figures[0].1.push(raw(dir, &memory)?);
        figures[1].1.push(epoch(dir, &memory, false)?);
        figures[2].1.push(epoch(dir, &memory, true)?);
        figures[3].1.push(read(dir, memory.len())?);
        std::fs::remove_dir_all(dir.join("epoch"))?;
    }
    let (median, worst) = small(dir)?;
    println!("{} MB, median of {repeats}:", memory.len() / 1_000_000);
    for (name, values) in &mut figures {
        values.sort_by(f64::total_cmp);
        println!("{:6.2} GB/s  {name}", values[values.len() / 2]);
    }
    println!(
        "epochs of 16 scattered pages: begin to acknowledged {median} us median, {worst} us p99"
    );
    Ok(())
}

/// Median and 99th percentile of the time for a small epoch, in microseconds.
fn small(dir: &Path) -> Outcome<(u128, u128)> {
    let path = dir.join("epoch");
    let mut store = Store::create(&path)?;
    let page = noise(PAGE_SIZE);
    let mut times = Vec::new();
    for epoch in 0..300u64 {
        let start = Instant::now();
        let mut writer = store.begin()?;
        for i in 0..16 {
            let run = Run::new(SpaceId(1), epoch + 1000 * i, 1).ok_or("an empty run")?;
            writer.put(run, &page)?;
        }
        writer.tree("root", &epoch.to_le_bytes())?;
        writer.commit(EpochFacts::default())?;
        times.push(start.elapsed().as_micros());
    }
    store.close()?;
    std::fs::remove_dir_all(path)?;
    times.sort_unstable();
    Ok((times[times.len() / 2], times[times.len() * 99 / 100]))
}

/// Memory in which no page is zero.
fn noise(len: usize) -> Vec<u8> {
    let mut seed = 1u64;
    let mut memory = vec![0; len];
    for word in memory.as_chunks_mut::<8>().0 {
        seed = seed
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        *word = seed.to_le_bytes();
    }
    memory
}

fn rate(bytes: usize, start: Instant) -> f64 {
    bytes as f64 / start.elapsed().as_secs_f64() / 1e9
}

fn raw(dir: &Path, memory: &[u8]) -> Outcome<f64> {
    use std::os::unix::fs::{FileExt, OpenOptionsExt};
    let path = dir.join("raw");
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true);
    options.custom_flags(rustix::fs::OFlags::DIRECT.bits() as i32);
    let file = options.open(&path)?;
    let mut buffer = outlive_media::Buffer::new(TRANSFER)?;
    buffer.copy_from_slice(&memory[..TRANSFER]);
    rustix::fs::fallocate(
        &file,
        rustix::fs::FallocateFlags::empty(),
        0,
        memory.len() as u64,
    )?;
    let start = Instant::now();
    for at in (0..memory.len()).step_by(TRANSFER) {
        file.write_all_at(&buffer, at as u64)?;
    }
    file.sync_data()?;
    let rate = rate(memory.len(), start);
    std::fs::remove_file(path)?;
    Ok(rate)
}

fn epoch(dir: &Path, memory: &[u8], copied: bool) -> Outcome<f64> {
    let path = dir.join("epoch");
    if path.exists() {
        std::fs::remove_dir_all(&path)?;
    }
    let mut store = Store::create(&path)?;
    let mut copy = vec![0; 1 << 20];
    let start = Instant::now();
    let mut writer = store.begin()?;
    for (i, part) in memory.chunks(copy.len()).enumerate() {
        let pages = (part.len() / PAGE_SIZE) as u64;
        let run = Run::new(SpaceId(1), (i * copy.len() / PAGE_SIZE) as u64, pages);
        let run = run.ok_or("an empty run")?;
        if copied {
            // One more copy of every byte, as when another address space is read.
            copy[..part.len()].copy_from_slice(part);
            writer.put(run, &copy[..part.len()])?;
        } else {
            writer.put(run, part)?;
        }
    }
    writer.commit(EpochFacts::default())?;
    let rate = rate(memory.len(), start);
    store.close()?;
    Ok(rate)
}

fn read(dir: &Path, len: usize) -> Outcome<f64> {
    // Reads past the page cache; this makes sure that nothing is in it.
    let file = std::fs::File::open(dir.join("epoch/epochs.1"))?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    let start = Instant::now();
    let store = Store::open(dir.join("epoch"), Access::Read)?;
    let mut bytes = 0;
    store.epoch(None)?.pages(&mut |run, _| {
        bytes += run.bytes();
        Ok(())
    })?;
    assert_eq!(bytes, len as u64);
    Ok(rate(len, start))
}
