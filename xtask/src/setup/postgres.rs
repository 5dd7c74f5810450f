//! The disk of the demo's database guest: PostgreSQL and what it needs on an ext4 file system, built from Debian's packages.
//!
//! Promise: `target/guest-postgres` holds `disk.raw`, from which the guest of [`super::guest`] serves a new cluster with
//! checksums and `fsync`; `tree`, the same files for this host's use by `chroot` (clients and checkers of the same
//! version); and `manifest`. All of one build; replaced as a whole or not at all. It is built only for who asks for it.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use super::apt::Apt;
use crate::shell;

/// Changes when the way the disk is put together does.
const RULES: &str = "rules 2";
/// Each depends on the version of this release.
const NAMES: [&str; 2] = ["postgresql", "postgresql-client"];
const OTHERS: [&str; 4] = ["busybox-static", "tzdata", "zlib1g", "libc6"];
/// Neither needed by a server that compiles no queries, and large.
const LEFT_OUT: [&str; 1] = ["libllvm"];
/// The server's user, in the guest and in `tree`.
const USER: u32 = 65534;
const DISK_MIB: u32 = 512;
/// How it serves. What a crash could take from it is left as it comes: everything is synced.
const CONFIG: &str = "
listen_addresses = '0.0.0.0'
unix_socket_directories = '/tmp'
dynamic_shared_memory_type = mmap
shared_buffers = 16MB
max_wal_size = 64MB
max_connections = 40
jit = off
";

/// Builds it unless it is there; the directory, or why this machine cannot build it.
///
/// # Errors
/// If the build directory cannot be written.
pub(crate) fn build(refresh: bool) -> Result<Result<PathBuf, String>> {
    let target = shell::target();
    let dir = target.join("guest-postgres");
    let manifest = fs::read_to_string(dir.join("manifest")).unwrap_or_default();
    if !refresh && manifest.lines().next() == Some(RULES) {
        println!("setup: the database's disk is there: {}", dir.display());
        return Ok(Ok(dir));
    }
    if !shell::is_root() {
        return Ok(Err("the database's disk can only be built by the superuser".to_owned()));
    }
    let work = target.join(format!("guest-postgres-{}.partial", std::process::id()));
    fs::create_dir_all(&work).with_context(|| format!("cannot create {}", work.display()))?;
    let made = make(&mut Apt::new(), &work).and_then(|()| {
        if dir.exists() {
            fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
        }
        fs::rename(&work, &dir).with_context(|| format!("cannot put the disk to {}", dir.display()))
    });
    match made {
        Ok(()) => Ok(Ok(dir)),
        Err(error) => {
            fs::remove_dir_all(&work).with_context(|| format!("cannot remove {}", work.display()))?;
            Ok(Err(format!("the database's disk could not be built: {error:#}")))
        }
    }
}

fn make(apt: &mut Apt, work: &Path) -> Result<()> {
    let mut packages = Vec::new();
    for name in NAMES {
        let versioned =
            apt.depends(&[name.to_owned()])?.into_iter().find(|found| found.starts_with(&format!("{name}-")));
        packages.push(versioned.with_context(|| format!("{name} names no version: is this Debian?"))?);
    }
    packages.extend(OTHERS.map(str::to_owned));
    let roots: Vec<&str> = packages.iter().map(String::as_str).collect();
    let mut packages = apt.closure(&roots)?;
    packages.retain(|name| !LEFT_OUT.iter().any(|left_out| name.starts_with(left_out)));
    let (debs, tree) = (work.join("debs"), work.join("tree"));
    for dir in [&debs, &tree] {
        fs::create_dir_all(dir)?;
    }
    println!("setup: downloading {} packages for the database", packages.len());
    let mut manifest = format!("{RULES}\n");
    for file in apt.download(&packages, &debs)? {
        shell::output(Command::new("dpkg-deb").arg("-x").arg(&file).arg(&tree))?;
        let mut ask = Command::new("dpkg-deb");
        ask.args(["--show", "--showformat", "${Package} ${Version}\n"]).arg(&file);
        manifest.push_str(&shell::output(&mut ask)?);
    }
    fs::remove_dir_all(&debs)?;
    for large in ["usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/postgresql-common"] {
        if tree.join(large).exists() {
            fs::remove_dir_all(tree.join(large))?;
        }
    }
    furnish(&tree)?;
    let mut init = Command::new("chroot");
    init.arg(format!("--userspec={USER}:{USER}")).arg(&tree).args(["/postgres/initdb", "-D", "/pg"]);
    init.args(["--data-checksums", "--locale=C", "--encoding=UTF8", "--auth=trust", "--username=postgres"]);
    shell::output(&mut init)?;
    append(&tree.join("pg/postgresql.conf"), CONFIG)?;
    append(&tree.join("pg/pg_hba.conf"), "host all all all trust\n")?;
    let disk = work.join("disk.raw");
    fs::File::create(&disk)?.set_len(u64::from(DISK_MIB) << 20)?;
    let mkfs = shell::find("mkfs.ext4").context("there is no mkfs.ext4 here")?;
    shell::output(Command::new(mkfs).args(["-q", "-F", "-d"]).arg(&tree).arg(&disk))?;
    // The cluster is on the disk alone: here nobody may take it for the one that is served.
    fs::remove_dir_all(tree.join("pg"))?;
    fs::create_dir(tree.join("pg"))?;
    fs::write(work.join("manifest"), manifest)?;
    println!("setup: built the database's disk of {DISK_MIB} MiB");
    Ok(())
}

/// What programs expect of a root directory.
fn furnish(tree: &Path) -> Result<()> {
    for dir in ["dev", "proc", "tmp", "etc", "pg"] {
        fs::create_dir_all(tree.join(dir))?;
    }
    fs::set_permissions(tree.join("tmp"), fs::Permissions::from_mode(0o1777))?;
    fs::set_permissions(tree.join("pg"), fs::Permissions::from_mode(0o700))?;
    chown(tree.join("pg"), Some(USER), Some(USER))?;
    symlink("busybox", tree.join("bin/sh"))?;
    fs::write(tree.join("etc/passwd"), format!("root:x:0:0::/:/bin/sh\npostgres:x:{USER}:{USER}::/:/bin/sh\n"))?;
    fs::write(tree.join("etc/group"), format!("root:x:0:\npostgres:x:{USER}:\n"))?;
    for (name, minor) in [("null", "3"), ("urandom", "9")] {
        shell::output(
            Command::new("mknod").args(["-m", "666"]).arg(tree.join("dev").join(name)).args(["c", "1", minor]),
        )?;
    }
    let versions: Vec<_> =
        fs::read_dir(tree.join("usr/lib/postgresql"))?.flatten().map(|entry| entry.file_name()).collect();
    let [version] = versions.as_slice() else { bail!("there is not one PostgreSQL but {versions:?}") };
    // One name for the programs of whatever version.
    symlink(Path::new("usr/lib/postgresql").join(version).join("bin"), tree.join("postgres"))?;
    Ok(())
}

fn append(file: &Path, text: &str) -> Result<()> {
    let before = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    fs::write(file, before + text).with_context(|| format!("cannot write {}", file.display()))
}
