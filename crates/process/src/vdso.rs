//! The vDSO of a kernel, and how a program that knows the one of another kernel gets on with it.
//!
//! Every process has this small shared object from its kernel. C libraries look its functions up
//! once and keep their addresses; where it lies is told to a program at its start only. So under
//! another kernel the old object stays where it was, as ordinary memory, and each of its functions
//! begins with a jump to the same function of the new kernel, whose object lies elsewhere
//! ([`Bridge`]). Where the new kernel has no such function, the system call that it stands for is
//! made instead; what needs no kernel at all stays as it is.
//!
//! # Rules
//! - Images under the same kernel see nothing of this.
//! - The old object comes from an image and is hostile: nothing outside its own bytes is written.
//! - A function of which neither can be had is refused by name.
//!
//! # In the middle of a function
//! A thread, or a signal handler's caller, may have been inside the old object when it was saved.
//! Its data pages become zeros, by which the old code sees that the clock was changed meanwhile,
//! finds no time source, and makes the system call. The coarse clocks and `time` need no time
//! source and would read zeros: a thread that stands there is refused when it is made again, before
//! anything runs (`restore/leave.rs`). Where only a signal handler's return leads back into such a
//! function, that call gives a time of zero; and where it leads to the first instructions of any
//! function, which are written over, the program ends by a signal.

use object::read::elf::ElfFile64;
use object::{Endianness, Object, ObjectSegment, ObjectSymbol, SymbolKind};
use std::collections::BTreeMap;

/// Longest object that is believed.
const LONGEST: usize = 1 << 20;

/// The GNU build ID of a vDSO.
pub fn build_id(object: &[u8]) -> Option<Vec<u8>> {
    let file = ElfFile64::<Endianness>::parse(object).ok()?;
    file.build_id().ok()?.map(<[u8]>::to_vec)
}

/// A function: where it begins, and its names.
struct Function {
    at: u64,
    /// Bytes that may be written over.
    room: u64,
    names: Vec<String>,
}

/// The functions of an object, by address.
fn functions(object: &[u8]) -> Result<Vec<Function>, String> {
    if object.len() > LONGEST {
        return Err(format!("it is {} bytes long", object.len()));
    }
    let file = ElfFile64::<Endianness>::parse(object).map_err(|e| e.to_string())?;
    let base = file.segments().next().map_or(0, |s| s.address());
    let mut found: BTreeMap<u64, (u64, Vec<String>)> = BTreeMap::new();
    for symbol in file.dynamic_symbols() {
        if symbol.kind() != SymbolKind::Text || !symbol.is_definition() {
            continue;
        }
        let name = symbol.name().map_err(|e| e.to_string())?.to_owned();
        let at = symbol.address().wrapping_sub(base);
        let end = at.checked_add(symbol.size());
        if end.is_none_or(|end| end > object.len() as u64) {
            return Err(format!("its function {name} lies outside of it"));
        }
        let entry = found.entry(at).or_default();
        entry.0 = entry.0.max(symbol.size());
        entry.1.push(name);
    }
    let starts: Vec<u64> = found.keys().copied().collect();
    let of = |(n, (at, (size, names))): (usize, (u64, (u64, Vec<String>)))| {
        // Functions are aligned; what lies between two of them is never executed.
        let next = starts.get(n + 1).copied().unwrap_or(at + size);
        let room = at.saturating_add(size).next_multiple_of(16).min(next) - at;
        let room = room.min(object.len() as u64 - at);
        Function { at, room, names }
    };
    Ok(found.into_iter().enumerate().map(of).collect())
}

/// What a function does instead of what it did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Instead {
    /// Goes on at this offset of the new object.
    Jump(u64),
    /// Makes this system call with the arguments as they are.
    Call(u32),
    /// As `__vdso_getrandom` where it has no state: a question for its state's form fails.
    Random,
    /// What it did: it reads no data of the kernel, and helps itself.
    Same,
}

/// How the vDSO of an image leads to the one of this kernel.
#[derive(Clone, Debug)]
pub struct Bridge {
    old: Vec<u8>,
    functions: Vec<(u64, Instead)>,
}

/// What serves for a function that this kernel does not have.
fn call_of(name: &str) -> Option<Instead> {
    let number = match name.strip_prefix("__vdso_").unwrap_or(name) {
        "clock_gettime" => libc::SYS_clock_gettime,
        "clock_getres" => libc::SYS_clock_getres,
        "gettimeofday" => libc::SYS_gettimeofday,
        "time" => libc::SYS_time,
        "getcpu" => libc::SYS_getcpu,
        "getrandom" => return Some(Instead::Random),
        // An instruction of the processor, and an exchange in the program's own memory. That the
        // kernel knows where the latter lies closes a gap for a thread that is killed within;
        // under a kernel without the function the gap is as wide as it was before there was one.
        "sgx_enter_enclave"
        | "futex_robust_list32_try_unlock"
        | "futex_robust_list64_try_unlock" => return Some(Instead::Same),
        _ => return None,
    };
    u32::try_from(number).ok().map(Instead::Call)
}

impl Bridge {
    /// Leads from an old object to a new one; the error says what is not possible.
    pub fn new(old: &[u8], new: &[u8]) -> Result<Self, String> {
        let unknown =
            |whose: &str, e: String| format!("the vDSO of {whose} is not understood: {e}");
        let there = functions(new).map_err(|e| unknown("this kernel", e))?;
        let here = functions(old).map_err(|e| unknown("the image", e))?;
        let mut bridge = Vec::with_capacity(here.len());
        for function in &here {
            let same = |f: &&Function| f.names.iter().any(|n| function.names.contains(n));
            let instead = match there.iter().find(same) {
                Some(new) => Some(Instead::Jump(new.at)),
                None => function.names.iter().find_map(|n| call_of(n)),
            };
            let name = function.names.join(", ");
            let instead =
                instead.ok_or_else(|| format!("this kernel's vDSO has no function {name}"))?;
            if code(instead, 0).len() as u64 > function.room {
                return Err(format!("the function {name} of the old vDSO is too short"));
            }
            bridge.push((function.at, instead));
        }
        Ok(Self {
            old: old.to_vec(),
            functions: bridge,
        })
    }

    /// The old object as it was.
    #[must_use]
    pub fn original(&self) -> &[u8] {
        &self.old
    }

    /// The contents of the old object when the new one lies at `new_at`.
    #[must_use]
    pub fn contents(&self, new_at: u64) -> Vec<u8> {
        let mut contents = self.old.clone();
        for &(at, instead) in &self.functions {
            let code = code(instead, new_at);
            if let Some(room) = contents.get_mut(at as usize..at as usize + code.len()) {
                room.copy_from_slice(&code);
            }
        }
        contents
    }
}

/// Machine code. Registers with arguments stay as they are, and so does the stack.
fn code(instead: Instead, new_at: u64) -> Vec<u8> {
    const SYSCALL: [u8; 2] = [0x0f, 0x05];
    const RET: u8 = 0xc3;
    // mov eax, N
    let load = |n: u32| [&[0xb8][..], &n.to_le_bytes()].concat();
    // mov rax, N with the sign extended
    let load_error = |e: i32| [&[0x48, 0xc7, 0xc0][..], &(-e).to_le_bytes()].concat();
    match instead {
        Instead::Jump(offset) => {
            // jmp [rip + 0], and the address behind it
            let to = new_at.wrapping_add(offset);
            [&[0xff, 0x25, 0, 0, 0, 0][..], &to.to_le_bytes()].concat()
        }
        Instead::Call(number) => [&load(number)[..], &SYSCALL, &[RET]].concat(),
        Instead::Same => Vec::new(),
        Instead::Random => {
            let call = [&load(libc::SYS_getrandom as u32)[..], &SYSCALL, &[RET]].concat();
            // cmp r8, -1; je behind the call
            let asks = [0x49, 0x83, 0xf8, 0xff, 0x74, call.len() as u8];
            [&asks[..], &call, &load_error(libc::ENOSYS), &[RET]].concat()
        }
    }
}

#[cfg(test)]
mod tests;
