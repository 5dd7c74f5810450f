//! The microVM under the contract, with the pilot guest in it, which does what it is ordered to.

use std::cell::RefCell;
use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vmm_hooks::guest::{Guest, GuestError, TwinHost};
use vmm_hooks::kvm::pilot::abi;
use vmm_hooks::kvm::ring::check;
use vmm_hooks::kvm::twin::Join;
use vmm_hooks::kvm::{
    Dirty, DiskFile, GateBounds, KvmTwinHost, Machine, NetCard, PilotOptions, Spec, TwinHostOptions, attach, host,
};
use vmm_hooks::layout::PAGE_SIZE;

use crate::fixture::{DISK_BYTES, Fixture, Needs, SPARES, Step, World};

const PILOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/pilot/pilot");

/// Far above what an order takes.
const PATIENCE: Duration = Duration::from_secs(30);

/// Where the number is in a frame that was emitted by order.
const NUMBER: std::ops::Range<usize> = 14..22;

/// With dirty pages found so.
pub(crate) struct Kvm(pub(crate) Dirty);

impl Fixture for Kvm {
    fn name(&self) -> &'static str {
        match self.0 {
            Dirty::Bitmap => "kvm",
            Dirty::Ring => "kvm-ring",
        }
    }

    fn boot(&self, needs: Needs) -> Result<Box<dyn World>, String> {
        let kvm = host().map_err(|error| format!("no /dev/kvm: {error}"))?;
        if !Path::new(PILOT).exists() {
            return Err("the pilot guest is not built; cargo xtask setup".to_owned());
        }
        if self.0 == Dirty::Ring {
            check::of_host(&kvm, check::Code::User).map_err(|why| format!("its rings cannot be relied on: {why}"))?;
        }
        let directory = tempfile::Builder::new().prefix("kvm-contract-").tempdir().expect("a directory");
        let disks = if needs == Needs::Disks { &["one", "two"][..] } else { &[] };
        let disks = disks.iter().map(|name| {
            let path = directory.path().join(name);
            fs::write(&path, vec![0; DISK_BYTES]).expect("room");
            DiskFile { name: (*name).to_owned(), path }
        });
        let (ours, theirs) = UnixDatagram::pair().expect("a pair");
        theirs.set_nonblocking(true).expect("it can");
        let network = needs == Needs::Network;
        let spec = Spec {
            name: "contract".to_owned(),
            memory: abi::MEMORY_MIN,
            cpus: 2,
            net: network.then(|| NetCard { mac: [2, 0, 0, 0, 0, 7], tap: "none".to_owned(), bridge: None }),
            disks: disks.collect(),
            dirty: self.0,
        };
        let wire = network.then(|| ours.into());
        let options = PilotOptions::default();
        let machine = Machine::pilot(&kvm, spec, Path::new(PILOT), &options, wire, GateBounds::default());
        let machine = machine.expect("this host can");
        assert_eq!(machine.dirty_note(), None);
        machine.resume().expect("it is new");
        let others: Arc<Mutex<Vec<UnixDatagram>>> = Arc::default();
        let join: Join = {
            let others = Arc::clone(&others);
            Arc::new(move |_: &NetCard| {
                let (ours, theirs) = UnixDatagram::pair()?;
                others.lock().expect("no panic").push(theirs);
                Ok(ours.into())
            })
        };
        let host = KvmTwinHost::new(TwinHostOptions { join, ..TwinHostOptions::default() });
        Ok(Box::new(KvmWorld { machine, host, wire: theirs, heard: RefCell::default(), directory }))
    }
}

struct KvmWorld {
    machine: Machine,
    host: KvmTwinHost,
    /// The other end of the network.
    wire: UnixDatagram,
    heard: RefCell<Vec<Vec<u8>>>,
    directory: tempfile::TempDir,
}

impl KvmWorld {
    fn order(&self, words: &[u32]) {
        self.machine.order(words, PATIENCE).unwrap_or_else(|error| panic!("{error}; {}", self.machine.serial()));
    }
}

fn small(value: impl TryInto<u32>) -> u32 {
    value.try_into().unwrap_or_else(|_| panic!("a small number"))
}

impl World for KvmWorld {
    fn attach(&self) -> Result<Box<dyn Guest>, GuestError> {
        Ok(Box::new(attach(&self.machine)?))
    }

    fn spare(&self, index: u64) -> u64 {
        assert!(index < SPARES);
        abi::FREE / PAGE_SIZE as u64 + index
    }

    fn fill(&self, page: u64, byte: u8) {
        let order = [abi::order::FILL, small(page), byte.into()];
        if self.machine.is_running() {
            return self.order(&order);
        }
        // Only a guest that runs carries out an order; nobody captures meanwhile.
        self.machine.resume().expect("it stands");
        self.order(&order);
        self.machine.pause().expect("it runs");
    }

    fn write_disk(&self, disk: usize, offset: usize, byte: u8, bytes: usize) {
        let sectors = [small(offset / abi::SECTOR), small(bytes / abi::SECTOR)];
        self.order(&[abi::order::WRITE, small(disk), sectors[0], sectors[1], byte.into()]);
    }

    fn disk(&self, disk: usize) -> Vec<u8> {
        fs::read(self.directory.path().join(["one", "two"][disk])).expect("its image")
    }

    fn is_running(&self) -> bool {
        self.machine.is_running()
    }

    fn is_there(&self) -> bool {
        !self.machine.fence().ended()
    }

    fn traces(&self) -> Vec<String> {
        self.machine.traces()
    }

    fn emit(&self) {
        self.order(&[abi::order::EMIT, 3]);
    }

    fn heard(&self) -> u64 {
        let mut frame = [0; 2048];
        while let Ok(bytes) = self.wire.recv(&mut frame) {
            self.heard.borrow_mut().push(frame[..bytes].to_vec());
        }
        self.heard.borrow().len() as u64
    }

    fn heard_in_order(&self) -> bool {
        self.heard();
        (1_u64..).zip(self.heard.borrow().iter()).all(|(number, frame)| frame[NUMBER] == number.to_be_bytes())
    }

    fn fail_next(&self, _step: Step) -> bool {
        false
    }

    fn twins(&self) -> Box<dyn TwinHost> {
        Box::new(self.host.clone())
    }

    fn twin_traces(&self) -> Vec<String> {
        self.host.twins()
    }
}

impl Drop for KvmWorld {
    fn drop(&mut self) {
        let twins = self.host.twins().into_iter().filter_map(|name| self.host.machine(&name));
        for machine in twins.chain([self.machine.clone()]) {
            machine.fence().fence().expect("it ends");
        }
    }
}
