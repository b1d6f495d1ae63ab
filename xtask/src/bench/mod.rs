//! `cargo xtask bench`: measurements side by side with what they are compared to, in one run.

mod redis;

use anyhow::Result;

/// What can be measured.
#[derive(clap::Subcommand, Debug)]
pub enum Command {
    /// Durable image, restore, stop times and throughput of a Redis of about 500 MB.
    Redis(redis::Options),
}

/// Runs the command.
pub fn run(command: &Command) -> Result<()> {
    match command {
        Command::Redis(options) => redis::run(options),
    }
}
