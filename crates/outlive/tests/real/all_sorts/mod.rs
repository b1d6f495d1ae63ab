//! Programs of all sorts, as others wrote them: killed with their keeper at random moments of
//! their work, restored, and judged by what they compute.
//!
//! # Rules
//! - A program is one small file here: how it is started, what it must have computed, and in which
//!   process the data lie on which this depends. What all of them go through is in this file.
//! - A program works in its place (a directory of its own) until there is a file `finish`, and
//!   adds a byte to the file `progress` for each piece of work: so it is at work at every kill,
//!   however fast the machine is, and nothing here depends on how long something took.
//! - Every judgement is shown to be one: the same program is restored with one page of its memory
//!   changed, and must then be found wrong.
//! - The moments of the kills are random; the seed is printed, and taken from `OUTLIVE_SEED`.

/// The two tests of a program.
macro_rules! tests {
    ($program:expr) => {
        #[test]
        fn comes_back() {
            let name = concat!(module_path!(), "::comes_back");
            crate::all_sorts::comes_back(name, &$program);
        }

        #[test]
        fn a_changed_page_is_noticed() {
            let name = concat!(module_path!(), "::a_changed_page_is_noticed");
            crate::all_sorts::a_changed_page_is_noticed(name, &$program);
        }
    };
}

mod figures;
mod java;
mod make;
mod memcached;
mod nginx;
mod node;
mod orchestra;
mod perl;
mod pipeline;
mod postgres;
mod python;
mod spoil;
mod statically_linked;

use crate::support::{Kept, Place, alone, end, may_run, until};
use figures::Figures;
use rustix::process::{Pid, Signal, kill_process};
use spoil::Spot;
use std::collections::BTreeSet;
use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

/// A program, and what it takes to judge it.
pub struct Program {
    /// How people call it.
    name: &'static str,
    /// What it does meanwhile.
    load: &'static str,
    /// What is compared in the end.
    compared: &'static str,
    /// Makes its files, and returns the command line with which it works until it is to finish.
    prepare: fn(&Place) -> Vec<String>,
    /// What is wrong with what it left in its place, once it has ended with 0.
    judge: fn(&Place) -> Result<(), String>,
    /// Data on which the judgement depends.
    spot: Spot,
}

/// A program under its keeper; all of it is ended when this is dropped.
struct Life<'a> {
    place: &'a Place,
    kept: Option<Kept>,
}

impl<'a> Life<'a> {
    fn begin(place: &'a Place, program: &Program) -> Self {
        let line = (program.prepare)(place);
        let every = figures::every();
        let mut words = vec!["run", "--name", "a", "--every", every, "--"];
        words.extend(line.iter().map(String::as_str));
        let kept = Some(place.start(&words));
        let mut life = Self { place, kept };
        life.works();
        life.epoch();
        life
    }

    fn kept(&mut self) -> &mut Kept {
        self.kept.as_mut().unwrap()
    }

    /// How much work was done.
    fn progress(&self) -> u64 {
        fs::metadata(self.place.path("progress")).map_or(0, |file| file.len())
    }

    fn must_live(&mut self) {
        let ended = self.kept().keeper.try_wait().unwrap();
        assert!(ended.is_none(), "{ended:?}: {}", self.said());
    }

    /// Waits until more work was done.
    fn works(&mut self) {
        let before = self.progress();
        until("it works", || {
            self.must_live();
            self.progress() > before
        });
    }

    /// Waits for a new epoch, and returns its number.
    fn epoch(&mut self) -> u64 {
        let before = self.place.newest("a");
        let mut newest = before;
        until("an epoch is taken", || {
            self.must_live();
            newest = self.place.newest("a");
            newest > before
        });
        newest
    }

    /// All processes of the program.
    fn members(&mut self) -> Vec<u32> {
        family(self.kept().pid()).split_off(1)
    }

    /// Kills the keeper and all of the program.
    fn die(&mut self) {
        let Some(mut kept) = self.kept.take() else {
            return;
        };
        kept.kill();
        // What the keeper kept is now below us. Whoever is stopped starts nobody.
        let mut all = BTreeSet::new();
        loop {
            let seen = family(std::process::id()).split_off(1);
            let new: Vec<u32> = seen.into_iter().filter(|&pid| all.insert(pid)).collect();
            if new.is_empty() {
                break;
            }
            new.into_iter().for_each(|pid| send(pid, Signal::STOP));
        }
        all.iter().for_each(|&pid| send(pid, Signal::KILL));
        all.into_iter().for_each(end);
    }

    /// Brings back the newest epoch; returns what was told of it.
    fn come_back(&mut self) -> serde_json::Value {
        let kept = self.place.start(&["restore", "a", "--json"]);
        self.kept = Some(kept);
        let told = self.kept().line();
        let told: Option<serde_json::Value> = serde_json::from_str(&told).ok();
        let told = told.filter(|told| told["epoch"].is_u64());
        told.unwrap_or_else(|| panic!("it does not come back: {}", self.said()))
    }

    /// What keepers and program said since the beginning.
    fn said(&self) -> String {
        let names = self.place.names(".").into_iter();
        let names = names.filter(|name| name.starts_with("errors-"));
        let said = names.map(|name| fs::read(self.place.path(&name)).unwrap());
        said.map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .collect()
    }

    /// Tells the program to finish, and judges it.
    fn finish(mut self, program: &Program) -> Result<(), String> {
        fs::write(self.place.path("finish"), "").unwrap();
        until("it finishes", || {
            self.kept().keeper.try_wait().unwrap().is_some()
        });
        let (code, said) = (self.kept().code(), self.said());
        // What goes wrong with the keeper is no judgement of the program.
        assert!(!said.contains("panicked"), "{said}");
        match code {
            0 => (program.judge)(self.place),
            code => Err(format!("exit code {code}: {said}")),
        }
    }
}

impl Drop for Life<'_> {
    fn drop(&mut self) {
        self.die();
    }
}

/// All processes below this one, and itself.
fn family(root: u32) -> Vec<u32> {
    let mut all = vec![root];
    let mut at = 0;
    while at < all.len() {
        let tasks = fs::read_dir(format!("/proc/{}/task", all[at]));
        for task in tasks.into_iter().flatten().flatten() {
            let text = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            all.extend(text.split_whitespace().map(|w| w.parse::<u32>().unwrap()));
        }
        at += 1;
    }
    all
}

fn send(pid: u32, signal: Signal) {
    // Who is gone already is what is wanted.
    let _ = kill_process(Pid::from_raw(pid.try_into().unwrap()).unwrap(), signal);
}

fn random() -> fastrand::Rng {
    let seed = std::env::var("OUTLIVE_SEED").ok();
    let seed = seed.map_or_else(|| fastrand::u64(..), |text| text.parse().unwrap());
    println!("OUTLIVE_SEED={seed}");
    fastrand::Rng::with_seed(seed)
}

/// Killed and restored again and again, the program computes what it computes undisturbed.
fn comes_back(name: &str, program: &Program) {
    if !may_run(name) {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let mut random = random();
    let mut life = Life::begin(&place, program);
    let mut figures = Figures::default();
    for kill in 1..=figures::rounds() {
        life.works();
        let held = life.epoch();
        std::thread::sleep(Duration::from_micros(random.u64(..200_000)));
        life.die();
        let told = life.come_back();
        let epoch = told["epoch"].as_u64().unwrap();
        assert!(epoch >= held, "kill {kill}: {held} was there, not {epoch}");
        figures.restored(&told);
        life.works();
    }
    figures.observe(&mut life);
    let judged = life.finish(program);
    judged.unwrap_or_else(|wrong| panic!("{}: {wrong}", program.name));
    figures.tell(program);
}

/// The judgement would notice if a single page came back wrong.
fn a_changed_page_is_noticed(name: &str, program: &Program) {
    if !may_run(name) {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let mut life = Life::begin(&place, program);
    life.die();
    life.come_back();
    life.works();
    let changed = spoil::spoil(&life.members(), &program.spot);
    let before = life.progress();
    until("it works with it or ends", || {
        let ended = life.kept().keeper.try_wait().unwrap();
        ended.is_some() || life.progress() > before + 3
    });
    let judged = life.finish(program);
    let Err(noticed) = judged else {
        panic!("{}: nobody noticed {changed}", program.name);
    };
    println!("{changed}; noticed: {noticed}");
}

/// A file that the program needs.
fn file(place: &Place, name: &str, contents: &str) -> String {
    fs::write(place.path(name), contents).unwrap();
    place.text(name)
}

fn read(place: &Place, name: &str) -> Result<Vec<u8>, String> {
    fs::read(place.path(name)).map_err(|error| format!("{name}: {error}"))
}

/// The number of rounds that the program says that it made, in the first line of `result`.
fn rounds(place: &Place) -> Result<u64, String> {
    let text = read(place, "result")?;
    let text = String::from_utf8_lossy(&text);
    let first = text.lines().next().and_then(|line| line.parse().ok());
    first.ok_or_else(|| format!("no number of rounds in {text:?}"))
}

/// Each piece of work was counted once: the file went back with the memory at every restore.
fn all_were_counted(place: &Place) -> Result<(), String> {
    let (rounds, counted) = (rounds(place)?, read(place, "progress")?.len() as u64);
    if rounds == counted {
        return Ok(());
    }
    Err(format!("{rounds} rounds, of which {counted} were counted"))
}

/// Runs the same again, as many rounds without a keeper, and compares what both wrote.
fn same_undisturbed(
    place: &Place,
    line: impl Fn(&str) -> Vec<String>,
    files: &[&str],
) -> Result<(), String> {
    all_were_counted(place)?;
    let again = place.path("undisturbed");
    fs::create_dir(&again).unwrap();
    let line = line(&rounds(place)?.to_string());
    let mut command = Command::new(&line[0]);
    command.args(&line[1..]).current_dir(&again);
    let done = command.stdin(Stdio::null()).output().unwrap();
    assert!(done.status.success(), "undisturbed: {done:?}");
    for name in files {
        if read(place, name)? != fs::read(again.join(name)).unwrap() {
            return Err(format!("{name} is not what it is undisturbed"));
        }
    }
    Ok(())
}

/// A command line.
fn words<const N: usize>(words: [&str; N]) -> Vec<String> {
    words.map(str::to_owned).to_vec()
}
