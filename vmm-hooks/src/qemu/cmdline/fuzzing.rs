//! Target `cmdline`: a command line, its arguments ended by zero bytes as in `/proc/PID/cmdline`. The first byte chooses the
//! network.
//!
//! Holds: what is rewritten parses again and can be rewritten again with the same result (a survivor is protected like any
//! other VM); what makes the machine is there word for word and in order; what the machine listens on or writes to lies in its
//! own directory; each memory backend is there once.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::options::{Keys, Opt, parse};
use super::{Backend, Disk, Image, Network, Plan, qmp_sockets, rewrite, shutdown_pauses};

const RUN_DIR: &str = "/run/t";

/// What is carried over as it is.
const KEPT: [&str; 14] = [
    "accel",
    "append",
    "boot",
    "cpu",
    "device",
    "global",
    "m",
    "name",
    "numa",
    "rtc",
    "smp",
    "usbdevice",
    "uuid",
    "vga",
];

pub(in super::super) fn run(bytes: &[u8]) {
    let Some((&choice, rest)) = bytes.split_first() else { return };
    let text = String::from_utf8_lossy(rest);
    let argv: Vec<String> = std::iter::once("qemu").chain(text.split_terminator('\0')).map(str::to_owned).collect();
    keys(&text);
    let _ = (qmp_sockets(&argv), shutdown_pauses(&argv));
    let memory = [Backend { id: "pc.ram".to_owned(), size: 64 << 20, path: "/proc/1/fd/9".to_owned() }];
    let memory = &memory[..usize::from(choice & 1)];
    let network = if choice & 2 == 0 {
        Network::Same {
            taps: BTreeMap::from([("n1".to_owned(), "vnet7".to_owned())]),
            bridges: BTreeMap::from([("br0".to_owned(), "lan".to_owned())]),
        }
    } else {
        Network::Null
    };
    // What a survivor has is its image, which is what its own twin would replace.
    let disks = [Disk { source: "/d".into(), image: Image::File("/d".into()) }];
    twice(&argv, memory, &network, &disks[..usize::from(choice >> 2 & 1)]);
}

/// Keys can be printed and read again.
fn keys(text: &str) {
    for implied in ["", "type"] {
        let Some(keys) = Keys::parse(text, implied) else { continue };
        let printed = keys.print("");
        // A value with a brace in front is read as JSON; no option that is printed has one.
        if !printed.starts_with('{') {
            assert_eq!(Keys::parse(&printed, ""), Some(keys), "{printed}");
        }
    }
}

fn twice(argv: &[String], memory: &[Backend], network: &Network, disks: &[Disk]) {
    let (cwd, run_dir) = (Path::new("/home/vm"), Path::new(RUN_DIR));
    let plan = |argv| Plan {
        argv,
        user: (0, 0),
        version: "7.2.22",
        cwd,
        machine: "pc-q35-7.2",
        memory,
        share: true,
        network: network.clone(),
        disks,
        run_dir,
    };
    let Ok(done) = rewrite(&plan(argv)) else { return };
    assert!(done.arguments.ends_with(&["-S", "-incoming", "defer"].map(str::to_owned)));
    assert!(done.needs.iter().all(|path| path.is_absolute()), "{:?}", done.needs);
    let was = parse(&argv[1..]).expect("it was rewritten");
    let is = parse(&done.arguments).expect("what was rewritten can be read");
    for name in KEPT {
        assert_eq!(values(&is, name), values(&was, name), "-{name}");
    }
    for name in ["netdev", "serial", "chardev", "drive", "blockdev"] {
        let moved = if name == "drive" {
            values(&was, "hda").len()
                + values(&was, "hdb").len()
                + values(&was, "hdc").len()
                + values(&was, "hdd").len()
        } else {
            0
        };
        let left = if name == "drive" {
            values(&is, "hda").len() + values(&is, "hdb").len() + values(&is, "hdc").len() + values(&is, "hdd").len()
        } else {
            0
        };
        let (before, after) = (values(&was, name).len() + moved, values(&is, name).len() + left);
        assert!(after == before || (name == "serial" && after == before + 1), "-{name}: {before} became {after}");
    }
    let ids = |options: &[Opt]| -> Vec<Option<String>> {
        values(options, "netdev").iter().map(|value| Keys::parse(value, "type")?.remove("id")).collect()
    };
    assert_eq!(ids(&is), ids(&was), "the netdevs have other ids");
    for (name, implied) in [("serial", ""), ("chardev", "backend"), ("vnc", ""), ("qmp", "")] {
        for value in values(&is, name) {
            assert!(is_inside(value, implied), "-{name} {value} is outside of {RUN_DIR}");
        }
    }
    let objects = values(&is, "object");
    for backend in memory {
        let of_it = |value: &&&str| value.starts_with(&format!("memory-backend-file,id={},", backend.id));
        assert_eq!(objects.iter().filter(of_it).count(), 1, "{objects:?}");
    }
    let again: Vec<String> = std::iter::once("qemu".to_owned()).chain(done.arguments.iter().cloned()).collect();
    assert_eq!(qmp_sockets(&again), [PathBuf::from(RUN_DIR).join("qmp.sock")]);
    let second = rewrite(&plan(&again)).expect("a survivor can be protected");
    assert_eq!(second.arguments, done.arguments, "rewriting twice gives something else");
}

fn values<'a>(options: &'a [Opt], name: &str) -> Vec<&'a str> {
    options.iter().filter(|option| option.name == name).map(|option| option.value.as_deref().unwrap_or("")).collect()
}

/// Whether what a value of this kind opens is in the machine's own directory.
fn is_inside(value: &str, implied: &str) -> bool {
    let bare = ["none", "null", "vc", "chardev"];
    let in_dir = |path: &str| Path::new(path).starts_with(RUN_DIR);
    if implied.is_empty() {
        let (kind, rest) = value.split_once(':').unwrap_or((value, ""));
        return bare.contains(&kind.split(',').next().unwrap_or_default())
            || (matches!(kind, "unix" | "file") && in_dir(rest.split(',').next().unwrap_or_default()));
    }
    Keys::parse(value, implied).is_some_and(|keys| {
        ["path", "logfile", "host", "port", "input-path"].iter().all(|key| keys.get(key).is_none_or(in_dir))
    })
}
