//! The microVM's pilot guest: a freestanding program, built outside of the workspace with flags of its own.
//!
//! Promise: `target/pilot/pilot` is what the sources say, or it is said why not.

use std::fs;

use anyhow::{Context, Result};

use crate::shell;

/// Where its sources are.
const SOURCES: &str = "vmm-hooks/pilot";

/// Builds it, unless it is there as the sources are.
///
/// # Errors
/// If it does not build.
pub(crate) fn build() -> Result<()> {
    if !cfg!(target_arch = "x86_64") {
        println!("setup: the tests of the microVM will be skipped here: its pilot guest is for x86-64 only");
        return Ok(());
    }
    let build = shell::target().join("pilot-build");
    let mut command = shell::cargo();
    command.current_dir(shell::root().join(SOURCES)).env("CARGO_TARGET_DIR", &build);
    // These would take the place of the flags that it is linked by.
    command.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS").env_remove("CARGO_BUILD_TARGET");
    shell::run(command.args(["build", "--release", "--locked", "--quiet"]))?;
    let dir = shell::target().join("pilot");
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let made = build.join("x86_64-unknown-linux-gnu/release/pilot");
    let bytes = fs::read(&made).with_context(|| format!("cannot read {}", made.display()))?;
    let image = dir.join("pilot");
    if fs::read(&image).ok().as_ref() != Some(&bytes) {
        fs::write(&image, &bytes).with_context(|| format!("cannot write {}", image.display()))?;
    }
    println!("setup: the pilot guest is there: {}", image.display());
    Ok(())
}
