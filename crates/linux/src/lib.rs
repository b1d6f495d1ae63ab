//! Thin, safe, typed wrappers for the Linux interfaces that Outlive needs
