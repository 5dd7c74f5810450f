//! What protection costs beside throughput: a guest that only computes, the initial sync, the agents' memory.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use replicator::demo::lab::{Host, REDIS};

use crate::path::Speeds;
use crate::row::{Better, Pairs, Report};
use crate::stage::Stage;
use crate::stats::{count, length, median};

/// A guest that only computes keeps at least this much of its speed.
const COMPUTE_BUDGET: f64 = 0.95;
/// Bound on one computation.
const COMPUTE: Duration = Duration::from_secs(60);
/// Rounds of the loop that Redis's Lua runs: about a second under emulation.
const LOOPS: &str = "2000000";
const SCRIPT: &str = "local a=0 for i=1,tonumber(ARGV[1]) do a=(a*31+i)%65521 end return a";
/// Memory of the laboratory's VM.
pub(crate) const GUEST_MIB: f64 = 256.0;

/// A guest that only computes, unprotected and protected in turn, and where its time goes. It is not protected before and after.
pub(crate) async fn compute(stage: &Stage, quick: bool, report: &mut Report) -> Result<()> {
    let rounds = if quick { 2 } else { 6 };
    println!("a guest that only computes: {rounds} rounds");
    let [mut speed, mut processor, mut stood, mut waited] = [(); 4].map(|()| Pairs::default());
    for _ in 0..rounds {
        let without = computed(stage, quick).await?;
        stage.protect("auto").await?;
        let before = lag(stage).await?;
        let with = computed(stage, quick).await?;
        let lag = lag(stage).await? - before;
        stage.unprotect().await?;
        speed.push(1.0 / with.run, 1.0 / without.run);
        processor.push(with.processor / with.runs, without.processor / without.runs);
        stood.push(lag * 1e3, with.wall * 1e3);
        waited.push(with.waited * 1e3, with.wall * 1e3);
    }
    report.add("a guest that only computes, auto", "runs/s", Better::Higher, Some(COMPUTE_BUDGET), &speed);
    report.add("a guest that only computes: processor time of a run, auto", "s", Better::Lower, None, &processor);
    report.add("a guest that only computes: stood, of the time", "ms", Better::Lower, None, &stood);
    report.add("a guest that only computes: waited for a processor, of the time", "ms", Better::Lower, None, &waited);
    Ok(())
}

/// How long the agent has made the VM stand, in seconds.
async fn lag(stage: &Stage) -> Result<f64> {
    Ok(stage.status().await?.guest_clock.context("the agent does not say how long the VM stood")?.lag_seconds)
}

/// Some computing, in seconds.
struct Computed {
    /// A run, median.
    run: f64,
    /// How many there were.
    runs: f64,
    /// All of it.
    wall: f64,
    /// What its vCPU's thread ran.
    processor: f64,
    /// What that would have run, and had no processor.
    waited: f64,
}

async fn computed(stage: &Stage, quick: bool) -> Result<Computed> {
    let to = REDIS.to_string();
    let pid = stage.lab.vm_pid()?;
    let (before, begun) = (times(pid)?, Instant::now());
    let took: Vec<f64> = stage.worker("c", &["compute", "--to", &to, "--count", if quick { "2" } else { "3" }]).await?;
    let (after, wall) = (times(pid)?, begun.elapsed().as_secs_f64());
    let grown = after.iter().filter_map(|(thread, now)| {
        let then = before.get(thread)?;
        Some([0, 1].map(|at| Duration::from_nanos(now[at] - then[at]).as_secs_f64()))
    });
    // The one that computes.
    let vcpu = grown.max_by(|one, other| one[0].total_cmp(&other[0])).context("the VM has no thread")?;
    let runs = length(took.len());
    let run = median(took.into_iter()).context("it did not compute")?;
    Ok(Computed { run, runs, wall, processor: vcpu[0], waited: vcpu[1] })
}

/// What each thread of a process has run, and waited for a processor, in nanoseconds (`Documentation/scheduler/sched-stats.rst`).
fn times(pid: u32) -> Result<BTreeMap<String, [u64; 2]>> {
    let tasks = format!("/proc/{pid}/task");
    let mut all = BTreeMap::new();
    for task in fs::read_dir(&tasks).with_context(|| format!("cannot list {tasks}"))? {
        let task = task?;
        // One that has ended meanwhile did not compute.
        let Ok(text) = fs::read_to_string(task.path().join("schedstat")) else { continue };
        let mut words = text.split_whitespace().map(str::parse);
        let (Some(ran), Some(waited)) = (words.next(), words.next()) else { bail!("no times in {tasks}") };
        all.insert(task.file_name().to_string_lossy().into_owned(), [ran?, waited?]);
    }
    Ok(all)
}

/// The worker: has Redis compute, and says how many seconds each run took.
pub(crate) fn run_compute(to: SocketAddr, times: u32) -> Result<Vec<f64>> {
    let mut out = TcpStream::connect(to).with_context(|| format!("cannot connect to {to}"))?;
    out.set_nodelay(true)?;
    out.set_read_timeout(Some(COMPUTE))?;
    let mut lines = BufReader::new(out.try_clone()?);
    let words = ["EVAL", SCRIPT, "0", LOOPS];
    let mut request = format!("*{}\r\n", words.len());
    for word in words {
        request.push_str(&format!("${}\r\n{word}\r\n", word.len()));
    }
    let mut took = Vec::new();
    for _ in 0..times {
        let begun = Instant::now();
        out.write_all(request.as_bytes())?;
        let mut line = String::new();
        lines.read_line(&mut line).context("no answer to EVAL")?;
        if !line.starts_with(':') {
            bail!("Redis answered {line:?} to EVAL");
        }
        took.push(begun.elapsed().as_secs_f64());
    }
    Ok(took)
}

/// How long becoming protected takes, idle and under load, against a raw stream of the guest's memory, of which it has `mib` MiB. The VM is not
/// protected before and after.
pub(crate) async fn sync(stage: &Stage, mib: f64, rounds: u32, speeds: Speeds, report: &mut Report) -> Result<()> {
    println!("initial sync of {mib} MiB: {rounds} rounds");
    let raw = mib * f64::from(1 << 20) / speeds.quinn;
    let (mut idle, mut busy) = (Pairs::default(), Pairs::default());
    for _ in 0..rounds {
        idle.push(stage.protect("auto").await?.as_secs_f64(), raw);
        stage.unprotect().await?;
        let load = stage.load_until_dropped(50)?;
        busy.push(stage.protect("auto").await?.as_secs_f64(), raw);
        drop(load);
        stage.unprotect().await?;
    }
    for (guest, took) in [("an idle", &idle), ("a loaded", &busy)] {
        let name = format!("protect {guest} guest of {mib} MiB, against a raw stream of its memory");
        report.add(&name, "s", Better::Lower, None, took);
    }
    Ok(())
}

/// The agents' memory while they protect, against the guest's.
pub(crate) fn memory(stage: &Stage, report: &mut Report) -> Result<()> {
    for (host, what) in [(Host::A, "memory of the primary's agent"), (Host::B, "memory of the standby's agent")] {
        let mib = proportional_kib(stage.lab.agent_pid(host)?)? / 1024.0;
        let name = format!("{what}, against the guest's");
        report.add(&name, "MiB", Better::Lower, None, &Pairs::one(mib, GUEST_MIB));
    }
    Ok(())
}

/// A process's memory, what it shares counted by its share.
fn proportional_kib(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).context("no Pss in smaps_rollup")?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().context("Pss is no number")?;
    Ok(count(kib))
}
