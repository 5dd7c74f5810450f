//! The latch: nothing else than this agent starts a VM here while another host may run it (`docs/protocol.md` P14).
//!
//! A VM is latched, durably, before its first pairing ([`super::durable`]). From then on two doors are shut. One is a question, for a
//! unit's `ExecCondition=` and libvirt's hook: `understudy may-start`. The other is a lock that every stock QEMU honours,
//! [`ImageHold`]: this agent holds the VM's images whenever its guest is not here, first of all when it starts. Images that it made itself
//! are not held: a twin of its own opens them.
//!
//! Promises: a held image is let go, and a start allowed, only when the record was made this node's alone in this life, or says that the VM was
//! stopped here; silence of the store allows nothing. Images that were the VM's disks before it ran elsewhere stay held until an operator
//! releases them by name.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use heartbeat_core::ids::NodeId;
use heartbeat_core::record::{Owner, Record};
use heartbeat_core::store::{StoreOp, StoreRequest};
use vmm_hooks::disk::DiskImage;
use vmm_hooks::qemu::{HoldError, ImageHold};

use super::Agent;
use super::durable::{Durable, ImageFile};
use super::sessions::blocking;
use crate::control::api::{ErrorBody, ErrorKind, ProtectionState, Role, VmStatus};
use crate::control::latch::{MayStart, MayStartRequest};

/// Time between two looks at which guests are gone.
const LOOK: Duration = Duration::from_secs(2);
/// Time between two questions whose a VM is that has no guest and no task here.
const ASK: Duration = Duration::from_secs(60);
/// How long an agent that starts waits for file systems that do not answer.
const FIRST_WITHIN: Duration = Duration::from_secs(5);
/// How long a released image is left alone, so that it can be opened.
const LEFT_ALONE: Duration = Duration::from_secs(60);

/// What is held, and why some of it is not.
#[derive(Debug, Default)]
pub(super) struct Latches {
    held: Mutex<BTreeMap<PathBuf, ImageHold>>,
    /// Said of an image that is in use though it should not be: once.
    in_use: Mutex<BTreeMap<PathBuf, String>>,
    released: Mutex<BTreeMap<PathBuf, Instant>>,
}

/// An image that must not be started from.
struct Wanted {
    vm: String,
    /// Hold it if it is not held. Else it is kept as it is: whose it is, is being asked.
    take: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Latches {
    /// Holds these images as far as they are there, and no others, but for what is held already if it is not known what is `wanted` beside these. Blocks as
    /// long as their file systems do.
    fn hold(&self, wanted: &BTreeMap<PathBuf, Wanted>, is_all: bool) {
        let mut held = lock(&self.held);
        held.retain(|path, hold| (wanted.contains_key(path) || !is_all) && hold.is_current());
        lock(&self.released).retain(|_, at| at.elapsed() < LEFT_ALONE);
        lock(&self.in_use).retain(|path, _| wanted.contains_key(path));
        for (path, Wanted { vm, take }) in wanted {
            if !take || held.contains_key(path) || lock(&self.released).contains_key(path) {
                continue;
            }
            match ImageHold::take(path) {
                Ok(hold) => {
                    tracing::info!(vm, image = %path.display(), "held: no QEMU can start from it here");
                    lock(&self.in_use).remove(path);
                    held.insert(path.clone(), hold);
                }
                // Nobody starts from what is not there.
                Err(HoldError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => {
                    let said = error.to_string();
                    if lock(&self.in_use).insert(path.clone(), said.clone()).as_ref() != Some(&said) {
                        tracing::error!(vm, %error, "an image that nothing may start from is not held; if a VM runs from it, end that");
                    }
                }
            }
        }
    }

    /// Lets these go, and leaves them alone for a while.
    fn release(&self, images: impl IntoIterator<Item = PathBuf>) {
        for path in images {
            lock(&self.held).remove(&path);
            lock(&self.released).insert(path, Instant::now());
        }
    }
}

/// The images that must be held of a VM. `here`: its guest is; `ours`: nobody asks for the VM at the moment, and it is not latched, or a task of
/// this agent sees to it.
fn held_of(durable: &Durable, here: bool, ours: bool) -> Vec<ImageFile> {
    let current = if here || ours || !durable.is_latched() { &[] } else { durable.own() };
    durable.former().iter().chain(current).filter(|image| image.is_there()).cloned().collect()
}

/// Why a VM that is known on this host must not be started while no agent can be asked; `None` if none of this is known.
pub(crate) fn without_agent(state_dir: &Path, request: &MayStartRequest) -> Option<String> {
    let all = match Durable::all(state_dir) {
        Ok(all) => all,
        Err(error) => return Some(unreadable(&format!("its VMs ({error})"))),
    };
    if let Some(vm) = all.unusable(request.vm.as_deref(), !request.images.is_empty()) {
        return Some(unreadable(vm));
    }
    let durable = all.vms.iter().find(|durable| concerns(durable, request))?;
    let stale = request.images.iter().any(|image| is_among(image, durable.former()));
    let known = durable.is_latched() || durable.protection().is_some() || stale;
    known.then(|| {
        format!(
            "{} is protected, and this host's agent does not say who runs it; start the agent, then ask again",
            durable.name()
        )
    })
}

/// What is said if it may be about a VM of which nothing can be read.
fn unreadable(vm: &str) -> String {
    format!(
        "what this host remembers of {vm} cannot be used, so it is not known whose it is, nor from which disks it ran; repair the state directory, then ask again"
    )
}

/// Whether a question is about this VM.
fn concerns(durable: &Durable, request: &MayStartRequest) -> bool {
    request.vm.as_deref() == Some(durable.name())
        || request.images.iter().any(|image| is_among(image, durable.own()) || is_among(image, durable.former()))
}

fn is_among(image: &Path, images: &[ImageFile]) -> bool {
    images.iter().any(|other| other.is_there() && same_file(image, &other.path))
}

/// The same file, by whatever path.
fn same_file(a: &Path, b: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let id = |path: &Path| std::fs::metadata(path).map(|found| (found.dev(), found.ino())).ok();
    a == b || id(a).is_some_and(|a| Some(a) == id(b))
}

fn shown(images: &[DiskImage]) -> String {
    let paths: Vec<String> = images.iter().map(|image| image.path.display().to_string()).collect();
    if paths.is_empty() { "not known".to_owned() } else { paths.join(", ") }
}

fn refused(message: String) -> ErrorBody {
    ErrorBody::new(ErrorKind::Refused, message)
}

/// What a record means for who wants to start the VM on the host `me`: `Ok` says that it is this node's.
fn judge(name: &str, record: Option<&Record>, me: NodeId, called: impl Fn(NodeId) -> String) -> Result<(), ErrorBody> {
    let nothing = "start nothing here";
    let no = |what: String| Err(refused(what));
    match record.map(|record| record.owner) {
        None => Ok(()),
        Some(Owner::Solo { node, activated, .. }) if node.node == me => {
            if activated {
                return Ok(());
            }
            Err(ErrorBody::new(ErrorKind::Busy, format!("{name} is about to go on here from its copy; {nothing}")))
        }
        Some(Owner::Stopped { node }) if node.node == me => Ok(()),
        Some(Owner::Solo { node, .. }) => {
            let host = called(node.node);
            no(format!(
                "{host} runs {name}, and the disk here is older; {nothing}: `understudy failback {name}` there brings it back"
            ))
        }
        Some(Owner::Stopped { node }) => {
            let host = called(node.node);
            no(format!("{name} was shut down on {host}, whose disk is the newest; start it there, not here"))
        }
        Some(Owner::Paired { primary, standby }) if primary.node == me => {
            let host = called(standby.node);
            no(format!(
                "{name} is protected, and {host} goes on with it where it was; {nothing}: to boot from the disk would lose what clients were told"
            ))
        }
        Some(Owner::Paired { primary, .. }) => {
            let host = called(primary.node);
            no(format!("{host} runs {name}, and this host may stand by for it; {nothing}"))
        }
    }
}

impl Agent {
    /// Holds the images of every VM whose guest is not here, before anything else is done.
    pub(super) async fn latch_first(&self) {
        let agent = self.own();
        let first = tokio::task::spawn_blocking(move || agent.hold_all(None));
        if tokio::time::timeout(FIRST_WITHIN, first).await.is_err() {
            tracing::error!("a file system does not answer: not every image that must be held is held yet");
        }
    }

    /// Goes on doing so, and lets go of what has become this node's alone.
    pub(super) async fn keep_latched(self: Arc<Self>) {
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // Of those that nobody sees to: when the store was asked last.
        let mut asked: BTreeMap<String, Instant> = BTreeMap::new();
        loop {
            look.tick().await;
            let Some(unsettled) = self.hold_after(&asked).await else { continue };
            asked.retain(|name, _| unsettled.contains(name));
            let due: Vec<_> =
                unsettled.into_iter().filter(|name| asked.get(name).is_none_or(|at| at.elapsed() >= ASK)).collect();
            for name in &due {
                match self.settle_latch(name).await {
                    Ok(()) => tracing::info!(vm = name, "is this host's alone: it may be started from its disks"),
                    Err(error) => tracing::debug!(vm = name, %error, "stays latched"),
                }
                asked.insert(name.clone(), Instant::now());
            }
            if !due.is_empty() {
                self.hold_after(&asked).await;
            }
        }
    }

    async fn hold_after(self: &Arc<Self>, asked: &BTreeMap<String, Instant>) -> Option<Vec<String>> {
        let (agent, asked) = (Arc::clone(self), asked.keys().cloned().collect());
        tokio::task::spawn_blocking(move || agent.hold_all(Some(&asked))).await.ok()
    }

    /// Holds what must be held now: at first whatever has no guest here, later not what may be found to be this host's, as long as it was not
    /// `asked` for. Returns the latched VMs with images of which nothing runs here and that nobody sees to.
    fn hold_all(&self, asked: Option<&BTreeSet<String>>) -> Vec<String> {
        let (mut wanted, mut unsettled) = (BTreeMap::new(), Vec::new());
        let known = Durable::all(&self.config.state_dir).inspect_err(|error| {
            tracing::error!(%error, "what this host remembers of its VMs cannot be read: no image that is held is let go");
        });
        let is_all = known.as_ref().is_ok_and(|known| known.unreadable.is_empty());
        for durable in known.unwrap_or_default().vms {
            let name = durable.name().to_owned();
            let here = durable.guest().is_some_and(|at| !self.is_gone(at));
            let task = self.task_of(&name);
            // A guest that has ended by itself is its task's: it says within moments whether it was shut down.
            let ours = task.as_ref().is_some_and(|(status, settled)| *settled && is_primarys(status));
            let take = task.is_some() || asked.is_none_or(|asked| asked.contains(&name));
            let mut images = held_of(&durable, here, ours);
            images.retain(|image| !image.path.starts_with(&self.config.standby.images));
            let current = images.iter().any(|image| durable.own().contains(image));
            for image in images {
                let former = durable.former().contains(&image);
                wanted.insert(image.path, Wanted { vm: name.clone(), take: take || former });
            }
            if current && task.is_none() {
                unsettled.push(name);
            }
        }
        self.latches.hold(&wanted, is_all);
        unsettled
    }

    /// What the task of a VM shows, and whether it is known whose the VM is; `None` if none runs.
    pub(super) fn task_of(&self, name: &str) -> Option<(VmStatus, bool)> {
        let vms = self.vms();
        let vm = vms.get(name).filter(|vm| !vm.task.is_finished())?;
        let settled = vm.settled.as_ref().is_none_or(|settled| *settled.borrow());
        Some((vm.view.status(), settled))
    }

    /// Makes sure that a VM of which nothing runs here is this node's, and takes its latch off. What was its disk before it ran elsewhere
    /// stays held.
    async fn settle_latch(&self, name: &str) -> Result<(), ErrorBody> {
        let unusable = |error: std::io::Error| {
            ErrorBody::new(ErrorKind::Failed, format!("what this host remembers of {name} cannot be used"))
                .advise("start nothing from its disks before the state directory can be read and written")
                .because(&error)
        };
        let Some(mut durable) = Durable::find(&self.config.state_dir, name).map_err(unusable)? else { return Ok(()) };
        let first = durable.begin_session().map_err(unusable)?.first_request;
        let store = self.store(&self.arbiter_for(&durable.protection().cloned().unwrap_or_default(), &durable)?);
        let read = StoreRequest { id: first, vm: durable.vm(), asker: self.me(), op: StoreOp::Read };
        let answer = store.ask(read).await.map_err(|error| {
            ErrorBody::new(
                ErrorKind::Unavailable,
                format!("nobody says who runs {name} now: the keeper of its record does not answer"),
            )
            .advise("start nothing from its disks; ask again when the witness answers")
            .because(&error)
        })?;
        let me = self.me().node;
        judge(name, answer.record.as_ref(), me, |node| self.name_of(node))?;
        // What was stopped here stays so: its standby is to read that. All else is made this life's, so that nothing that a former life asked
        // counts any more.
        let mut alone = true;
        let stopped = matches!(answer.record, Some(Record { owner: Owner::Stopped { .. }, .. }));
        if !stopped || durable.store().is_some_and(|known| known != answer.store.to_string()) {
            let generation = self.own_alone(name, &mut durable, first + 1).await?;
            alone = durable.set_generation_unchanged(generation).map_err(unusable)?;
        }
        if !alone || self.task_of(name).is_some() || !durable.unlatch().map_err(unusable)? {
            let message = format!("{name} was asked for by somebody else at the same moment");
            return Err(ErrorBody::new(ErrorKind::Busy, message).advise("start nothing here; ask again"));
        }
        Ok(())
    }

    /// See [`crate::control::agent_api::AgentApi::may_start`].
    pub(super) async fn may_be_started(&self, request: MayStartRequest) -> Result<MayStart, ErrorBody> {
        if request.vm.is_none() && request.images.is_empty() {
            return Err(ErrorBody::new(ErrorKind::Invalid, "name a VM, or the images that it is to be started from"));
        }
        let (state_dir, about) = (self.config.state_dir.clone(), request.clone());
        let known = blocking(move || {
            let failed = |what: &str| ErrorBody::new(ErrorKind::Failed, unreadable(what));
            let all = Durable::all(&state_dir).map_err(|error| failed("its VMs").because(&error))?;
            if let Some(vm) = all.unusable(about.vm.as_deref(), !about.images.is_empty()) {
                return Err(failed(vm));
            }
            let meant = all.vms.iter().filter(|durable| concerns(durable, &about));
            Ok(meant.map(|durable| durable.name().to_owned()).collect::<Vec<_>>())
        })
        .await??;
        let mut reason = "no VM that was ever protected here is meant".to_owned();
        for name in known {
            reason = self.one_may_be_started(&name, &request).await?;
        }
        Ok(MayStart { reason })
    }

    async fn one_may_be_started(&self, name: &str, request: &MayStartRequest) -> Result<String, ErrorBody> {
        self.settled(name).await;
        self.forget_ended(name);
        let unusable = |error: std::io::Error| {
            ErrorBody::new(ErrorKind::Failed, format!("what this host remembers of {name} cannot be used"))
                .because(&error)
        };
        let find = || Durable::find(&self.config.state_dir, name).map_err(unusable);
        let Some(durable) = find()? else { return Ok(format!("nothing is known of {name}")) };
        if let Some(at) = durable.guest().filter(|at| !self.is_gone(at)) {
            return Err(refused(format!(
                "{name} runs on this host already, as process {}; start nothing beside it",
                at.pid
            )));
        }
        if let Some((status, _)) = self.task_of(name) {
            if status.role == Role::Standby {
                let host = if status.peer.is_empty() { "another host" } else { &status.peer };
                return Err(refused(format!("{host} runs {name}, and this host stands by for it; start nothing here")));
            }
            let because = if status.reason.is_empty() { status.state.to_string() } else { status.reason };
            return Err(ErrorBody::new(ErrorKind::Busy, format!("it is not known yet who runs {name}: {because}"))
                .advise("start nothing here; ask again"));
        }
        if durable.is_latched() {
            self.settle_latch(name).await?;
        }
        let mut durable = find()?.unwrap_or(durable);
        for image in &request.images {
            let Some(former) =
                durable.former().iter().find(|former| former.is_there() && same_file(image, &former.path)).cloned()
            else {
                continue;
            };
            if !request.release {
                let message = format!(
                    "{} is no disk of {name} any more: it ran elsewhere since, and its disks here are {}",
                    image.display(),
                    shown(durable.disks())
                );
                let advice = "start it from those; `understudy may-start --release` gives the old image free, with what it lacks";
                return Err(refused(message).advise(advice));
            }
            durable.release(&former.path).map_err(unusable)?;
            tracing::warn!(vm = name, image = %image.display(), "released by an operator, though it is older than the VM's disks");
        }
        let released = durable.disks().iter().map(|disk| disk.path.clone()).chain(request.images.iter().cloned());
        self.latches.release(released);
        Ok(format!("{name} is this host's alone, and runs nowhere"))
    }
}

/// Its record is not another host's, as far as its task knows: what a standby had of the VM before is as old as any former disk.
fn is_primarys(status: &VmStatus) -> bool {
    let contested =
        [ProtectionState::FailingOver, ProtectionState::Fenced, ProtectionState::Error].contains(&status.state);
    status.role != Role::Standby && !contested
}

#[cfg(test)]
mod tests {
    use heartbeat_core::ids::{Generation, Incarnation, Party, Revision, StoreId, VmId};

    use super::*;

    const ME: NodeId = NodeId([1; 16]);
    const OTHER: NodeId = NodeId([2; 16]);

    fn party(node: NodeId) -> Party {
        Party { node, incarnation: Incarnation(4) }
    }

    fn said(owner: Owner) -> Result<(), String> {
        let record = Record { store: StoreId([9; 16]), revision: Revision(3), generation: Generation(2), owner };
        let called = |node| if node == OTHER { "host-b".to_owned() } else { "host-a".to_owned() };
        judge("web-1", Some(&record), ME, called).map_err(|error| error.message)
    }

    #[test]
    fn only_what_is_this_hosts_may_be_started_and_the_answer_names_who_has_it() {
        let solo = |node, activated| Owner::Solo { node: party(node), activated, other: None };
        assert!(judge("web-1", None, ME, |_| String::new()).is_ok(), "nobody was ever paired");
        assert!(said(solo(ME, true)).is_ok() && said(Owner::Stopped { node: party(ME) }).is_ok());
        assert!(said(solo(ME, false)).is_err(), "its copy is being activated");
        let paired = |primary, standby| Owner::Paired { primary: party(primary), standby: party(standby) };
        let others = [
            solo(OTHER, true),
            solo(OTHER, false),
            Owner::Stopped { node: party(OTHER) },
            paired(ME, OTHER),
            paired(OTHER, ME),
        ];
        for owner in others {
            let message = said(owner).expect_err("it is not this host's");
            assert!(message.contains("host-b") && message.contains("web-1"), "{message}");
        }
    }

    #[test]
    fn what_is_held_and_what_an_agent_that_is_not_there_is_taken_to_say() {
        let dir = tempfile::tempdir().expect("a directory");
        let image = |name: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, [0; 512]).expect("room");
            DiskImage { path, format: "raw".to_owned() }
        };
        let (disk, copy, foreign) = (image("disk"), image("copy"), image("foreign"));
        let mut durable = Durable::open(dir.path(), "web-1", VmId([1; 16])).expect("opens");
        let by_name = MayStartRequest { vm: Some("web-1".to_owned()), ..MayStartRequest::default() };
        let by_image =
            |image: &DiskImage| MayStartRequest { images: vec![image.path.clone()], ..MayStartRequest::default() };
        assert_eq!(without_agent(dir.path(), &by_name), None, "it was never protected");
        durable.latch(vec![disk.clone()]).expect("writes");
        assert!(without_agent(dir.path(), &by_name).is_some());
        std::os::unix::fs::symlink(&disk.path, dir.path().join("link")).expect("a link");
        let link = DiskImage { path: dir.path().join("link"), ..disk.clone() };
        assert!(without_agent(dir.path(), &by_image(&link)).is_some(), "by whatever path");
        assert_eq!(without_agent(dir.path(), &by_image(&foreign)), None);
        let paths = |held: Vec<ImageFile>| held.into_iter().map(|image| image.path).collect::<Vec<_>>();
        assert_eq!(paths(held_of(&durable, false, false)), std::slice::from_ref(&disk.path));
        assert!(held_of(&durable, true, false).is_empty() && held_of(&durable, false, true).is_empty());
        durable.latch(vec![copy.clone()]).expect("it came back, with another disk");
        assert_eq!(
            paths(held_of(&durable, true, true)),
            std::slice::from_ref(&disk.path),
            "a stale image is held even then"
        );
        assert!(durable.unlatch().expect("writes"));
        assert_eq!(without_agent(dir.path(), &by_name), None);
        assert!(without_agent(dir.path(), &by_image(&disk)).is_some());
        assert_eq!(without_agent(dir.path(), &by_image(&copy)), None);

        let latches = Latches::default();
        let wanted = |take| BTreeMap::from([(disk.path.clone(), Wanted { vm: "web-1".to_owned(), take })]);
        latches.hold(&wanted(false), true);
        assert!(lock(&latches.held).is_empty(), "whose it is, is asked first");
        latches.hold(&wanted(true), true);
        latches.hold(&wanted(false), true);
        assert!(lock(&latches.held).contains_key(&disk.path));
        latches.hold(&BTreeMap::new(), false);
        assert!(lock(&latches.held).contains_key(&disk.path), "what cannot be read may want it");
        latches.release([disk.path.clone()]);
        latches.hold(&wanted(true), true);
        assert!(lock(&latches.held).is_empty(), "what was released is left alone for a while");

        // Of what cannot be read nobody knows which images it means, nor, if it is all of it, which VMs.
        std::fs::write(dir.path().join("vms/web-2.toml"), "damage").expect("room");
        let by_other_name = |name: &str| MayStartRequest { vm: Some(name.to_owned()), ..MayStartRequest::default() };
        assert!(without_agent(dir.path(), &by_image(&foreign)).is_some());
        assert!(without_agent(dir.path(), &by_other_name("web-2")).is_some());
        assert_eq!(without_agent(dir.path(), &by_other_name("web-3")), None);
        std::fs::remove_dir_all(dir.path().join("vms")).expect("it is there");
        std::fs::write(dir.path().join("vms"), "").expect("room");
        assert!(without_agent(dir.path(), &by_other_name("web-3")).is_some());
    }
}
