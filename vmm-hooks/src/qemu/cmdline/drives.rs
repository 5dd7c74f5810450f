//! The drives on a command line, by what names them there.

use serde_json::Value;

use super::options::{Keys, parse};

/// Options that make a drive out of an image alone.
const SHORT: [&str; 4] = ["hda", "hdb", "hdc", "hdd"];

/// One option that makes a drive or a node of one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::qemu) struct DriveArgument {
    /// The id that it gives the drive.
    pub(in crate::qemu) id: Option<String>,
    /// The name that it gives the node.
    pub(in crate::qemu) node: Option<String>,
    /// The image that it names.
    pub(in crate::qemu) file: Option<String>,
}

/// All of them, in order; none of a command line that cannot be read, which is refused elsewhere.
pub(in crate::qemu) fn drive_arguments(argv: &[String]) -> Vec<DriveArgument> {
    let options = parse(argv.get(1..).unwrap_or_default()).unwrap_or_default();
    let mut found = Vec::new();
    for option in options {
        let Some(value) = option.value else { continue };
        let made = match option.name {
            name if SHORT.contains(&name) => DriveArgument { file: Some(value), ..DriveArgument::default() },
            "drive" => of_keys(&value, "file"),
            "blockdev" => of_keys(&value, "driver"),
            _ => continue,
        };
        found.push(made);
    }
    found
}

fn of_keys(value: &str, implied: &str) -> DriveArgument {
    let Some(mut keys) = Keys::parse(value, implied) else { return of_json(value) };
    let id = keys.remove("id");
    let node = keys.remove("node-name");
    // In -blockdev `file` names another node.
    let file = if implied == "file" { keys.remove("file") } else { None };
    let file = file.or_else(|| keys.remove("file.filename")).or_else(|| keys.remove("filename"));
    DriveArgument { id, node, file }
}

/// JSON with parts in it.
fn of_json(value: &str) -> DriveArgument {
    let value: Value = serde_json::from_str(value).unwrap_or_default();
    let text = |pointer: &str| value.pointer(pointer).and_then(Value::as_str).map(str::to_owned);
    let file = text("/file/filename").or_else(|| text("/filename"));
    DriveArgument { id: text("/id"), node: text("/node-name"), file }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_drives_in_every_form() {
        let argv: Vec<String> = [
            "qemu",
            "-S",
            "-drive",
            "file=/a,,b,if=virtio",
            "-hda",
            "/h",
            "-blockdev",
            "qcow2,node-name=q,file=f",
            "-blockdev",
            r#"{"driver":"raw","node-name":"r","file":{"driver":"file","filename":"/r"}}"#,
            "-device",
            "virtio-blk-pci,drive=q",
            "-drive",
            "id=x,if=none,file.filename=/x",
        ]
        .map(str::to_owned)
        .to_vec();
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        let found: Vec<_> = drive_arguments(&argv)
            .iter()
            .map(|found| format!("{} {} {}", text(&found.id), text(&found.node), text(&found.file)))
            .collect();
        assert_eq!(found, ["  /a,b", "  /h", " q ", " r /r", "x  /x"]);
    }
}
