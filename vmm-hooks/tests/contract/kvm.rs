//! The microVM under the contract, in this process and in one of its own, with the pilot guest in it, which does what it is ordered to.

use std::cell::RefCell;
use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vmm_hooks::guest::{Fence, Guest, GuestError, TwinHost};
use vmm_hooks::kvm::pilot::abi;
use vmm_hooks::kvm::process::guest::Boot;
use vmm_hooks::kvm::process::{self, Microvm, ProcessTwinHost, Program};
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

/// With dirty pages found so, by threads of this process or in one of its own.
pub(crate) struct Kvm {
    pub(crate) dirty: Dirty,
    pub(crate) process: bool,
}

fn program() -> Program {
    Program::new(env!("CARGO_BIN_EXE_microvm-process"), &[])
}

impl Fixture for Kvm {
    fn name(&self) -> &'static str {
        match (self.dirty, self.process) {
            (Dirty::Bitmap, false) => "kvm",
            (Dirty::Ring, false) => "kvm-ring",
            (Dirty::Bitmap, true) => "kvm-process",
            (Dirty::Ring, true) => "kvm-process-ring",
        }
    }

    fn boot(&self, needs: Needs) -> Result<Box<dyn World>, String> {
        let kvm = host().map_err(|error| format!("no /dev/kvm: {error}"))?;
        if !Path::new(PILOT).exists() {
            return Err("the pilot guest is not built; cargo xtask setup".to_owned());
        }
        if self.dirty == Dirty::Ring {
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
            dirty: self.dirty,
        };
        let wire = network.then(|| ours.into());
        let options = PilotOptions::default();
        let bounds = GateBounds::default();
        let machine = if self.process {
            let boot = Boot::Pilot(PILOT.into(), options);
            let machine = Microvm::start(&program(), spec, &boot, wire, bounds).expect("this host can");
            assert_eq!(machine.dirty_note(), None);
            Vm::Process(machine)
        } else {
            let machine = Machine::pilot(&kvm, spec, Path::new(PILOT), &options, wire, bounds).expect("this host can");
            assert_eq!(machine.dirty_note(), None);
            Vm::Here(machine)
        };
        machine.resume();
        let others: Arc<Mutex<Vec<UnixDatagram>>> = Arc::default();
        let join: Join = {
            let others = Arc::clone(&others);
            Arc::new(move |_: &NetCard| {
                let (ours, theirs) = UnixDatagram::pair()?;
                others.lock().expect("no panic").push(theirs);
                Ok(ours.into())
            })
        };
        let options = TwinHostOptions { join, ..TwinHostOptions::default() };
        let host = if self.process {
            Host::Process(ProcessTwinHost::new(program(), options))
        } else {
            Host::Here(KvmTwinHost::new(options))
        };
        Ok(Box::new(KvmWorld { machine, host, wire: theirs, heard: RefCell::default(), directory }))
    }
}

enum Vm {
    Here(Machine),
    Process(Microvm),
}

impl Vm {
    fn resume(&self) {
        match self {
            Self::Here(machine) => machine.resume(),
            Self::Process(machine) => machine.resume(),
        }
        .expect("it stands");
    }

    fn pause(&self) {
        match self {
            Self::Here(machine) => machine.pause(),
            Self::Process(machine) => machine.pause(),
        }
        .expect("it runs");
    }

    fn is_running(&self) -> bool {
        match self {
            Self::Here(machine) => machine.is_running(),
            Self::Process(machine) => machine.is_running(),
        }
    }

    fn fence(&self) -> Arc<dyn Fence> {
        match self {
            Self::Here(machine) => machine.fence(),
            Self::Process(machine) => machine.fence(),
        }
    }

    fn serial(&self) -> String {
        match self {
            Self::Here(machine) => machine.serial(),
            Self::Process(machine) => machine.serial().unwrap_or_else(|error| error.to_string()),
        }
    }
}

enum Host {
    Here(KvmTwinHost),
    Process(ProcessTwinHost),
}

struct KvmWorld {
    machine: Vm,
    host: Host,
    /// The other end of the network.
    wire: UnixDatagram,
    heard: RefCell<Vec<Vec<u8>>>,
    directory: tempfile::TempDir,
}

impl KvmWorld {
    fn order(&self, words: &[u32]) {
        let carried_out = match &self.machine {
            Vm::Here(machine) => machine.order(words, PATIENCE),
            Vm::Process(machine) => machine.order(words, PATIENCE),
        };
        carried_out.unwrap_or_else(|error| panic!("{error}; {}", self.machine.serial()));
    }
}

fn small(value: impl TryInto<u32>) -> u32 {
    value.try_into().unwrap_or_else(|_| panic!("a small number"))
}

impl World for KvmWorld {
    fn attach(&self) -> Result<Box<dyn Guest>, GuestError> {
        match &self.machine {
            Vm::Here(machine) => Ok(Box::new(attach(machine)?)),
            Vm::Process(machine) => Ok(Box::new(process::attach(machine)?)),
        }
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
        self.machine.resume();
        self.order(&order);
        self.machine.pause();
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
        match &self.machine {
            Vm::Here(machine) => machine.traces(),
            Vm::Process(machine) => machine.traces(),
        }
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
        match &self.host {
            Host::Here(host) => Box::new(host.clone()),
            Host::Process(host) => Box::new(host.clone()),
        }
    }

    fn twin_traces(&self) -> Vec<String> {
        match &self.host {
            Host::Here(host) => host.twins(),
            Host::Process(host) => host.twins(),
        }
    }
}

impl Drop for KvmWorld {
    fn drop(&mut self) {
        // Processes end with their handles.
        if let Host::Here(host) = &self.host {
            for machine in host.twins().into_iter().filter_map(|name| host.machine(&name)) {
                machine.fence().fence().expect("it ends");
            }
        }
        self.machine.fence().fence().expect("it ends");
    }
}
