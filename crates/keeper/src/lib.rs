//! Policy and sequencing: what to capture when
