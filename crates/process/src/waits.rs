//! System calls that our stop interrupts, and how they go on with the time that was left.
//!
//! Most calls restart by themselves after a stop (`signal(7)`). Two sorts do not:
//! - calls that return EINTR at any stop (`epoll_wait`, `sigtimedwait`, socket calls with a time
//!   limit …): when no signal is to be delivered, they are made again;
//! - calls with a relative time limit whose end only the kernel's restart block knows
//!   (`nanosleep`, `poll`, `FUTEX_WAIT`): in a program that runs on the kernel finishes them; in
//!   a restored one they are made again with the time that was left.
//!
//! The time limit of a call is an argument, but when the call began is not to be seen. It is
//! taken from the moment the thread last ran (the scheduler's `exec_start`), which for a thread
//! asleep in a call is when it fell asleep, and remembered over the stops from then on.
//!
//! # A known limit
//! A call is made again by changing the register that holds the limit, or by pointing it to a copy
//! below the red zone of the stack. The program's function that made the call sees these registers
//! changed after it, which the C calling convention allows.

/// `-EINTR` in a result register.
const EINTR: i64 = -4;
/// `-ERESTART_RESTARTBLOCK`: the kernel goes on by its restart block.
const RESTART_BLOCK: i64 = -516;
/// The bits of a futex operation that are not flags.
const FUTEX_COMMAND: u64 = 0x7f;
const FUTEX_WAIT: u64 = 0;
/// Bytes below the stack pointer that a leaf function may use (System V ABI), and as much again.
const BELOW_STACK: u64 = 256;

/// Where a call has its relative time limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// No limit: the call waits until something happens.
    None,
    /// Argument number n is an `int`, milliseconds; negative means none.
    Milliseconds(usize),
    /// Argument number n points to a `struct timespec`; null means none.
    Timespec(usize),
    /// The receive time limit of the socket in argument 0 (`SO_RCVTIMEO`).
    SocketReceive,
    /// The send time limit of the socket in argument 0 (`SO_SNDTIMEO`).
    SocketSend,
}

/// How a call was interrupted by our stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interruption {
    /// It returned EINTR and must be made again.
    Returned(Limit),
    /// The kernel has a restart block for it.
    RestartBlock(Limit),
}

/// The system call that a thread is in: number and arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// `SYS_…`.
    pub number: i64,
    /// Its arguments.
    pub args: [u64; 6],
}

/// The limit of a call that may return EINTR for no other reason than a stop.
fn returning(call: &Call) -> Option<Limit> {
    Some(match call.number {
        libc::SYS_epoll_wait | libc::SYS_epoll_pwait => Limit::Milliseconds(3),
        libc::SYS_epoll_pwait2 | libc::SYS_semtimedop => Limit::Timespec(3),
        libc::SYS_semop => Limit::None,
        libc::SYS_rt_sigtimedwait => Limit::Timespec(2),
        libc::SYS_read
        | libc::SYS_readv
        | libc::SYS_recvfrom
        | libc::SYS_recvmsg
        | libc::SYS_accept
        | libc::SYS_accept4 => Limit::SocketReceive,
        libc::SYS_write
        | libc::SYS_writev
        | libc::SYS_sendto
        | libc::SYS_sendmsg
        | libc::SYS_connect => Limit::SocketSend,
        _ => return None,
    })
}

/// The limit of a call that the kernel continues by a restart block.
fn restarting(call: &Call) -> Limit {
    match call.number {
        libc::SYS_nanosleep => Limit::Timespec(0),
        libc::SYS_clock_nanosleep => Limit::Timespec(2),
        libc::SYS_poll => Limit::Milliseconds(2),
        // The other operations have an absolute limit: made again as they are, they end in time.
        libc::SYS_futex if call.args[1] & FUTEX_COMMAND == FUTEX_WAIT => Limit::Timespec(3),
        _ => Limit::None,
    }
}

/// Whether, and how, our stop interrupted a call. `result` is the result register at the stop;
/// `deliverable` says that a signal is about to be handled, in which case EINTR is what the
/// program would have seen anyway.
#[must_use]
pub fn interruption(call: &Call, result: i64, deliverable: bool) -> Option<Interruption> {
    match result {
        _ if call.number < 0 => None,
        EINTR if !deliverable => returning(call).map(Interruption::Returned),
        RESTART_BLOCK => Some(Interruption::RestartBlock(restarting(call))),
        _ => None,
    }
}

/// The limit of a call.
#[must_use]
pub fn limit(call: &Call) -> Limit {
    returning(call).unwrap_or_else(|| restarting(call))
}

/// Whether a sleeping thread's call is one whose begin must be known if a stop comes.
#[must_use]
pub fn has_limit(call: &Call) -> bool {
    let relative = call.number != libc::SYS_clock_nanosleep || call.args[1] & 1 == 0;
    relative
        && (returning(call).is_some_and(|l| l != Limit::None) || restarting(call) != Limit::None)
}

/// Whether the kernel resumes a call by a restart block.
#[must_use]
pub fn restarts(call: &Call) -> bool {
    matches!(
        call.number,
        libc::SYS_nanosleep | libc::SYS_clock_nanosleep | libc::SYS_poll | libc::SYS_futex
    )
}

/// What must be done for a call to go on with the time that is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Again {
    /// Just make it again.
    Plain,
    /// With this value in argument `arg`.
    Argument {
        /// Which argument.
        arg: usize,
        /// Its new value.
        value: u64,
    },
    /// With a `struct timespec` of these nanoseconds at this address, and argument `arg` there.
    Timespec {
        /// Which argument.
        arg: usize,
        /// Where to write the structure.
        address: u64,
        /// The time left, nanoseconds.
        ns: u64,
    },
    /// Not at all: its time limit has passed, it returns EAGAIN.
    TimedOut,
}

/// Plans how to make a call again. `left_ns` is the time that was left, where the call has a limit
/// and it is known; `stack` is the stack pointer.
#[must_use]
pub fn again(limit: Limit, left_ns: Option<u64>, stack: u64) -> Again {
    let Some(ns) = left_ns else {
        return Again::Plain;
    };
    match limit {
        Limit::None => Again::Plain,
        // Rounded up: a program may rely on a limit never being too short.
        Limit::Milliseconds(arg) => Again::Argument {
            arg,
            value: ns.div_ceil(1_000_000).min(i32::MAX as u64),
        },
        Limit::Timespec(arg) => Again::Timespec {
            arg,
            address: (stack.saturating_sub(BELOW_STACK)) & !15,
            ns,
        },
        Limit::SocketReceive | Limit::SocketSend if ns == 0 => Again::TimedOut,
        Limit::SocketReceive | Limit::SocketSend => Again::Plain,
    }
}

/// A `struct timespec` of so many nanoseconds.
#[must_use]
pub fn timespec(ns: u64) -> [u8; 16] {
    let mut raw = [0u8; 16];
    raw[..8].copy_from_slice(&(ns / 1_000_000_000).to_ne_bytes());
    raw[8..].copy_from_slice(&(ns % 1_000_000_000).to_ne_bytes());
    raw
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(number: i64) -> Call {
        Call {
            number,
            args: [0; 6],
        }
    }

    #[test]
    fn a_signal_that_is_to_be_handled_keeps_its_eintr() {
        let c = call(libc::SYS_epoll_wait);
        assert_eq!(
            interruption(&c, EINTR, false),
            Some(Interruption::Returned(Limit::Milliseconds(3)))
        );
        assert_eq!(interruption(&c, EINTR, true), None);
        assert_eq!(interruption(&c, 5, false), None);
        assert_eq!(interruption(&call(-1), EINTR, false), None);
    }

    #[test]
    fn calls_that_must_not_be_repeated_are_left_alone() {
        assert_eq!(interruption(&call(libc::SYS_close), EINTR, false), None);
    }

    #[test]
    fn restart_blocks_are_known() {
        let c = call(libc::SYS_nanosleep);
        assert_eq!(
            interruption(&c, RESTART_BLOCK, false),
            Some(Interruption::RestartBlock(Limit::Timespec(0)))
        );
        let mut absolute = call(libc::SYS_clock_nanosleep);
        absolute.args[1] = 1;
        assert!(!has_limit(&absolute));
        assert!(has_limit(&call(libc::SYS_clock_nanosleep)));
    }

    #[test]
    fn time_left_is_rounded_up_and_written_below_the_red_zone() {
        assert_eq!(
            again(Limit::Milliseconds(3), Some(1_000_001), 0),
            Again::Argument { arg: 3, value: 2 }
        );
        let Again::Timespec { address, .. } = again(Limit::Timespec(2), Some(5), 0x1000) else {
            panic!("a timespec is expected")
        };
        assert!(address + 16 <= 0x1000 - 128 && address.is_multiple_of(16));
        assert_eq!(again(Limit::SocketReceive, Some(0), 0), Again::TimedOut);
        assert_eq!(again(Limit::SocketReceive, Some(9), 0), Again::Plain);
        assert_eq!(timespec(1_000_000_002)[8], 2);
    }
}
