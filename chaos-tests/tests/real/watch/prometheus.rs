//! A Prometheus in the laboratory, beside the client, and questions to its HTTP API.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use replicator::demo::process::Daemon;
use replicator::demo::wait::until;
use serde_json::Value;

use super::{HOSTS, SCRAPE};
use crate::stage::{SOON, Stage};

/// Bound on one answer.
const ANSWER: Duration = Duration::from_secs(10);
/// Time between two steps of a query over time.
const STEP: Duration = Duration::from_millis(500);
/// Where it listens, in the client's namespace.
const ADDRESS: &str = "10.77.0.100:9090";

/// What `understudy dashboards export` writes.
pub(super) fn exported() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../dashboards/export")
}

/// What is missing on this machine, if anything.
pub(super) fn missing() -> Option<String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).any(|dir| dir.join("prometheus").is_file());
    (!found).then(|| "prometheus is not installed".to_owned())
}

/// A running one. It ends with the value.
pub(super) struct Prometheus {
    _daemon: Daemon,
    started: SystemTime,
}

impl Prometheus {
    /// Starts it with the exported rules and short intervals; returns when it has scraped both agents.
    pub(super) async fn start(stage: &Stage) -> Result<Self> {
        let dir = stage.lab.dir().join("prometheus");
        fs::create_dir_all(&dir)?;
        let rules = exported().join("prometheus/understudy.rules.yml");
        let rules = rules.canonicalize().with_context(|| format!("cannot find {}", rules.display()))?;
        let every = format!("{}ms", SCRAPE.as_millis());
        let targets = HOSTS.map(|host| format!("\"{}\"", host.metrics())).join(", ");
        let config = format!(
            "global:\n  scrape_interval: {every}\n  scrape_timeout: {every}\n  evaluation_interval: {every}\nrule_files: \
             [\"{}\"]\nscrape_configs:\n  - job_name: understudy\n    static_configs:\n      - targets: [{targets}]\n",
            rules.display()
        );
        let config_file = dir.join("prometheus.yml");
        fs::write(&config_file, config)?;
        let args = [
            format!("--config.file={}", config_file.display()),
            format!("--storage.tsdb.path={}", dir.join("data").display()),
            format!("--web.listen-address={ADDRESS}"),
        ];
        let (namespace, log) = (stage.lab.namespace("c"), dir.join("prometheus.log"));
        let mut daemon = Daemon::start("Prometheus", &namespace, Path::new("prometheus"), &args, &[], &log)?;
        let started = SystemTime::now();
        until("Prometheus to scrape both agents", SOON, async || {
            daemon.check()?;
            let answer = ask(&namespace, &path("query", &[("query", "sum(up) == 2")]));
            Ok(match answer {
                Ok(data) if data["result"].as_array().is_some_and(|all| !all.is_empty()) => Ok(()),
                Ok(data) => Err(data.to_string()),
                Err(error) => Err(format!("{error:#}")),
            })
        })
        .await?;
        Ok(Self { _daemon: daemon, started })
    }

    /// The first value of a query now, if it has any that is a number.
    pub(super) fn now(&self, stage: &Stage, query: &str) -> Result<Option<f64>> {
        let data = ask(&stage.lab.namespace("c"), &path("query", &[("query", query)]))
            .with_context(|| format!("asking for {query}"))?;
        let first = data["result"].as_array().and_then(|all| all.first());
        Ok(first.and_then(|series| number(&series["value"])))
    }

    /// How many numbers a query has over all the time since the start.
    ///
    /// The steps are counted back from now: what an instant query has just seen is in the last one. Counted from the start, the
    /// last step can lie up to a whole one before now, and what came with the last scrape would not be seen.
    pub(super) fn over_all(&self, stage: &Stage, query: &str) -> Result<usize> {
        let end = SystemTime::now();
        let steps = end.duration_since(self.started)?.as_millis() / STEP.as_millis();
        let start = end - STEP * u32::try_from(steps)?;
        let unix = |at: SystemTime| at.duration_since(UNIX_EPOCH).map(|since| format!("{:.3}", since.as_secs_f64()));
        let (start, end, step) = (unix(start)?, unix(end)?, STEP.as_secs_f64().to_string());
        let asked = [("query", query), ("start", &start), ("end", &end), ("step", &step)];
        let data = ask(&stage.lab.namespace("c"), &path("query_range", &asked))?;
        let series = data["result"].as_array().context("the answer has no result")?;
        let values = series.iter().filter_map(|one| one["values"].as_array()).flatten();
        Ok(values.filter_map(number).count())
    }

    /// The alert rules as it has loaded them: names and expressions.
    pub(super) fn alerts(&self, stage: &Stage) -> Result<Vec<(String, String)>> {
        let data = ask(&stage.lab.namespace("c"), &path("rules", &[("type", "alert")]))?;
        let groups = data["groups"].as_array().context("the answer has no groups")?;
        let rules = groups.iter().filter_map(|group| group["rules"].as_array()).flatten();
        let mut alerts = Vec::new();
        for rule in rules {
            ensure!(rule["health"] == "ok", "a rule fails: {rule}");
            let text = |key: &str| rule[key].as_str().map(str::to_owned).context("a rule has a name and a query");
            alerts.push((text("name")?, text("query")?));
        }
        Ok(alerts)
    }
}

/// The number of `[time, "number"]`.
fn number(pair: &Value) -> Option<f64> {
    let value: f64 = pair[1].as_str()?.parse().ok()?;
    value.is_finite().then_some(value)
}

fn path(what: &str, parameters: &[(&str, &str)]) -> String {
    let encoded = |text: &str| text.bytes().map(|byte| format!("%{byte:02X}")).collect::<String>();
    let pairs: Vec<String> = parameters.iter().map(|(key, value)| format!("{key}={}", encoded(value))).collect();
    format!("/api/v1/{what}?{}", pairs.join("&"))
}

/// Asks in the namespace; returns `data` of the answer, or the error that Prometheus says.
fn ask(namespace: &str, path: &str) -> Result<Value> {
    let mut stream = connect(namespace)?;
    stream.set_read_timeout(Some(ANSWER))?;
    stream.set_write_timeout(Some(ANSWER))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {ADDRESS}\r\n\r\n")?;
    let deadline = Instant::now() + ANSWER;
    let (mut answer, mut part) = (Vec::new(), [0; 65_536]);
    loop {
        match stream.read(&mut part)? {
            0 => break,
            length => answer.extend_from_slice(&part[..length]),
        }
        ensure!(Instant::now() < deadline, "Prometheus' answer took longer than {ANSWER:?}");
    }
    let answer = String::from_utf8(answer)?;
    let (_, body) = answer.split_once("\r\n\r\n").context("Prometheus' answer has no body")?;
    let mut body: Value = serde_json::from_str(body).with_context(|| format!("Prometheus answered {answer}"))?;
    if body["status"] != "success" {
        bail!("Prometheus says {}", body["error"]);
    }
    Ok(body["data"].take())
}

/// A socket belongs to the namespace that its thread is in when it is made; so a thread of its own goes there for it.
fn connect(namespace: &str) -> Result<TcpStream> {
    let place = fs::File::open(Path::new("/run/netns").join(namespace))?;
    let address: SocketAddr = ADDRESS.parse()?;
    let connecting = thread::spawn(move || -> Result<TcpStream> {
        rustix::thread::move_into_link_name_space(
            std::os::fd::AsFd::as_fd(&place),
            Some(rustix::thread::LinkNameSpaceType::Network),
        )?;
        Ok(TcpStream::connect_timeout(&address, ANSWER)?)
    });
    connecting.join().map_err(|_| anyhow::anyhow!("the connecting thread panicked"))?
}
