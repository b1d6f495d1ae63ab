//! The command line of `bench`.

use super::loads::LoadArgs;
use std::path::PathBuf;

/// `outlive bench`
#[derive(Debug, clap::Args)]
pub struct BenchArgs {
    /// What to measure.
    #[command(subcommand)]
    pub what: What,
}

/// What can be measured.
#[derive(Debug, clap::Subcommand)]
pub enum What {
    /// One area of 1 to 200 MB, 1 to 200 areas of 1 MB, strategies, granularity
    Rtcr(Common),
    /// A program that maps and unmaps, Redis, a neighbour, time to persist
    Wpp(Common),
    /// Stop time against memory, written pages, threads, mappings, descriptors
    Stop(Common),
    /// Time of a restore against memory
    Restore(Common),
    /// Memory of the keeper, page tables, bytes written a day
    Overhead(Common),
    /// All of these
    All(Common),
    /// A program to be measured
    #[command(hide = true)]
    Load(LoadArgs),
}

/// What all measurements know.
#[derive(Clone, Debug, clap::Args)]
pub struct Common {
    /// A short form that shows that everything works; its figures are rough
    #[arg(long)]
    pub short: bool,
    /// How often each figure is measured
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub runs: Option<u32>,
    /// Most memory of a program under measurement: 512MiB, 10GiB
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub memory: Option<u64>,
    /// Only these parts, as the tables' names in JSON begin
    #[arg(long, value_name = "PART")]
    pub only: Vec<String>,
    /// Write the tables as NAME.md, and plots as SVG, into this directory
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Where programs, images and stores under measurement are put; on a disk
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    pub dir: PathBuf,
    /// Measure another program in alternation: criu=PATH
    #[arg(long, value_name = "NAME=PATH", value_parser = parse_peer)]
    pub peer: Option<PathBuf>,
}

/// How much is measured, and where.
#[derive(Clone, Debug)]
pub struct Effort {
    /// Whether the short form is asked for.
    pub short: bool,
    runs: Option<u32>,
    memory: Option<u64>,
    only: Vec<String>,
    /// Where tables and plots go.
    pub out: Option<PathBuf>,
    /// Where the run takes place.
    pub dir: PathBuf,
    /// CRIU.
    pub peer: Option<PathBuf>,
}

impl BenchArgs {
    /// What is asked for.
    pub fn effort(&self) -> Effort {
        let common = match &self.what {
            What::Rtcr(c) | What::Wpp(c) | What::Stop(c) => Some(c),
            What::Restore(c) | What::Overhead(c) | What::All(c) => Some(c),
            What::Load(_) => None,
        };
        Effort {
            short: common.is_some_and(|c| c.short),
            runs: common.and_then(|c| c.runs),
            memory: common.and_then(|c| c.memory),
            only: common.map(|c| c.only.clone()).unwrap_or_default(),
            out: common.and_then(|c| c.out.clone()),
            dir: common.map(|c| c.dir.clone()).unwrap_or_default(),
            peer: common.and_then(|c| c.peer.clone()),
        }
    }
}

impl Effort {
    /// How often something is measured: as asked for, or else `long` times, `short` times in the
    /// short form.
    pub fn runs(&self, long: usize, short: usize) -> usize {
        let otherwise = if self.short { short } else { long };
        self.runs
            .map_or(otherwise, |n| usize::try_from(n).unwrap_or(otherwise))
    }

    /// The same, with everything measured once.
    pub fn once(&self) -> Self {
        Self {
            runs: Some(1),
            ..self.clone()
        }
    }

    /// The most memory: as asked for, or else one of these, bytes.
    pub fn memory(&self, long: u64, short: u64) -> u64 {
        self.memory.unwrap_or(if self.short { short } else { long })
    }

    /// Whether a part is asked for.
    pub fn wants(&self, part: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| part.starts_with(only.as_str()))
    }

    /// The values of `long` that do not exceed `most`, or those of `short` in the short form.
    pub fn points(&self, long: &[u64], short: &[u64], most: u64) -> Vec<u64> {
        let all = if self.short { short } else { long };
        all.iter().copied().filter(|value| *value <= most).collect()
    }

    /// The command line that gives the same.
    pub fn command(&self, name: &str) -> String {
        let mut words = vec![format!("outlive bench {name}")];
        words.extend(self.short.then(|| "--short".into()));
        words.extend(self.runs.map(|n| format!("--runs {n}")));
        words.extend(self.memory.map(|n| format!("--memory {}MiB", n >> 20)));
        words.extend(self.only.iter().map(|part| format!("--only {part}")));
        words.extend(self.peer.as_ref().map(|_| "--peer criu=PATH".into()));
        words.join(" ")
    }
}

/// A number of bytes with its unit: `512MiB`, `10GiB`.
fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no size; write it with its unit, such as 512MiB or 10GiB");
    let at = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
    let (number, unit) = text.split_at(at);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let shift = match unit {
        "KiB" | "K" => 10,
        "MiB" | "M" => 20,
        "GiB" | "G" => 30,
        _ => return Err(wrong()),
    };
    let bytes = number.checked_mul(1 << shift).filter(|n| *n > 0);
    bytes.ok_or_else(wrong)
}

fn parse_peer(text: &str) -> Result<PathBuf, String> {
    match text.split_once('=') {
        Some(("criu", path)) if !path.is_empty() => Ok(path.into()),
        _ => Err(format!(
            "{text:?} is no peer; the one that is known is criu=PATH"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_carry_their_unit() {
        assert_eq!(parse_size("512MiB"), Ok(512 << 20));
        assert_eq!(parse_size("10G"), Ok(10 << 30));
        for bad in ["", "5", "MiB", "0MiB", "-1G", "99999999999G", "1 G", "1GB"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_peer_has_a_name_and_a_path() {
        assert_eq!(parse_peer("criu=/x/criu"), Ok("/x/criu".into()));
        for bad in ["criu", "criu=", "dmtcp=/x", "=/x"] {
            assert!(parse_peer(bad).is_err(), "{bad}");
        }
    }
}
