//! QEMU's command line as options with values, and values as keys.
//!
//! Promise: no command line makes it panic; what is not known is an error that names it.

use super::CmdlineError;

/// Options that take no value.
const FLAGS: &[&str] = &[
    "S",
    "s",
    "daemonize",
    "enable-kvm",
    "enable-sync-profile",
    "full-screen",
    "mem-prealloc",
    "no-acpi",
    "no-fd-bootchk",
    "no-hpet",
    "no-quit",
    "no-reboot",
    "no-shutdown",
    "no-user-config",
    "nodefaults",
    "nographic",
    "only-migratable",
    "portrait",
    "preconfig",
    "singlestep",
    "snapshot",
    "usb",
    "win2k-hack",
    "xen-attach",
    "xen-domid-restrict",
    "async-teardown",
];

/// Options that take a value.
const VALUED: &[&str] = &[
    "accel",
    "acpitable",
    "action",
    "add-fd",
    "append",
    "audio",
    "audiodev",
    "bios",
    "blockdev",
    "boot",
    "cdrom",
    "chardev",
    "chroot",
    "compat",
    "cpu",
    "D",
    "d",
    "debugcon",
    "device",
    "dfilter",
    "display",
    "drive",
    "dtb",
    "dump-vmstate",
    "echr",
    "fda",
    "fdb",
    "fsdev",
    "fw_cfg",
    "gdb",
    "global",
    "hda",
    "hdb",
    "hdc",
    "hdd",
    "icount",
    "incoming",
    "initrd",
    "iscsi",
    "k",
    "kernel",
    "L",
    "loadvm",
    "M",
    "m",
    "machine",
    "machine",
    "mem-path",
    "mon",
    "monitor",
    "msg",
    "mtdblock",
    "name",
    "net",
    "netdev",
    "nic",
    "numa",
    "object",
    "option-rom",
    "overcommit",
    "parallel",
    "pflash",
    "pidfile",
    "plugin",
    "qmp",
    "qmp-pretty",
    "readconfig",
    "rotate",
    "rtc",
    "run-with",
    "runas",
    "sandbox",
    "sd",
    "seed",
    "serial",
    "set",
    "smbios",
    "smp",
    "spice",
    "tb-size",
    "tpmdev",
    "trace",
    "usbdevice",
    "uuid",
    "vga",
    "virtfs",
    "vnc",
    "watchdog",
    "watchdog-action",
    "writeconfig",
    "xen-domid",
];

/// One option.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Opt {
    /// Its name without dashes; `M` is `machine`.
    pub(super) name: &'static str,
    /// Its value; `None` for a flag.
    pub(super) value: Option<String>,
}

/// Cuts a command line (without the program) into options.
pub(super) fn parse(arguments: &[String]) -> Result<Vec<Opt>, CmdlineError> {
    let mut options = Vec::new();
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let Some(name) = argument.strip_prefix('-') else {
            return Err(CmdlineError::Positional { argument: argument.clone() });
        };
        let name = name.strip_prefix('-').unwrap_or(name);
        if let Some(&name) = FLAGS.iter().find(|flag| **flag == name) {
            options.push(Opt { name, value: None });
        } else if let Some(&name) = VALUED.iter().find(|valued| **valued == name) {
            let Some(value) = rest.next() else {
                return Err(CmdlineError::NoValue { option: name.to_owned() });
            };
            let name = if name == "M" { "machine" } else { name };
            options.push(Opt { name, value: Some(value.clone()) });
        } else {
            return Err(CmdlineError::Unknown { option: argument.clone() });
        }
    }
    Ok(options)
}

/// A value as keys, in order. A first part without `=` belongs to `implied`; others without `=` are `on`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Keys(Vec<(String, String)>);

impl Keys {
    /// Reads `value`; flat JSON is read too. `None` if it is JSON with parts in it.
    pub(super) fn parse(value: &str, implied: &str) -> Option<Self> {
        if value.starts_with('{') {
            return Self::from_json(value);
        }
        let mut keys = Vec::new();
        for (index, part) in split_commas(value).into_iter().enumerate() {
            let (key, value) = match part.split_once('=') {
                Some((key, value)) => (key.to_owned(), value.to_owned()),
                None if index == 0 && !implied.is_empty() => (implied.to_owned(), part),
                None => match part.strip_prefix("no").filter(|rest| ["wait", "delay"].contains(rest)) {
                    Some(rest) => (rest.to_owned(), "off".to_owned()),
                    None => (part, "on".to_owned()),
                },
            };
            keys.push((key, value));
        }
        Some(Self(keys))
    }

    fn from_json(text: &str) -> Option<Self> {
        let serde_json::Value::Object(object) = serde_json::from_str(text).ok()? else { return None };
        let mut keys = Vec::new();
        for (key, value) in object {
            // Such a key cannot be written in the other form.
            if key.contains('=') {
                return None;
            }
            let value = match value {
                serde_json::Value::String(text) => text,
                serde_json::Value::Bool(on) => if on { "on" } else { "off" }.to_owned(),
                serde_json::Value::Number(number) => number.to_string(),
                _ => return None,
            };
            keys.push((key, value));
        }
        Some(Self(keys))
    }

    /// The last value of a key, which is the one that counts.
    pub(super) fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().rev().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    /// Takes a key out.
    pub(super) fn remove(&mut self, key: &str) -> Option<String> {
        let value = self.get(key).map(str::to_owned);
        self.0.retain(|(name, _)| name != key);
        value
    }

    /// Sets a key, at its place if it was there, else at the end.
    pub(super) fn set(&mut self, key: &str, value: impl Into<String>) {
        match self.0.iter().position(|(name, _)| name == key) {
            Some(at) => {
                self.0[at].1 = value.into();
                let mut index = 0;
                self.0.retain(|(name, _)| {
                    index += 1;
                    name != key || index - 1 == at
                });
            }
            None => self.0.push((key.to_owned(), value.into())),
        }
    }

    /// Keeps only these keys.
    pub(super) fn keep(&mut self, keys: &[&str]) {
        self.0.retain(|(name, _)| keys.contains(&name.as_str()));
    }

    /// Keeps only the keys that `kept` says.
    pub(super) fn keep_if(&mut self, kept: impl Fn(&str) -> bool) {
        self.0.retain(|(name, _)| kept(name));
    }

    /// Keys and values, in order.
    pub(super) fn pairs(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// Adds the keys of another value behind these.
    pub(super) fn extend(&mut self, other: Self) {
        for (key, value) in other.0 {
            self.set(&key, value);
        }
    }

    /// As QEMU reads it: the value of `leading`, if there is such a key, first and bare, then the others.
    pub(super) fn print(&self, leading: &str) -> String {
        let escape = |text: &str| text.replace(',', ",,");
        let pair = |key: &str, value: &str| format!("{}={}", escape(key), escape(value));
        let first = self.get(leading).filter(|_| !leading.is_empty()).map(|value| {
            // Bare, it would be read as nothing, as another key, or as JSON.
            let misread = value.is_empty() || value.contains('=') || value.starts_with('{');
            if misread { pair(leading, value) } else { escape(value) }
        });
        let others =
            self.0.iter().filter(|(key, _)| leading.is_empty() || key != leading).map(|(key, value)| pair(key, value));
        first.into_iter().chain(others).collect::<Vec<_>>().join(",")
    }
}

/// Splits at single commas; two commas are one that is meant.
fn split_commas(value: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = value.chars().peekable();
    while let Some(char) = chars.next() {
        if char == ',' && chars.next_if_eq(&',').is_none() {
            parts.push(String::new());
            continue;
        }
        if let Some(last) = parts.last_mut() {
            last.push(char);
        }
    }
    parts.retain(|part| !part.is_empty());
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn keys_are_read_and_printed_as_qemu_does() {
        let mut keys = Keys::parse("tap,id=n0,ifname=a,,b,vhost=off,server,nowait", "type").expect("no JSON");
        assert_eq!(keys.get("ifname"), Some("a,b"));
        assert_eq!((keys.get("server"), keys.get("wait")), (Some("on"), Some("off")));
        keys.set("id", "n1");
        assert_eq!(keys.remove("vhost").as_deref(), Some("off"));
        assert_eq!(keys.print("type"), "tap,id=n1,ifname=a,,b,server=on,wait=off");
        let json = Keys::parse(r#"{"qom-type":"memory-backend-ram","id":"m","size":64,"share":true}"#, "qom-type")
            .expect("flat");
        assert_eq!(json.print("qom-type"), "memory-backend-ram,id=m,share=on,size=64");
        assert!(Keys::parse(r#"{"a":{"b":1}}"#, "").is_none());
    }

    #[test]
    fn no_value_is_taken_for_something_else_when_it_is_read_again() {
        let again = |keys: &Keys, leading: &str| Keys::parse(&keys.print(leading), leading);
        for value in ["a=b", "", "{a", "a,b", "plain"] {
            let mut keys = Keys::default();
            keys.set("file", value);
            keys.set("if", "virtio");
            assert_eq!(again(&keys, "file"), Some(keys), "{value}");
        }
        for text in ["==x", "a,,b=c", "=", "x,=y"] {
            let keys = Keys::parse(text, "").expect("no JSON");
            assert_eq!(again(&keys, ""), Some(keys), "{text}");
        }
        assert!(Keys::parse(r#"{"a=b":"c"}"#, "").is_none());
    }

    #[test]
    fn what_is_not_known_is_named() {
        let parse = |args: &[&str]| parse(&args.iter().map(|arg| (*arg).to_owned()).collect::<Vec<_>>());
        assert_eq!(parse(&["-M", "pc"]), Ok(vec![Opt { name: "machine", value: Some("pc".to_owned()) }]));
        assert_eq!(parse(&["--nodefaults"]), Ok(vec![Opt { name: "nodefaults", value: None }]));
        assert_eq!(parse(&["-new-thing"]), Err(CmdlineError::Unknown { option: "-new-thing".to_owned() }));
        assert_eq!(parse(&["-m"]), Err(CmdlineError::NoValue { option: "m".to_owned() }));
        assert_eq!(parse(&["disk.img"]), Err(CmdlineError::Positional { argument: "disk.img".to_owned() }));
    }

    proptest! {
        #[test]
        fn printing_and_reading_give_the_same_keys(pairs in prop::collection::vec(("[a-z]{1,6}", "[ -~]{1,12}"), 1..8)) {
            let mut keys = Keys::default();
            for (key, value) in &pairs { keys.set(key, value.clone()); }
            let again = Keys::parse(&keys.print(""), "").expect("no JSON");
            prop_assert_eq!(keys, again);
        }
    }
}
