//! What hot-plug changes: the network, the devices and the memory, compared with what was attached.
//!
//! Promise: each change is told once. Nothing here waits for QEMU: what is asked at one resume is read at a later one.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::QemuGuest;
use crate::guest::GuestEvent;
use crate::qemu::network::{self, Network};
use crate::qemu::qmp::{Pending, Qmp, QmpError};
use crate::qemu::ram::parse_ramblock;

/// What is compared to notice hot-plug.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) network: Network,
    pub(super) devices: BTreeSet<String>,
    pub(super) blocks: BTreeSet<(String, u64)>,
}

/// What was asked to compare, and not answered yet. QEMU answers in this order.
#[derive(Debug)]
pub(super) struct Comparing {
    /// Network cards and memory, if their turn has come.
    rest: Option<[Pending; 2]>,
    /// Devices with and without an id. A card that no gate holds is a new device.
    devices: [Pending; 2],
}

impl QemuGuest {
    /// Asks for what hot-plug would change, without waiting for the answers.
    pub(super) fn start_comparing(&mut self, all: bool) -> Result<(), QmpError> {
        let hmp = |line: &str| json!({ "command-line": line });
        let rest = if all {
            let network = self.qmp.send("human-monitor-command", hmp("info network"))?;
            Some([network, self.qmp.send("human-monitor-command", hmp("info ramblock"))?])
        } else {
            None
        };
        let named = self.qmp.send("qom-list", json!({ "path": PERIPHERAL[0] }))?;
        let unnamed = self.qmp.send("qom-list", json!({ "path": PERIPHERAL[1] }))?;
        self.comparing = Some(Comparing { rest, devices: [named, unnamed] });
        Ok(())
    }

    /// Compares, if the answers are there.
    fn finish_comparing(&mut self) -> Result<(), QmpError> {
        let Some(asked) = self.comparing.take() else { return Ok(()) };
        if !self.qmp.ready(&asked.devices[1])? {
            self.comparing = Some(asked);
            return Ok(());
        }
        if let Some([network, blocks]) = asked.rest {
            let text = |value: Value| value.as_str().unwrap_or_default().to_owned();
            let network = network::parse(&text(self.qmp.collect(network)?));
            let blocks = parse_ramblock(&text(self.qmp.collect(blocks)?)).unwrap_or_default();
            let blocks = blocks.into_iter().map(|block| (block.name, block.total)).collect();
            self.compare("its network cards", |shape| &mut shape.network, network);
            self.compare("its memory", |shape| &mut shape.blocks, blocks);
        }
        let mut devices = BTreeSet::new();
        for (listed, path) in asked.devices.into_iter().zip(PERIPHERAL) {
            devices.extend(names(&self.qmp.collect(listed)?, path));
        }
        self.compare("its devices", |shape| &mut shape.devices, devices);
        Ok(())
    }

    /// A monitor that fails is found out by the next capture.
    pub(super) fn look_at_comparison(&mut self) {
        if let Err(error) = self.finish_comparing() {
            tracing::debug!(pid = self.process.pid(), %error, "cannot compare the guest's devices");
        }
    }

    /// Tells once of each change.
    fn compare<T: PartialEq>(&mut self, what: &str, part: impl FnOnce(&mut Shape) -> &mut T, now: T) {
        let known = part(&mut self.shape);
        if *known != now {
            *known = now;
            let what = format!("{what} are not what they were when it was attached");
            self.events.push(GuestEvent::Changed { what });
        }
    }
}

/// Where QEMU keeps the devices that a user made, with and without an id.
const PERIPHERAL: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];

/// The devices that a user made.
pub(super) fn devices(qmp: &mut Qmp) -> Result<BTreeSet<String>, QmpError> {
    let mut found = BTreeSet::new();
    for path in PERIPHERAL {
        let listed = qmp.execute("qom-list", json!({ "path": path }))?;
        found.extend(names(&listed, path));
    }
    Ok(found)
}

fn names(listed: &Value, path: &str) -> Vec<String> {
    let text = |property: &Value, name: &str| property.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    listed
        .as_array()
        .into_iter()
        .flatten()
        .map(|property| format!("{path}/{} {}", text(property, "name"), text(property, "type")))
        .collect()
}
