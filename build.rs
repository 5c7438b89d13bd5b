//! With the feature `cuda`: the kernels of `src/policy/card/kernels.cu`, compiled to PTX by the toolkit that candle's are
//! built with.

#![expect(clippy::disallowed_methods, reason = "cargo talks to a build script through the environment")]

use std::{env, error::Error, path::Path, process::Command};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return Ok(());
    }
    let kernels = "src/policy/card/kernels.cu";
    println!("cargo::rerun-if-changed=src/policy/card");
    println!("cargo::rerun-if-env-changed=CUDA_HOME");
    let nvcc =
        env::var_os("CUDA_HOME").map_or_else(|| "nvcc".into(), |home| Path::new(&home).join("bin/nvcc"));
    let ptx = Path::new(&env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?).join("kernels.ptx");
    // For the oldest cards with bf16; the driver compiles it further for the one that it finds.
    let status = Command::new(&nvcc)
        .args(["-ptx", "-O3", "-std=c++17", "-arch=compute_80", "-o"])
        .arg(&ptx)
        .arg(kernels)
        .status()
        .map_err(|fault| format!("the feature `cuda` needs the CUDA toolkit: {}: {fault}", nvcc.display()))?;
    if status.success() { Ok(()) } else { Err(format!("{kernels} does not compile").into()) }
}
