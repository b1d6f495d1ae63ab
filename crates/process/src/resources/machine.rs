//! What a program found in its machine and may rely on for ever: the features of the processor
//! (a C library chooses its functions by them once, at start), the layout of extended registers,
//! and the vDSO, the code that the kernel gives to every process.
//!
//! All of it is the same for every program of a machine, and is read once.
//!
//! # Rules
//! - A feature counts if programs can see it and fault without it. What only makes something
//!   faster, or belongs to the kernel, does not count.
//! - An image is restored where no feature is missing and every register state that is in use
//!   exists. States may lie elsewhere: processors of different makers put them at different
//!   offsets, see [`XstateLayout`].

use crate::{ProcessError, vdso};
use outlive_linux::processor::{cpuid, enabled_states};
use outlive_linux::{maps, memory};
use outlive_state_tree::StateNode;

/// The machine.
#[derive(StateNode, Clone, Debug, PartialEq, Eq)]
#[state(compatible = "outlive,machine-v1")]
pub struct MachineState {
    /// The vDSO: an ELF shared object, as it lies in memory. Empty where the kernel gives none.
    pub vdso: Vec<u8>,
    /// Its GNU build ID.
    pub vdso_build_id: Option<Vec<u8>>,
    /// Features of the processor, by the names that `/proc/cpuinfo` has for them.
    pub features: Vec<String>,
    /// Register states in the standard XSAVE format beyond x87 and SSE: for each its number, its
    /// offset and its length in bytes.
    pub register_states: Vec<u32>,
    /// Length of that format, bytes.
    pub register_bytes: u32,
}

/// Where the bit of a feature stands: leaf, subleaf, register (0 EAX … 3 EDX), bit.
type Place = (u32, u32, usize, u32);

/// The features that count, see the rules above.
const FEATURES: &[(&str, Place)] = &[
    ("pni", (1, 0, 2, 0)),
    ("pclmulqdq", (1, 0, 2, 1)),
    ("ssse3", (1, 0, 2, 9)),
    ("fma", (1, 0, 2, 12)),
    ("cx16", (1, 0, 2, 13)),
    ("sse4_1", (1, 0, 2, 19)),
    ("sse4_2", (1, 0, 2, 20)),
    ("movbe", (1, 0, 2, 22)),
    ("popcnt", (1, 0, 2, 23)),
    ("aes", (1, 0, 2, 25)),
    // OSXSAVE: the kernel switched XSAVE on.
    ("xsave", (1, 0, 2, 27)),
    ("avx", (1, 0, 2, 28)),
    ("f16c", (1, 0, 2, 29)),
    ("rdrand", (1, 0, 2, 30)),
    ("fsgsbase", (7, 0, 1, 0)),
    ("bmi1", (7, 0, 1, 3)),
    ("avx2", (7, 0, 1, 5)),
    ("bmi2", (7, 0, 1, 8)),
    ("rtm", (7, 0, 1, 11)),
    ("avx512f", (7, 0, 1, 16)),
    ("avx512dq", (7, 0, 1, 17)),
    ("rdseed", (7, 0, 1, 18)),
    ("adx", (7, 0, 1, 19)),
    ("avx512ifma", (7, 0, 1, 21)),
    ("clflushopt", (7, 0, 1, 23)),
    ("clwb", (7, 0, 1, 24)),
    ("avx512cd", (7, 0, 1, 28)),
    ("sha_ni", (7, 0, 1, 29)),
    ("avx512bw", (7, 0, 1, 30)),
    ("avx512vl", (7, 0, 1, 31)),
    ("avx512vbmi", (7, 0, 2, 1)),
    // OSPKE: the kernel switched protection keys on.
    ("ospke", (7, 0, 2, 4)),
    ("waitpkg", (7, 0, 2, 5)),
    ("avx512_vbmi2", (7, 0, 2, 6)),
    ("gfni", (7, 0, 2, 8)),
    ("vaes", (7, 0, 2, 9)),
    ("vpclmulqdq", (7, 0, 2, 10)),
    ("avx512_vnni", (7, 0, 2, 11)),
    ("avx512_bitalg", (7, 0, 2, 12)),
    ("avx512_vpopcntdq", (7, 0, 2, 14)),
    ("rdpid", (7, 0, 2, 22)),
    ("movdiri", (7, 0, 2, 27)),
    ("movdir64b", (7, 0, 2, 28)),
    ("avx512_vp2intersect", (7, 0, 3, 8)),
    ("serialize", (7, 0, 3, 14)),
    ("amx_bf16", (7, 0, 3, 22)),
    ("avx512_fp16", (7, 0, 3, 23)),
    ("amx_tile", (7, 0, 3, 24)),
    ("amx_int8", (7, 0, 3, 25)),
    ("sha512", (7, 1, 0, 0)),
    ("sm3", (7, 1, 0, 1)),
    ("sm4", (7, 1, 0, 2)),
    ("avx_vnni", (7, 1, 0, 4)),
    ("avx512_bf16", (7, 1, 0, 5)),
    ("cmpccxadd", (7, 1, 0, 7)),
    ("amx_fp16", (7, 1, 0, 21)),
    ("avx_ifma", (7, 1, 0, 23)),
    ("avx_vnni_int8", (7, 1, 3, 4)),
    ("avx_ne_convert", (7, 1, 3, 5)),
    ("avx_vnni_int16", (7, 1, 3, 10)),
    ("avx10", (7, 1, 3, 19)),
    ("apx", (7, 1, 3, 21)),
    ("xsaveopt", (0xd, 1, 0, 0)),
    ("xsavec", (0xd, 1, 0, 1)),
    ("xgetbv1", (0xd, 1, 0, 2)),
    ("lahf_lm", (0x8000_0001, 0, 2, 0)),
    ("abm", (0x8000_0001, 0, 2, 5)),
    ("sse4a", (0x8000_0001, 0, 2, 6)),
    ("xop", (0x8000_0001, 0, 2, 11)),
    ("fma4", (0x8000_0001, 0, 2, 16)),
    ("tbm", (0x8000_0001, 0, 2, 21)),
    ("mwaitx", (0x8000_0001, 0, 2, 29)),
    ("rdtscp", (0x8000_0001, 0, 3, 27)),
    ("3dnow", (0x8000_0001, 0, 3, 31)),
    ("clzero", (0x8000_0008, 0, 1, 0)),
    ("rdpru", (0x8000_0008, 0, 1, 4)),
];

/// Most states that the format has room for.
const STATES: u32 = 63;

impl MachineState {
    /// This machine.
    pub fn here() -> Result<Self, ProcessError> {
        let pid = std::process::id();
        let kernel = |what: &str, e| crate::target::gone_or(pid, what, e);
        let ours = maps::read(pid).map_err(|e| kernel("reading own mappings", e))?;
        let mut vdso = Vec::new();
        if let Some(m) = ours.iter().find(|m| m.name == b"[vdso]") {
            vdso = vec![0; m.len() as usize];
            memory::read_exact(pid, m.start, &mut vdso)
                .map_err(|e| kernel("reading the vDSO", e.into()))?;
        }
        let layout = XstateLayout::here();
        Ok(Self {
            vdso_build_id: vdso::build_id(&vdso),
            vdso,
            features: features(),
            register_states: layout.states.iter().flatten().copied().collect(),
            register_bytes: layout.bytes,
        })
    }

    /// Features that the image's machine had and this one lacks.
    #[must_use]
    pub fn missing_here(&self) -> Vec<String> {
        let here = features();
        self.features
            .iter()
            .filter(|f| !here.contains(f))
            .cloned()
            .collect()
    }
}

fn features() -> Vec<String> {
    let has = |&&(_, (leaf, subleaf, register, bit)): &&(&str, Place)| {
        // A subleaf beyond those that there are is answered with anything.
        (leaf != 7 || subleaf <= cpuid(7, 0)[0]) && cpuid(leaf, subleaf)[register] & 1 << bit != 0
    };
    let found = FEATURES.iter().filter(has);
    found.map(|(name, _)| (*name).to_owned()).collect()
}

/// Where each register state lies in the standard XSAVE format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct XstateLayout {
    /// Number, offset, length in bytes.
    states: Vec<[u32; 3]>,
    /// Length of the whole.
    bytes: u32,
}

/// x87 and SSE, and the header behind them, lie in the same place everywhere.
const LEGACY: usize = 512 + 64;
/// Where the kernel notes the states that are switched on.
const SWITCHED_ON: usize = 464;
/// Which states differ from their initial values.
const IN_USE: usize = 512;
/// Longest area that is believed of an image.
const LONGEST: u32 = 64 * 1024;
/// Protection keys' register.
const PKRU: u32 = 9;
/// Values of it by which no key protects anything from a program that has made no keys.
const PKRU_IDLE: [u32; 2] = [0, 0x5555_5554];

impl XstateLayout {
    /// The layout of this machine.
    #[must_use]
    pub fn here() -> Self {
        let enabled = enabled_states();
        let states = (2..STATES).filter(|n| enabled & 1 << n != 0).map(|n| {
            let [length, offset, ..] = cpuid(0xd, n);
            [n, offset, length]
        });
        Self {
            states: states.collect(),
            bytes: cpuid(0xd, 0)[1],
        }
    }

    /// The layout of an image's machine; an image is hostile.
    pub fn of(saved: &MachineState) -> Result<Self, ProcessError> {
        let bad = || ProcessError::Image("machine: register states make no sense".into());
        let (states, rest) = saved.register_states.as_chunks::<3>();
        let fits = |&[number, offset, length]: &[u32; 3]| {
            (2..STATES).contains(&number)
                && offset as usize >= LEGACY
                && offset
                    .checked_add(length)
                    .is_some_and(|end| end <= saved.register_bytes)
        };
        let sane = saved.register_bytes <= LONGEST && states.len() <= STATES as usize;
        if !sane || !rest.is_empty() || !states.iter().all(fits) {
            return Err(bad());
        }
        Ok(Self {
            states: states.to_vec(),
            bytes: saved.register_bytes,
        })
    }

    fn find(&self, number: u32) -> Option<(usize, usize)> {
        let state = self.states.iter().find(|s| s[0] == number);
        state.map(|s| (s[1] as usize, s[2] as usize))
    }

    /// The area of a thread as a machine with the layout `to` has it. The inner error names a
    /// state that is in use and cannot be there.
    pub fn convert(&self, area: &[u8], to: &Self) -> Result<Result<Vec<u8>, String>, ProcessError> {
        if self == to && area.len() == to.bytes as usize {
            return Ok(Ok(area.to_vec()));
        }
        if area.len() != self.bytes as usize || area.len() < LEGACY {
            let what = format!("extended registers are {} bytes long", area.len());
            return Err(ProcessError::Image(what));
        }
        let mut new = vec![0u8; (to.bytes as usize).max(LEGACY)];
        new[..LEGACY].copy_from_slice(&area[..LEGACY]);
        let mut in_use = word(area, IN_USE);
        for number in (2..64).filter(|n| in_use >> n & 1 != 0).collect::<Vec<_>>() {
            let contents = self
                .find(number)
                .and_then(|(at, length)| area.get(at..at + length))
                .ok_or_else(|| {
                    ProcessError::Image(format!("register state {number} has no place"))
                })?;
            let place = to
                .find(number)
                .filter(|(_, length)| *length == contents.len());
            match place.and_then(|(at, length)| new.get_mut(at..at + length)) {
                Some(room) => room.copy_from_slice(contents),
                None if is_idle(number, contents) => in_use &= !(1 << number),
                None => return Ok(Err(state_name(number))),
            }
        }
        let enabled = to.states.iter().fold(3u64, |all, s| all | 1 << s[0]);
        new[SWITCHED_ON..SWITCHED_ON + 8].copy_from_slice(&enabled.to_le_bytes());
        new[IN_USE..IN_USE + 8].copy_from_slice(&in_use.to_le_bytes());
        Ok(Ok(new))
    }
}

/// Whether a state says no more than that it is not used.
fn is_idle(number: u32, contents: &[u8]) -> bool {
    let zero = contents.iter().all(|&b| b == 0);
    zero || number == PKRU
        && PKRU_IDLE
            .iter()
            .any(|v| contents.starts_with(&v.to_le_bytes()))
}

fn state_name(number: u32) -> String {
    match number {
        2 => "the upper halves of the AVX registers".into(),
        3 | 4 => "the MPX registers".into(),
        5..=7 => "the AVX-512 registers".into(),
        PKRU => "the register of protection keys (PKRU)".into(),
        17 | 18 => "the AMX tiles".into(),
        19 => "the APX registers".into(),
        n => format!("register state {n}"),
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let word = bytes.get(at..at + 8).and_then(|b| b.try_into().ok());
    u64::from_le_bytes(word.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use outlive_state_tree::{from_fdt, to_fdt};
    use proptest::prelude::*;

    fn layout(states: &[[u32; 3]], bytes: u32) -> XstateLayout {
        XstateLayout {
            states: states.to_vec(),
            bytes,
        }
    }

    /// AVX, the AVX-512 states and PKRU where one maker, and where another maker puts them.
    fn one() -> XstateLayout {
        let states = [
            [2, 576, 256],
            [5, 1088, 64],
            [6, 1152, 512],
            [7, 1664, 1024],
            [9, 2688, 8],
        ];
        layout(&states, 2696)
    }

    fn other() -> XstateLayout {
        let states = [
            [2, 576, 256],
            [5, 832, 64],
            [6, 896, 512],
            [7, 1408, 1024],
            [9, 2432, 8],
        ];
        layout(&states, 2440)
    }

    fn area(layout: &XstateLayout, in_use: u64) -> Vec<u8> {
        let mut area = vec![0u8; layout.bytes as usize];
        area[..SWITCHED_ON].fill(0x11);
        area[IN_USE..IN_USE + 8].copy_from_slice(&in_use.to_le_bytes());
        let enabled = layout.states.iter().fold(3u64, |all, s| all | 1 << s[0]);
        area[SWITCHED_ON..SWITCHED_ON + 8].copy_from_slice(&enabled.to_le_bytes());
        for &[n, at, length] in layout.states.iter().filter(|s| in_use >> s[0] & 1 != 0) {
            area[at as usize..(at + length) as usize].fill(0x80 | n as u8);
        }
        area
    }

    #[test]
    fn this_machine_is_described_and_lacks_nothing_of_itself() {
        let here = MachineState::here().unwrap();
        assert_eq!(here.missing_here(), Vec::<String>::new());
        assert!(
            here.features.iter().any(|f| f == "xsave"),
            "{:?}",
            here.features
        );
        assert!(here.vdso.starts_with(b"\x7fELF"));
        assert!(here.vdso_build_id.is_some());
        let fdt = to_fdt(&here).unwrap();
        assert_eq!(from_fdt::<MachineState>(&fdt).unwrap(), here);
        assert_eq!(XstateLayout::of(&here).unwrap(), XstateLayout::here());
    }

    #[test]
    fn features_agree_with_what_the_standard_library_finds() {
        let here = features();
        let has = |name: &str| here.iter().any(|f| f == name);
        for (name, found) in [
            ("sse4_2", std::is_x86_feature_detected!("sse4.2")),
            ("popcnt", std::is_x86_feature_detected!("popcnt")),
            ("aes", std::is_x86_feature_detected!("aes")),
            ("bmi1", std::is_x86_feature_detected!("bmi1")),
            ("bmi2", std::is_x86_feature_detected!("bmi2")),
            ("sha_ni", std::is_x86_feature_detected!("sha")),
            ("abm", std::is_x86_feature_detected!("lzcnt")),
            ("rdseed", std::is_x86_feature_detected!("rdseed")),
            ("adx", std::is_x86_feature_detected!("adx")),
            ("pclmulqdq", std::is_x86_feature_detected!("pclmulqdq")),
            ("sse4a", std::is_x86_feature_detected!("sse4a")),
        ] {
            assert_eq!(has(name), found, "{name}");
        }
    }

    #[test]
    fn a_missing_feature_is_named() {
        let mut saved = MachineState::here().unwrap();
        saved.features.push("of-tomorrow".into());
        assert_eq!(saved.missing_here(), ["of-tomorrow"]);
    }

    #[test]
    fn states_move_to_where_the_other_processor_has_them() {
        let all = 0b10_1110_0111;
        let there = one()
            .convert(&area(&one(), all), &other())
            .unwrap()
            .unwrap();
        assert_eq!(there, area(&other(), all));
        let back = other().convert(&there, &one()).unwrap().unwrap();
        assert_eq!(back, area(&one(), all));
    }

    #[test]
    fn a_state_in_use_must_exist_and_an_idle_one_need_not() {
        let small = layout(&[[2, 576, 256]], 832);
        let name = one().convert(&area(&one(), 0b10_0111), &small).unwrap();
        assert_eq!(name, Err("the AVX-512 registers".to_owned()));
        // Protection keys as Linux leaves them in a program that uses none.
        let mut idle = area(&one(), 0b10_0000_0111);
        idle[2688..2696].copy_from_slice(&0x5555_5554u64.to_le_bytes());
        let there = one().convert(&idle, &small).unwrap().unwrap();
        assert_eq!(there, area(&small, 0b111));
    }

    proptest! {
        #[test]
        fn hostile_layouts_and_areas_are_errors_at_worst(
            states in prop::collection::vec(any::<u32>(), 0..12),
            small in prop::collection::vec(0u32..3000, 0..12),
            bytes in 0u32..4000,
            area in prop::collection::vec(any::<u8>(), 0..4000),
            exact in any::<bool>(),
        ) {
            let mut machine = MachineState::here().unwrap();
            for states in [states, small] {
                machine.register_states = states;
                machine.register_bytes = bytes;
                if let Ok(layout) = XstateLayout::of(&machine) {
                    let mut area = area.clone();
                    if exact {
                        area.resize(bytes as usize, 0xff);
                    }
                    let _ = layout.convert(&area, &one());
                }
            }
        }
    }
}
