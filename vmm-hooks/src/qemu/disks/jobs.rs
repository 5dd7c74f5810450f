//! The mirror jobs in QEMU: added, looked at and removed, over its monitor.
//!
//! A job copies everything to our NBD socket and from then on answers a write of the guest only when both sides have it
//! (`write-blocking`). An error of our side never reaches the guest, and pauses the job.
//!
//! **Jobs begin and end only while the guest stands.** QEMU 7.2 is not safe against writes at these two moments (its
//! `block/mirror.c`): one that is under way when the filter goes in passes before there is a job, into a dirty bitmap that
//! is switched off, and may be missing from the copy for good; in an I/O thread it may meet a bitmap of the job that is not
//! there yet; and one that is under way when the job goes clears its bit in memory that was freed. For the same reason an
//! error does not end a job by itself (`stop`, not `report`).

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::super::OUR_PREFIX;
use super::super::qmp::{Qmp, QmpError};

/// How long removed jobs may take to go.
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(5);

/// How long jobs may take to begin. The guest stands meanwhile.
const BEGIN_TIMEOUT: Duration = Duration::from_secs(2);

/// How long removed jobs may take before their connection is cut.
const PATIENCE: Duration = Duration::from_secs(1);

/// Commands that mirroring cannot do without.
pub(in crate::qemu) const COMMANDS: [&str; 6] = [
    "block-job-cancel",
    "blockdev-add",
    "blockdev-del",
    "blockdev-mirror",
    "query-block-jobs",
    "query-named-block-nodes",
];

/// What one disk's things in QEMU are called. Each mirroring has names of its own, so that a late event of the last
/// one is not taken for its.
#[derive(Debug, Clone)]
pub(super) struct Names {
    pub(super) job: String,
    pub(super) target: String,
    pub(super) filter: String,
}

impl Names {
    pub(super) fn new(generation: u64, disk: usize) -> Self {
        // QEMU takes 31 characters at most.
        let ours = |what: &str| format!("{OUR_PREFIX}{what}-{}-{disk}", generation % 100_000);
        Self { job: ours("mirror"), target: ours("nbd"), filter: ours("top") }
    }
}

/// Whether this QEMU mirrors writes before it answers them.
pub(in crate::qemu) fn supported(qmp: &mut Qmp) -> Result<bool, QmpError> {
    if COMMANDS.iter().any(|command| !qmp.has(command)) {
        return Ok(false);
    }
    if !qmp.has("query-qmp-schema") {
        return Ok(false);
    }
    let schema = qmp.execute("query-qmp-schema", json!({}))?;
    let find = |name: &Value| schema.as_array().into_iter().flatten().find(|entry| entry.get("name") == Some(name));
    let arguments = find(&"blockdev-mirror".into()).and_then(|command| find(command.get("arg-type")?));
    let members = arguments.and_then(|arguments| arguments.get("members")?.as_array());
    Ok(members.is_some_and(|members| members.iter().any(|member| member["name"] == "copy-mode")))
}

/// Adds the mirror of the disk whose top node is `node`. The guest stands.
pub(super) fn add(qmp: &mut Qmp, names: &Names, node: &str, socket: &Path, export: &str) -> Result<(), QmpError> {
    qmp.execute(
        "blockdev-add",
        json!({
            "driver": "nbd",
            "node-name": names.target,
            "server": { "type": "unix", "path": socket },
            "export": export,
            // Written zeroes become holes, and holes are asked for as such.
            "detect-zeroes": "unmap",
            "discard": "unmap",
        }),
    )?;
    qmp.execute(
        "blockdev-mirror",
        json!({
            "job-id": names.job,
            "device": node,
            "target": names.target,
            "filter-node-name": names.filter,
            "sync": "full",
            "copy-mode": "write-blocking",
            "on-source-error": "stop",
            "on-target-error": "stop",
        }),
    )?;
    Ok(())
}

/// Waits until these jobs have begun: from then on they miss no write. The guest stands. `false`: it takes too long.
///
/// Without I/O threads QEMU begins a job before it answers the command that makes it.
pub(super) fn wait_begun(qmp: &mut Qmp, names: &[Names]) -> Result<bool, QmpError> {
    if qmp.has("query-iothreads") && qmp.execute("query-iothreads", json!({}))?.as_array().is_some_and(Vec::is_empty) {
        return Ok(true);
    }
    let started = Instant::now();
    loop {
        let jobs = qmp.execute("query-block-jobs", json!({}))?;
        // A job knows what there is to copy only after it has made everything that writes need, and looked through the image.
        if names.iter().all(|names| begun(&jobs, &names.job)) {
            return Ok(true);
        }
        if started.elapsed() > BEGIN_TIMEOUT {
            return Ok(false);
        }
        std::thread::yield_now();
    }
}

/// Whether a job has begun, or is gone, which others find out.
fn begun(jobs: &Value, name: &str) -> bool {
    let job = jobs.as_array().into_iter().flatten().find(|job| job["device"] == name);
    job.is_none_or(|job| job["ready"] == true || job["len"].as_u64().is_some_and(|len| len > 0))
}

/// Why a job does not prove that every write is in the log, if it does not. `Ok(false)`: the first copy goes on.
pub(super) fn whole(jobs: &Value, name: &str) -> Result<bool, String> {
    let job = jobs.as_array().into_iter().flatten().find(|job| job["device"] == name);
    let Some(job) = job else { return Err("its job is gone".to_owned()) };
    if job["io-status"] != "ok" {
        return Err(format!("its job has the I/O status {}", job["io-status"]));
    }
    if job["paused"] != false {
        return Err("its job was paused".to_owned());
    }
    if job.get("error").is_some() {
        return Err(format!("its job failed: {}", job["error"]));
    }
    // What newer ones tell beside: whether a write could still be missing.
    let synced = job.get("actively-synced").is_none_or(|synced| *synced == true);
    Ok(job["ready"] == true && synced)
}

/// How much a job has done, and of how much.
pub(super) fn progress(jobs: &Value, name: &str) -> (u64, u64) {
    let job = jobs.as_array().into_iter().flatten().find(|job| job["device"] == name);
    let number = |key: &str| job.and_then(|job| job.get(key)?.as_u64()).unwrap_or_default();
    (number("offset"), number("len"))
}

/// Removes every mirror of ours, whoever made it: what it was, and the first failure. Our side must answer everything at
/// once or be gone; `cut` is called if QEMU waits for it all the same. A guest that runs stands for a moment.
pub(in crate::qemu) fn remove(qmp: &mut Qmp, cut: impl Fn()) -> Result<Vec<String>, QmpError> {
    let jobs = our_jobs(qmp)?;
    if jobs.is_empty() || qmp.execute("query-status", json!({}))?["running"] != true {
        return remove_standing(qmp, jobs, cut);
    }
    let stopped = qmp.execute("stop", json!({}));
    let removed = stopped.and_then(|_| remove_standing(qmp, jobs, cut));
    // Also after a `stop` whose answer is late: QEMU does one after the other, and nobody else would let the guest run again.
    let runs = qmp.execute("cont", json!({}));
    removed.and_then(|removed| runs.map(|_| removed))
}

/// These jobs, and every node of ours.
fn remove_standing(qmp: &mut Qmp, mut removed: Vec<String>, cut: impl Fn()) -> Result<Vec<String>, QmpError> {
    for job in &removed {
        match qmp.execute("block-job-cancel", json!({ "device": job, "force": true })) {
            // It has gone by itself.
            Ok(_) | Err(QmpError::Refused { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    let started = Instant::now();
    while !our_jobs(qmp)?.is_empty() {
        if started.elapsed() > REMOVAL_TIMEOUT {
            let command = "block-job-cancel".to_owned();
            return Err(QmpError::TimedOut { command, after: REMOVAL_TIMEOUT });
        }
        if started.elapsed() > PATIENCE {
            cut();
        }
        std::thread::yield_now();
    }
    let mut result = Ok(());
    for node in our_nodes(qmp)? {
        let done = qmp.execute("blockdev-del", json!({ "node-name": node })).map(drop);
        result = result.and(done);
        removed.push(node);
    }
    result.map(|()| removed)
}

/// Jobs and nodes of ours.
pub(in crate::qemu) fn leftovers(qmp: &mut Qmp) -> Result<Vec<String>, QmpError> {
    let mut found = our_jobs(qmp)?;
    found.extend(our_nodes(qmp)?);
    Ok(found)
}

fn our_jobs(qmp: &mut Qmp) -> Result<Vec<String>, QmpError> {
    if !qmp.has("query-block-jobs") {
        return Ok(Vec::new());
    }
    Ok(ours(&qmp.execute("query-block-jobs", json!({}))?, "device"))
}

fn our_nodes(qmp: &mut Qmp) -> Result<Vec<String>, QmpError> {
    if !qmp.has("query-named-block-nodes") {
        return Ok(Vec::new());
    }
    let nodes = match qmp.execute("query-named-block-nodes", json!({ "flat": true })) {
        // An older QEMU does not know how to be brief.
        Err(QmpError::Refused { .. }) => qmp.execute("query-named-block-nodes", json!({}))?,
        other => other?,
    };
    Ok(ours(&nodes, "node-name"))
}

fn ours(listed: &Value, key: &str) -> Vec<String> {
    let names = listed.as_array().into_iter().flatten().filter_map(|entry| entry.get(key)?.as_str());
    names.filter(|name| name.starts_with(OUR_PREFIX)).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job() -> Value {
        json!({ "device": "j", "paused": false, "io-status": "ok", "ready": true, "len": 9, "offset": 4 })
    }

    fn with(key: &str, value: Value) -> Value {
        let mut job = job();
        job[key] = value;
        json!([{ "device": "other" }, job])
    }

    #[test]
    fn only_a_healthy_job_is_whole() {
        assert_eq!(whole(&with("x", json!(1)), "j"), Ok(true));
        assert_eq!(whole(&with("actively-synced", json!(true)), "j"), Ok(true));
        assert_eq!(whole(&with("actively-synced", json!(false)), "j"), Ok(false));
        assert_eq!(whole(&with("ready", json!(false)), "j"), Ok(false));
        assert_eq!(progress(&json!([job()]), "j"), (4, 9));
        let broken = [
            with("paused", json!(true)),
            with("io-status", json!("failed")),
            with("io-status", Value::Null),
            with("error", json!("no")),
            json!([]),
            json!({}),
        ];
        assert!(broken.iter().all(|jobs| whole(jobs, "j").is_err()));
    }

    #[test]
    fn a_job_has_begun_when_it_knows_what_to_copy() {
        assert!(begun(&with("x", json!(1)), "j") && begun(&json!([]), "j"));
        let empty = |ready: bool| json!([{ "device": "j", "ready": ready, "len": 0 }]);
        assert!(!begun(&empty(false), "j") && begun(&empty(true), "j"));
    }

    #[test]
    fn names_fit_qemu_and_are_ours() {
        let names = Names::new(99_999, 31);
        for name in [names.job, names.target, names.filter] {
            assert!(name.len() <= 31 && name.starts_with(OUR_PREFIX), "{name}");
        }
    }
}
