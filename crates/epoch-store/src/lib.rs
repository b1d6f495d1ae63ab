//! Committed epochs on a medium
