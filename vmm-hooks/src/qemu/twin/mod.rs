//! Twins on the standby: a QEMU made from the primary's command line that waits for its device state.
//!
//! Promise: the committed memory is ours. Guest RAM lies in memfds that the twin maps shared, all other blocks beside it, so that
//! neither a twin that dies while loading nor a rehearsal harms it. Nothing is emitted before [`Twin::activate`].

mod leftovers;
mod machine;
mod room;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use self::machine::{Launch, Machine, TwinFence};
use super::cmdline::{Backend, Disk, Network, Plan, qmp_path, rewrite};
use super::recipe::QemuRecipe;
use super::state::is_loadable;
use crate::guest::{
    Activation, Fence, GuestError, GuestErrorKind, Recipe, Rehearsal, Survivor, Twin, TwinHost, TwinMemory,
};
use crate::layout::{Layout, PAGE_SIZE};
use crate::sys::memory::BlockMemory;
use crate::tap::{self, Tap};

/// How often a twin that dies while loading is launched again.
const RELAUNCHES_MAX: u32 = 3;

/// Bound on directories of the same name.
const DIRS_MAX: u32 = 1000;

/// Where and how twins are made.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TwinHostOptions {
    /// Where each twin gets a directory of its own for its sockets and logs. Keep it short: a socket's path has at most 107 bytes.
    pub run_dir: PathBuf,
    /// The QEMU program to use instead of the one that the primary runs.
    pub binary: Option<PathBuf>,
    /// Bridge of the primary's host to bridge of this host; one that is not listed keeps its name.
    pub bridges: BTreeMap<String, String>,
}

impl Default for TwinHostOptions {
    fn default() -> Self {
        Self { run_dir: PathBuf::from("/run/understudy/twins"), binary: None, bridges: BTreeMap::new() }
    }
}

/// Makes twins of QEMU guests on this host.
#[derive(Debug)]
pub struct QemuTwinHost {
    options: TwinHostOptions,
}

impl QemuTwinHost {
    /// A twin host with these options; does nothing yet.
    #[must_use]
    pub fn new(options: TwinHostOptions) -> Self {
        Self { options }
    }
}

impl TwinHost for QemuTwinHost {
    fn prepare(
        &self,
        name: &str,
        recipe: &Recipe,
        layout: &Layout,
        images: &[PathBuf],
    ) -> Result<Box<dyn Twin>, GuestError> {
        let recipe = QemuRecipe::unpack(recipe)?;
        for backend in &recipe.backends {
            if !layout.blocks().iter().any(|block| block.name == backend.block) {
                let message = format!("the memory block {} is not in the layout", backend.block);
                return Err(GuestError::new(GuestErrorKind::Refused, message));
            }
        }
        if images.len() != recipe.disks.len() {
            let message =
                format!("the guest has {} replicated disks, and {} images were made", recipe.disks.len(), images.len());
            return Err(GuestError::new(GuestErrorKind::Refused, message));
        }
        for image in images {
            give_to(image, recipe.user)?;
        }
        let binary = find_binary(self.options.binary.as_deref().unwrap_or(&recipe.exe))?;
        room::check(layout)?;
        let memory = BlockMemory::new(name, layout)
            .map_err(|error| GuestError::new(GuestErrorKind::Refused, error.to_string()).because(error))?;
        let run_dir = RunDir::make(&self.options.run_dir, name)?;
        let missing = recipe.taps.iter().map(|tap| tap.ifname.as_str()).filter(|ifname| !tap::exists(ifname));
        leftovers::note_taps(&run_dir.path, missing).map_err(|error| {
            GuestError::new(GuestErrorKind::Refused, format!("cannot write to {}", run_dir.path.display()))
                .because(error)
        })?;
        let mut taps = Vec::new();
        for tap in &recipe.taps {
            let bridge = tap.bridge.as_ref().map(|bridge| self.options.bridges.get(bridge).unwrap_or(bridge).as_str());
            taps.extend(Tap::ensure(&tap.ifname, bridge, tap.mtu)?);
        }
        let mut twin = QemuTwin {
            name: name.to_owned(),
            recipe,
            binary,
            bridges: self.options.bridges.clone(),
            memory: Arc::new(memory),
            machine: None,
            taps,
            images: images.to_vec(),
            fence: Arc::new(TwinFence::default()),
            stage: Stage::Waits,
            rehearsals: 0,
            run_dir,
        };
        twin.machine = Some(twin.launch()?);
        Ok(Box::new(twin))
    }
}

/// A directory that is removed with all that is in it, unless it is kept.
#[derive(Debug)]
struct RunDir {
    path: PathBuf,
    keep: bool,
    /// Locked as long as a twin of this agent is in it.
    _lock: File,
}

impl RunDir {
    fn make(parent: &Path, name: &str) -> Result<Self, GuestError> {
        let refused = |path: &Path, error| {
            GuestError::new(GuestErrorKind::Refused, format!("cannot make the directory {}: {error}", path.display()))
        };
        let mut builder = fs::DirBuilder::new();
        builder.mode(0o700);
        builder.recursive(true).create(parent).map_err(|error| refused(parent, error))?;
        builder.recursive(false);
        let plain: String = name
            .chars()
            .map(|char| if char.is_ascii_alphanumeric() || "-_".contains(char) { char } else { '_' })
            .take(40)
            .collect();
        for number in 0..DIRS_MAX {
            let path = parent.join(if number == 0 { plain.clone() } else { format!("{plain}.{number}") });
            leftovers::remove_dead(&path);
            match builder.create(&path) {
                Ok(()) => {
                    let lock = leftovers::lock(&path).map_err(|error| refused(&path, error))?;
                    return Ok(Self { path, keep: false, _lock: lock });
                }
                Err(error) if error.kind() == ErrorKind::AlreadyExists => leftovers::refuse_gone_on(&path, name)?,
                Err(error) => return Err(refused(&path, error)),
            }
        }
        Err(GuestError::new(
            GuestErrorKind::Refused,
            format!("{} is full of directories called {plain}", parent.display()),
        ))
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "a twin's directory was left behind");
        }
    }
}

/// How far a twin is. There is no way back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Its memory is what was committed.
    Waits,
    /// It was told to run and ended before it said yes. It may have written to its memory.
    Spoiled,
    /// It runs.
    Runs,
}

/// A QEMU that waits to go on where the primary stood. Dropping it ends it, unless it was activated.
#[derive(Debug)]
struct QemuTwin {
    name: String,
    recipe: QemuRecipe,
    binary: PathBuf,
    bridges: BTreeMap<String, String>,
    memory: Arc<BlockMemory>,
    /// `None` only while it is launched again.
    machine: Option<Machine>,
    taps: Vec<Tap>,
    /// Its disks.
    images: Vec<PathBuf>,
    fence: Arc<TwinFence>,
    stage: Stage,
    rehearsals: u32,
    /// Removed last.
    run_dir: RunDir,
}

impl QemuTwin {
    fn launch(&self) -> Result<Machine, GuestError> {
        let taps = self.recipe.taps.iter().map(|tap| (tap.netdev.clone(), tap.ifname.clone())).collect();
        let network = Network::Same { taps, bridges: self.bridges.clone() };
        let disks = self.recipe.disks_in(&self.images);
        self.launch_in(&self.run_dir.path, network, &disks, true, Some(&self.fence))
    }

    fn launch_in(
        &self,
        run_dir: &Path,
        network: Network,
        disks: &[Disk],
        share: bool,
        fence: Option<&TwinFence>,
    ) -> Result<Machine, GuestError> {
        let layout = self.memory.layout();
        let backends: Vec<Backend> =
            self.recipe.backends.iter().filter_map(|backend| self.backend(&backend.id, &backend.block)).collect();
        let plan = Plan {
            argv: &self.recipe.argv,
            user: self.recipe.user,
            version: &self.recipe.version,
            cwd: &self.recipe.cwd,
            machine: &self.recipe.machine,
            memory: &backends,
            share,
            network,
            disks,
            run_dir,
        };
        let rewritten = rewrite(&plan)
            .map_err(|error| GuestError::new(GuestErrorKind::Refused, error.to_string()).because(error))?;
        if let Some(missing) = rewritten.needs.iter().find(|path| !path.exists()) {
            let message = format!("this host has no {}, which the primary's QEMU uses", missing.display());
            return Err(
                GuestError::new(GuestErrorKind::Refused, message).advise("copy it here from the primary's host")
            );
        }
        let launch = Launch {
            name: &self.name,
            binary: &self.binary,
            arguments: &rewritten.arguments,
            run_dir,
            version: &self.recipe.version,
            layout,
        };
        Machine::launch(&launch, fence)
    }

    /// The file of a memory backend. QEMU opens it through our descriptor and then has a mapping of its own.
    fn backend(&self, id: &str, block: &str) -> Option<Backend> {
        let layout = self.memory.layout();
        let index = layout.blocks().iter().position(|known| known.name == block)?;
        let fd = self.memory.block(index)?.fd().as_raw_fd();
        let path = format!("/proc/{}/fd/{fd}", std::process::id());
        Some(Backend { id: id.to_owned(), size: layout.blocks()[index].pages * PAGE_SIZE as u64, path })
    }

    fn is_shared(&self, block: &str) -> bool {
        self.recipe.backends.iter().any(|backend| backend.block == block)
    }

    fn check_state(&self, device: &[u8]) -> Result<(), GuestError> {
        if is_loadable(device, &self.recipe.machine) {
            return Ok(());
        }
        let message = format!("the device state of {} is not whole ({} bytes)", self.name, device.len());
        Err(GuestError::new(GuestErrorKind::Failed, message))
    }

    /// Only memory that is what was committed may be loaded.
    fn check_waits(&self) -> Result<(), GuestError> {
        let (message, advice) = match self.stage {
            Stage::Waits => return Ok(()),
            Stage::Runs => (format!("{} was activated before", self.name), "it runs; nothing was changed"),
            Stage::Spoiled => (
                format!("{} was told to run once and ended, so its memory may not be what was committed", self.name),
                "it does not run and will not; the primary's copy is the one that counts, protect it again",
            ),
        };
        Err(GuestError::new(GuestErrorKind::Failed, message).advise(advice))
    }

    /// Lets the loaded machine run. On an error it is gone for sure.
    fn go_on(&mut self) -> Result<&mut Machine, GuestError> {
        let Some(machine) = self.machine.take() else {
            return Err(GuestError::new(GuestErrorKind::Failed, format!("{} is gone", self.name)));
        };
        self.stage = Stage::Spoiled;
        let machine = machine.run()?;
        self.stage = Stage::Runs;
        self.run_dir.keep = true;
        leftovers::forget_taps(&self.run_dir.path);
        Ok(self.machine.insert(machine))
    }

    /// Loads into the machine that waits, launching one if there is none.
    fn load(&mut self, device: &[u8]) -> Result<(), GuestError> {
        let mut machine = match self.machine.take().filter(|machine| !machine.process().has_exited()) {
            Some(machine) => machine,
            None => self.launch()?,
        };
        machine.load(device)?;
        machine.write_blocks(&self.memory, |block| self.is_shared(block))?;
        self.machine = Some(machine);
        Ok(())
    }
}

impl Twin for QemuTwin {
    fn memory(&self) -> Arc<dyn TwinMemory> {
        Arc::clone(&self.memory) as Arc<dyn TwinMemory>
    }

    fn rehearse(&mut self, device: &[u8]) -> Result<Rehearsal, GuestError> {
        self.check_waits()?;
        self.check_state(device)?;
        self.rehearsals += 1;
        let run_dir = RunDir::make(&self.run_dir.path, &format!("r{}", self.rehearsals))?;
        let started = Instant::now();
        let mut scratch = self.launch_in(&run_dir.path, Network::Null, &self.recipe.scratch_disks(), false, None)?;
        let launch = started.elapsed();
        let loading = Instant::now();
        scratch.load(device)?;
        scratch.write_blocks(&self.memory, |block| self.is_shared(block))?;
        let load = loading.elapsed();
        scratch.end()?;
        Ok(Rehearsal { launch, load })
    }

    fn activate(&mut self, device: &[u8]) -> Result<Activation, GuestError> {
        self.check_waits()?;
        self.check_state(device)?;
        let started = Instant::now();
        let mut relaunched = 0;
        loop {
            let had_one = self.alive();
            match self.load(device) {
                Ok(()) => {
                    relaunched += u32::from(!had_one);
                    break;
                }
                Err(error) if relaunched < RELAUNCHES_MAX && !self.fence.asked() => {
                    tracing::warn!(twin = self.name, %error, "loading failed, launching the twin again");
                    relaunched += 1;
                }
                Err(error) => return Err(GuestError { kind: GuestErrorKind::Failed, ..error }),
            }
        }
        let load = started.elapsed();
        let resuming = Instant::now();
        let machine = self.go_on()?;
        let resume = resuming.elapsed();
        // It runs; that the network learns of it only by its own frames is no failure.
        if let Err(error) = machine.announce() {
            tracing::warn!(twin = self.name, %error, "cannot announce the guest to the network");
        }
        Ok(Activation { load, resume, relaunched })
    }

    fn alive(&mut self) -> bool {
        self.machine.as_ref().is_some_and(|machine| !machine.process().has_exited())
    }

    fn fence(&self) -> Arc<dyn Fence> {
        Arc::clone(&self.fence) as Arc<dyn Fence>
    }

    fn destroy(mut self: Box<Self>) -> Result<(), GuestError> {
        self.run_dir.keep = false;
        let mut result = self.machine.take().map_or(Ok(()), Machine::end);
        for tap in self.taps.drain(..) {
            result = result.and(tap.remove());
        }
        result
    }

    fn release(mut self: Box<Self>) -> Result<Survivor, GuestError> {
        let alive = self.alive();
        match self.machine.take().filter(|_| self.stage == Stage::Runs && alive) {
            Some(machine) => {
                let pid = machine.process().pid();
                machine.let_go();
                self.taps.drain(..).for_each(Tap::keep);
                let control = qmp_path(&self.run_dir.path).to_string_lossy().into_owned();
                Ok(Survivor { pid, control })
            }
            None => Err(GuestError::new(
                GuestErrorKind::Failed,
                format!("{} does not run, so it cannot be let go", self.name),
            )),
        }
    }
}

impl Drop for QemuTwin {
    fn drop(&mut self) {
        if self.stage == Stage::Runs {
            if let Some(machine) = self.machine.take() {
                machine.let_go();
            }
            self.taps.drain(..).for_each(Tap::keep);
        }
    }
}

/// Lets the user that the machine runs as use an image, and nobody else.
fn give_to(image: &Path, (user, group): (u32, u32)) -> Result<(), GuestError> {
    let given = fs::set_permissions(image, fs::Permissions::from_mode(0o600))
        .and_then(|()| std::os::unix::fs::chown(image, Some(user), Some(group)));
    given.map_err(|error| {
        let message = format!("the image {} cannot be given to the user {user} of the VM", image.display());
        GuestError::new(GuestErrorKind::Refused, message).because(error)
    })
}

/// The program at this path, or of this name in the usual places.
fn find_binary(wanted: &Path) -> Result<PathBuf, GuestError> {
    // A program that was replaced while it ran has this behind its path.
    let wanted = wanted.to_string_lossy();
    let wanted = Path::new(wanted.trim_end_matches(" (deleted)"));
    let name = wanted.file_name().unwrap_or_default();
    let installed = ["/usr/bin", "/usr/local/bin", "/usr/libexec"].map(|dir| Path::new(dir).join(name));
    [wanted.to_owned()].into_iter().chain(installed).find(|path| path.is_file()).ok_or_else(|| {
        GuestError::new(GuestErrorKind::Refused, format!("this host has no {}", wanted.display()))
            .advise("install the same QEMU as on the primary's host")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Block;

    #[test]
    fn directories_of_the_same_name_do_not_meet_and_vanish() {
        let parent = tempfile::tempdir().expect("a directory");
        let first = RunDir::make(parent.path(), "web/1").expect("room");
        let second = RunDir::make(parent.path(), "web/1").expect("room");
        assert_eq!(first.path, parent.path().join("web_1"));
        assert_ne!(first.path, second.path);
        let gone = first.path.clone();
        drop(first);
        assert!(!gone.exists() && second.path.exists());
    }

    /// A twin with this machine and one page of memory.
    fn twin(parent: &Path, machine: impl FnOnce(&Path) -> Machine) -> QemuTwin {
        let layout = Layout::new(vec![Block { name: "pc.ram".to_owned(), pages: 1 }]).expect("a layout");
        let run_dir = RunDir::make(parent, "test").expect("room");
        let recipe = QemuRecipe {
            name: "test".to_owned(),
            argv: Vec::new(),
            user: (0, 0),
            cwd: PathBuf::new(),
            exe: PathBuf::new(),
            version: String::new(),
            machine: "pc".to_owned(),
            backends: Vec::new(),
            taps: Vec::new(),
            disks: Vec::new(),
        };
        QemuTwin {
            name: "test".to_owned(),
            recipe,
            binary: PathBuf::new(),
            bridges: BTreeMap::new(),
            memory: Arc::new(BlockMemory::new("test", &layout).expect("room")),
            machine: Some(machine(&run_dir.path)),
            taps: Vec::new(),
            images: Vec::new(),
            fence: Arc::new(TwinFence::default()),
            stage: Stage::Waits,
            rehearsals: 0,
            run_dir,
        }
    }

    #[test]
    fn a_twin_that_may_have_run_is_dead_and_never_used_again() {
        let parent = tempfile::tempdir().expect("a directory");
        let mut twin = twin(parent.path(), machine::tests::breaks_at_cont);
        let process = twin.machine.as_ref().expect("it waits").process().clone();
        assert_eq!(twin.go_on().map(drop).expect_err("it does not confirm").kind, GuestErrorKind::Failed);
        assert!(process.has_exited() && !twin.alive());
        for error in [twin.activate(&[]).map(drop), twin.rehearse(&[]).map(drop)] {
            let error = error.expect_err("its memory may not be what was committed");
            assert!(error.message.contains("may not be what was committed"), "{error}");
        }
        Box::new(twin).destroy().expect("nothing is left");
        assert_eq!(fs::read_dir(parent.path()).expect("a directory").count(), 0);
    }

    #[test]
    fn a_missing_program_is_refused_by_name() {
        let error = find_binary(Path::new("/opt/none/qemu-system-z80")).expect_err("nobody has it");
        assert!(error.message.contains("qemu-system-z80"), "{error}");
        assert_eq!(find_binary(Path::new("/bin/sh (deleted)")).expect("there"), Path::new("/bin/sh"));
    }
}
