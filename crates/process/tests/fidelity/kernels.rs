//! Restoring under another kernel, as far as one machine can show it: the epoch says that its
//! kernel's vDSO was another one, or that its processor had more. Real other kernels are booted by
//! `cargo xtask lab`.

use crate::store::{Epoch, Store};
use crate::support::{Program, alone, epoch, last_epoch, may_run, prepare, times, track};
use outlive_epoch::EpochReader;
use outlive_process::image::{self, ThreadsState, group, kinds};
use outlive_process::resources::machine::MachineState;
use outlive_process::{ProcessError, RestoreOptions, restore};
use std::time::Duration;

/// The same epoch with another machine.
fn on_another_machine(epoch: &Epoch, change: impl FnOnce(&mut MachineState)) -> Epoch {
    let mut machine: MachineState = image::get(epoch, image::MACHINE).expect("the machine");
    change(&mut machine);
    let mut changed = epoch.clone();
    let fdt = outlive_state_tree::to_fdt(&machine).expect("a tree");
    changed.replace(image::MACHINE, fdt);
    changed
}

/// As another kernel has it that was built from the same source.
fn another_build(machine: &mut MachineState) {
    let id = machine.vdso_build_id.clone().expect("a build ID");
    let at = machine.vdso.windows(id.len()).position(|w| w == id);
    machine.vdso[at.expect("it is in the object")] ^= 0xff;
}

/// Where the kernel's object lies in a program.
fn object(program: &Program) -> String {
    let mappings = program.mappings();
    let mut found = mappings.lines().filter(|l| l.ends_with("[vdso]"));
    let place = found.next().and_then(|l| l.split(' ').next());
    assert!(found.next().is_none(), "{mappings}");
    place.expect("there is one").to_owned()
}

#[test]
fn clocks_go_on_under_kernel_after_kernel() {
    let _alone = alone();
    if !may_run("clocks_go_on_under_kernel_after_kernel") {
        return;
    }
    let mut program = Program::start("clocks", &[]);
    let (mut kernels, mut refused) = (0, 0);
    while kernels < times(5, 40) {
        let before = object(&program);
        let mut store = Store::default();
        let mut tracked = track(&program);
        epoch(&mut tracked, &mut store).expect("an epoch");
        last_epoch(&mut program, tracked, &mut store);
        let other = on_another_machine(store.newest(), another_build);
        let ready = match restore(&other as &dyn EpochReader, &RestoreOptions::default()) {
            Ok(ready) => ready,
            // A thread was reading a coarse clock: then it is said, and the same kernel will do.
            Err(ProcessError::Refused(refusals)) if refused < 20 => {
                assert!(refusals[0].what.contains("reading a clock"), "{refusals:?}");
                refused += 1;
                prepare(store.newest()).go().expect("letting it run");
                program.was_restored();
                continue;
            }
            Err(e) => panic!("restoring: {e}"),
        };
        kernels += 1;
        ready.go().expect("letting it run");
        program.was_restored();
        // Its kernel's object lies elsewhere; where the old one was, there is ordinary memory.
        let (now, mappings) = (object(&program), program.mappings());
        assert!(now != before, "{mappings}");
        let old = mappings.lines().find(|l| l.starts_with(&before));
        assert!(
            old.is_some_and(|l| l.contains("r-xp") && !l.contains('[')),
            "{mappings}"
        );
        std::thread::sleep(Duration::from_millis(200));
        program.must_be_well();
    }
    program.must_report();
}

#[test]
fn what_the_processor_lacks_is_refused_by_name() {
    let _alone = alone();
    if !may_run("what_the_processor_lacks_is_refused_by_name") {
        return;
    }
    let mut program = Program::start("clocks", &[]);
    let mut store = Store::default();
    let tracked = track(&program);
    last_epoch(&mut program, tracked, &mut store);
    let other = on_another_machine(store.newest(), |machine| {
        machine.features.push("avx8192".into());
    });
    let Err(ProcessError::Refused(refusals)) = restore(&other, &RestoreOptions::default()) else {
        panic!("not refused");
    };
    assert_eq!(refusals.len(), 1, "{refusals:?}");
    assert!(refusals[0].what.contains("avx8192"), "{refusals:?}");
    // A state that this processor does not have, in use.
    let mut other = on_another_machine(store.newest(), |machine| {
        machine
            .register_states
            .extend([62, machine.register_bytes, 64]);
        machine.register_bytes += 64;
    });
    let name = group(kinds::THREADS, program.pid);
    let mut threads: ThreadsState = image::get(&other, &name).expect("the threads");
    for thread in &mut threads.threads {
        thread.xstate.extend([0xff; 64]);
        thread.xstate[519] |= 1 << 6;
    }
    other.replace(&name, outlive_state_tree::to_fdt(&threads).expect("a tree"));
    let Err(ProcessError::Refused(refusals)) = restore(&other, &RestoreOptions::default()) else {
        panic!("not refused");
    };
    assert!(
        refusals[0].what.contains("register state 62"),
        "{refusals:?}"
    );
    // Where it is there but not in use, it is not missed.
    for thread in &mut threads.threads {
        thread.xstate[519] &= !(1 << 6);
    }
    other.replace(&name, outlive_state_tree::to_fdt(&threads).expect("a tree"));
    prepare(&other).go().expect("letting it run");
    program.was_restored();
    program.must_report();
}
