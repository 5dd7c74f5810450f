//! PostgreSQL's own programs, of the version that the guest serves: `psql` for clients, and its checkers.
//!
//! They run by `chroot` in the tree that the guest's disk was made of ([`super::lab::Machine::database`]).

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use super::image;
use super::lab::GUEST;
use super::process::{Daemon, Talker, outcome};
use super::wait::until;

/// Bound on an answer of the database.
pub(super) const ANSWER: Duration = Duration::from_secs(30);
/// Bound on a checker's work.
const CHECK: Duration = Duration::from_secs(300);

/// A connection to the database, one and never another one: when it breaks, `psql` ends.
#[derive(Debug)]
pub struct Client {
    psql: Talker,
    asked: u64,
}

impl Client {
    /// Connects to the guest from a namespace. What `psql` complains about goes to `log`.
    ///
    /// # Errors
    /// If `psql` cannot be started.
    pub fn connect(namespace: &str, database: &Path, log: &Path) -> Result<Self> {
        Self::connect_to(&GUEST.to_string(), namespace, database, log)
    }

    fn connect_to(host: &str, namespace: &str, database: &Path, log: &Path) -> Result<Self> {
        let words = ["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-h", host, "-U", "postgres"];
        let args = program(database, "psql", &words);
        Ok(Self { psql: Talker::start("psql", namespace, Path::new("chroot"), &args, log)?, asked: 0 })
    }

    /// Runs SQL; the rows of its answer, their columns separated by `|`.
    ///
    /// # Errors
    /// If it fails, or the connection breaks.
    pub async fn run(&mut self, sql: &str) -> Result<Vec<String>> {
        self.asked += 1;
        let last = format!("answered {}", self.asked);
        self.psql.ask(&format!("{sql};\n\\echo {last}\n"), &last, ANSWER).await
    }

    /// The one value that SQL asks for.
    ///
    /// # Errors
    /// As [`Client::run`]; if it gives no row or several.
    pub async fn value(&mut self, sql: &str) -> Result<String> {
        let rows = self.run(sql).await?;
        let [value] = rows.as_slice() else { bail!("{sql} gave {rows:?}") };
        Ok(value.clone())
    }
}

/// The words after `chroot` that start a program of the tree.
fn program(database: &Path, name: &str, words: &[&str]) -> Vec<String> {
    let mut args = vec![database.join("tree").display().to_string(), format!("/postgres/{name}")];
    args.extend(words.iter().map(|&word| word.to_owned()));
    args
}

/// Waits until the database takes connections.
///
/// # Errors
/// If it does not within `bound`.
pub(super) async fn until_ready(namespace: &str, database: &Path, bound: Duration) -> Result<()> {
    until_ready_at(&GUEST.to_string(), namespace, database, bound).await
}

async fn until_ready_at(host: &str, namespace: &str, database: &Path, bound: Duration) -> Result<()> {
    let args = program(database, "pg_isready", &["-q", "-t", "2", "-h", host, "-U", "postgres"]);
    until("the database to take connections", bound, async || {
        let asked = outcome("pg_isready", namespace, Path::new("chroot"), &args, &[], ANSWER).await?;
        Ok(if asked.code == Some(0) { Ok(()) } else { Err(format!("{asked:?}")) })
    })
    .await
}

/// Checks every table and index of a running database with `amcheck`, each index against its table.
///
/// # Errors
/// If one is not sound, in the words of `pg_amcheck`.
pub(super) async fn amcheck(host: &str, namespace: &str, database: &Path) -> Result<()> {
    let words = ["--all", "--install-missing", "--heapallindexed", "-h", host, "-U", "postgres"];
    let args = program(database, "pg_amcheck", &words);
    let checked = outcome("pg_amcheck", namespace, Path::new("chroot"), &args, &[], CHECK).await?;
    ensure!(checked.code == Some(0), "pg_amcheck is not content: {} {}", checked.out, checked.err);
    Ok(())
}

/// Serves the database of a disk whose machine was killed, to this host alone: file system and database are recovered by what their journals
/// hold, as after a loss of power. Only this looks at what is on the disk: a guest that lives answers out of the memory that came with it, and one
/// that shuts down writes its state anew.
///
/// # Errors
/// If something is wrong, in the words of whoever found it.
pub(super) async fn serve_disk(image: &Path, namespace: &str, database: &Path, dir: &Path) -> Result<Served> {
    image::replay(image)?;
    // Into the tree, where the programs of the same version are. It has no cluster of its own.
    let cluster = Cluster::take(database, dir)?;
    let rdump = format!("rdump /pg {}", cluster.0.display());
    let said = image::tool("debugfs", &["-R", &rdump, &image.display().to_string()])?.err;
    // It names a process of the guest's.
    fs::remove_file(cluster.0.join("pg/postmaster.pid"))
        .with_context(|| format!("there is no cluster on the disk that was served when it was killed: {said}"))?;
    let mut args = vec!["--userspec=65534:65534".to_owned()];
    let words = ["-D", &cluster.inside(database), "-k", &cluster.socket(database), "-c", "listen_addresses="];
    args.extend(program(database, "postgres", &words));
    let log = dir.join("postgres.log");
    let server = Daemon::start("PostgreSQL on the survivor's disk", namespace, Path::new("chroot"), &args, &[], &log)?;
    let served = Served { host: cluster.socket(database), server, cluster };
    until_ready_at(&served.host, namespace, database, CHECK).await?;
    Ok(served)
}

/// A database that is served from a disk, out of the tree; ended and removed when let go.
#[derive(Debug)]
pub(super) struct Served {
    /// Where, for a client.
    pub(super) host: String,
    // In this order: the server goes before its files.
    server: Daemon,
    cluster: Cluster,
}

impl Served {
    /// Shuts it down in good order and checks the checksum of each of its pages.
    ///
    /// # Errors
    /// If it does not end, or a page is damaged.
    pub(super) async fn end(mut self, database: &Path) -> Result<()> {
        let pid = self.server.pid().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?)).context("it has ended")?;
        kill_process(pid, Signal::INT)?;
        self.server.ended(CHECK).await?;
        let args = program(database, "pg_checksums", &["--check", "-D", &self.cluster.inside(database)]);
        let checked = Command::new("chroot").args(&args).output().context("cannot run pg_checksums")?;
        let words = [checked.stdout, checked.stderr].concat();
        ensure!(checked.status.success(), "pg_checksums is not content: {}", String::from_utf8_lossy(&words));
        Ok(())
    }

    /// A connection to it.
    pub(super) fn connect(&self, namespace: &str, database: &Path, log: &Path) -> Result<Client> {
        Client::connect_to(&self.host, namespace, database, log)
    }
}

/// A place in the tree for a cluster, removed when let go.
#[derive(Debug)]
struct Cluster(PathBuf);

impl Cluster {
    fn take(database: &Path, dir: &Path) -> Result<Self> {
        let name = dir.file_name().context("the directory has no name")?.to_string_lossy().into_owned();
        let place = database.join("tree/tmp").join(format!("check-{}-{name}", std::process::id()));
        fs::create_dir(&place).with_context(|| format!("cannot make {}", place.display()))?;
        // Its server's user makes the socket there.
        fs::set_permissions(&place, fs::Permissions::from_mode(0o777))?;
        Ok(Self(place))
    }

    /// The directory of its server's socket, for a program of the tree.
    fn socket(&self, database: &Path) -> String {
        let place = self.0.strip_prefix(database.join("tree")).expect("it was made there");
        format!("/{}", place.display())
    }

    /// The cluster's path for a program of the tree.
    fn inside(&self, database: &Path) -> String {
        format!("{}/pg", self.socket(database))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
