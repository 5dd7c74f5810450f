//! Wall clocks that jump: those of a host's agent and its twins, or of the witness, by a few lines of C that are loaded before libc.
//!
//! Promise: that a daemon has read a clock that is off is counted, so that a jump nobody noticed is no fault.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use replicator::demo::lab::Lab;

use super::storage::run;

/// What is loaded.
const SOURCE: &str = include_str!("clock.c");

/// The clocks of hosts A and B and of the witness.
#[derive(Debug)]
pub struct Clocks(PathBuf);

impl Clocks {
    /// Gives the daemons of the laboratory clocks that can be set. None has been started yet.
    ///
    /// # Errors
    /// If there is no C compiler.
    pub fn make(lab: &mut Lab) -> Result<Self> {
        let dir = lab.path("clocks");
        fs::create_dir_all(&dir)?;
        let shown = |name: &str| dir.join(name).display().to_string();
        fs::write(dir.join("clock.c"), SOURCE)?;
        run("cc", &["-O2", "-shared", "-fPIC", "-o", &shown("clock.so"), &shown("clock.c")])?;
        for role in ["a", "b", "w"] {
            File::create(dir.join(role))?.set_len(4096)?;
            lab.set_environment(role, "UNDERSTUDY_CLOCK", shown(role));
            lab.set_environment(role, "LD_PRELOAD", shown("clock.so"));
        }
        Ok(Self(dir))
    }

    fn file(&self, role: &str) -> Result<File> {
        File::options().read(true).write(true).open(self.0.join(role)).context("a clock is missing")
    }

    /// Puts a clock forward, or back, from what is right.
    ///
    /// # Errors
    /// If there is none.
    pub fn set(&self, role: &str, off: Duration, back: bool) -> Result<()> {
        let off = i64::try_from(off.as_nanos()).context("it is too far")?;
        let bytes = if back { -off } else { off }.to_ne_bytes();
        // In the order of the file: how far, how often it was read.
        self.file(role)?.write_all_at(&[bytes, [0; 8]].concat(), 0).context("a clock cannot be set")
    }

    /// How often it was read while it was off, since it was set.
    ///
    /// # Errors
    /// If there is none.
    pub fn reads(&self, role: &str) -> Result<u64> {
        let mut bytes = [0; 8];
        self.file(role)?.read_exact_at(&mut bytes, 8)?;
        Ok(u64::from_ne_bytes(bytes))
    }
}
