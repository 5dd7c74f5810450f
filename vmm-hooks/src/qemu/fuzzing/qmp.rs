//! Target `qmp`: what a monitor may send, in any pieces.
//!
//! Holds: cutting a stream in pieces changes nothing; a client whose monitor says anything at all and hangs up ends with
//! an error and never waits; an answer is one that the monitor gave to this very call.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use serde_json::{Value, json};

use crate::qemu::qmp::{Lines, Qmp, QmpError};

/// Fits in the buffer of a socket, so that writing it all never waits for the reader.
const MAX_SAID: usize = 64 << 10;

pub(super) fn run(bytes: &[u8]) {
    let Some((&piece, said)) = bytes.split_first() else { return };
    let said = &said[..said.len().min(MAX_SAID)];
    let messages = whole(said);
    assert_eq!(in_pieces(said, usize::from(piece) + 1), messages);
    client(said, &messages.0);
}

/// The messages up to the first line that is none, and whether there was such a line.
fn whole(said: &[u8]) -> (Vec<Value>, bool) {
    let mut messages = Vec::new();
    let mut lines: Vec<&[u8]> = said.split(|&byte| byte == b'\n').collect();
    // What no end of line follows is not said yet.
    lines.pop();
    for line in lines.into_iter().map(<[u8]>::trim_ascii).filter(|line| !line.is_empty()) {
        match serde_json::from_slice(line) {
            Ok(message) => messages.push(message),
            Err(_) => return (messages, true),
        }
    }
    (messages, false)
}

/// Reads at most so many bytes at once.
struct Pieces<'a>(&'a [u8], usize);

impl Read for Pieces<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let length = self.1.min(into.len());
        self.0.read(&mut into[..length])
    }
}

fn in_pieces(said: &[u8], piece: usize) -> (Vec<Value>, bool) {
    let (mut lines, mut stream, mut messages) = (Lines::default(), Pieces(said, piece), Vec::new());
    loop {
        match lines.next_message() {
            Ok(Some(message)) => messages.push(message),
            Ok(None) => match lines.read_from(&mut stream) {
                Ok(_) => {}
                Err(QmpError::Closed) => return (messages, false),
                Err(error) => panic!("{error}"),
            },
            Err(QmpError::Malformed { .. }) => return (messages, true),
            Err(error) => panic!("{error}"),
        }
    }
}

/// A whole client on a monitor that says all this at once.
fn client(said: &[u8], messages: &[Value]) {
    let (ours, mut theirs) = UnixStream::pair().expect("a socket pair");
    theirs.write_all(said).expect("it fits in the socket");
    theirs.shutdown(Shutdown::Write).expect("a connected socket");
    let Ok(mut qmp) = Qmp::over(ours) else { return };
    assert!(messages[0].get("QMP").is_some(), "no greeting");
    let first = qmp.send("stop", json!({}));
    let second = qmp.send("cont", json!({}));
    // Ids 1 and 2 were the negotiation.
    for (id, pending) in [(4, second), (3, first)] {
        let answers: Vec<&Value> =
            messages.iter().filter(|answer| answer.get("event").is_none_or(|event| !event.is_string())).collect();
        let mut mine = answers.iter().filter(|answer| answer.get("id").and_then(Value::as_u64) == Some(id));
        match pending.and_then(|pending| qmp.collect(pending)) {
            Ok(value) => assert!(mine.any(|answer| answer.get("return") == Some(&value)), "an answer of another call"),
            Err(QmpError::Refused { .. }) => assert!(mine.any(|answer| answer.get("return").is_none())),
            Err(QmpError::TimedOut { .. }) => panic!("a monitor that hung up was waited for"),
            Err(_) => {}
        }
    }
    if let Ok(events) = qmp.poll_events() {
        assert!(events.len() <= messages.len());
    }
}
