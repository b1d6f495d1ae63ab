//! How the kernel is linked: by its own script, and with nothing of the system.

fn main() {
    let here = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    println!("cargo::rerun-if-changed=kernel.ld");
    println!("cargo::rerun-if-changed=src/boot.s");
    for argument in [
        "-nostdlib",
        "-nostartfiles",
        "-static",
        "-no-pie",
        "-Wl,--build-id=none",
        "-Wl,-z,noexecstack",
        &format!("-Wl,-T,{here}/kernel.ld"),
    ] {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
}
