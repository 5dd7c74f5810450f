//! The program itself: exit codes, what it prints, and a witness from start to SIGTERM.

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use replicator::control::client::Client;
use rustix::process::{Pid, Signal, kill_process};

fn understudy(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_understudy"))
        .args(arguments)
        .env_remove("UNDERSTUDY_CONTROL")
        .env_remove("UNDERSTUDY_LOG")
        .output()
        .expect("the program starts")
}

fn code(output: &Output) -> i32 {
    output.status.code().expect("it exits")
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("UTF-8")
}

#[test]
fn a_wrong_command_line_is_2() {
    for arguments in [&["protekt"][..], &["protect", "web-1"], &["pair", "--ttl", "2h"], &[]] {
        assert_eq!(code(&understudy(arguments)), 2, "{arguments:?}");
    }
}

#[test]
fn a_wrong_configuration_is_2_and_names_the_key() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("agent.toml");
    std::fs::write(&file, "[epoch]\npipelin = 2\n").unwrap();
    let output = understudy(&["agent", "--config", file.to_str().unwrap()]);
    assert_eq!(code(&output), 2);
    assert!(stderr(&output).contains("unknown field `pipelin`"), "{}", stderr(&output));
}

#[test]
fn no_agent_is_4_and_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("agent.sock");
    let socket = socket.to_str().unwrap();
    for arguments in [
        &["status"][..],
        &["protect", "web-1", "--to", "host-b"],
        &["rehearse", "web-1"],
        &["failover", "web-1"],
        &["unprotect", "web-1"],
        &["pair"],
        &["pair", "host-b", "--code", "1"],
    ] {
        let output = understudy(&[&["--control", socket], arguments].concat());
        assert_eq!(code(&output), 4, "{arguments:?}: {}", stderr(&output));
        let expected = format!("error: no agent answers on {socket}\n");
        assert!(stderr(&output).starts_with(&expected), "{}", stderr(&output));
        assert!(stderr(&output).contains("understudy agent"), "{}", stderr(&output));
    }
}

#[test]
fn doctor_needs_no_agent() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("agent.sock");
    let output = understudy(&["--control", socket.to_str().unwrap(), "doctor", "--json"]);
    assert!(matches!(code(&output), 0 | 3), "{}", stderr(&output));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let refused = report["checks"].as_array().unwrap().iter().any(|check| check["verdict"] == "refused");
    assert_eq!(code(&output) == 3, refused, "the exit code says what the checklist says");

    let output = understudy(&["--control", socket.to_str().unwrap(), "doctor", "no-such-vm-anywhere"]);
    assert_eq!(code(&output), 3, "{}", stderr(&output));
}

/// A witness that is killed if the test fails.
struct Witness(Child);

impl Drop for Witness {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Witness {
    /// Starts one in `dir` and waits until it says that it serves.
    fn start(dir: &Path) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_understudy"))
            .args(["witness", "--name", "w-1", "--listen", "127.0.0.1:0", "--pair-listen", "127.0.0.1:0"])
            .arg("--state-dir")
            .arg(dir.join("state"))
            .arg("--run-dir")
            .arg(dir.join("run"))
            .env_remove("UNDERSTUDY_LOG")
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let mut log = BufReader::new(child.stderr.take().expect("piped"));
        let mut seen = String::new();
        while !seen.contains("serves") {
            assert_ne!(log.read_line(&mut seen).unwrap(), 0, "it ended: {seen}");
        }
        // Somebody must read the rest, or the witness stands still when the pipe is full.
        std::thread::spawn(move || log.read_to_string(&mut seen));
        Self(child)
    }
}

#[tokio::test]
async fn a_witness_opens_windows_refuses_a_second_and_ends_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let mut witness = Witness::start(dir.path());
    let socket = dir.path().join("run/witness.sock");

    let status = Client::new(&socket).witness_status().await.unwrap();
    assert_eq!((status.name.as_str(), status.peers.len()), ("w-1", 0));

    let open = || understudy(&["--control", socket.to_str().unwrap(), "pair", "--ttl", "1m"]);
    let (first, second) = (open(), open());
    let text = |output: &Output| String::from_utf8(output.stdout.clone()).unwrap();
    assert_eq!((code(&first), code(&second)), (0, 0), "{}", stderr(&second));
    assert!(text(&first).contains("understudy pair HOST:"), "{}", text(&first));
    assert_ne!(text(&first), text(&second), "a new window has a new code");

    let again = understudy(&[
        "witness",
        "--listen",
        "127.0.0.1:0",
        "--state-dir",
        dir.path().join("other").to_str().unwrap(),
        "--run-dir",
        dir.path().join("run").to_str().unwrap(),
    ]);
    assert_eq!(code(&again), 1);
    assert!(stderr(&again).contains("another process answers on"), "{}", stderr(&again));

    let pid = Pid::from_raw(i32::try_from(witness.0.id()).unwrap()).unwrap();
    kill_process(pid, Signal::TERM).unwrap();
    assert_eq!(witness.0.wait().unwrap().code(), Some(0));
    assert!(!socket.exists(), "its socket is gone");
}
