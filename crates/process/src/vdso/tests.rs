use super::*;
use crate::resources::machine::MachineState;
use proptest::prelude::*;

fn here() -> Vec<u8> {
    MachineState::here().unwrap().vdso
}

fn place(object: &[u8], name: &str) -> u64 {
    let functions = functions(object).unwrap();
    let of_name = |f: &&Function| f.names.iter().any(|n| n == name);
    functions.iter().find(of_name).unwrap().at
}

/// Renames a function, under all names that end so, in the object's table of names.
fn rename(object: &mut [u8], from: &str, to: &str) {
    let name = [from.as_bytes(), &[0]].concat();
    let found = |w: &[u8]| w == name;
    while let Some(at) = object.windows(name.len()).position(found) {
        object[at..at + to.len()].copy_from_slice(to.as_bytes());
    }
}

#[test]
fn every_function_of_this_kernel_leads_to_itself() {
    let object = here();
    let bridge = Bridge::new(&object, &object).unwrap();
    assert!(bridge.functions.len() >= 4, "{:?}", bridge.functions);
    for (at, instead) in &bridge.functions {
        assert_eq!(*instead, Instead::Jump(*at));
    }
    let at = place(&object, "__vdso_clock_gettime");
    let contents = bridge.contents(0x1234_5678_9000);
    let entry = &contents[at as usize..at as usize + 14];
    let mut jump = vec![0xff, 0x25, 0, 0, 0, 0];
    jump.extend_from_slice(&(0x1234_5678_9000 + at).to_le_bytes());
    assert_eq!(entry, jump);
    // The headers, by which programs look functions up later, stay.
    assert_eq!(
        place(&contents, "__vdso_clock_gettime"),
        place(&object, "__vdso_clock_gettime")
    );
}

#[test]
fn a_function_that_is_gone_becomes_its_system_call() {
    let old = here();
    let mut new = old.clone();
    rename(&mut new, "__vdso_getcpu", "__vDSO_getxxx");
    rename(&mut new, "getcpu", "getxxx");
    rename(&mut new, "clock_getres", "clock_getxxx");
    let bridge = Bridge::new(&old, &new).unwrap();
    let calls = bridge
        .functions
        .iter()
        .filter(|f| matches!(f.1, Instead::Call(_)));
    assert_eq!(calls.count(), 2, "{:?}", bridge.functions);
    let at = place(&old, "__vdso_getcpu") as usize;
    let code = [0xb8, 0x35, 0x01, 0, 0, 0x0f, 0x05, 0xc3];
    assert_eq!(bridge.contents(0x1000)[at..at + code.len()], code);
}

#[test]
fn what_needs_no_kernel_stays() {
    for name in ["futex_robust_list64_try_unlock", "sgx_enter_enclave"] {
        assert_eq!(call_of(&format!("__vdso_{name}")), Some(Instead::Same));
    }
    let old = here();
    let at = place(&old, "__vdso_getcpu");
    let bridge = Bridge {
        old: old.clone(),
        functions: vec![(at, Instead::Same)],
    };
    assert_eq!(bridge.contents(0x1000), old);
}

#[test]
fn a_function_that_nobody_knows_is_refused_by_name() {
    let mut old = here();
    rename(&mut old, "getcpu", "getfoo");
    let refused = Bridge::new(&old, &here()).unwrap_err();
    assert!(refused.contains("__vdso_getfoo"), "{refused}");
}

#[test]
fn what_is_no_object_is_an_error() {
    assert!(Bridge::new(b"", &here()).is_err());
    assert!(Bridge::new(&here()[..100], &here()).is_err());
    assert!(Bridge::new(&vec![0; LONGEST + 1], &here()).is_err());
}

proptest! {
    #[test]
    fn a_hostile_object_is_an_error_at_worst(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..40),
        near in prop::collection::vec((0usize..0x800, any::<u8>()), 0..20),
    ) {
        let new = here();
        let mut old = new.clone();
        for (at, value) in changes {
            let at = at.index(old.len());
            old[at] = value;
        }
        for (at, value) in near {
            old[at] = value;
        }
        if let Ok(bridge) = Bridge::new(&old, &new) {
            prop_assert_eq!(bridge.contents(0x1000).len(), old.len());
        }
        let _ = build_id(&old);
    }
}
