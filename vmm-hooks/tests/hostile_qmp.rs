//! What is named as a VM and is none: processes that are no QEMU, and sockets on which something else than a QEMU speaks, falls
//! silent, or hangs up in the middle. Each is one clear error within a bound; nothing hangs and nothing panics.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::thread;

use serde_json::{Value, json};
use vmm_hooks::guest::{GuestError, GuestErrorKind};
use vmm_hooks::qemu::{AttachOptions, CheckLevel, Target, attach, doctor, remove_leftovers, run_state};

const GREETING: &str = r#"{"QMP":{"version":{"qemu":{"major":7,"minor":2,"micro":0},"package":""},"capabilities":[]}}"#;

/// Everything that is asked before a VM is touched.
const ASKED: [&str; 14] = [
    "qmp_capabilities",
    "query-commands",
    "query-status",
    "qom-get",
    "human-monitor-command",
    "query-block",
    "query-chardev",
    "qom-list",
    "query-migrate",
    "query-vnc",
    "query-spice",
    "stop",
    "cont",
    "quit",
];

/// A program that takes any number of connections on a socket.
fn serve(path: &Path, with: impl Fn(UnixStream) + Send + 'static) -> Target {
    let listener = UnixListener::bind(path).expect("a socket");
    thread::spawn(move || listener.incoming().flatten().for_each(with));
    Target::QmpSocket(path.to_owned())
}

/// What a healthy QEMU might answer, as far as it is asked before a VM is touched.
fn plausible(request: &Value) -> Value {
    match request["execute"].as_str().unwrap_or_default() {
        "query-commands" => ASKED.iter().map(|name| json!({ "name": name })).collect(),
        "query-status" => json!({ "status": "running" }),
        "qom-get" => json!("pc-q35-7.2-machine"),
        "human-monitor-command" => {
            json!("  pc.ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000\n")
        }
        "query-block" | "query-chardev" | "qom-list" => json!([]),
        _ => json!({}),
    }
}

/// Answers requests until `answer` gives none.
fn converse(stream: &UnixStream, mut answer: impl FnMut(usize, &Value) -> Option<String>) {
    let mut out = stream;
    if writeln!(out, "{GREETING}").is_err() {
        return;
    }
    for (number, line) in BufReader::new(stream).lines().map_while(Result::ok).enumerate() {
        let request: Value = serde_json::from_str(&line).expect("the client sends JSON");
        let Some(answer) = answer(number, &request) else { return };
        if writeln!(out, "{answer}").is_err() {
            return;
        }
    }
}

fn returned(value: &Value, request: &Value) -> String {
    json!({ "return": value, "id": request["id"] }).to_string()
}

/// Every way in refuses or fails, in a sentence that ends up on one line; the first one's error.
fn refused(target: &Target) -> GuestError {
    let error = attach(target, &AttachOptions::default()).map(drop).expect_err("no VM");
    for error in [&error, &remove_leftovers(target).map(drop).err().unwrap_or_else(|| clone(&error))] {
        assert!(!error.message.is_empty() && !error.message.contains('\n'), "{error:?}");
        assert!(error.message.len() < 400, "{error:?}");
    }
    let _ = run_state(target);
    let list = doctor(Some(target));
    assert!(list.iter().any(|check| check.level == CheckLevel::Refusal), "{list:?}");
    error
}

fn clone(error: &GuestError) -> GuestError {
    GuestError::new(error.kind, error.message.clone())
}

#[test]
fn processes_and_files_that_are_no_vm_are_refused_in_words() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("file");
    fs::write(&file, "no socket").expect("room");
    let datagrams = dir.path().join("datagrams");
    let _datagrams = UnixDatagram::bind(&datagrams).expect("a socket");
    let closed = dir.path().join("closed");
    drop(UnixListener::bind(&closed).expect("a socket"));
    let socket = |path: &Path| Target::QmpSocket(path.to_owned());
    for (target, words) in [
        (Target::Pid(std::process::id()), "is no QEMU but"),
        // A kernel thread, if there is one, has no command line at all.
        (Target::Pid(2), "process 2"),
        (Target::Pid(1), "is no QEMU but"),
        (Target::Pid(u32::MAX), "has ended"),
        (socket(&file), "cannot connect to the QMP socket"),
        (socket(&datagrams), "cannot connect to the QMP socket"),
        (socket(&closed), "cannot connect to the QMP socket"),
        (socket(dir.path()), "cannot connect to the QMP socket"),
        (socket(&dir.path().join("nothing")), "cannot connect to the QMP socket"),
    ] {
        let error = refused(&target);
        assert!(error.message.contains(words), "{words}: {error:?}");
    }
}

#[test]
fn what_does_not_greet_as_a_monitor_is_refused_in_words() {
    let dir = tempfile::tempdir().expect("a directory");
    let endless = |stream: UnixStream| {
        let _ = (0..).try_for_each(|_: u32| (&stream).write_all(&[b'x'; 1 << 16]));
    };
    let says = |what: &'static [u8]| move |stream: UnixStream| drop((&stream).write_all(what));
    let silent = |stream: UnixStream| {
        // Held open until the client gives up.
        let _ = BufReader::new(stream).lines().count();
    };
    for (target, words) in [
        (serve(&dir.path().join("silent"), silent), "does not greet: another program is connected to it"),
        (serve(&dir.path().join("shut"), drop), "closed its monitor"),
        (serve(&dir.path().join("http"), says(b"HTTP/1.1 400 Bad Request\r\n\r\n")), "not QMP"),
        (serve(&dir.path().join("bytes"), says(&[0xff, 0, 7, b'\n'])), "not QMP"),
        (serve(&dir.path().join("json"), says(b"[1, 2, 3]\n")), "monitor"),
        (serve(&dir.path().join("endless"), endless), "not QMP"),
    ] {
        let error = refused(&target);
        assert!(error.message.contains(words), "{words}: {error:?}");
    }
}

#[test]
fn a_monitor_that_hangs_up_or_raves_at_any_command_is_one_error() {
    let dir = tempfile::tempdir().expect("a directory");
    for at in 0..ASKED.len() {
        let hangs_up = serve(&dir.path().join(format!("hangs-up-{at}")), move |stream| {
            converse(&stream, |number, request| (number < at).then(|| returned(&plausible(request), request)));
        });
        let raves = serve(&dir.path().join(format!("raves-{at}")), move |stream| {
            converse(&stream, |number, request| {
                Some(if number == at { "}{ \u{7}".to_owned() } else { returned(&plausible(request), request) })
            });
        });
        for (target, words) in [(hangs_up, "closed its monitor"), (raves, "not QMP")] {
            let error = refused(&target);
            // Behind the last question it is seen that nothing of a guest is in this process.
            assert!(error.message.contains(words) || error.kind == GuestErrorKind::Refused, "{at}: {error:?}");
        }
    }
}

#[test]
fn answers_of_any_other_form_are_one_error() {
    let dir = tempfile::tempdir().expect("a directory");
    let odd =
        [json!(null), json!(7), json!("x"), json!([]), json!([[1], null, { "name": 3 }]), json!({ "status": [] })];
    for (number, odd) in odd.into_iter().enumerate() {
        let target = serve(&dir.path().join(format!("odd-{number}")), move |stream| {
            converse(&stream, |_, request| Some(returned(&odd, request)));
        });
        refused(&target);
    }
    let refuses = serve(&dir.path().join("refuses"), |stream| {
        converse(&stream, |number, request| {
            let no = json!({ "error": { "class": "GenericError", "desc": "I do not want to" }, "id": request["id"] });
            Some(if number < 2 { returned(&plausible(request), request) } else { no.to_string() })
        });
    });
    let error = refused(&refuses);
    assert!(error.message.contains("I do not want to"), "{error:?}");
}
