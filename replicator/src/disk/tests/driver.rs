//! A standby agent as the disks see it, and what is true of the copy at each moment.

use std::path::PathBuf;
use std::sync::Arc;

use proptest::prelude::*;
use vmm_hooks::disk::{DiskChange, DiskSpec, DiskWrite};

use super::model::{Dice, Model};
use crate::disk::{
    DiskError, DiskStore, EpochId, Policy, Recovered, Setup, StandbyDisk, State, create, recover, reset,
};

pub(super) const SIZES: [usize; 2] = [8192, 4608];

/// A write, short enough to be read in a report.
#[derive(Debug, Clone)]
pub(super) struct W {
    pub(super) disk: usize,
    pub(super) at: usize,
    pub(super) bytes: usize,
    /// 0: zeroes.
    pub(super) fill: u8,
}

#[derive(Debug, Clone)]
pub(super) enum Op {
    /// Appends an epoch; false: its acknowledgement waits for the next one's.
    Epoch(Vec<W>, bool),
    Commit,
    Apply,
    Flush,
    /// The agent is killed and started again.
    Restart,
    /// Finishes and activates, then a new generation begins.
    Failover,
    /// A new generation begins.
    Renew(Vec<W>),
}

fn w() -> impl Strategy<Value = W> {
    (0..SIZES.len(), 0..SIZES[0], 1..3000_usize, 0..4_u8).prop_map(|(disk, at, bytes, fill)| {
        let at = at % SIZES[disk];
        W { disk, at, bytes: bytes.min(SIZES[disk] - at), fill }
    })
}

pub(super) fn ops(most: usize) -> impl Strategy<Value = Vec<Op>> {
    let writes = || proptest::collection::vec(w(), 0..4);
    let op = prop_oneof![
        8 => (writes(), prop::bool::weighted(0.75)).prop_map(|(writes, acked)| Op::Epoch(writes, acked)),
        4 => Just(Op::Commit),
        4 => Just(Op::Apply),
        1 => Just(Op::Flush),
        1 => Just(Op::Restart),
        1 => Just(Op::Failover),
        1 => writes().prop_map(Op::Renew),
    ];
    proptest::collection::vec(op, 1..=most)
}

type Content = Vec<Vec<u8>>;

/// What a recovery may find.
#[derive(Debug, Clone, Copy, Default)]
struct May {
    missing: bool,
    syncing: bool,
    whole: bool,
    finished: bool,
    activated: bool,
}

/// What is true, and what may be.
#[derive(Debug, Clone)]
pub(super) struct Truth {
    may: May,
    /// Of the session: each epoch that was taken or may have been, its content, and whether it wrote anything.
    history: Vec<(EpochId, Content, bool)>,
    pub(super) acked: u64,
    committed: u64,
    /// Not older than this after a power loss, whatever the policy.
    durable: u64,
    finishing: Option<u64>,
    /// Nothing later may be found: it was marked, surely, that the images are brought to this epoch.
    bound: Option<u64>,
    /// A recovery without a limit had begun.
    unlimited: bool,
}

impl Truth {
    fn content(&self) -> Content {
        self.history.last().map_or_else(|| SIZES.iter().map(|&bytes| vec![0; bytes]).collect(), |last| last.1.clone())
    }

    fn id(&self) -> EpochId {
        self.history.last().map_or(EpochId { generation: 1, incarnation: 7, epoch: 100 }, |last| last.0)
    }
}

#[derive(Debug)]
pub(super) struct Driver {
    pub(super) model: Model,
    setup: Setup,
    pub(super) store: Option<Arc<DiskStore>>,
    pub(super) truth: Truth,
}

fn filled(fill: u8, at: usize, bytes: usize, salt: u64) -> Vec<u8> {
    let mut data = vec![0; bytes];
    if fill > 0 {
        for (place, byte) in (at as u64..).zip(&mut data) {
            let mixed = (place ^ salt.wrapping_mul(131)).wrapping_mul(0x9e37_79b9);
            *byte = mixed.to_le_bytes()[1] | fill;
        }
    }
    data
}

fn writes(ws: &[W], salt: u64, content: &mut [Vec<u8>]) -> Vec<DiskWrite> {
    ws.iter()
        .map(|w| {
            let data = filled(w.fill, w.at, w.bytes, salt);
            content[w.disk][w.at..w.at + w.bytes].copy_from_slice(&data);
            let change = if w.fill == 0 { DiskChange::Zero(w.bytes as u64) } else { DiskChange::Data(data) };
            DiskWrite { disk: u32::try_from(w.disk).expect("small"), offset: w.at as u64, change }
        })
        .collect()
}

impl Driver {
    pub(super) fn new(model: Model, policy: Policy) -> Self {
        let disks = SIZES.iter().zip(["a", "b"]);
        let disks = disks.map(|(&bytes, name)| StandbyDisk {
            spec: DiskSpec { name: name.into(), bytes: bytes as u64 },
            image: (name == "b").then(|| PathBuf::from("/elsewhere/b.raw")),
        });
        let setup = Setup { dir: PathBuf::from("/vm"), disks: disks.collect(), journal_bytes: 16 << 10, policy };
        let may = May { missing: true, syncing: true, ..May::default() };
        let truth = Truth {
            may,
            history: Vec::new(),
            acked: 0,
            committed: 0,
            durable: 0,
            finishing: None,
            bound: None,
            unlimited: false,
        };
        Self { model, setup, store: None, truth }
    }

    /// The same agent on what a crash left.
    pub(super) fn on(&self, model: Model) -> Self {
        Self { model, setup: self.setup.clone(), store: None, truth: self.truth.clone() }
    }

    /// For another thread of the agent.
    pub(super) fn shared(&self) -> Arc<DiskStore> {
        Arc::clone(self.store.as_ref().expect("there is one"))
    }

    pub(super) fn store(&self) -> &DiskStore {
        self.store.as_ref().expect("there is one")
    }

    /// The first protection.
    pub(super) fn start(&mut self) -> Result<(), DiskError> {
        self.store = Some(create(&self.model, &self.setup)?.into());
        self.truth.may = May { syncing: true, ..May::default() };
        self.sync(&[])
    }

    /// First copy and begin, of the next generation.
    fn sync(&mut self, ws: &[W]) -> Result<(), DiskError> {
        let EpochId { generation, incarnation, epoch } = self.truth.id();
        // The epochs of another primary's agent have numbers of their own.
        let id = EpochId { generation: generation + 1, incarnation: incarnation ^ 1, epoch: epoch ^ 1 };
        let mut content = self.truth.content();
        let all: Vec<W> = (0..).zip(SIZES).map(|(disk, bytes)| W { disk, at: 0, bytes, fill: 1 }).collect();
        let copy = writes(&all, generation, &mut content);
        let more = writes(ws, generation + 77, &mut content);
        self.truth.history = vec![(id, content, true)];
        let store = self.store();
        store.write(&copy)?;
        store.write(&more)?;
        self.truth.may = May { syncing: true, whole: true, ..May::default() };
        (self.truth.acked, self.truth.committed, self.truth.durable) = (id.epoch, id.epoch, id.epoch);
        (self.truth.finishing, self.truth.bound, self.truth.unlimited) = (None, None, false);
        self.store().begin(id)?;
        self.truth.may = May { whole: true, ..May::default() };
        Ok(())
    }

    pub(super) fn step(&mut self, op: &Op) -> Result<(), DiskError> {
        match op {
            Op::Epoch(ws, acked) => {
                let last = self.truth.id();
                let id = EpochId { epoch: last.epoch + 1, ..last };
                let mut content = self.truth.content();
                let disk_writes = writes(ws, id.epoch, &mut content);
                self.truth.history.push((id, content, !ws.is_empty()));
                match self.store().append(id, &disk_writes) {
                    Err(DiskError::Full { .. } | DiskError::TooLarge { .. }) => drop(self.truth.history.pop()),
                    done => {
                        done?;
                        if *acked {
                            self.truth.acked = id.epoch;
                        }
                    }
                }
            }
            Op::Commit => {
                self.store().commit(self.truth.acked)?;
                self.truth.committed = self.truth.acked;
            }
            Op::Apply => {
                let applied = self.store().apply()?;
                assert_eq!(applied, self.truth.committed);
                self.truth.durable = self.truth.committed;
                assert!(
                    self.images() == self.at(applied).1,
                    "the images are at the last committed epoch, nothing later"
                );
            }
            Op::Flush => {
                self.store().flush()?;
            }
            Op::Restart => {
                drop(self.store.take());
                self.truth.unlimited = true;
                self.check_restart(None, false)?;
            }
            Op::Failover => {
                let epoch = self.truth.acked;
                self.truth.finishing = Some(epoch);
                self.truth.may.finished = true;
                let before = self.model.calls();
                let finished = self.store().finish(epoch);
                if self.setup.images().iter().any(|(_, path)| self.model.touched(path, before)) {
                    self.truth.bound = Some(epoch);
                }
                finished?;
                assert!(self.images() == self.at(epoch).1, "exactly the acknowledged epoch {epoch}");
                self.store().finish(epoch)?;
                self.truth.may = May { finished: true, activated: true, ..May::default() };
                let generation = self.truth.id().generation;
                self.store().activated(generation)?;
                self.truth.may = May { activated: true, ..May::default() };
                self.renew(&[])?;
            }
            Op::Renew(ws) => self.renew(ws)?,
        }
        Ok(())
    }

    fn renew(&mut self, ws: &[W]) -> Result<(), DiskError> {
        drop(self.store.take());
        self.truth.may.syncing = true;
        self.store = Some(reset(&self.model, &self.setup)?.into());
        self.truth.may = May { syncing: true, ..May::default() };
        self.sync(ws)
    }

    fn images(&self) -> Content {
        self.setup.images().iter().map(|(_, path)| self.model.content(path)).collect()
    }

    fn at(&self, epoch: u64) -> &(EpochId, Content, bool) {
        self.truth.history.iter().find(|(id, ..)| id.epoch == epoch).expect("an epoch of the session")
    }

    /// Recovers, and checks that nothing was found that may not be. Afterwards the store goes on from there.
    pub(super) fn check_restart(&mut self, limit: Option<u64>, power_lost: bool) -> Result<(), DiskError> {
        let may = self.truth.may;
        match recover(&self.model, &self.setup, limit) {
            Err(DiskError::Missing { .. }) if may.missing => {}
            Err(DiskError::Activated { .. }) if may.activated => {}
            Err(error @ (DiskError::Io { .. } | DiskError::NoSpace { .. })) => return Err(error),
            Err(error @ DiskError::OutOfTurn { .. }) if limit.is_some() => return Err(error),
            Err(error) => panic!("{error}: {may:?}"),
            Ok((store, Recovered::Syncing)) => {
                assert!(may.syncing, "a whole copy is lost: {may:?}");
                self.store = Some(store.into());
                self.truth.may = May { syncing: true, ..May::default() };
            }
            Ok((store, found @ (Recovered::Whole(id) | Recovered::Finished(id)))) => {
                let finished = matches!(found, Recovered::Finished(_));
                assert!(if finished { may.finished } else { may.whole }, "{found:?} {may:?}");
                let (known, content, _) = self.at(id.epoch);
                assert_eq!(*known, id);
                assert!(self.images() == *content, "the images are not as of {id:?}");
                let safe = self.setup.policy == Policy::Disk || !power_lost;
                let floor = if safe { self.truth.acked } else { self.truth.durable };
                let wrote = |(known, _, wrote): &(EpochId, Content, bool)| {
                    *wrote && known.epoch > id.epoch && known.epoch <= floor
                };
                assert!(!self.truth.history.iter().any(wrote), "{found:?} is older than {floor}");
                assert!(
                    self.truth.bound.is_none_or(|bound| id.epoch <= bound),
                    "{found:?} is beyond {:?}",
                    self.truth.bound
                );
                if finished {
                    assert_eq!(Some(id.epoch), self.truth.finishing);
                }
                assert!(limit.is_none_or(|limit| id.epoch <= limit), "{found:?} is beyond {limit:?}");
                assert_eq!(store.progress().state, if finished { State::Finished } else { State::Whole });
                let truth = &mut self.truth;
                truth.history.retain(|(known, ..)| known.epoch <= id.epoch);
                (truth.acked, truth.committed, truth.durable) = (id.epoch, id.epoch, id.epoch);
                truth.may = May { whole: !finished, finished, ..May::default() };
                (truth.bound, truth.unlimited) = (None, false);
                self.store = Some(store.into());
            }
        }
        Ok(())
    }

    /// Goes on after a restart: whatever was found, a few more epochs are taken.
    pub(super) fn go_on(&mut self) -> Result<(), DiskError> {
        match self.store.as_ref().map(|store| store.progress().state) {
            Some(State::Whole) => {}
            Some(State::Syncing) => self.sync(&[])?,
            _ if self.truth.may.missing => self.start()?,
            _ => self.renew(&[])?,
        }
        let write = |fill| W { disk: 1, at: 100, bytes: 2500, fill };
        for op in [
            Op::Epoch(vec![write(1)], true),
            Op::Commit,
            Op::Apply,
            Op::Epoch(vec![write(2), W { disk: 0, ..write(3) }], true),
            Op::Epoch(vec![write(0)], false),
        ] {
            self.step(&op)?;
        }
        Ok(())
    }

    /// An activation after an error: a new process recovers up to the last acknowledged epoch, and finishes there.
    pub(super) fn finishes_at_acknowledged(&mut self, dice: &mut Dice) {
        let may = self.truth.may;
        if !may.whole || may.syncing {
            return;
        }
        let acked = self.truth.acked;
        let content = self.at(acked).1.clone();
        match self.check_restart(Some(acked), false) {
            Err(DiskError::OutOfTurn { .. }) if self.truth.unlimited => {
                return self.check_restart(None, false).expect("recovers without a limit, as was begun");
            }
            done => done.expect("recovers"),
        }
        let found = self.truth.id().epoch;
        let store = self.store();
        store.finish(found).expect("finishes");
        assert!(self.images() == content, "exactly the acknowledged epoch {acked}");
        store.activated(9).expect("activates");
        let lost = self.model.after_power_loss(dice);
        let again = recover(&lost, &self.setup, None);
        assert!(matches!(again, Err(DiskError::Activated { generation: 9, .. })));
        assert!(self.on(lost).images() == content, "and it stays so");
    }

    /// The store refuses everything after an error.
    pub(super) fn check_latched(&self) {
        let Some(store) = &self.store else { return };
        let progress = store.progress();
        assert!(progress.error.is_some(), "{progress:?}");
        let id = EpochId { epoch: progress.last.epoch + 1, ..progress.last };
        let write = DiskWrite { disk: 0, offset: 0, change: DiskChange::Zero(1) };
        for refused in [
            store.append(id, std::slice::from_ref(&write)),
            store.append(id, &[]),
            store.write(&[write]),
            store.begin(id),
            store.apply().map(drop),
            store.flush(),
            store.finish(progress.last.epoch),
            store.activated(id.generation),
        ] {
            assert!(matches!(refused, Err(DiskError::Latched { .. })), "{refused:?}");
        }
    }
}
