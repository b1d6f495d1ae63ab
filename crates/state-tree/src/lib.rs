//! The state tree: flattened device trees that describe saved state
