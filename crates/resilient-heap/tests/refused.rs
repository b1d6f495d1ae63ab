//! What the types refuse, each with the message that is shown. The first one must compile: it is what the
//! others break.
//!
//! The messages are the compiler's; where another version words them differently,
//! `TRYBUILD=overwrite cargo test -p resilient-heap --test refused` writes them anew. A program that compiles
//! fails this test whatever the messages are.

#[test]
fn what_would_dangle_does_not_compile() {
    let cases = trybuild::TestCases::new();
    cases.pass("tests/refused/what_is_right.rs");
    for case in CASES {
        cases.compile_fail(format!("tests/refused/{case}.rs"));
    }
}

/// Named one by one, so that none is lost unnoticed.
const CASES: &[&str] = &[
    "a_box",
    "a_cell",
    "a_change_through_a_readers_reference",
    "a_change_while_reading",
    "a_destructor",
    "a_file",
    "a_function",
    "a_key_without_an_order",
    "a_map_changed_while_it_is_iterated",
    "a_pointer_kept_after_the_transaction",
    "a_pointer_of_another_heap",
    "a_pointer_out_of_a_nested_transaction",
    "a_pointer_returned",
    "a_raw_pointer",
    "a_reference",
    "a_reference_across_a_nested_transaction",
    "a_reference_that_leaves",
    "a_root_that_leaves",
    "a_second_pointer_to_an_owned_value",
    "a_string",
    "a_transaction_in_another_thread",
    "a_transaction_within_another_of_the_same_heap",
    "a_usize",
    "a_vec",
    "an_arc",
    "an_atomic",
    "an_enum_with_fields",
    "no_representation",
    "packed",
    "padding",
    "two_heaps_in_one_type",
    "two_references_for_changing",
];
