//! Other people's clients on a real socket. Skipped, with a line that says so, where one is not installed.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::super::memory::Memory;
use super::super::{Backend, Export, Server};
use super::export;

const SIZE: usize = 8 << 20;

fn serve(memory: &Arc<Memory>) -> (tempfile::TempDir, Server, String) {
    let dir = tempfile::Builder::new().prefix("nbd-test").tempdir().expect("a directory");
    let socket = dir.path().join("socket");
    let server = Server::listen(&socket, export(memory), |_| true).expect("a socket");
    let uri = format!("nbd+unix:///disk?socket={}", socket.display());
    (dir, server, uri)
}

/// Runs a client; `None`, with a line, if it is not installed.
fn run(program: &str, arguments: &[&str]) -> Option<Output> {
    match Command::new(program).args(arguments).stdin(Stdio::null()).output() {
        Ok(output) => Some(output),
        Err(error) => {
            println!("skipped: {program}: {error}");
            None
        }
    }
}

fn good(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

/// Bytes that are neither alike nor at random.
fn pattern() -> Vec<u8> {
    (0..SIZE).map(|at| if at >> 16 & 1 == 0 { 0 } else { (at * 7 + (at >> 8)).to_le_bytes()[0] }).collect()
}

#[test]
fn qemu_img_copies_in_and_out() {
    let memory = Arc::new(Memory::new(SIZE));
    let (dir, _server, uri) = serve(&memory);
    let file = |name: &str| dir.path().join(name).display().to_string();
    std::fs::write(file("in"), pattern()).expect("room");
    let Some(output) = run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", &file("in"), &uri]) else { return };
    good(&output);
    assert!(*memory.content() == pattern());
    good(&run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &uri, &file("out")]).expect("it is installed"));
    assert!(std::fs::read(file("out")).expect("written") == pattern());
    let info = good(&run("qemu-img", &["info", "-f", "raw", "--output=json", &uri]).expect("it is installed"));
    assert!(info.contains(&format!("\"virtual-size\": {SIZE}")), "{info}");
}

#[test]
fn qemu_io_writes_zeroes_discards_and_flushes() {
    let memory = Arc::new(Memory::new(SIZE));
    memory.content().fill(9);
    let (_dir, _server, uri) = serve(&memory);
    let commands = [
        "write -P 1 0 64k",
        "write -f -P 2 100 1",
        "write -z 4k 4k",
        "write -z -u 12k 4k",
        "discard 20k 4k",
        "flush",
        "read -P 1 0 100",
    ];
    let mut arguments = vec!["-f", "raw", "-d", "unmap"];
    commands.iter().for_each(|command| arguments.extend(["-c", command]));
    arguments.push(&uri);
    let Some(output) = run("qemu-io", &arguments) else { return };
    good(&output);
    let mut expected = vec![9; SIZE];
    expected[..64 << 10].fill(1);
    expected[100] = 2;
    for start in [4 << 10, 12 << 10, 20 << 10] {
        expected[start..start + (4 << 10)].fill(0);
    }
    assert!(*memory.content() == expected);
}

#[test]
fn libnbd_agrees_on_what_there_is_and_copies() {
    let memory = Arc::new(Memory::new(SIZE));
    let (dir, server, uri) = serve(&memory);
    let Some(output) = run("nbdinfo", &["--json", &uri]) else { return };
    let info = good(&output);
    let compact: String = info.split_whitespace().collect();
    for wanted in [
        format!("\"export-size\":{SIZE}"),
        "\"is_read_only\":false".to_owned(),
        "\"can_flush\":true".to_owned(),
        "\"can_fua\":true".to_owned(),
        "\"can_trim\":true".to_owned(),
        "\"can_zero\":true".to_owned(),
        "\"can_fast_zero\":false".to_owned(),
        "\"can_multi_conn\":false".to_owned(),
        "\"block_size_minimum\":1".to_owned(),
        format!("\"block_size_maximum\":{}", 32 << 20),
    ] {
        assert!(compact.contains(&wanted), "{wanted} in {info}");
    }
    let list = good(&run("nbdinfo", &["--list", &uri]).expect("it is installed"));
    assert!(list.contains("export=\"disk\""), "{list}");
    let file = |name: &str| dir.path().join(name).display().to_string();
    std::fs::write(file("in"), pattern()).expect("room");
    if let Some(output) = run("nbdcopy", &["--flush", &file("in"), &uri]) {
        good(&output);
        assert!(*memory.content() == pattern());
        good(&run("nbdcopy", &[&uri, &file("out")]).expect("it is installed"));
        assert!(std::fs::read(file("out")).expect("written") == pattern());
    }
    wait_for(|| server.connections() == 0 && memory.clients.load(Ordering::SeqCst) == 0);
}

fn wait_for(mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
}

fn ends(stream: &mut UnixStream) -> bool {
    use std::io::Read;
    stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a socket");
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).is_ok()
}

#[test]
fn a_server_that_ends_hangs_up_on_everybody_and_removes_its_socket() {
    let memory = Arc::new(Memory::new(SIZE));
    let dir = tempfile::tempdir().expect("a directory");
    let socket = dir.path().join("socket");
    let exports: Vec<Export> = export(&memory);
    let mut server = Server::listen(&socket, exports.clone(), |_| true).expect("a socket");
    assert!(Server::listen(&socket, exports.clone(), |_| true).is_err(), "there is one already");
    let mut silent = UnixStream::connect(&socket).expect("it listens");
    wait_for(|| server.connections() == 1);
    server.stop_listening();
    assert!(!Path::exists(&socket) && server.connections() == 1);
    server.hang_up();
    assert!(ends(&mut silent));
    wait_for(|| server.connections() == 0);
    drop(server);
    // A stranger is turned away without a word.
    let server = Server::listen(&socket, exports, |_| false).expect("a socket");
    let mut stranger = UnixStream::connect(&socket).expect("it listens");
    assert!(ends(&mut stranger));
    drop(server);
    assert!(!Path::exists(&socket));
    assert_eq!(memory.bytes(), SIZE as u64);
}
