//! How pause and commit grow with the guest's memory and with the pages written in an epoch.
//!
//! The guest's kernel is told to use the first part of its memory alone. The rest is ours: it is filled, and written page by
//! page, from outside by `process_vm_writev`, which the tracker sees as it sees the guest's own writes. Nothing of the
//! guest is touched.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use replicator::demo::lab::Machine;
use vmm_hooks::layout::PAGE_SIZE;
use vmm_hooks::sys::process::{PidFd, ProcessMemory};

use crate::costs;
use crate::path::Speeds;
use crate::row::{Better, Pairs, Report};
use crate::stage::{Means, Stage, let_run};
use crate::stats::count;

/// What the guest's kernel uses.
const GUEST_MIB: u64 = 224;
/// Ours begins here and ends this far below the top, where the firmware keeps its tables.
const OURS_FROM_MIB: u64 = 256;
const TOP_MIB: u64 = 32;
/// On this machine type memory above 3 GiB is moved, so there is another top.
const SPLIT_MIB: u64 = 3 << 10;
/// A guest that is large for a first copy.
const LARGE_MIB: u64 = 2048;
/// Connections of the load while memory is large.
const CONNECTIONS: u32 = 50;
/// One burst of writes per epoch of this length.
const EPOCH: Duration = Duration::from_millis(400);
const EPOCH_WORD: &str = "400ms";

/// Measures in guests of growing memory.
pub(crate) async fn with_memory(means: &Means, report: &mut Report) -> Result<()> {
    let sizes: &[u64] = if means.quick { &[256, 1024] } else { &[256, 512, 1024, 2048, 4096] };
    println!("growth with memory: {sizes:?} MiB");
    let mut first = None;
    for &mib in sizes {
        let stage = Stage::full(means, &format!("memory{mib}"), &machine(mib)?).await?;
        let ours = Ours::find(stage.lab.vm_pid()?, mib)?;
        let filled = ours.pages();
        ours.fill()?;
        let took = stage.protect("auto").await?;
        stage.load(CONNECTIONS, if means.quick { 2 } else { 8 }).await?;
        let epochs = stage.epochs().await?;
        println!(
            "  {mib} MiB, {filled} pages filled: protected after {:.1} s, {} dirty pages an epoch",
            took.as_secs_f64(),
            epochs.dirty_pages_p50
        );
        let seen = (epochs.pause_ms_p50, epochs.commit_ms_p50, epochs.pause_parts_ms_p50.harvest);
        let base = *first.get_or_insert(seen);
        if mib == sizes[0] {
            continue;
        }
        for (what, value, baseline) in
            [("pause", seen.0, base.0), ("commit", seen.1, base.1), ("harvest", seen.2, base.2)]
        {
            let name = format!("{what} with {mib} MiB against {} MiB, under load", sizes[0]);
            report.add(&name, "ms", Better::Lower, None, &Pairs::one(value, baseline));
        }
    }
    Ok(())
}

/// How long a large guest takes to become protected.
pub(crate) async fn sync(means: &Means, speeds: Speeds, report: &mut Report) -> Result<()> {
    let stage = Stage::full(means, "large", &machine(LARGE_MIB)?).await?;
    Ours::find(stage.lab.vm_pid()?, LARGE_MIB)?.fill()?;
    costs::sync(&stage, count(LARGE_MIB), 2, speeds, report).await
}

/// Measures one guest that writes more and more pages in each epoch.
pub(crate) async fn with_pages(means: &Means, report: &mut Report) -> Result<()> {
    let counts: &[u64] = if means.quick { &[10, 10_000] } else { &[10, 100, 1_000, 10_000, 100_000] };
    println!("growth with dirty pages: {counts:?}");
    let stage = Stage::full(means, "pages", &machine(1024)?).await?;
    let ours = Arc::new(Ours::find(stage.lab.vm_pid()?, 1024)?);
    let mut first = None;
    for &wanted in counts {
        stage.protect(EPOCH_WORD).await?;
        let stop = Arc::new(AtomicBool::new(false));
        let writer = thread::spawn({
            let (ours, stop) = (Arc::clone(&ours), Arc::clone(&stop));
            move || ours.write_bursts(wanted, &stop)
        });
        let_run(EPOCH * if means.quick { 10 } else { 25 }).await;
        let epochs = stage.epochs().await;
        stop.store(true, Ordering::Relaxed);
        writer.join().map_err(|_| anyhow::anyhow!("the writing thread failed"))??;
        let epochs = epochs?;
        stage.unprotect().await?;
        let found = epochs.dirty_pages_p50;
        let seen = (epochs.pause_ms_p50, epochs.commit_ms_p50, found);
        let base = *first.get_or_insert(seen);
        println!("  {wanted} pages written beside the guest's own: {found} found in the median epoch");
        if wanted == counts[0] {
            continue;
        }
        for (what, value, baseline) in [("pause", seen.0, base.0), ("commit", seen.1, base.1)] {
            let name = format!("{what} with {found} dirty pages against {}", base.2);
            report.add(&name, "ms", Better::Lower, None, &Pairs::one(value, baseline));
        }
    }
    Ok(())
}

fn machine(mib: u64) -> Result<Machine> {
    Ok(Machine { memory_mib: u32::try_from(mib)?, kernel: format!("mem={GUEST_MIB}M"), ..Machine::default() })
}

/// The part of a guest's memory that its kernel does not use.
#[derive(Debug)]
struct Ours {
    memory: ProcessMemory,
    /// Addresses in QEMU, from and to.
    parts: Vec<(u64, u64)>,
}

impl Ours {
    /// Finds it by the size of QEMU's mapping.
    fn find(pid: u32, mib: u64) -> Result<Self> {
        let size = mib << 20;
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).context("cannot read QEMU's mappings")?;
        let starts: Vec<u64> = maps
            .lines()
            .filter_map(|line| {
                let (from, rest) = line.split_once('-')?;
                let (to, rest) = rest.split_once(' ')?;
                let range = (u64::from_str_radix(from, 16).ok()?, u64::from_str_radix(to, 16).ok()?);
                (rest.starts_with("rw") && range.1 - range.0 == size).then_some(range.0)
            })
            .collect();
        let [start] = starts.as_slice() else { bail!("QEMU has {} mappings of {mib} MiB", starts.len()) };
        let low = (OURS_FROM_MIB, mib.min(SPLIT_MIB).saturating_sub(TOP_MIB));
        let high = (SPLIT_MIB + TOP_MIB, mib.saturating_sub(TOP_MIB));
        let parts = [low, high]
            .into_iter()
            .filter(|(from, to)| from < to)
            .map(|(from, to)| (start + (from << 20), start + (to << 20)))
            .collect();
        Ok(Self { memory: ProcessMemory::new(PidFd::open(pid)?), parts })
    }

    fn pages(&self) -> u64 {
        self.parts.iter().map(|(from, to)| (to - from) / PAGE_SIZE as u64).sum()
    }

    /// Writes every page: a few words, each page others.
    fn fill(&self) -> Result<()> {
        const AT_ONCE: u64 = 256;
        let mut block = vec![0; usize::try_from(AT_ONCE)? * PAGE_SIZE];
        for &(from, to) in &self.parts {
            let mut at = from;
            while at < to {
                for (page, number) in block.chunks_exact_mut(PAGE_SIZE).zip(at..) {
                    page[..8].copy_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
                }
                let length = (to - at).min(block.len() as u64);
                self.memory.write(at, &block[..usize::try_from(length)?])?;
                at += length;
            }
        }
        Ok(())
    }

    /// Changes a word of each of `count` pages, once per epoch, until it is told to stop.
    fn write_bursts(&self, wanted: u64, stop: &AtomicBool) -> Result<()> {
        let &(from, to) = self.parts.first().context("the guest's kernel uses all of its memory")?;
        if count(wanted) > count((to - from) / PAGE_SIZE as u64) {
            bail!("the guest has no {wanted} pages to spare");
        }
        let mut next = Instant::now();
        for number in 1_u64.. {
            for page in 0..wanted {
                self.memory.write(from + page * PAGE_SIZE as u64, &number.to_le_bytes())?;
            }
            if stop.load(Ordering::Relaxed) {
                break;
            }
            next = (next + EPOCH).max(Instant::now());
            thread::sleep(next - Instant::now());
        }
        Ok(())
    }
}
