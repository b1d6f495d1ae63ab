//! The kinds of process state, one file each, all of one shape.

pub mod descriptors;
