//! State of every shape that the derive macros know.
#![allow(dead_code, reason = "each test file uses its own part")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

pub mod arbitrary;

use outlive_state_tree::{SchemaSet, StateNode, StateValue};

/// A thread of the example.
///
/// Second paragraph.
#[derive(StateNode, Debug, Clone, PartialEq, Default)]
#[state(compatible = "outlive,test-thread-v2")]
pub struct Thread {
    /// Its number | with a bar.
    pub tid: u32,
    pub regs_saved: bool,
    pub nice: i32,
    pub small: u8,
    pub port: u16,
    pub address: u64,
    pub offset: i64,
    pub comm: String,
    pub xsave: Vec<u8>,
    pub mask: [u8; 5],
    pub ips: [u64; 3],
    pub cpus: Vec<u32>,
    pub ranges: Vec<u64>,
    pub words: Vec<String>,
    pub exit_code: Option<u32>,
    pub path: Option<Vec<u8>>,
    pub label: Option<String>,
    pub r#type: Mode,
    pub other_mode: Option<Mode>,
    #[state(child)]
    pub stack: AltStack,
    #[state(child)]
    pub rseq: Option<Rseq>,
    /// Its timers.
    #[state(children)]
    pub timers: Vec<Timer>,
    #[state(children)]
    pub files: Vec<Description>,
    #[state(rename = "called", child)]
    pub boxed: Option<Box<Rseq>>,
}

#[derive(StateNode, Debug, Clone, PartialEq, Default)]
#[state(compatible = "outlive,test-alt-stack-v1")]
pub struct AltStack {
    pub base: u64,
    pub size: u64,
}

#[derive(StateNode, Debug, Clone, PartialEq, Default)]
#[state(compatible = "outlive,test-rseq-v1")]
pub struct Rseq;

#[derive(StateNode, Debug, Clone, PartialEq, Default)]
#[state(compatible = "outlive,test-timer-v1")]
pub struct Timer {
    pub id: u32,
    #[state(children)]
    pub nested: Vec<Timer>,
}

#[derive(StateNode, Debug, Clone, PartialEq)]
pub enum Description {
    Pipe(Pipe),
    File(Box<File>),
    Old(OldFile),
}

#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,test-pipe-v1")]
pub struct Pipe {
    pub capacity: u32,
}

#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,test-file-v3")]
pub struct File {
    pub path: Vec<u8>,
}

#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,test-file-v1")]
pub struct OldFile {
    pub path: String,
}

#[derive(StateValue, Debug, Clone, Copy, PartialEq, Default)]
pub enum Mode {
    #[default]
    Read,
    ReadWrite,
    #[state(rename = "w")]
    Write,
}

/// A state with everything in it.
pub fn full() -> Thread {
    Thread {
        tid: 4711,
        regs_saved: true,
        nice: -20,
        small: 255,
        port: 6379,
        address: 0x7fff_ffff_f000,
        offset: i64::MIN,
        comm: "redis-\"server\\".into(),
        xsave: (0..=255).collect(),
        mask: [1, 2, 3, 4, 5],
        ips: [1, u64::MAX, 3],
        cpus: (0..20).collect(),
        ranges: vec![0x1000, 0x2000],
        words: vec!["a".into(), String::new(), "größe\n".into()],
        exit_code: Some(0),
        path: Some(b"/tmp/\xff".to_vec()),
        label: Some(String::new()),
        r#type: Mode::ReadWrite,
        other_mode: Some(Mode::Write),
        stack: AltStack { base: 1, size: 2 },
        rseq: Some(Rseq),
        timers: (0..40)
            .map(|id| Timer {
                id,
                nested: vec![Timer::default(); 2],
            })
            .collect(),
        files: vec![
            Description::Pipe(Pipe { capacity: 65536 }),
            Description::File(Box::new(File {
                path: b"/x".to_vec(),
            })),
            Description::Old(OldFile { path: "/y".into() }),
        ],
        boxed: Some(Box::new(Rseq)),
    }
}

/// The schemas of all of it.
pub fn schemas() -> SchemaSet {
    let mut set = SchemaSet::new();
    set.add::<Thread>().unwrap();
    set
}
