//! Media: where bytes survive
