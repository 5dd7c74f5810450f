//! The guest's network cards and what is behind them, read from `info network`.

/// One queue pair or more of a network card of the guest, and the netdev it is joined to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Nic {
    /// The card's name in QEMU.
    pub(super) name: String,
    /// The netdev that a filter is put on; `None` if the card is joined to nothing.
    pub(super) netdev: Option<Netdev>,
    /// How many queues it has.
    pub(super) queues: usize,
}

/// A host side of the guest's network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Netdev {
    /// Its id.
    pub(super) id: String,
    /// Its type: `tap`, `user`, `hubport`, ...
    pub(super) kind: String,
    /// What QEMU tells about it: `ifname=tap0,script=no`.
    pub(super) detail: String,
}

impl Netdev {
    /// The tap interface by name, if QEMU was told one.
    pub(super) fn ifname(&self) -> Option<&str> {
        self.detail.split(',').find_map(|part| part.strip_prefix("ifname="))
    }

    /// The tap's file descriptor in QEMU, if QEMU was given one.
    pub(super) fn fd(&self) -> Option<u32> {
        self.detail.split(',').find_map(|part| part.strip_prefix("fd="))?.parse().ok()
    }
}

/// Everything that `info network` says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Network {
    /// The guest's cards.
    pub(super) nics: Vec<Nic>,
    /// Netdevs that stand behind a hub or are joined to no card.
    pub(super) others: Vec<Netdev>,
}

/// Reads the text. Lines it does not know are skipped.
pub(super) fn parse(text: &str) -> Network {
    let mut network = Network::default();
    let mut last_is_nic = false;
    let mut in_hub = false;
    for line in text.lines() {
        if line.starts_with("hub ") {
            in_hub = true;
            continue;
        }
        let peer = line.strip_prefix(" \\ ");
        in_hub &= peer.is_some();
        let line = peer.unwrap_or(line);
        if in_hub {
            // "port: peer: index=..." where the filter goes on the port.
            let Some((port, rest)) = line.split_once(": ") else { continue };
            let Some(client) = client(rest) else { continue };
            if client.kind == "nic" {
                let netdev = Netdev { id: port.trim().to_owned(), kind: "hubport".to_owned(), detail: String::new() };
                network.nics.push(Nic { name: client.id, netdev: Some(netdev), queues: 1 });
            } else {
                network.others.push(client);
            }
            continue;
        }
        let Some(client) = client(line) else { continue };
        match (peer.is_some(), client.kind == "nic") {
            (false, true) => {
                network.nics.push(Nic { name: client.id, netdev: None, queues: 1 });
                last_is_nic = true;
            }
            (true, false) if last_is_nic => {
                let same = |nic: &Nic| nic.netdev.as_ref().is_some_and(|netdev| netdev.id == client.id);
                let Some(mut nic) = network.nics.pop() else { continue };
                if let Some(first) = network.nics.iter_mut().find(|nic| same(nic)) {
                    first.queues += 1;
                } else {
                    nic.netdev = Some(client);
                    network.nics.push(nic);
                }
                last_is_nic = false;
            }
            _ => {
                network.others.push(client);
                last_is_nic = false;
            }
        }
    }
    network
}

/// "name: index=0,type=tap,detail".
fn client(line: &str) -> Option<Netdev> {
    let (id, rest) = line.split_once(": index=")?;
    let (_, rest) = rest.split_once(",type=")?;
    let (kind, detail) = rest.split_once(',').unwrap_or((rest, ""));
    Some(Netdev { id: id.trim().to_owned(), kind: kind.to_owned(), detail: detail.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_cards_queues_and_hubs() {
        let network = parse(
            "hub 0\n \\ hub0port1: #net171: index=0,type=user,net=10.0.2.0,restrict=off\n \\ hub0port0: e1000.0: index=0,type=nic,model=e1000,macaddr=52:54:00:12:34:56\n\
             nic0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:57\n \\ net0: index=0,type=tap,ifname=tap9,script=no,downscript=no\n\
             filters:\n  - f0: type=filter-redirector,status=on\n\
             virtio-net-pci.1: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:58\n \\ net1: index=0,type=tap,ifname=tap10,script=no\n\
             virtio-net-pci.2: index=1,type=nic,\n \\ net1: index=1,type=tap,fd=12\nlone: index=0,type=socket,\n",
        );
        let shown: Vec<_> = network
            .nics
            .iter()
            .map(|nic| (nic.name.as_str(), nic.netdev.as_ref().map_or("", |netdev| netdev.id.as_str()), nic.queues))
            .collect();
        assert_eq!(shown, [("e1000.0", "hub0port0", 1), ("nic0", "net0", 1), ("virtio-net-pci.1", "net1", 2)]);
        assert_eq!(network.nics[1].netdev.as_ref().and_then(Netdev::ifname), Some("tap9"));
        let others: Vec<_> = network.others.iter().map(|netdev| netdev.kind.as_str()).collect();
        assert_eq!(others, ["user", "socket"]);
    }

    #[test]
    fn a_port_is_named_like_any_other_netdev() {
        let network = parse("hub 0\n \\  hub0port0 : e1000.0: index=0,type=nic,\n");
        assert_eq!(network.nics[0].netdev.as_ref().map(|netdev| netdev.id.as_str()), Some("hub0port0"));
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "(hub 0\n| \\\\ |n0: index=0,type=(nic|tap),x\n|[ -~\n]){0,30}") {
            parse(&text);
        }
    }
}
