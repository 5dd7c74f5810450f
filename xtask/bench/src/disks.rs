//! What a guest's disk can do: alone, mirrored by QEMU to `qemu-nbd` on the same host, and protected.
//!
//! The guest is that of the demo's database, which runs `dd` by order. Each round measures all three once, in an order that
//! turns; ratios are of one round. The time is this host's, for the guest's clock stands in pauses. What is written is not compressible
//! and on no hole, so that nothing has less to carry.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use replicator::demo::lab::Machine;
use replicator::demo::postgres::Client;
use replicator::demo::process::Daemon;
use replicator::demo::wait::{ms_between, now_ns, until};

use crate::monitor::Monitor;
use crate::row::{Better, Pairs, Report};
use crate::stage::{Means, Stage};

/// Bytes that are written in one go and then synced.
const MIB: u32 = 24;
/// Blocks of 4 KiB that are written and synced one by one.
const BLOCKS: u32 = 60;
/// Bound on a mirror's first copy.
const MIRROR: Duration = Duration::from_secs(120);

/// One measurement.
#[derive(Debug, Clone, Copy)]
struct Speed {
    mib_per_s: f64,
    syncs_per_s: f64,
}

/// How the disk is attached meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    Alone,
    Mirrored,
    Protected,
}

/// Measures, in a laboratory of its own.
pub(crate) async fn measure(means: &Means, report: &mut Report) -> Result<()> {
    let Some(database) = &means.database else {
        report.skip(
            "disks",
            "the database's disk is missing: `cargo xtask demo --workload postgres` builds it".to_owned(),
        );
        return Ok(());
    };
    let rounds = if means.quick { 2 } else { 6 };
    println!("disks: {rounds} rounds");
    let second = format!("unix:{},server=on,wait=off", means.dir.join("disks/vm/second.sock").display());
    let more = vec!["-qmp".to_owned(), second];
    let machine = Machine { database: Some(database.clone()), more, ..Machine::default() };
    let stage = Stage::full(means, "disks", &machine).await?;
    let measured = rounds_of(&stage, database, rounds).await;
    let all = stage.explained(measured).await?;
    for (what, unit, value) in [
        ("24 MiB written and synced", "MiB/s", (|speed| speed.mib_per_s) as fn(&Speed) -> f64),
        ("4 KiB written and synced", "writes/s", |speed| speed.syncs_per_s),
    ] {
        let mut add = |how: &str, of: fn(&[Speed; 3]) -> (Speed, Speed)| {
            let mut pairs = Pairs::default();
            for speeds in &all {
                let (one, other) = of(speeds);
                pairs.push(value(&one), value(&other));
            }
            report.add(&format!("disk, {what}, {how}"), unit, Better::Higher, None, &pairs);
        };
        add("protected against alone", |[alone, _, protected]| (*protected, *alone));
        add("protected against a plain mirror", |[_, mirrored, protected]| (*protected, *mirrored));
    }
    Ok(())
}

async fn rounds_of(stage: &Stage, database: &Path, rounds: usize) -> Result<Vec<[Speed; 3]>> {
    let mut client = Client::connect(&stage.lab.namespace("c"), database, &stage.dir().join("psql.log"))?;
    run(&mut client, &format!("dd if=/dev/urandom of=/tmp/random bs=64k count={}", MIB * 16)).await?;
    let mut all = Vec::new();
    for round in 0..rounds {
        let mut speeds = [Speed { mib_per_s: 0.0, syncs_per_s: 0.0 }; 3];
        for turn in 0..3 {
            let at = (round + turn) % 3;
            let how = [How::Alone, How::Mirrored, How::Protected][at];
            speeds[at] = one(stage, &mut client, how).await.with_context(|| format!("{how:?}"))?;
            println!(
                "  round {}, {how:?}: {:.1} MiB/s, {:.0} syncs/s",
                round + 1,
                speeds[at].mib_per_s,
                speeds[at].syncs_per_s
            );
        }
        all.push(speeds);
    }
    Ok(all)
}

async fn one(stage: &Stage, client: &mut Client, how: How) -> Result<Speed> {
    match how {
        How::Alone => speed(client).await,
        How::Mirrored => {
            let mirror = Mirror::begin(stage).await?;
            let measured = speed(client).await;
            mirror.end(stage).await?;
            measured
        }
        How::Protected => {
            stage.protect("auto").await?;
            let measured = speed(client).await;
            stage.unprotect().await?;
            measured
        }
    }
}

async fn speed(client: &mut Client) -> Result<Speed> {
    let begun = now_ns();
    run(client, "dd if=/tmp/random of=/tmp/written bs=64k conv=fsync").await?;
    let written = now_ns();
    let each = "dd if=/tmp/random of=/tmp/written bs=4k count=1 skip=$n seek=$n conv=notrunc,fsync";
    run(client, &format!("n=0; while [ $n -lt {BLOCKS} ]; do {each} || exit 1; n=$((n+1)); done")).await?;
    let synced = now_ns();
    // Everything anew the next time.
    run(client, "rm /tmp/written; sync").await?;
    let seconds = |from, to| ms_between(from, to) / 1e3;
    Ok(Speed {
        mib_per_s: f64::from(MIB) / seconds(begun, written),
        syncs_per_s: f64::from(BLOCKS) / seconds(written, synced),
    })
}

/// Runs a command in the guest, to its end. It reads what it is sent: else one that ends before that is sent fails.
async fn run(client: &mut Client, command: &str) -> Result<()> {
    client.run(&format!("COPY (SELECT 1) TO PROGRAM 'exec 2>/dev/null; cat >/dev/null; {command}'")).await.map(drop)
}

/// A mirror of the VM's disk to `qemu-nbd`, as anybody can have it.
struct Mirror {
    monitor: Monitor,
    _server: Daemon,
}

impl Mirror {
    async fn begin(stage: &Stage) -> Result<Self> {
        let (socket, copy) = (stage.dir().join("nbd.sock"), stage.dir().join("copy.raw"));
        let disk = stage.lab.vm_dir().join("disk.raw");
        std::fs::File::create(&copy)?.set_len(std::fs::metadata(&disk)?.len())?;
        let args =
            ["-t", "-f", "raw", "--cache=none", "-k", &socket.display().to_string(), &copy.display().to_string()];
        let log = stage.dir().join("nbd.log");
        let (namespace, program) = (stage.lab.namespace("a"), Path::new("qemu-nbd"));
        let server = Daemon::start("qemu-nbd", &namespace, program, &args.map(str::to_owned), &[], &log)?;
        until("qemu-nbd to listen", MIRROR, async || {
            Ok(if socket.exists() { Ok(()) } else { Err("there is no socket".to_owned()) })
        })
        .await?;
        let mut monitor = Monitor::connect(&stage.lab.vm_second())?;
        let target = serde_json::json!({ "driver": "nbd", "node-name": "bench-nbd", "discard": "unmap", "detect-zeroes": "unmap",
            "server": { "type": "unix", "path": socket } });
        // QEMU 7.2 may lose a write that is under way when a mirror begins or ends: the guest stands then.
        monitor.command("stop", &serde_json::Value::Null)?;
        monitor.command("blockdev-add", &target)?;
        let job = serde_json::json!({ "job-id": "bench-mirror", "device": "virtio0", "target": "bench-nbd", "sync": "full",
            "copy-mode": "write-blocking" });
        monitor.command("blockdev-mirror", &job)?;
        monitor.command("cont", &serde_json::Value::Null)?;
        let mut mirror = Self { monitor, _server: server };
        until("the mirror to be whole", MIRROR, async || {
            let jobs = mirror.monitor.command("query-block-jobs", &serde_json::Value::Null)?;
            Ok(if jobs[0]["ready"] == true { Ok(()) } else { Err(jobs.to_string()) })
        })
        .await?;
        Ok(mirror)
    }

    async fn end(mut self, stage: &Stage) -> Result<()> {
        let nothing = serde_json::Value::Null;
        self.monitor.command("stop", &nothing)?;
        self.monitor.command("block-job-cancel", &serde_json::json!({ "device": "bench-mirror", "force": true }))?;
        until("the mirror to be gone", MIRROR, async || {
            let jobs = self.monitor.command("query-block-jobs", &serde_json::Value::Null)?;
            Ok(if jobs.as_array().is_some_and(Vec::is_empty) { Ok(()) } else { Err(jobs.to_string()) })
        })
        .await?;
        self.monitor.command("blockdev-del", &serde_json::json!({ "node-name": "bench-nbd" }))?;
        self.monitor.command("cont", &nothing)?;
        for file in ["nbd.sock", "copy.raw"] {
            std::fs::remove_file(stage.dir().join(file))?;
        }
        Ok(())
    }
}
