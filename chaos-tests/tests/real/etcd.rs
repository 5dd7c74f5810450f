//! A cluster of etcd in place of the witness: three members that ask for TLS and a password, some of which die when a host does.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use replicator::control::api::{Role, VmStatus};
use replicator::demo::lab::{COMMAND, Host, WITNESS};
use replicator::demo::process::{Daemon, outcome};
use replicator::demo::wait::until;

use crate::stage::{SOON, Stage, play_long};

/// The namespace in which the members live.
const ROLE: &str = "w";
const PORTS: [u16; 3] = [2379, 2389, 2399];
const PASSWORD: &str = "a long word";

struct Cluster {
    dir: PathBuf,
    namespace: String,
    members: [Option<Daemon>; 3],
    /// The cluster asks for passwords.
    locked: bool,
}

fn is_installed() -> bool {
    let there = |program: &str| {
        Command::new(program).arg("--help").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
    };
    there("etcd") && there("etcdctl")
}

fn client(member: usize) -> String {
    format!("https://{WITNESS}:{}", PORTS[member])
}

fn peer(member: usize) -> String {
    format!("http://127.0.0.1:{}", PORTS[member] + 1)
}

/// An authority, and a certificate for the members' address.
fn make_certificates(dir: &Path) -> Result<()> {
    let authority = rcgen::KeyPair::generate()?;
    let mut params = rcgen::CertificateParams::new(Vec::new())?;
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let root = params.self_signed(&authority)?;
    let issuer = rcgen::Issuer::new(params, authority);
    let key = rcgen::KeyPair::generate()?;
    let params = rcgen::CertificateParams::new(vec![WITNESS.to_owned(), "127.0.0.1".to_owned()])?;
    let certificate = params.signed_by(&key, &issuer)?;
    fs::write(dir.join("ca.pem"), root.pem())?;
    fs::write(dir.join("member.pem"), certificate.pem())?;
    Ok(fs::write(dir.join("member.key"), key.serialize_pem())?)
}

impl Cluster {
    /// One that has a leader and lets only its users in, and both agents' configuration for it.
    async fn start(stage: &Stage) -> Result<Self> {
        let dir = stage.lab.path("etcd");
        fs::create_dir_all(&dir)?;
        make_certificates(&dir)?;
        let namespace = stage.lab.namespace(ROLE);
        let mut cluster = Self { dir, namespace, members: [None, None, None], locked: false };
        for member in 0..PORTS.len() {
            cluster.run(member)?;
        }
        cluster.leader().await?;
        let root = format!("root:{PASSWORD}");
        let user = format!("understudy:{PASSWORD}");
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
            cluster.ctl(words).await?;
        }
        cluster.locked = true;
        let password = cluster.dir.join("password");
        fs::write(&password, format!("{PASSWORD}\n"))?;
        let endpoints = [client(0), client(1), client(2)];
        let config = format!(
            "[etcd]\nendpoints = {endpoints:?}\nca = {:?}\nuser = \"understudy\"\npassword_file = {password:?}\n",
            cluster.dir.join("ca.pem")
        );
        for host in [Host::A, Host::B] {
            fs::write(stage.lab.agent_config(host)?, &config)?;
        }
        Ok(cluster)
    }

    /// Starts a member, also one that ran before.
    fn run(&mut self, member: usize) -> Result<()> {
        let name = format!("m{member}");
        let all = [0, 1, 2].map(|member| format!("m{member}={}", peer(member))).join(",");
        let shown = |file: &str| self.dir.join(file).display().to_string();
        let (client, peer, data) = (client(member), peer(member), shown(&name));
        let (certificate, key) = (shown("member.pem"), shown("member.key"));
        let words = [
            ["--name", &name],
            ["--data-dir", &data],
            ["--listen-client-urls", &client],
            ["--advertise-client-urls", &client],
            ["--listen-peer-urls", &peer],
            ["--initial-advertise-peer-urls", &peer],
            ["--initial-cluster", &all],
            ["--cert-file", &certificate],
            ["--key-file", &key],
        ];
        let words: Vec<String> = words.as_flattened().iter().map(|&word| word.to_owned()).collect();
        let log = self.dir.join(format!("{name}.log"));
        let what = format!("the etcd member {name}");
        self.members[member] = Some(Daemon::start(&what, &self.namespace, Path::new("etcd"), &words, &[], &log)?);
        Ok(())
    }

    async fn kill(&mut self, member: usize) -> Result<()> {
        let mut killed = self.members[member].take().context("it does not run")?;
        killed.kill();
        killed.ended(SOON).await.map(drop)
    }

    async fn ctl(&self, words: &[&str]) -> Result<String> {
        let running = (0..PORTS.len()).filter(|&member| self.members[member].is_some()).map(client);
        let mut args = vec!["--endpoints".to_owned(), running.collect::<Vec<_>>().join(",")];
        args.extend(["--cacert".to_owned(), self.dir.join("ca.pem").display().to_string()]);
        if self.locked {
            args.extend(["--user".to_owned(), format!("root:{PASSWORD}")]);
        }
        args.extend(words.iter().map(|&word| word.to_owned()));
        let env = [("ETCDCTL_API", "3".to_owned())];
        let said = outcome("etcdctl", &self.namespace, Path::new("etcdctl"), &args, &env, COMMAND).await?;
        ensure!(said.code == Some(0), "etcdctl {words:?}: {said:?}");
        Ok(said.out)
    }

    /// Which member leads. Waits until all that run agree on one that runs.
    async fn leader(&self) -> Result<usize> {
        until("etcd to have a leader", SOON, async || {
            let said = match self.ctl(&["endpoint", "status", "--write-out", "json"]).await {
                Ok(said) => said,
                Err(error) => return Ok(Err(format!("{error:#}"))),
            };
            let all: Vec<serde_json::Value> = serde_json::from_str(&said)?;
            let leads = |status: &serde_json::Value| status["Status"]["leader"].as_u64();
            let id = all.first().and_then(leads).filter(|id| *id != 0);
            let agreed = all.iter().all(|status| leads(status) == id);
            let of = |status: &&serde_json::Value| status["Status"]["header"]["member_id"].as_u64() == id;
            let found = all.iter().find(of).filter(|_| agreed && id.is_some());
            let leader = found.and_then(|of| (0..PORTS.len()).find(|&member| of["Endpoint"] == client(member)));
            Ok(leader.ok_or(said))
        })
        .await
    }
}

#[test]
fn hosts_and_members_of_etcd_die_together_and_nothing_is_lost() {
    if !is_installed() {
        println!("skipped: no etcd here (Debian packages etcd-server and etcd-client; `cargo xtask setup`)");
        return;
    }
    play_long("etcd: hosts die, and members with them", async |stage| {
        let mut etcd = Cluster::start(stage).await?;
        stage.lab.boot().await?;
        stage.lab.start_agent(Host::A).await?;
        stage.lab.start_agent(Host::B).await?;
        stage.lab.pair_hosts().await?;
        stage.protect_for_good().await?;
        let mut client = stage.writer("e").await?;

        // One member is dead already when the primary's host dies.
        let leader = etcd.leader().await?;
        let follower = (leader + 1) % PORTS.len();
        etcd.kill(follower).await?;
        client.goes_on().await?;
        stage.lab.kill_host_a().await?;
        client.goes_on().await?;
        let survivor = stage.until_survivor().await?;
        ensure!(survivor.role == Role::Survivor || survivor.role == Role::Primary, "{survivor:?}");
        etcd.run(follower)?;
        stage.stands_by_again(&mut client).await?;

        // The leader dies in the middle: the host that asks is granted the VM by its successor.
        let leader = etcd.leader().await?;
        stage.lab.kill_host(Host::B)?;
        etcd.kill(leader).await?;
        client.goes_on().await?;
        let survives = |status: &VmStatus| status.survivor.is_some() && status.generation > survivor.generation;
        stage.until(Host::A, "that the VM runs here again", survives).await?;
        ensure!(etcd.leader().await? != leader, "the dead member leads");
        stage.nothing_lost(client).await.map(drop)
    });
}
