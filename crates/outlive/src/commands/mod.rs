//! The commands, one file for each group. Each returns the exit code of a command that was done;
//! what was not done is an error that carries its own.

mod bench;
mod carry;
mod check;
mod checkpoint;
mod demo;
mod device;
mod dts;
mod end;
mod heap;
mod image;
mod inspect;
mod list;
mod medium;
mod pool;
mod power;
mod prune;
mod restore;
mod run;
mod shelf;

pub use bench::BenchArgs;
pub use pool::PoolCommand;

use crate::cli::{Cli, Command, PowerCommand};
use outlive_keeper::KeeperError;
use outlive_keeper::subject::Root;

/// Does what the command line says.
pub fn run(cli: &Cli) -> Result<u8, KeeperError> {
    if let Command::Bench(args) = &cli.command {
        // It has a store of its own.
        return bench::bench(args, cli.json);
    }
    if let Command::Pool(command) = &cli.command {
        // It needs no store.
        return pool::pool(command, cli.json);
    }
    let root = Root::find(cli.store.as_deref())?;
    let json = cli.json;
    match &cli.command {
        Command::Check => check::check(&root, json),
        Command::Run(args) => run::run(&root, args, json),
        Command::Attach(args) => run::attach(&root, args, json),
        Command::Checkpoint(args) => checkpoint::checkpoint(&root, args, json),
        Command::Restore(args) => restore::restore(&root, args, json),
        Command::Ps => list::ps(&root, json),
        Command::History { name } => list::history(&root, name, json),
        Command::Stop { name } => end::stop(&root, name, json),
        Command::Forget { name } => end::forget(&root, name, json),
        Command::Power(PowerCommand::Simulate {
            name,
            mains_back_after,
        }) => end::simulate(&root, name, *mains_back_after, json),
        Command::Power(PowerCommand::Back { name }) => power::back(&root, name, json),
        Command::Power(PowerCommand::Budget { name, hold_up }) => {
            power::budget(&root, name.as_deref(), *hold_up, json)
        }
        Command::Prune(args) => prune::prune(&root, args, json),
        Command::Inspect(args) => inspect::inspect(&root, args, json),
        Command::Verify(args) => image::verify(&root, args, json),
        Command::Repair { what, key } => image::repair(&root, what, key, json),
        Command::Export(args) => carry::export(&root, args, json),
        Command::Import(args) => carry::import(&root, args, json),
        Command::Push(args) => shelf::push(&root, args, json),
        Command::Pull(args) => shelf::pull(&root, args, json),
        Command::Heap(command) => heap::heap(command, json),
        Command::Pool(command) => pool::pool(command, json),
        Command::Demo => demo::demo(json),
        Command::Bench(args) => bench::bench(args, json),
    }
}
