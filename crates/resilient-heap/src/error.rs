//! What can go wrong, and who is to blame.

use alloc::string::String;
use core::fmt;

/// An error of the heap.
///
/// # Who is to blame
/// The caller: `NotAHeap`, `Layout`, `Full`, `TooLarge`, `TransactionTooLarge`, `TooDeep`, `Aborted`,
/// `WithinReading`.
/// The medium: `Memory`, `Damaged`, `Lost`, `Halted`, `File`. Whoever wrote the bytes: `Invalid`; whoever changed a
/// file: `Replaced`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// The memory answered with an error.
    Memory {
        /// What was tried.
        what: &'static str,
        /// The operating system's error number, or 0.
        code: i32,
    },
    /// The memory holds something else, or is damaged beyond recognition. Nothing was changed.
    NotAHeap,
    /// The heap was written with other types.
    Layout {
        /// The types as they were written.
        stored: String,
        /// The types of this program.
        wanted: String,
    },
    /// A part that holds the heap together cannot be read.
    Damaged {
        /// Which part.
        what: &'static str,
        /// Where, in bytes from the beginning.
        at: usize,
    },
    /// Data is damaged beyond what the code corrects. Nothing of it is shown.
    Lost {
        /// Where, in bytes from the beginning.
        at: usize,
    },
    /// Bytes that pass their checks but are no value of their type: somebody else wrote them.
    Invalid {
        /// What is wrong.
        what: &'static str,
        /// Where, in bytes from the beginning.
        at: usize,
    },
    /// There is no room left.
    Full {
        /// Bytes that were wanted.
        wanted: usize,
    },
    /// More in one piece than a zone holds.
    TooLarge {
        /// Bytes that were wanted.
        wanted: usize,
        /// The most that one piece may have, in bytes.
        most: usize,
    },
    /// The transaction changed more than the log holds.
    TransactionTooLarge {
        /// Lines of 64 bytes that changed.
        lines: usize,
        /// The most that one transaction may change.
        most: usize,
    },
    /// Transactions are nested too deeply.
    TooDeep,
    /// The transaction was given up by its own code, for this reason.
    Aborted(&'static str),
    /// A thread would write to a heap that it is reading: the commit would wait for ever.
    WithinReading,
    /// The system refused something with a file that the heap refers to.
    File {
        /// The file.
        path: String,
        /// What was refused.
        what: &'static str,
        /// The error number of the system.
        code: i32,
    },
    /// A file that the heap refers to is not as it was left. Nothing was changed.
    Replaced {
        /// The file.
        path: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// An earlier commit failed half-way in the memory, so that nobody knows what is durable. Open
    /// the heap again.
    Halted,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory { what, code: 0 } => write!(f, "the memory refused: {what}"),
            Self::Memory { what, code } => write!(f, "the memory refused: {what} (error {code})"),
            Self::NotAHeap => f.write_str(
                "this is no resilient heap; choose another place, or empty this one to begin anew",
            ),
            Self::Layout { stored, wanted } => write!(
                f,
                "the heap was written with other types; use the program that wrote it\n\
                 written:\n{stored}now:\n{wanted}"
            ),
            Self::Damaged { what, at } => {
                write!(f, "the {what} at byte {at} is damaged beyond correction")
            }
            Self::Lost { at } => write!(f, "the data at byte {at} is lost beyond correction"),
            Self::Invalid { what, at } => write!(f, "at byte {at}: {what}"),
            Self::Full { wanted } => write!(f, "no room left for {wanted} bytes"),
            Self::TooLarge { wanted, most } => {
                write!(f, "{wanted} bytes in one piece; a zone holds {most}")
            }
            Self::TransactionTooLarge { lines, most } => write!(
                f,
                "the transaction changes {lines} lines, the log holds {most}; change less at once, \
                 or make the heap with a larger log"
            ),
            Self::TooDeep => f.write_str("transactions are nested too deeply"),
            Self::Aborted(why) => write!(f, "transaction given up: {why}"),
            Self::WithinReading => f.write_str(
                "a thread that reads the heap cannot write to it; end the reading first",
            ),
            Self::File { path, what, code } => write!(f, "{path}: {what} failed (error {code})"),
            Self::Replaced { path, why } => write!(
                f,
                "{path}: {why}; put the file back as it was, or open another one"
            ),
            Self::Halted => f.write_str("an earlier commit failed; open the heap again"),
        }
    }
}

impl core::error::Error for Error {}
