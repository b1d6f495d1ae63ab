//! The `outlive` binary: flags and glue only. What the commands do lies in the crates below.
//!
//! - `cli`: the command line, a contract.
//! - `out`: units, tables, moments.
//! - `progress`: what a long operation shows meanwhile.
//! - `terminal`: the terminal of a restored program.
//! - `commands`: one file for each group of commands.

mod cli;
mod commands;
mod key_args;
mod out;
mod progress;
mod terminal;

use clap::Parser;
use clap::error::ErrorKind;
use outlive_keeper::KeeperError;
use std::process::ExitCode;

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::from_env("OUTLIVE_LOG");
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    let cli = match cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let json = cli.json;
    let done = cli.offered().and_then(|()| commands::run(&cli));
    match done {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let code = error.exit_code();
            out::say(&error.to_string());
            if json {
                out::json(&failure(&error.to_string(), code));
            }
            ExitCode::from(code)
        }
    }
}

/// An error as `--json` prints it.
pub fn failure(error: &str, exit: u8) -> serde_json::Value {
    serde_json::json!({ "error": error, "exit": exit })
}

/// Help and version go to standard output with code 0; all else is an error in usage.
fn usage(error: &clap::Error) -> ExitCode {
    let _ = error.print();
    if matches!(
        error.kind(),
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
    ) {
        return ExitCode::SUCCESS;
    }
    let ours = std::env::args_os().take_while(|word| word != "--");
    if ours.into_iter().any(|word| word == "--json") {
        let text = error.to_string();
        let first = text.lines().next().unwrap_or_default();
        let KeeperError::Usage(text) = KeeperError::Usage(first.replace("error: ", "")) else {
            return ExitCode::from(2);
        };
        out::json(&failure(&text, 2));
    }
    ExitCode::from(2)
}
