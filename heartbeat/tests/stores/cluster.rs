//! etcd clusters on the loopback interface, each member a process of its own.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use heartbeat::etcd::{DEFAULT_PREFIX, EtcdConfig};
use tempfile::TempDir;

/// How often a cluster is looked at until it has a leader.
const LOOKS: u32 = 1_200;

/// Files of a cluster that speaks TLS.
pub(crate) struct Tls {
    pub(crate) ca: PathBuf,
    certificate: PathBuf,
    key: PathBuf,
}

impl Tls {
    /// An authority and a certificate for 127.0.0.1, in `dir`.
    pub(crate) fn make(dir: &Path) -> Self {
        let authority = rcgen::KeyPair::generate().expect("key");
        let mut params = rcgen::CertificateParams::new(Vec::new()).expect("parameters");
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let root = params.self_signed(&authority).expect("signed");
        let issuer = rcgen::Issuer::new(params, authority);
        let key = rcgen::KeyPair::generate().expect("key");
        let params = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).expect("parameters");
        let certificate = params.signed_by(&key, &issuer).expect("signed");
        let write = |name: &str, text: String| {
            let path = dir.join(name);
            std::fs::write(&path, text).expect("written");
            path
        };
        Self {
            ca: write("ca.pem", root.pem()),
            certificate: write("member.pem", certificate.pem()),
            key: write("member.key", key.serialize_pem()),
        }
    }
}

struct Member {
    client: String,
    peer: String,
    process: Option<Child>,
}

/// A cluster. Its members end with it.
pub(crate) struct Cluster {
    dir: TempDir,
    tls: Option<Tls>,
    token: &'static str,
    members: Vec<Member>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for index in 0..self.members.len() {
            self.kill(index);
        }
    }
}

/// Whether there is an etcd here; if not, says that the test is skipped.
pub(crate) fn is_installed() -> bool {
    let there = |program: &str| {
        Command::new(program).arg("--help").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
    };
    let all = there("etcd") && there("etcdctl");
    if !all {
        println!("skipped: no etcd here (Debian packages etcd-server and etcd-client; `cargo xtask setup`)");
    }
    all
}

/// Addresses that were free a moment ago.
fn free(count: usize) -> Vec<String> {
    let held: Vec<_> = (0..count).map(|_| TcpListener::bind(("127.0.0.1", 0)).expect("a port")).collect();
    held.iter().map(|listener| listener.local_addr().expect("bound").to_string()).collect()
}

impl Cluster {
    /// A cluster of `size` members that has a leader.
    pub(crate) fn start(size: usize, with_tls: bool) -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        let tls = with_tls.then(|| Tls::make(dir.path()));
        let scheme = if with_tls { "https" } else { "http" };
        let addresses = free(2 * size);
        let members = addresses
            .chunks(2)
            .map(|pair| Member {
                client: format!("{scheme}://{}", pair[0]),
                peer: format!("http://{}", pair[1]),
                process: None,
            })
            .collect();
        let mut cluster = Self { dir, tls, token: "first", members };
        for index in 0..size {
            cluster.run(index);
        }
        cluster.leader();
        cluster
    }

    fn data(&self, index: usize) -> PathBuf {
        self.dir.path().join(format!("{}-{index}", self.token))
    }

    fn initial(&self) -> String {
        let list = self.members.iter().enumerate().map(|(index, member)| format!("m{index}={}", member.peer));
        list.collect::<Vec<_>>().join(",")
    }

    /// Starts a member, also one that ran before.
    pub(crate) fn run(&mut self, index: usize) {
        let member = &self.members[index];
        let log = std::fs::File::create(self.dir.path().join(format!("log-{}-{index}", self.token))).expect("a log");
        let mut command = Command::new("etcd");
        command.args(["--name", &format!("m{index}"), "--data-dir"]).arg(self.data(index));
        command.args(["--listen-client-urls", &member.client, "--advertise-client-urls", &member.client]);
        command.args(["--listen-peer-urls", &member.peer, "--initial-advertise-peer-urls", &member.peer]);
        command.args(["--initial-cluster", &self.initial(), "--initial-cluster-token", self.token]);
        if let Some(tls) = &self.tls {
            command.arg("--cert-file").arg(&tls.certificate).arg("--key-file").arg(&tls.key);
        }
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a log")).stderr(log);
        self.members[index].process = Some(command.spawn().expect("etcd starts"));
    }

    /// Ends a member with SIGKILL.
    pub(crate) fn kill(&mut self, index: usize) {
        if let Some(mut process) = self.members[index].process.take() {
            // It may have ended by itself; either way it is gone after this.
            let _gone = process.kill();
            process.wait().expect("it was ours");
        }
    }

    pub(crate) fn ctl(&self, arguments: &[&str]) -> Option<String> {
        let endpoints: Vec<_> =
            self.members.iter().filter(|member| member.process.is_some()).map(|member| member.client.clone()).collect();
        let mut command = Command::new("etcdctl");
        command.env("ETCDCTL_API", "3").arg("--endpoints").arg(endpoints.join(","));
        if let Some(tls) = &self.tls {
            command.arg("--cacert").arg(&tls.ca);
        }
        let output = command.args(arguments).output().expect("etcdctl starts");
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Which member leads. Waits until all that run agree on one that runs.
    pub(crate) fn leader(&self) -> usize {
        for _ in 0..LOOKS {
            if let Some(leader) = self.agreed_leader() {
                return leader;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        panic!("the cluster has no leader");
    }

    fn agreed_leader(&self) -> Option<usize> {
        let text = self.ctl(&["endpoint", "status", "--write-out", "json"])?;
        let all: Vec<serde_json::Value> = serde_json::from_str(&text).ok()?;
        let leads = |status: &serde_json::Value| status["Status"]["leader"].as_u64();
        let leader = leads(all.first()?).filter(|leader| *leader != 0)?;
        if all.iter().any(|status| leads(status) != Some(leader)) {
            return None;
        }
        let of = all.iter().find(|status| status["Status"]["header"]["member_id"].as_u64() == Some(leader))?;
        self.members.iter().position(|member| of["Endpoint"] == member.client.as_str())
    }

    /// How a client reaches it.
    pub(crate) fn config(&self) -> EtcdConfig {
        EtcdConfig {
            endpoints: self.members.iter().map(|member| member.client.clone()).collect(),
            prefix: DEFAULT_PREFIX.to_owned(),
            ca: self.tls.as_ref().map(|tls| tls.ca.clone()),
            certificate: None,
            user: None,
        }
    }

    /// Ends a cluster of one member and begins another from its snapshot, at the same address, as an operator restores a backup.
    pub(crate) fn restore(mut self) -> Self {
        let snapshot = self.dir.path().join("snapshot");
        let path = snapshot.to_str().expect("a plain path");
        self.ctl(&["snapshot", "save", path]).expect("saved");
        self.kill(0);
        self.token = "second";
        let data = self.data(0);
        let initial = self.initial();
        let restored = self.ctl(&[
            "snapshot",
            "restore",
            path,
            "--name",
            "m0",
            "--data-dir",
            data.to_str().expect("a plain path"),
            "--initial-cluster",
            &initial,
            "--initial-cluster-token",
            "second",
            "--initial-advertise-peer-urls",
            &self.members[0].peer,
        ]);
        restored.expect("restored");
        self.run(0);
        self.leader();
        self
    }
}
