//! What is to be done to semaphores when a process ends (`SEM_UNDO`, `semop(2)`).
//!
//! Nothing lists it. But the kernel refuses an operation (`ERANGE`) that would bring what is to be
//! undone beyond its bounds, and takes a list of operations back as a whole if one of them cannot be
//! made. So the process is given lists that never succeed, and how they fail tells the number.
//!
//! # Rules
//! - The last operation of each list cannot be made, or one before it cannot: whatever the value of
//!   the semaphore has become meanwhile, nothing is changed. All of them are made while the kernel
//!   holds the set, so nobody sees anything in between.
//! - Asked is about semaphores of the program only ([`super::system_v`]).
//! - A process that shares its list with another one (`CLONE_SYSVSEM`) is refused.

use crate::ProcessError;
use crate::resources::system_v::SemaphoresState;
use outlive_linux::remote::{Arg, Batch, Results};
use outlive_linux::{Errno, sysv};
use outlive_state_tree::StateNode;

/// The largest value of a semaphore, and the most that is to be undone (`SEMVMX`, `SEMAEM`).
pub const LARGEST: i32 = 32_767;
/// Operations in one call, at most, where the kernel does not tell.
const OPERATIONS: usize = 500;
/// Operations by which one semaphore is asked about, at most.
const EACH: usize = 4;

/// What is to be added to one semaphore when a process ends.
#[derive(StateNode, Clone, Debug, PartialEq, Eq)]
#[state(compatible = "outlive,system-v-undo-v1")]
pub struct UndoState {
    /// The process.
    pub process: u32,
    /// The ID of the set.
    pub set: u32,
    /// Its place in the set.
    pub semaphore: u32,
    /// What is added; less than nothing is taken away.
    pub adjustment: i32,
}

/// An operation: which semaphore, what is added, and whether that is to be undone.
type Operation = (u32, i32, bool);

/// The arguments of `semop(2)`; none of them waits.
fn arguments(set: u32, operations: &[Operation]) -> [Arg; 3] {
    // struct sembuf: number, operation, flags.
    let encode = |&(semaphore, add, undo): &Operation| {
        let flags = libc::IPC_NOWAIT | if undo { libc::SEM_UNDO } else { 0 };
        let words = [semaphore as u16, add as u16, flags as u16];
        words.map(u16::to_ne_bytes).concat()
    };
    let list = operations.iter().flat_map(encode).collect();
    [
        Arg::Value(set.into()),
        Arg::In(list),
        Arg::Value(operations.len() as u64),
    ]
}

/// Has a process make calls.
pub type Run<'a> = &'a mut dyn FnMut(Batch) -> Result<Results, ProcessError>;

/// What a process is to undo in a set.
pub fn collect(
    process: u32,
    set: &SemaphoresState,
    run: Run<'_>,
) -> Result<Vec<UndoState>, ProcessError> {
    let id = set.object.id;
    let values: Vec<(u32, i32)> = (0u32..).zip(set.values.iter().map(|&v| v as i32)).collect();
    let mut found = Vec::new();
    for some in values.chunks(at_once()) {
        let signs = [up(some), down(some)];
        let any = exceeds(id, &signs, run)?;
        for (sign, any) in [1, -1].into_iter().zip(any) {
            for &one in some.iter().filter(|_| any) {
                let adjustment = sign * amount(id, one, sign, run)?;
                if adjustment != 0 {
                    must_be(set, one, process)?;
                    found.push(UndoState {
                        process,
                        set: id,
                        semaphore: one.0,
                        adjustment,
                    });
                }
            }
        }
    }
    Ok(found)
}

/// What was found is true of a semaphore that had this value all the time.
fn must_be(set: &SemaphoresState, (n, value): (u32, i32), pid: u32) -> Result<(), ProcessError> {
    let now = sysv::semaphore(set.object.id.cast_signed(), n);
    if now.is_ok_and(|now| now.value as i32 == value) {
        return Ok(());
    }
    Err(ProcessError::Kernel {
        pid,
        what: format!("asking what it undoes in semaphores {}", set.object.id),
        source: std::io::Error::other("somebody else changed them meanwhile"),
    })
}

/// How many semaphores are asked about at once.
fn at_once() -> usize {
    // SEMMSL, SEMMNS, SEMOPM, SEMMNI
    let limits = std::fs::read_to_string("/proc/sys/kernel/sem").unwrap_or_default();
    let operations = limits
        .split_whitespace()
        .nth(2)
        .and_then(|n| n.parse().ok());
    let operations: usize = operations.unwrap_or(OPERATIONS).min(OPERATIONS);
    (operations.saturating_sub(1) / EACH).max(1)
}

/// Exceeds the bounds if one of these is to be increased.
fn up(semaphores: &[(u32, i32)]) -> Vec<Operation> {
    let one = |&(n, value): &(u32, i32)| [(n, LARGEST - value, false), (n, -LARGEST, true)];
    let mut list: Vec<Operation> = semaphores.iter().flat_map(one).collect();
    list.extend(semaphores.last().map(|&(n, _)| (n, -1, false)));
    without_nothing(list)
}

/// Exceeds the bounds if one of these is to be decreased.
fn down(semaphores: &[(u32, i32)]) -> Vec<Operation> {
    let one = |&(n, value): &(u32, i32)| {
        let whole = [(n, LARGEST, true), (n, -LARGEST, false)];
        [(n, -value, false), whole[0], whole[1], (n, 1, true)]
    };
    let mut list: Vec<Operation> = semaphores.iter().flat_map(one).collect();
    list.extend(semaphores.last().map(|&(n, _)| (n, -2, false)));
    without_nothing(list)
}

/// Exceeds the bounds if this one is to be increased (`sign` 1) or decreased (-1) by `least` or more.
fn by_at_least((n, value): (u32, i32), sign: i32, least: i32) -> Vec<Operation> {
    let list = match (sign, least) {
        (1, _) => {
            let step = LARGEST + 1 - least;
            vec![
                (n, LARGEST - value, false),
                (n, -step, true),
                (n, step - LARGEST, false),
                (n, -1, false),
            ]
        }
        // It takes two steps to exceed the other bound by one.
        (_, 1) => down(&[(n, value)]),
        _ => {
            let step = LARGEST + 2 - least;
            vec![
                (n, -value, false),
                (n, step, true),
                (n, LARGEST - step, false),
                (n, -LARGEST, false),
                (n, -1, false),
            ]
        }
    };
    without_nothing(list)
}

/// To add nothing is to wait for nothing.
fn without_nothing(mut list: Vec<Operation>) -> Vec<Operation> {
    list.retain(|(_, add, _)| *add != 0);
    list
}

/// By how much one is to be increased or decreased.
fn amount(set: u32, one: (u32, i32), sign: i32, run: Run<'_>) -> Result<i32, ProcessError> {
    let powers: Vec<i32> = (0..15).map(|n| 1 << n).collect();
    let lists: Vec<_> = powers.iter().map(|&p| by_at_least(one, sign, p)).collect();
    let reached = exceeds(set, &lists, run)?;
    let reached = reached.iter().take_while(|is| **is).count();
    let Some(mut low) = reached.checked_sub(1).map(|at| powers[at]) else {
        return Ok(0);
    };
    let mut high = powers.get(reached).map_or(LARGEST, |p| p - 1);
    while low < high {
        let middle = high - (high - low) / 2;
        if exceeds(set, &[by_at_least(one, sign, middle)], run)?[0] {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    Ok(low)
}

/// Which of these lists exceed the bounds.
fn exceeds(set: u32, lists: &[Vec<Operation>], run: Run<'_>) -> Result<Vec<bool>, ProcessError> {
    let mut batch = Batch::new();
    let call = |list: &Vec<Operation>| batch.push(libc::SYS_semop, arguments(set, list));
    let calls: Vec<_> = lists.iter().map(call).collect();
    let answers = run(batch)?;
    let exceeds = |id| answers.value(id) == Err(Errno::RANGE);
    Ok(calls.into_iter().map(exceeds).collect())
}

/// The arguments of a call after which as much is to be undone of a semaphore, which keeps its value.
pub fn recreate(state: &UndoState, value: u32) -> [Arg; 3] {
    let (n, value) = (state.semaphore, value as i32);
    let (mut left, sign) = (state.adjustment.abs(), state.adjustment.signum());
    let mut list = Vec::new();
    while left > 0 {
        let (room, first) = if LARGEST - value >= value {
            (LARGEST - value, 1)
        } else {
            (value, -1)
        };
        let step = left.min(room);
        // What takes away is undone by adding.
        list.extend([first, -first].map(|way| (n, way * step, way != sign)));
        left -= step;
    }
    arguments(state.set, &list)
}

/// The arguments of a call by which a process has used a semaphore last that keeps its value.
pub fn touch(set: u32, semaphore: u32, value: u32) -> [Arg; 3] {
    let first = if value == 0 { 1 } else { -1 };
    arguments(set, &[first, -first].map(|way| (semaphore, way, false)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The kernel's rule (`perform_atomic_semop`): what becomes of a semaphore's value and of what is
    /// to be undone, or why nothing does.
    fn kernel(mut value: i32, mut undo: i32, list: &[Operation]) -> Result<(i32, i32), Errno> {
        for &(_, add, undoes) in list {
            assert!(i16::try_from(add).is_ok() && add != 0, "{list:?}");
            value += add;
            if value < 0 {
                return Err(Errno::AGAIN);
            }
            if value > LARGEST {
                return Err(Errno::RANGE);
            }
            if undoes {
                undo -= add;
                if !(-LARGEST - 1..=LARGEST).contains(&undo) {
                    return Err(Errno::RANGE);
                }
            }
        }
        Ok((value, undo))
    }

    fn operations(arguments: &[Arg; 3]) -> Vec<Operation> {
        let Arg::In(bytes) = &arguments[1] else {
            panic!("{arguments:?}")
        };
        let word = |b: &[u8]| i16::from_ne_bytes([b[0], b[1]]);
        let one = |b: &[u8]| {
            let undoes = i32::from(word(&b[4..])) & libc::SEM_UNDO != 0;
            (word(b) as u32, word(&b[2..]).into(), undoes)
        };
        bytes.chunks(6).map(one).collect()
    }

    proptest! {
        #[test]
        fn questions_never_succeed_and_tell_the_number(
            value in prop_oneof![Just(0), Just(1), Just(LARGEST), 0..=LARGEST],
            undo in prop_oneof![Just(0), Just(1), Just(-1), -LARGEST..=LARGEST],
            now in prop_oneof![Just(0), Just(LARGEST), 0..=LARGEST],
            least in prop_oneof![Just(1), Just(2), Just(LARGEST), 1..=LARGEST],
        ) {
            let lists = [
                (up(&[(0, value)]), undo > 0),
                (down(&[(0, value)]), undo < 0),
                (by_at_least((0, value), 1, least), undo >= least),
                (by_at_least((0, value), -1, least), -undo >= least),
            ];
            for (list, exceeds) in lists {
                let error = if exceeds { Errno::RANGE } else { Errno::AGAIN };
                prop_assert_eq!(kernel(value, undo, &list), Err(error), "{:?}", list);
                // Nor where somebody else changed the value meanwhile.
                prop_assert!(kernel(now, undo, &list).is_err(), "{:?}", list);
            }
        }

        #[test]
        fn what_is_to_be_undone_is_made_and_the_value_stays(
            value in 0..=LARGEST,
            adjustment in -LARGEST..=LARGEST,
        ) {
            let state = UndoState { process: 1, set: 2, semaphore: 3, adjustment };
            let list = operations(&recreate(&state, value as u32));
            prop_assert_eq!(kernel(value, 0, &list), Ok((value, adjustment)));
            let list = operations(&touch(2, 3, value as u32));
            prop_assert_eq!(kernel(value, adjustment, &list), Ok((value, adjustment)));
        }
    }
}
