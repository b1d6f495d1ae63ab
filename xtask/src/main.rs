//! The developer's one door: demo, test, bench.
fn main() {}
