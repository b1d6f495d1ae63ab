//! The kinds of process state, one file each, all of one shape.

pub mod attributes;
pub mod credentials;
pub mod descriptors;
pub mod keyrings;
pub mod landlock;
pub mod machine;
pub mod memory;
mod protection_keys;
pub mod semaphore_undo;
pub mod shared;
pub mod signals;
pub mod system_v;
pub mod thread;
pub mod timers;
