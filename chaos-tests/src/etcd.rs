//! An etcd cluster in the laboratory, in place of its witness: three members, each in a namespace of its own at the switch.
//!
//! ```text
//!   namespace us-PID-1      us-PID-2      us-PID-3
//!   10.77.0.21              10.77.0.22    10.77.0.23
//!   uplink -- to-1 -- br0 in us-PID-s, where hosts and clients are
//! ```
//!
//! The agents ask over TLS, with an authority of the laboratory's own. Promise: its processes and namespaces end with the laboratory;
//! what a member has acknowledged is in its directory there, so one that was killed goes on when it is started again.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use replicator::demo::lab::{Host, Lab};
use replicator::demo::netns::ip;
use replicator::demo::process::Daemon;
use replicator::demo::wait::until;

/// The members, by the letters of their namespaces.
pub const MEMBERS: [&str; 3] = ["1", "2", "3"];
/// Bound on the cluster's having a leader.
const LEADER: Duration = Duration::from_secs(60);
/// What its users say, once it asks.
const PASSWORD: &str = "a long word";
/// Bound on the end of a member that was killed.
const END: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Debug)]
pub struct Etcd {
    /// Where the members keep what they know, and the certificates.
    dir: PathBuf,
    /// By member; `None` while it is dead.
    members: [Option<Daemon>; 3],
    /// It asks for passwords.
    locked: bool,
}

/// The address of a member.
#[must_use]
pub fn address(member: &str) -> &'static str {
    match member {
        "1" => "10.77.0.21",
        "2" => "10.77.0.22",
        _ => "10.77.0.23",
    }
}

fn client(member: &str) -> String {
    format!("https://{}:2379", address(member))
}

fn peer(member: &str) -> String {
    format!("http://{}:2380", address(member))
}

/// What is missing on this machine, if anything is.
#[must_use]
pub fn missing() -> Option<String> {
    let there = |program: &str| {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
    };
    let absent = ["etcd", "etcdctl"].into_iter().find(|program| !there(program))?;
    Some(format!("{absent} is not installed (Debian packages etcd-server and etcd-client)"))
}

impl Etcd {
    /// Starts a cluster in the laboratory, waits until it has a leader, and configures both agents, which do not run yet, to ask it.
    ///
    /// # Errors
    /// If it cannot be started, or gets no leader within a bound.
    pub async fn start(lab: &Lab) -> Result<Self> {
        let dir = lab.path("etcd");
        fs::create_dir_all(&dir)?;
        certify(&dir)?;
        let switch = lab.namespace("s");
        for member in MEMBERS {
            let name = lab.namespace(member);
            ip(&format!("netns add {name}"))?;
            ip(&format!("-n {name} link set lo up"))?;
            ip(&format!("-n {switch} link add to-{member} type veth peer name uplink netns {name}"))?;
            ip(&format!("-n {switch} link set to-{member} master br0 up"))?;
            ip(&format!("-n {name} link set uplink up"))?;
            ip(&format!("-n {name} addr add {}/24 dev uplink", address(member)))?;
        }
        let mut etcd = Self { dir, members: [None, None, None], locked: false };
        for member in MEMBERS {
            etcd.run(lab, member)?;
        }
        etcd.leader(lab).await?;
        let endpoints = MEMBERS.map(|member| format!("\"{}\"", client(member))).join(", ");
        let ca = etcd.dir.join("ca.pem");
        for host in [Host::A, Host::B] {
            let config = lab.agent_config(host)?;
            let before = fs::read_to_string(&config).unwrap_or_default();
            let text = format!("{before}[etcd]\nendpoints = [{endpoints}]\nca = \"{}\"\n", ca.display());
            fs::write(&config, text).context("cannot configure an agent")?;
        }
        Ok(etcd)
    }

    /// Lets only users in from here on, of which the agents, which do not run yet, become one.
    ///
    /// # Errors
    /// If etcd does not take its users.
    pub fn lock(&mut self, lab: &Lab) -> Result<()> {
        let (root, user) = (format!("root:{PASSWORD}"), format!("understudy:{PASSWORD}"));
        let says: [&[&str]; 7] = [
            &["user", "add", &root],
            &["user", "grant-role", "root", "root"],
            &["role", "add", "understudy"],
            &["role", "grant-permission", "understudy", "--prefix=true", "readwrite", "understudy/"],
            &["user", "add", &user],
            &["user", "grant-role", "understudy", "understudy"],
            &["auth", "enable"],
        ];
        for words in says {
            self.ask(lab, &MEMBERS, words)?;
        }
        self.locked = true;
        let file = self.dir.join("password");
        fs::write(&file, format!("{PASSWORD}\n"))?;
        for host in [Host::A, Host::B] {
            // Its last part is etcd's.
            let config = lab.agent_config(host)?;
            let text = format!("{}user = \"understudy\"\npassword_file = {file:?}\n", fs::read_to_string(&config)?);
            fs::write(&config, text).context("cannot configure an agent")?;
        }
        Ok(())
    }

    /// What `etcdctl` answers, asked at these members.
    fn ask(&self, lab: &Lab, members: &[&str], words: &[&str]) -> Result<Vec<u8>> {
        let endpoints: Vec<String> = members.iter().map(|member| client(member)).collect();
        let mut ask = Command::new("ip");
        ask.args(["netns", "exec", &lab.namespace("c"), "etcdctl", "--endpoints", &endpoints.join(",")]);
        ask.arg("--cacert").arg(self.dir.join("ca.pem")).args(["--command-timeout", "2s"]);
        if self.locked {
            ask.args(["--user", &format!("root:{PASSWORD}")]);
        }
        let said = ask.args(words).env("ETCDCTL_API", "3").output().context("cannot run etcdctl")?;
        ensure!(said.status.success(), "etcdctl {words:?}: {}", String::from_utf8_lossy(&said.stderr).trim());
        Ok(said.stdout)
    }

    fn slot(&mut self, member: &str) -> &mut Option<Daemon> {
        let at = MEMBERS.iter().position(|its| *its == member).unwrap_or_default();
        &mut self.members[at]
    }

    /// Starts a member, for the first time or again.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn run(&mut self, lab: &Lab, member: &str) -> Result<()> {
        let at = |name: &str| self.dir.join(name).display().to_string();
        let all = MEMBERS.map(|member| format!("m{member}={}", peer(member))).join(",");
        let args = [
            "--name",
            &format!("m{member}"),
            "--data-dir",
            &at(&format!("data-{member}")),
            "--listen-client-urls",
            &client(member),
            "--advertise-client-urls",
            &client(member),
            "--listen-peer-urls",
            &peer(member),
            "--initial-advertise-peer-urls",
            &peer(member),
            "--initial-cluster",
            &all,
            "--cert-file",
            &at("member.pem"),
            "--key-file",
            &at("member.key"),
        ]
        .map(str::to_owned);
        let log = self.dir.join(format!("etcd-{member}.log"));
        let what = format!("member {member} of etcd");
        *self.slot(member) = Some(Daemon::start(&what, &lab.namespace(member), Path::new("etcd"), &args, &[], &log)?);
        Ok(())
    }

    /// Kills a member.
    ///
    /// # Errors
    /// If it does not run, or does not end.
    pub async fn kill(&mut self, member: &str) -> Result<()> {
        let mut process = self.slot(member).take().with_context(|| format!("member {member} of etcd does not run"))?;
        process.check()?;
        process.kill();
        process.ended(END).await.map(drop)
    }

    /// The process of a member.
    ///
    /// # Errors
    /// If it does not run.
    pub fn pid(&mut self, member: &str) -> Result<u32> {
        let pid = self.slot(member).as_ref().and_then(Daemon::pid);
        pid.with_context(|| format!("member {member} of etcd does not run"))
    }

    /// Waits until all members that run agree on one of them that leads, and returns it.
    ///
    /// # Errors
    /// If they do not within a bound.
    pub async fn leader(&mut self, lab: &Lab) -> Result<&'static str> {
        let run: Vec<&'static str> = MEMBERS.into_iter().filter(|member| self.slot(member).is_some()).collect();
        until("etcd to have a leader", LEADER, async || {
            Ok(self.agreed(lab, &run).map_err(|error| format!("{error:#}")))
        })
        .await
    }

    fn agreed(&self, lab: &Lab, run: &[&'static str]) -> Result<&'static str> {
        let said = self.ask(lab, run, &["endpoint", "status", "--write-out", "json"])?;
        let all: Vec<serde_json::Value> = serde_json::from_slice(&said)?;
        let leads = |status: &serde_json::Value| status["Status"]["leader"].as_u64();
        let leader = all.first().and_then(leads).filter(|leader| *leader != 0).context("none leads")?;
        ensure!(all.len() == run.len() && all.iter().all(|status| leads(status) == Some(leader)), "they do not agree");
        let its = all.iter().find(|status| status["Status"]["header"]["member_id"].as_u64() == Some(leader));
        let its = its.context("the leader is dead")?;
        run.iter().copied().find(|member| its["Endpoint"] == client(member).as_str()).context("an unknown leader")
    }
}

/// An authority, and a certificate for all members.
fn certify(dir: &Path) -> Result<()> {
    let authority = rcgen::KeyPair::generate()?;
    let mut params = rcgen::CertificateParams::new(Vec::new())?;
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let root = params.self_signed(&authority)?;
    let issuer = rcgen::Issuer::new(params, authority);
    let key = rcgen::KeyPair::generate()?;
    let names: Vec<String> = MEMBERS.iter().map(|member| address(member).to_owned()).collect();
    let certificate = rcgen::CertificateParams::new(names)?.signed_by(&key, &issuer)?;
    fs::write(dir.join("ca.pem"), root.pem())?;
    fs::write(dir.join("member.pem"), certificate.pem())?;
    fs::write(dir.join("member.key"), key.serialize_pem()).context("cannot write a key")
}
