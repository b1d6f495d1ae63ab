//! Derive macro of the state tree
