//! A file system that can be crashed and made to fail.
//!
//! What a file holds is kept apart from what its disk holds. Between two syncs each sector that was written may have reached the
//! disk or not, independently of all others; so may each change of length and each name. At a chosen call the model stops: that
//! call may have been done in part, and every later one fails. Or that call alone fails: a write that fails was done in part; after a
//! sync that fails the unsynced writes are seen by readers, but those that did not reach the disk never will, also not by later
//! syncs that succeed.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use crate::disk::files::{File, Files, parent};

const SECTOR: u64 = 512;

/// Numbers that follow from a seed (splitmix64).
#[derive(Debug, Clone)]
pub(super) struct Dice(pub(super) u64);

impl Dice {
    pub(super) fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`.
    pub(super) fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.roll() % bound as u64).expect("below a usize")
    }
}

/// What happens at the chosen call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    Crash,
    Io,
    NoSpace,
    /// Something cannot be read; counted by reads.
    Read,
}

#[derive(Debug, Clone)]
struct Piece {
    offset: u64,
    bytes: Vec<u8>,
}

#[derive(Debug, Clone, Default)]
struct Node {
    live: Vec<u8>,
    durable: Vec<u8>,
    /// Sectors written since the last sync, in order.
    pending: Vec<Piece>,
    /// Lengths since the last sync.
    lengths: Vec<u64>,
}

type Names = BTreeMap<PathBuf, usize>;

/// Something that was not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Unsynced {
    /// Which of all.
    nth: usize,
    /// Of this file; `None`: a name.
    node: Option<usize>,
}

/// What is told of each write and sync before it is done, and not of those that it does itself.
#[derive(Clone)]
struct Watch(Arc<dyn Fn() + Send + Sync>);

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watch")
    }
}

#[derive(Debug, Clone, Default)]
struct World {
    nodes: Vec<Node>,
    names: Names,
    durable_names: Names,
    /// What each name meant since its directory was last synced.
    pending_names: Vec<(PathBuf, Option<usize>)>,
    /// The file of each call that changes something, if it was about one.
    calls: Vec<Option<usize>>,
    watch: Option<Watch>,
    reads: usize,
    fault: Option<(usize, Fault)>,
    /// The model has stopped.
    dead: bool,
    hit: bool,
}

/// The file system. Clones are the same one.
#[derive(Debug, Clone, Default)]
pub(super) struct Model(Arc<Mutex<World>>);

#[derive(Debug)]
struct Open {
    model: Model,
    node: usize,
}

/// What a call has to do.
enum Go {
    /// All of it.
    Whole,
    /// A part of it, then fail.
    Part(io::Error),
}

fn dead() -> io::Error {
    io::Error::other("crashed")
}

impl World {
    /// Counts a call that changes something.
    fn call(&mut self, node: Option<usize>) -> io::Result<Go> {
        if self.dead {
            return Err(dead());
        }
        self.calls.push(node);
        match self.fault {
            Some((at, fault)) if at == self.calls.len() && fault != Fault::Read => {
                self.hit = true;
                self.dead = fault == Fault::Crash;
                Ok(Go::Part(match fault {
                    Fault::Crash => dead(),
                    Fault::Io | Fault::Read => io::Error::from_raw_os_error(5),
                    Fault::NoSpace => io::Error::from_raw_os_error(28),
                }))
            }
            _ => Ok(Go::Whole),
        }
    }

    fn write(&mut self, node: usize, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let go = self.call(Some(node))?;
        // A write that crashes may have reached the disk in any part; one that fails is done by half.
        let length = if self.dead || matches!(go, Go::Whole) { bytes.len() } else { bytes.len() / 2 };
        let node = &mut self.nodes[node];
        let end = usize::try_from(offset).expect("small") + length;
        if end > node.live.len() {
            node.live.resize(end, 0);
            node.lengths.push(end as u64);
        }
        node.live[end - length..end].copy_from_slice(&bytes[..length]);
        let mut at = offset;
        while at < end as u64 {
            let next = ((at / SECTOR + 1) * SECTOR).min(end as u64);
            let part = usize::try_from(at - offset).expect("small")..usize::try_from(next - offset).expect("small");
            node.pending.push(Piece { offset: at, bytes: bytes[part].to_vec() });
            at = next;
        }
        done(go)
    }

    fn set_len(&mut self, node: usize, bytes: u64) -> io::Result<()> {
        let go = self.call(Some(node))?;
        if self.dead || matches!(go, Go::Whole) {
            let node = &mut self.nodes[node];
            node.live.resize(usize::try_from(bytes).expect("small"), 0);
            node.lengths.push(bytes);
        }
        done(go)
    }

    fn sync(&mut self, node: usize) -> io::Result<()> {
        let go = self.call(Some(node))?;
        let dead = self.dead;
        let node = &mut self.nodes[node];
        if matches!(go, Go::Whole) {
            let length = node.live.len();
            let pieces = std::mem::take(&mut node.pending);
            node.lengths.clear();
            put(&mut node.durable, length, &pieces);
        } else if !dead {
            let some: Vec<Piece> = node.pending.drain(..).step_by(2).collect();
            let length = node.durable.len();
            put(&mut node.durable, length, &some);
        }
        done(go)
    }

    fn name(&mut self, path: &Path, node: Option<usize>) {
        match node {
            Some(node) => self.names.insert(path.to_path_buf(), node),
            None => self.names.remove(path),
        };
        self.pending_names.push((path.to_path_buf(), node));
    }
}

fn put(durable: &mut Vec<u8>, length: usize, pieces: &[Piece]) {
    durable.resize(length, 0);
    for piece in pieces {
        let at = usize::try_from(piece.offset).expect("small");
        if at < length {
            let fits = piece.bytes.len().min(length - at);
            durable[at..at + fits].copy_from_slice(&piece.bytes[..fits]);
        }
    }
}

fn done(go: Go) -> io::Result<()> {
    match go {
        Go::Whole => Ok(()),
        Go::Part(error) => Err(error),
    }
}

impl Model {
    fn world<T>(&self, f: impl FnOnce(&mut World) -> T) -> T {
        f(&mut self.0.lock().expect("not poisoned"))
    }

    /// Makes the `n`-th call from now on fail.
    pub(super) fn fail_at(&self, n: usize, fault: Fault) {
        self.world(|world| {
            let so_far = if fault == Fault::Read { world.reads } else { world.calls.len() };
            world.fault = Some((so_far + n, fault));
            world.hit = false;
        });
    }

    /// Whether the chosen call came.
    pub(super) fn hit(&self) -> bool {
        self.world(|world| world.hit)
    }

    /// How many calls there were that change something.
    pub(super) fn calls(&self) -> usize {
        self.world(|world| world.calls.len())
    }

    /// Whether there was such a call for the file after the first `since` ones of all.
    pub(super) fn touched(&self, path: &Path, since: usize) -> bool {
        self.world(|world| world.names.get(path).is_some_and(|&node| world.calls[since..].contains(&Some(node))))
    }

    /// Has `f` called before each write and sync from now on, but for those that it causes itself.
    pub(super) fn watch(&self, f: impl Fn() + Send + Sync + 'static) {
        self.world(|world| world.watch = Some(Watch(Arc::new(f))));
    }

    fn told(&self) {
        if let Some(watch) = self.world(|world| world.watch.take()) {
            (watch.0)();
            self.world(|world| world.watch = Some(watch));
        }
    }

    /// The same file system seen by a process that was started after the old one was killed.
    pub(super) fn after_kill(&self) -> Self {
        let mut world = self.world(|world| world.clone());
        (world.dead, world.fault, world.watch) = (false, None, None);
        Self(Arc::new(Mutex::new(world)))
    }

    /// What a power loss leaves: one of the many possible disks.
    pub(super) fn after_power_loss(&self, dice: &mut Dice) -> Self {
        let most = dice.below(5);
        self.keeping(|_| dice.below(4) < most)
    }

    /// What power losses leave that keep nothing, all, all of one file or of all others, one sector or all others.
    pub(super) fn after_plain_power_losses(&self) -> Vec<Self> {
        let mut unsynced = Vec::new();
        self.keeping(|one| {
            unsynced.push(one);
            true
        });
        let mut left = vec![self.keeping(|_| false), self.keeping(|_| true)];
        let mut nodes: Vec<_> = unsynced.iter().map(|one| one.node).collect();
        nodes.dedup();
        if nodes.len() > 1 {
            for node in nodes {
                left.push(self.keeping(|one| one.node == node));
                left.push(self.keeping(|one| one.node != node));
            }
        }
        for this in unsynced {
            left.push(self.keeping(|one| one == this));
            left.push(self.keeping(|one| one != this));
        }
        left
    }

    /// What a power loss leaves that keeps some of what was not synced.
    fn keeping(&self, mut kept: impl FnMut(Unsynced) -> bool) -> Self {
        let mut world = self.after_kill().world(|world| world.clone());
        let mut nth = 0..;
        let mut kept = |node| kept(Unsynced { nth: nth.next().expect("endless"), node });
        for (place, node) in world.nodes.iter_mut().enumerate() {
            let mut length = node.durable.len();
            for &pending in &node.lengths {
                if kept(Some(place)) {
                    length = usize::try_from(pending).expect("small");
                }
            }
            let pieces: Vec<Piece> = node.pending.iter().filter(|_| kept(Some(place))).cloned().collect();
            put(&mut node.durable, length, &pieces);
            (node.live, node.pending, node.lengths) = (node.durable.clone(), Vec::new(), Vec::new());
        }
        for (path, node) in std::mem::take(&mut world.pending_names) {
            if kept(None) {
                match node {
                    Some(node) => world.durable_names.insert(path, node),
                    None => world.durable_names.remove(&path),
                };
            }
        }
        world.names = world.durable_names.clone();
        Self(Arc::new(Mutex::new(world)))
    }

    /// What a file holds.
    pub(super) fn content(&self, path: &Path) -> Vec<u8> {
        self.world(|world| world.nodes[world.names[path]].live.clone())
    }
}

impl Files for Model {
    fn open(&self, path: &Path) -> io::Result<Option<Box<dyn File>>> {
        self.world(|world| {
            if world.dead {
                return Err(dead());
            }
            let node = world.names.get(path).copied();
            Ok(node.map(|node| Box::new(Open { model: self.clone(), node }) as Box<dyn File>))
        })
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn File>> {
        self.world(|world| {
            let go = world.call(None)?;
            let node = world.nodes.len();
            world.nodes.push(Node::default());
            if world.dead || matches!(go, Go::Whole) {
                world.name(path, Some(node));
            }
            done(go)?;
            Ok(Box::new(Open { model: self.clone(), node }) as Box<dyn File>)
        })
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.world(|world| {
            let go = world.call(None)?;
            if world.dead || matches!(go, Go::Whole) {
                let node = world.names.get(from).copied();
                world.name(from, None);
                world.name(to, node);
            }
            done(go)
        })
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.world(|world| {
            let go = world.call(None)?;
            if !matches!(go, Go::Whole) {
                return done(go);
            }
            let (here, elsewhere) =
                std::mem::take(&mut world.pending_names).into_iter().partition(|(path, _)| parent(path) == dir);
            world.pending_names = elsewhere;
            let here: Vec<(PathBuf, Option<usize>)> = here;
            for (path, node) in here {
                match node {
                    Some(node) => world.durable_names.insert(path, node),
                    None => world.durable_names.remove(&path),
                };
            }
            Ok(())
        })
    }
}

impl File for Open {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.model.world(|world| {
            let at = usize::try_from(offset).expect("small");
            let bytes = world.nodes[self.node].live.get(at..at + buffer.len());
            buffer.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
            world.reads += 1;
            if world.fault == Some((world.reads, Fault::Read)) {
                world.hit = true;
                return Err(io::Error::from_raw_os_error(5));
            }
            if world.dead { Err(dead()) } else { Ok(()) }
        })
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.model.told();
        self.model.world(|world| world.write(self.node, offset, bytes))
    }

    fn zero(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.write_at(offset, &vec![0; usize::try_from(bytes).expect("small")])
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.model.world(|world| world.set_len(self.node, bytes))
    }

    fn reserve(&self, bytes: u64) -> io::Result<()> {
        self.set_len(bytes)
    }

    fn bytes(&self) -> io::Result<u64> {
        self.model.world(|world| Ok(world.nodes[self.node].live.len() as u64))
    }

    fn sync(&self) -> io::Result<()> {
        self.model.told();
        self.model.world(|world| world.sync(self.node))
    }

    fn lock(&self) -> io::Result<bool> {
        Ok(true)
    }
}
