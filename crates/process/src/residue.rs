//! What a stop took of memory, on its way into an epoch.

use crate::ProcessError;
use crate::guard::Behind;
use outlive_epoch::{PageSink, Run};
use std::time::Duration;

/// Pages that were taken at the stop.
#[derive(Debug, Default)]
pub struct Residue {
    /// Where the pages in the buffer belong, one after the other.
    pub runs: Vec<Run>,
    /// Pages that are no more.
    pub absent: Vec<Run>,
    /// The contents, and perhaps rubbish behind them.
    pub buffer: Vec<u8>,
    /// How long their copying took.
    pub took: Duration,
    /// What is copied while the program runs again …
    pub behind: Option<Behind>,
    /// … and where those pages belong.
    pub behind_runs: Vec<Run>,
}

impl Residue {
    /// Hands everything to a sink.
    pub fn write(&self, sink: &mut dyn PageSink) -> Result<(), ProcessError> {
        for &run in &self.absent {
            sink.absent(run)?;
        }
        let mut at = 0;
        for &run in &self.runs {
            let len = run.bytes() as usize;
            sink.put(run, &self.buffer[at..at + len])?;
            at += len;
        }
        self.behind.as_ref().map_or(Ok(()), |b| b.write(sink))
    }

    /// Number of pages with contents.
    #[must_use]
    pub fn pages(&self) -> u64 {
        let behind = self.behind_runs.iter().map(Run::count);
        self.runs.iter().map(Run::count).sum::<u64>() + behind.sum::<u64>()
    }
}
