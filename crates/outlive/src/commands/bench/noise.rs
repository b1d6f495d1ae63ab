//! What the machine itself varies by: a fixed piece of work, measured again and again.
//!
//! What takes long now and then without any reason in the program that is measured shows here as
//! well: other work on the processors, interrupts, the host of a virtual machine.

use super::figures::Samples;
use std::hint::black_box;
use std::time::{Duration, Instant};

/// How long the piece of work takes, about.
const PIECE: Duration = Duration::from_millis(1);

/// The times of so many pieces of equal work, as multiples of the least of them.
pub fn noise(pieces: usize) -> Samples {
    let rounds = calibrated();
    let times: Vec<f64> = (0..pieces).map(|_| work(rounds).as_secs_f64()).collect();
    let least = times
        .iter()
        .copied()
        .fold(f64::INFINITY, f64::min)
        .max(1e-9);
    Samples(times.iter().map(|time| time / least).collect())
}

/// In words: median, 99th percentile and most.
pub fn told(samples: &Samples) -> String {
    let show = |value: Option<f64>| value.map_or("–".into(), |v| format!("{v:.2}"));
    format!(
        "{} / {} / {}",
        show(samples.median()),
        show(samples.percentile(99.0)),
        show(samples.range().map(|r| r.1))
    )
}

/// Rounds of work that fill a piece, by the fastest of a few tries.
fn calibrated() -> u64 {
    const TRY: u64 = 100_000;
    let fastest = (0..20).map(|_| work(TRY)).min().unwrap_or(PIECE);
    let nanos = fastest.as_nanos().max(1);
    u64::try_from(PIECE.as_nanos() * u128::from(TRY) / nanos)
        .unwrap_or(TRY)
        .max(1)
}

fn work(rounds: u64) -> Duration {
    let began = Instant::now();
    let mut state = black_box(88_172_645_463_325_252u64);
    for _ in 0..rounds {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
    }
    black_box(state);
    began.elapsed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_is_one() {
        let samples = noise(20);
        assert_eq!(samples.0.len(), 20);
        assert_eq!(samples.range().map(|r| r.0), Some(1.0));
        assert!(told(&samples).split(" / ").count() == 3);
    }
}
