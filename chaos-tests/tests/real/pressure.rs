//! Hosts that run short of memory: what belongs to a VM goes to swap again and again, and nothing is lost.
//!
//! The processes are put into a control group of their own, which is told to give its memory back. Without swap of this
//! test's own nothing of a guest could go, so it brings some; where the kernel does not let it, it is skipped.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use chaos_tests::chaos::memory::{Group, Swap};
use replicator::demo::lab::Host;
use vmm_hooks::guest::{Capture, Guest as _, PauseParts};
use vmm_hooks::layout::PAGE_SIZE;
use vmm_hooks::qemu::{AttachOptions, QemuGuest, Target, attach};

use crate::stage::play_long;

/// What of a guest must have gone to swap at least once.
const GONE: u64 = 32 << 20;
/// How often memory is taken away.
const ROUNDS: usize = 8;

#[test]
fn hosts_short_of_memory_lose_nothing() {
    play_long("hosts short of memory", async |stage| {
        let Some((_swap, [a, b])) = means(stage.lab.dir(), ["a", "b"])? else { return Ok(()) };
        // What a process has stays with the group in which it took it, so the VM is born there.
        a.add(std::process::id())?;
        stage.set().await?;
        a.leave()?;
        a.add(stage.lab.agent_pid(Host::A)?)?;
        // The twin is its child.
        b.add(stage.lab.agent_pid(Host::B)?)?;
        // A host so short of memory may be left behind; then it is made a standby again.
        stage.protect_for_good().await?;
        let mut client = stage.writer("s").await?;
        let mut most = (0, 0);
        for _ in 0..ROUNDS {
            a.take_away()?;
            b.take_away()?;
            most = (most.0.max(a.swapped()?), most.1.max(b.swapped()?));
            client.goes_on().await?;
        }
        ensure!(most.0 > GONE && most.1 > GONE, "too little went to swap to mean anything: {most:?}");
        stage.until_state(Host::A, "protected").await?;
        b.take_away()?;
        stage.lab.kill_host_a().await?;
        client.goes_on().await?;
        stage.until_survivor().await?;
        stage.nothing_lost(client).await.map(drop)
    });
}

#[test]
fn pages_that_went_to_swap_are_harvested_like_others() {
    play_long("pages that went to swap", async |stage| {
        let Some((_swap, [vm])) = means(stage.lab.dir(), ["vm"])? else { return Ok(()) };
        vm.add(std::process::id())?;
        stage.lab.boot().await?;
        vm.leave()?;
        let mut client = stage.writer("h").await?;
        let mut guest = attach(&Target::QmpSocket(stage.lab.vm_control()), &AttachOptions::default())?;
        guest.pause()?;
        guest.arm()?;
        let mut copy = memory(&mut guest)?;
        guest.resume()?;
        let (mut capture, mut most, mut harvested) = (Capture::default(), 0, 0);
        for round in 0..ROUNDS {
            vm.take_away()?;
            most = most.max(vm.swapped()?);
            client.goes_on().await?;
            guest.pause()?;
            if round % 2 == 1 {
                // What was written goes, too, before it is looked for.
                vm.take_away()?;
            }
            guest.capture(&mut capture, &mut PauseParts::default())?;
            harvested += capture.pages.len();
            for (&page, bytes) in capture.pages.iter().zip(capture.bytes.chunks_exact(PAGE_SIZE)) {
                let start = usize::try_from(page)? * PAGE_SIZE;
                copy[start..start + PAGE_SIZE].copy_from_slice(bytes);
            }
            ensure!(copy == memory(&mut guest)?, "round {round}: a page was lost");
            guest.resume()?;
        }
        ensure!(most > GONE, "too little went to swap to mean anything: {most}");
        ensure!(harvested > ROUNDS, "the guest wrote nothing: {harvested}");
        println!("{}: {harvested} pages in {ROUNDS} harvests, {} MiB in swap at most", guest.tracker(), most >> 20);
        Box::new(guest).detach()?;
        stage.nothing_lost(client).await.map(drop)
    });
}

fn memory(guest: &mut QemuGuest) -> Result<Vec<u8>> {
    let pages: Vec<u64> = (0..guest.layout().pages()).collect();
    let mut bytes = Vec::new();
    guest.read_pages(&pages, &mut bytes)?;
    Ok(bytes)
}

/// Swap in `dir` and control groups of these names; `None`, after saying why, where they cannot be had.
fn means<const N: usize>(dir: &Path, names: [&str; N]) -> Result<Option<(Swap, [Group; N])>> {
    fs::create_dir_all(dir)?;
    let swap = match Swap::begin(dir) {
        Ok(swap) => swap,
        Err(why) => {
            println!("skipped: no swap can be had: {why:#}");
            return Ok(None);
        }
    };
    let groups: Result<Vec<Group>> =
        names.iter().map(|name| Group::make(&format!("us-real-{}-{name}", std::process::id()))).collect();
    match groups {
        Ok(groups) => {
            let groups = groups.try_into().ok().context("as many as names")?;
            Ok(Some((swap, groups)))
        }
        Err(why) => {
            println!("skipped: no control group for memory: {why:#}");
            Ok(None)
        }
    }
}
