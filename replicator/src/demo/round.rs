//! One round of the demo: boot, measure, protect, measure, write, kill, check, and back to where it began.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use super::figures::Figures;
use super::image;
use super::lab::{COMMAND, Death, Host, Lab, Machine, Microvm, REDIS, VM};
use super::process::Helper;
use super::wait::{ms_between, now_ns, until};
use super::worker::{Checked, FIRST_REPLY, FirstReply, Loaded, Started, Ticked, WRITE_ANSWER, Written, logged};
use crate::control::api::{EpochSummary, FailoverReport, Role, VmStatus};

/// Connections of the throughput measurement.
const CONNECTIONS: &str = "50";
/// Bound on becoming protected.
const PROTECT: Duration = Duration::from_secs(120);
/// Bound on a throughput measurement beyond its length.
const LOAD_SLACK: Duration = Duration::from_secs(60);
/// How long an idle guest's clock is watched.
const IDLE_SECONDS: u64 = 3;
/// The kill comes this long after the writer started at the earliest, and this much later at the latest.
pub(super) const KILL_AFTER: Duration = Duration::from_millis(1_500);
pub(super) const KILL_WITHIN_MS: u64 = 2_000;
/// How long the client goes on after the survivor's first reply.
const GO_ON: Duration = Duration::from_secs(3);
/// Bound on the survivor's agent reporting its failover as complete.
const REPORT: Duration = Duration::from_secs(30);

/// What varies between rounds.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    /// Counts from 1.
    pub(super) number: u32,
    /// How long each throughput measurement lasts, in seconds.
    pub(super) load_seconds: u64,
    /// Policy given to `protect`.
    pub(super) epoch: String,
    /// Whether the VM has a disk.
    pub(super) disk: bool,
    /// Size of a QEMU's disk, if it has one for Redis.
    pub(super) disk_mib: Option<u64>,
    /// What the VM is, if it is a microVM.
    pub(super) microvm: Option<Microvm>,
    /// Policy given to `protect`.
    pub(super) durability: String,
}

/// Runs a round in a laboratory that was just built.
///
/// # Errors
/// If something does not work at all. A lost write and a broken connection are figures, not errors.
pub(super) async fn run(lab: &mut Lab, plan: &Plan) -> Result<Figures> {
    if let Some(microvm) = &plan.microvm {
        // It runs inside of the agent, which is there first.
        lab.start_daemons().await?;
        lab.pair().await.context("pairing")?;
        let boot = lab.run_microvm(microvm).await?;
        println!("  microVM {VM} runs on {}, its guest answers after {:.2} s", Host::A.name(), boot.as_secs_f64());
    } else {
        let boot = lab.boot_as(&Machine { disk_mib: plan.disk_mib, ..Machine::default() }).await?;
        println!("  VM {VM} runs on {}, Redis answers after {:.1} s", Host::A.name(), boot.as_secs_f64());
    }
    let unprotected = load(lab, plan).await.context("unprotected")?;
    println!("  unprotected: {:.0} SET/s over {CONNECTIONS} connections", unprotected.ops_per_s);
    if plan.microvm.is_none() {
        lab.start_daemons().await?;
        lab.pair().await.context("pairing")?;
    }
    let begun = now_ns();
    protect(lab, plan).await?;
    println!("  protected after {:.1} s", ms_between(begun, now_ns()) / 1e3);
    let idle = watch_clock(lab, IDLE_SECONDS)?.answer::<Ticked>(LOAD_SLACK).await.context("watching the clock")?;
    let mut watcher = watch_clock(lab, plan.load_seconds)?;
    let protected = load(lab, plan).await.context("protected")?;
    let busy: Ticked = watcher.answer(LOAD_SLACK).await.context("watching the clock under load")?;
    println!(
        "  the guest's clock loses {:.1} % of the time while idle, {:.1} % under load",
        idle.lost_percent, busy.lost_percent
    );
    let share = protected.ops_per_s / unprotected.ops_per_s;
    println!("  protected: {:.0} SET/s, {share:.2} of unprotected", protected.ops_per_s);
    lab.check(&[Host::A, Host::B])?;

    let run = write_and_kill(lab, plan).await?;
    let report = failover_report(lab).await?;
    let mut checked = check(lab, plan, run.written.acked).await?;
    if plan.microvm.is_some() {
        checked.lost = checked.lost.max(check_log(lab, plan, run.written.acked)?);
    }
    if let Some(why) = &run.written.broken {
        println!("  BROKEN CONNECTION: {why}");
    }
    if checked.lost > 0 {
        println!("  LOST WRITES: {} of {}, the first: {:?}", checked.lost, run.written.acked, checked.first_lost);
    }
    let home = go_home(lab, plan).await.context("on the way back to host-a")?;
    if plan.disk_mib.is_some() && plan.microvm.is_none() {
        look_at_disk(lab, plan, &run.written, &home.written).await?;
    }
    let activation = report.activation_ms.context("the survivor's agent reports no activation")?;
    let stall = Duration::from_nanos(run.written.longest_gap_after(run.death.begun_ns));
    let figures = Figures {
        rounds: 1,
        epochs: run.before.epochs,
        epoch_ms_p50: run.before.epoch_ms_p50,
        pause_ms_p50: run.before.pause_ms_p50,
        pause_ms_p99: run.before.pause_ms_p99,
        dirty_pages_p50: run.before.dirty_pages_p50,
        commit_ms_p50: run.before.commit_ms_p50,
        detection_ms: ms_between(run.death.begun_ns, report.detected_monotonic_ns),
        activation_ms: activation.total,
        failover_ms: ms_between(run.death.begun_ns, run.first_reply_ns),
        client_stall_ms: stall.as_secs_f64() * 1e3,
        acked_writes: run.written.acked + home.written.acked,
        lost_writes: checked.lost + home.lost,
        connections_broken: u64::from(run.written.broken.is_some()) + u64::from(home.written.broken.is_some()),
        clock_lost_idle_percent: idle.lost_percent,
        clock_lost_busy_percent: busy.lost_percent,
        unprotected_ops_per_s: unprotected.ops_per_s,
        protected_ops_per_s: protected.ops_per_s,
    };
    println!("  {}", figures.line());
    Ok(figures)
}

async fn load(lab: &Lab, plan: &Plan) -> Result<Loaded> {
    let (to, seconds) = (REDIS.to_string(), plan.load_seconds.to_string());
    let args = ["load", "--to", &to, "--connections", CONNECTIONS, "--seconds", &seconds];
    let mut helper = lab.helper("the throughput measurement", &args)?;
    helper.answer(Duration::from_secs(plan.load_seconds) + LOAD_SLACK).await
}

fn watch_clock(lab: &Lab, seconds: u64) -> Result<Helper> {
    lab.helper(
        "the comparison of the clocks",
        &["clock", "--to", &REDIS.to_string(), "--seconds", &seconds.to_string()],
    )
}

/// `understudy protect` on host A; checks that the VM is protected when it returns.
pub(super) async fn protect(lab: &Lab, plan: &Plan) -> Result<()> {
    // Other laboratories on this machine may run a VM of this name; its own operator would write the name.
    let is_only_one = plan.microvm.is_some() || vmm_hooks::qemu::resolve(VM).is_ok();
    let vm = if is_only_one { VM.to_owned() } else { lab.vm_pid()?.to_string() };
    let vm = vm.as_str();
    let mut words = vec!["protect", vm, "--to", Host::B.name(), "--epoch", &plan.epoch];
    if plan.disk {
        words.extend(["--durability", &plan.durability]);
    }
    println!("  understudy {}", words.join(" "));
    lab.understudy(Host::A, &words, PROTECT).await?;
    let status = lab.client(Host::A).vm_status(VM).await.context("asking host-a about the VM")?;
    if status.state.word() != "protected" {
        bail!("`understudy protect` returned while the VM is {}: {}", status.state, status.reason);
    }
    Ok(())
}

/// What happened around the kill.
struct Run {
    before: EpochSummary,
    death: Death,
    first_reply_ns: u64,
    written: Written,
}

async fn write_and_kill(lab: &mut Lab, plan: &Plan) -> Result<Run> {
    let to = REDIS.to_string();
    let mut writer = lab.helper("the writing client", &["write", "--to", &to, "--tag", &tag(plan)])?;
    let mut prober = lab.helper("the prober", &["probe", "--to", &REDIS.ip().to_string()])?;
    writer.answer::<Started>(WRITE_ANSWER).await?;
    first_reply(&mut prober, now_ns()).await.context("before the kill")?;
    let random = uuid::Uuid::new_v4().as_u128() % u128::from(KILL_WITHIN_MS);
    let later = Duration::from_millis(u64::try_from(random).expect("below a u64"));
    // The moment is what is random here: there is no condition to wait for.
    tokio::time::sleep(KILL_AFTER + later).await;

    let status = lab.client(Host::A).vm_status(VM).await.context("asking host-a before its death")?;
    if status.state.word() != "protected" {
        bail!("before the kill the VM is {}: {} {}", status.state, status.reason, status.advice);
    }
    let before = status.epochs.context("host-a has committed no epoch")?;
    let death = lab.kill_host_a().await?;
    println!("  host-a is dead");
    let reply = first_reply(&mut prober, death.over_ns).await.context("after the kill")?;
    prober.end();
    // The client must be seen to go on, not only to be there.
    tokio::time::sleep(GO_ON).await;
    writer.end();
    let written: Written = writer.answer(WRITE_ANSWER + COMMAND).await?;
    Ok(Run { before, death, first_reply_ns: reply, written })
}

/// What a client saw of the way back.
struct Home {
    written: Written,
    lost: u64,
}

/// Host A comes back, the survivor protects itself with it, and the VM goes home.
async fn go_home(lab: &mut Lab, plan: &Plan) -> Result<Home> {
    let mut writer =
        lab.helper("the writing client", &["write", "--to", &REDIS.to_string(), "--tag", &home_tag(plan)])?;
    writer.answer::<Started>(WRITE_ANSWER).await?;
    let begun = now_ns();
    lab.raise_host_a().await?;
    println!("  host-a is back");
    until_protected(lab, Host::B).await?;
    println!("  protected again, on host-b, {:.1} s later", ms_between(begun, now_ns()) / 1e3);
    let asked = now_ns();
    println!("  understudy failback {VM}");
    lab.understudy(Host::B, &["failback", VM], PROTECT).await?;
    let moved = now_ns();
    until_protected(lab, Host::A).await?;
    println!(
        "  back on host-a after {:.1} s, protected after {:.1} s",
        ms_between(asked, moved) / 1e3,
        ms_between(asked, now_ns()) / 1e3
    );
    // It goes on there.
    writer.tell("").await?;
    writer.answer::<Started>(WRITE_ANSWER).await?;
    writer.end();
    let written: Written = writer.answer(WRITE_ANSWER + COMMAND).await?;
    let gap = Duration::from_nanos(written.longest_gap_after(asked));
    let lost = check_tag(lab, &home_tag(plan), written.acked).await?.lost;
    println!(
        "  the client waited {:.0} ms at the longest; {lost} of {} writes are lost",
        gap.as_secs_f64() * 1e3,
        written.acked
    );
    if let Some(why) = &written.broken {
        println!("  BROKEN CONNECTION: {why}");
    }
    Ok(Home { written, lost })
}

/// The guest shuts down, at home: everything that the client was told is on the disk that came back.
async fn look_at_disk(lab: &Lab, plan: &Plan, away: &Written, home: &Written) -> Result<()> {
    let status = lab.client(Host::A).vm_status(VM).await.context("asking host-a about the VM")?;
    let pid = status.survivor.context("the VM does not run from its copy on host-a")?.pid;
    lab.shut_redis_down().await?;
    lab.process_ended(pid, PROTECT).await?;
    let copies = image::below(&lab.state_dir(Host::A).join("images"));
    let [copy] = copies.as_slice() else { bail!("host-a has {} copies of the disk", copies.len()) };
    image::is_sound(copy)?;
    image::redis_holds(copy, &tag(plan), away.acked)?;
    image::redis_holds(copy, &home_tag(plan), home.acked)?;
    println!("  the guest shut down; its disk is sound and holds every acknowledged write");
    Ok(())
}

/// Waits until a host's agent runs the VM and says that it is protected.
async fn until_protected(lab: &Lab, host: Host) -> Result<()> {
    let client = lab.client(host);
    until(&format!("the VM to be protected on {}", host.name()), PROTECT, async || {
        Ok(match client.vm_status(VM).await {
            Ok(status) if status.state.word() == "protected" && status.role == Role::Primary => Ok(()),
            Ok(status) => Err(format!("{} as {}: {}", status.state, status.role.word(), status.reason)),
            // Not known yet.
            Err(error) => Err(error.to_string()),
        })
    })
    .await
}

/// When the first reply to a probe came that was sent after `after_ns`.
pub(super) async fn first_reply(prober: &mut Helper, after_ns: u64) -> Result<u64> {
    prober.tell(&after_ns.to_string()).await?;
    let reply: FirstReply = prober.answer(FIRST_REPLY + COMMAND).await?;
    reply.received_ns.with_context(|| format!("the guest answered no probe within {FIRST_REPLY:?}"))
}

/// The standby's own report, once it says that the survivor runs.
pub(super) async fn failover_report(lab: &Lab) -> Result<FailoverReport> {
    let client = lab.client(Host::B);
    until("host-b to report its failover as complete", REPORT, async || {
        let status: VmStatus = client.vm_status(VM).await.context("asking host-b after the failover")?;
        let seen = format!("{} as {}: {}", status.state, status.role.word(), status.reason);
        Ok(status.failover.filter(|report| report.activation_ms.is_some()).ok_or(seen))
    })
    .await
}

async fn check(lab: &Lab, plan: &Plan, acked: u64) -> Result<Checked> {
    check_tag(lab, &tag(plan), acked).await
}

async fn check_tag(lab: &Lab, tag: &str, acked: u64) -> Result<Checked> {
    let (to, acked) = (REDIS.to_string(), acked.to_string());
    let args = ["check", "--to", &to, "--tag", tag, "--acked", &acked];
    lab.helper("the comparison of what was acknowledged with what is there", &args)?.answer(WRITE_ANSWER).await
}

/// How many acknowledged writes are missing in the log on the survivor's disk.
fn check_log(lab: &Lab, plan: &Plan, acked: u64) -> Result<u64> {
    let records = lab.log_on(Host::B).context("the log on the survivor's disk")?;
    let there: BTreeSet<&[u8]> = records.iter().map(Vec::as_slice).collect();
    let lost = (0..acked).filter(|&number| !there.contains(logged(&tag(plan), number).as_bytes())).count();
    println!(
        "  the log on the survivor's disk has {} records; {lost} of {acked} acknowledged writes are missing",
        records.len()
    );
    Ok(u64::try_from(lost).expect("a count of writes"))
}

fn tag(plan: &Plan) -> String {
    format!("r{}", plan.number)
}

fn home_tag(plan: &Plan) -> String {
    format!("h{}", plan.number)
}
