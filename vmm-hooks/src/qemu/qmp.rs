//! A small blocking QMP client: one connection, id-matched replies, an event queue, file descriptors passed along.
//!
//! Promise: no call waits longer than its bound, no line and no queue grows past its bound, and a reply that comes after
//! its call gave up is thrown away, never taken for another's. A monitor that does not greet is used by somebody else.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;
use serde_json::{Map, Value, json};

use crate::sys::fdpass::send_with_fds;

/// Events that may come before the greeting.
const EARLY_EVENTS_MAX: u32 = 100;

/// How long a monitor may take to greet.
pub(super) const GREETING_TIMEOUT: Duration = Duration::from_secs(1);

/// How long QEMU may take to answer a command, if the call does not say otherwise.
pub(super) const REPLY_TIMEOUT: Duration = Duration::from_secs(10);

/// Bound on one line from QEMU: 16 MiB.
const LINE_MAX: usize = 16 << 20;

/// Bound on queued events; at the bound the oldest are dropped.
const EVENTS_MAX: usize = 4096;

/// Bytes asked for by one read.
const READ_SIZE: usize = 64 << 10;

/// Why a QMP call failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum QmpError {
    /// Nobody listens there, or it is not allowed.
    #[error("cannot connect to the QMP socket {path}")]
    Connect { path: String, source: io::Error },
    /// It accepted and said nothing: QEMU serves one client per monitor.
    #[error("the monitor {path} does not greet: another program is connected to it")]
    NoGreeting { path: String },
    /// QEMU closed the connection, most likely because it ended.
    #[error("QEMU closed its monitor")]
    Closed,
    /// No answer within the bound.
    #[error("QEMU did not answer {command} within {after:?}")]
    TimedOut { command: String, after: Duration },
    /// QEMU said no.
    #[error("QEMU refused {command}: {description}")]
    Refused { command: String, description: String },
    /// Something that is not QMP.
    #[error("the monitor sent something that is not QMP: {what}")]
    Malformed { what: String },
    /// The connection broke.
    #[error("the connection to QEMU's monitor broke")]
    Io(#[source] io::Error),
}

/// An event as QEMU sent it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct QmpEvent {
    pub(super) name: String,
    pub(super) data: Value,
}

/// A command that was sent and not collected yet.
#[derive(Debug)]
#[must_use]
pub(super) struct Pending {
    id: u64,
    command: String,
}

/// One connection to one QEMU.
#[derive(Debug)]
pub(super) struct Qmp {
    stream: UnixStream,
    lines: Lines,
    next_id: u64,
    waiting: BTreeSet<u64>,
    replies: BTreeMap<u64, Result<Value, String>>,
    events: VecDeque<QmpEvent>,
    commands: BTreeSet<String>,
    /// QEMU's version as it tells it, package included.
    pub(super) version: String,
}

impl Qmp {
    /// Connects, takes the greeting, negotiates and asks which commands there are.
    pub(super) fn connect(path: &Path) -> Result<Self, QmpError> {
        let shown = || path.display().to_string();
        let stream = UnixStream::connect(path).map_err(|source| QmpError::Connect { path: shown(), source })?;
        match Self::over(stream) {
            Err(QmpError::TimedOut { .. }) => Err(QmpError::NoGreeting { path: shown() }),
            other => other,
        }
    }

    /// Speaks QMP over a connected stream.
    pub(super) fn over(stream: UnixStream) -> Result<Self, QmpError> {
        stream.set_write_timeout(Some(REPLY_TIMEOUT)).map_err(QmpError::Io)?;
        let mut qmp = Self {
            stream,
            lines: Lines::default(),
            next_id: 1,
            waiting: BTreeSet::new(),
            replies: BTreeMap::new(),
            events: VecDeque::new(),
            commands: BTreeSet::new(),
            version: String::new(),
        };
        let deadline = Instant::now() + GREETING_TIMEOUT;
        let mut early = 0;
        let greeting = loop {
            if let Some(message) = qmp.lines.next_message()? {
                // Until QEMU has noticed who is connected it takes this for the connection before, and sends events (the end of that one's jobs).
                if message.get("event").is_some() && early < EARLY_EVENTS_MAX {
                    early += 1;
                    continue;
                }
                break message;
            }
            if !qmp.read_more(Some(deadline))? {
                return Err(QmpError::TimedOut { command: "connect".to_owned(), after: GREETING_TIMEOUT });
            }
        };
        let Some(hello) = greeting.get("QMP") else {
            let begins: String = greeting.to_string().chars().take(80).collect();
            return Err(QmpError::Malformed { what: format!("no QMP greeting, but {begins}") });
        };
        let part = |name: &str| hello.pointer(&format!("/version/qemu/{name}")).and_then(Value::as_u64);
        let package = hello.pointer("/version/package").and_then(Value::as_str).unwrap_or_default();
        if let (Some(major), Some(minor), Some(micro)) = (part("major"), part("minor"), part("micro")) {
            qmp.version = format!("{major}.{minor}.{micro} {package}").trim_end().to_owned();
        }
        qmp.execute("qmp_capabilities", json!({}))?;
        let commands = qmp.execute("query-commands", json!({}))?;
        qmp.commands = commands
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|command| Some(command.get("name")?.as_str()?.to_owned()))
            .collect();
        Ok(qmp)
    }

    /// Whether this QEMU has a command.
    pub(super) fn has(&self, command: &str) -> bool {
        self.commands.contains(command)
    }

    /// Sends a command without waiting for its reply.
    pub(super) fn send(&mut self, command: &str, arguments: Value) -> Result<Pending, QmpError> {
        let (pending, line) = self.prepare(command, arguments);
        match self.stream.write_all(line.as_bytes()) {
            Ok(()) => Ok(pending),
            Err(error) => {
                self.waiting.remove(&pending.id);
                Err(broken(error))
            }
        }
    }

    fn prepare(&mut self, command: &str, arguments: Value) -> (Pending, String) {
        let id = self.next_id;
        self.next_id += 1;
        self.waiting.insert(id);
        let mut message = Map::new();
        message.insert("execute".to_owned(), command.into());
        if arguments.as_object().is_none_or(|arguments| !arguments.is_empty()) {
            message.insert("arguments".to_owned(), arguments);
        }
        message.insert("id".to_owned(), id.into());
        let line = format!("{}\n", Value::Object(message));
        (Pending { id, command: command.to_owned() }, line)
    }

    /// Waits for the reply of a command that was sent, at most `after`.
    pub(super) fn collect_within(&mut self, pending: Pending, after: Duration) -> Result<Value, QmpError> {
        let deadline = Instant::now() + after;
        loop {
            while let Some(message) = self.lines.next_message()? {
                self.sort_in(message);
            }
            if let Some(reply) = self.replies.remove(&pending.id) {
                return reply.map_err(|description| QmpError::Refused { command: pending.command, description });
            }
            match self.read_more(Some(deadline)) {
                Ok(true) => {}
                Ok(false) => {
                    self.waiting.remove(&pending.id);
                    return Err(QmpError::TimedOut { command: pending.command, after });
                }
                Err(error) => {
                    self.waiting.remove(&pending.id);
                    return Err(error);
                }
            }
        }
    }

    /// Waits for the reply of a command that was sent.
    pub(super) fn collect(&mut self, pending: Pending) -> Result<Value, QmpError> {
        self.collect_within(pending, REPLY_TIMEOUT)
    }

    /// Gives up the reply of a command that was sent; QEMU does the command all the same.
    pub(super) fn forget(&mut self, pending: &Pending) {
        self.waiting.remove(&pending.id);
        self.replies.remove(&pending.id);
    }

    /// Whether the reply of a command is there; [`Self::collect`] will then not wait.
    pub(super) fn ready(&mut self, pending: &Pending) -> Result<bool, QmpError> {
        self.take_in()?;
        Ok(self.replies.contains_key(&pending.id))
    }

    /// Sends a command and waits for its reply.
    pub(super) fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let pending = self.send(command, arguments)?;
        self.collect(pending)
    }

    /// Like [`Self::execute`], with a file descriptor that QEMU gets a copy of.
    pub(super) fn execute_with_fd(
        &mut self,
        command: &str,
        arguments: Value,
        fd: BorrowedFd<'_>,
    ) -> Result<Value, QmpError> {
        let (pending, line) = self.prepare(command, arguments);
        let written = send_with_fds(&self.stream, line.as_bytes(), &[fd]);
        if let Err(error) = written {
            self.waiting.remove(&pending.id);
            return Err(broken(error));
        }
        self.collect(pending)
    }

    /// Runs a command of the human monitor.
    pub(super) fn hmp(&mut self, line: &str) -> Result<String, QmpError> {
        let reply = self.execute("human-monitor-command", json!({ "command-line": line }))?;
        match reply {
            Value::String(text) => Ok(text),
            _ => Err(QmpError::Malformed { what: format!("human-monitor-command {line} gave no text") }),
        }
    }

    /// Takes in what has arrived, without waiting, and gives the events so far.
    pub(super) fn poll_events(&mut self) -> Result<Vec<QmpEvent>, QmpError> {
        let taken = self.take_in();
        if self.events.is_empty() {
            taken?;
        }
        Ok(self.events.drain(..).collect())
    }

    /// Waits for the first queued or new event that `wanted` accepts; events before it are dropped.
    pub(super) fn wait_event(
        &mut self,
        deadline: Instant,
        wanted: impl Fn(&QmpEvent) -> bool,
    ) -> Result<Option<QmpEvent>, QmpError> {
        loop {
            while let Some(message) = self.lines.next_message()? {
                self.sort_in(message);
            }
            while let Some(event) = self.events.pop_front() {
                if wanted(&event) {
                    return Ok(Some(event));
                }
            }
            if !self.read_more(Some(deadline))? {
                return Ok(None);
            }
        }
    }

    fn take_in(&mut self) -> Result<(), QmpError> {
        loop {
            while let Some(message) = self.lines.next_message()? {
                self.sort_in(message);
            }
            if !self.read_more(None)? {
                return Ok(());
            }
        }
    }

    fn sort_in(&mut self, mut message: Value) {
        if let Some(name) = message.get("event").and_then(Value::as_str) {
            if self.events.len() == EVENTS_MAX {
                self.events.pop_front();
            }
            let name = name.to_owned();
            let data = message.get_mut("data").map(Value::take).unwrap_or_default();
            self.events.push_back(QmpEvent { name, data });
            return;
        }
        // A reply without an id we wait for belongs to a call that gave up.
        let Some(id) = message.get("id").and_then(Value::as_u64).filter(|id| self.waiting.remove(id)) else { return };
        let reply = match (message.get_mut("return").map(Value::take), message.pointer("/error/desc")) {
            (Some(value), _) => Ok(value),
            (None, Some(Value::String(description))) => Err(description.clone()),
            (None, _) => Err("no reason given".to_owned()),
        };
        self.replies.insert(id, reply);
    }

    /// Waits until `deadline` (not at all if there is none) for bytes and reads once; `false` if none came.
    fn read_more(&mut self, deadline: Option<Instant>) -> Result<bool, QmpError> {
        loop {
            let left = deadline.map_or(Duration::ZERO, |deadline| deadline.saturating_duration_since(Instant::now()));
            let left = Timespec::try_from(left).map_err(|_| QmpError::Io(io::ErrorKind::InvalidInput.into()))?;
            let mut fds = [PollFd::new(&self.stream, PollFlags::IN)];
            match poll(&mut fds, Some(&left)) {
                Ok(0) => return Ok(false),
                Ok(_) => return self.lines.read_from(&mut self.stream),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(QmpError::Io(error.into())),
            }
        }
    }
}

impl AsFd for Qmp {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

fn broken(error: io::Error) -> QmpError {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => QmpError::Closed,
        _ => QmpError::Io(error),
    }
}

/// Cuts a byte stream into JSON lines.
#[derive(Debug, Default)]
pub(super) struct Lines {
    bytes: Vec<u8>,
    /// Up to here there is no end of line.
    searched: usize,
}

impl Lines {
    pub(super) fn read_from(&mut self, stream: &mut impl Read) -> Result<bool, QmpError> {
        let old = self.bytes.len();
        if old > LINE_MAX {
            return Err(QmpError::Malformed { what: format!("a line of more than {LINE_MAX} bytes") });
        }
        self.bytes.resize(old + READ_SIZE, 0);
        let read = stream.read(&mut self.bytes[old..]);
        self.bytes.truncate(old + *read.as_ref().unwrap_or(&0));
        match read {
            Ok(0) => Err(QmpError::Closed),
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(true),
            Err(error) => Err(broken(error)),
        }
    }

    pub(super) fn next_message(&mut self) -> Result<Option<Value>, QmpError> {
        loop {
            let Some(end) = self.bytes[self.searched..].iter().position(|&byte| byte == b'\n') else {
                self.searched = self.bytes.len();
                return Ok(None);
            };
            let end = self.searched + end;
            let line: Vec<u8> = self.bytes.drain(..=end).collect();
            self.searched = 0;
            let line = line.trim_ascii();
            if line.is_empty() {
                continue;
            }
            return match serde_json::from_slice(line) {
                Ok(value) => Ok(Some(value)),
                Err(error) => {
                    let start = String::from_utf8_lossy(&line[..line.len().min(80)]).into_owned();
                    Err(QmpError::Malformed { what: format!("{start:?} ({error})") })
                }
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::{BufRead, BufReader};
    use std::thread;

    /// A QEMU that answers each line with what `answer` makes of it.
    fn fake(mut answer: impl FnMut(&Value) -> Vec<String> + Send + 'static) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        thread::spawn(move || {
            let mut out = theirs.try_clone().expect("a second handle");
            writeln!(out, r#"{{"QMP":{{"version":{{"qemu":{{"major":7,"minor":2,"micro":22}},"package":"x"}}}}}}"#)?;
            for line in BufReader::new(theirs).lines() {
                let request: Value = serde_json::from_str(&line?).expect("the client sends JSON");
                for reply in match request["execute"].as_str() {
                    Some("qmp_capabilities") => vec![json!({"return": {}, "id": request["id"]}).to_string()],
                    Some("query-commands") => {
                        vec![json!({"return": [{"name": "stop"}], "id": request["id"]}).to_string()]
                    }
                    _ => answer(&request),
                } {
                    writeln!(out, "{reply}")?;
                }
            }
            io::Result::Ok(())
        });
        ours
    }

    #[test]
    fn events_of_the_connection_before_may_come_first_but_not_for_ever() {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        let event = json!({"event": "BLOCK_JOB_ERROR", "data": {}}).to_string() + "\n";
        (&theirs).write_all(event.as_bytes()).expect("room");
        thread::spawn(move || {
            let mut real = fake(|_| Vec::new());
            let mut copy = (real.try_clone().expect("a handle"), theirs.try_clone().expect("a handle"));
            thread::spawn(move || io::copy(&mut copy.1, &mut copy.0));
            io::copy(&mut real, &mut &theirs)
        });
        assert_eq!(Qmp::over(ours).expect("greets").version, "7.2.22 x");

        let (ours, mut theirs) = UnixStream::pair().expect("a socket pair");
        thread::spawn(move || while theirs.write_all(event.as_bytes()).is_ok() {});
        assert!(matches!(Qmp::over(ours), Err(QmpError::Malformed { .. })));
    }

    #[test]
    fn matches_replies_by_id_and_queues_events() {
        let mut first = None;
        let mut qmp = Qmp::over(fake(move |request| match &first {
            None => {
                first = Some(request["id"].clone());
                vec![json!({"event": "STOP", "data": {"x": 1}}).to_string()]
            }
            Some(earlier) => vec![
                json!({"return": 2, "id": request["id"]}).to_string(),
                json!({"error": {"class": "GenericError", "desc": "no"}, "id": earlier}).to_string(),
                json!({"return": 9, "id": 12345}).to_string(),
            ],
        }))
        .expect("greets");
        assert_eq!(qmp.version, "7.2.22 x");
        assert!(qmp.has("stop") && !qmp.has("cont"));
        let one = qmp.send("one", json!({})).expect("sent");
        let two = qmp.send("two", json!({"a": 1})).expect("sent");
        assert_eq!(qmp.collect(two).expect("answered"), json!(2));
        let error = qmp.collect(one).expect_err("refused");
        assert!(matches!(error, QmpError::Refused { ref description, .. } if description == "no"), "{error}");
        let events = qmp.poll_events().expect("open");
        assert_eq!(events, vec![QmpEvent { name: "STOP".to_owned(), data: json!({"x": 1}) }]);
        assert!(qmp.replies.is_empty(), "a reply nobody waits for is thrown away");
    }

    #[test]
    fn a_silent_qemu_is_a_timeout_and_its_late_reply_is_thrown_away() {
        let mut late = Vec::new();
        let mut qmp = Qmp::over(fake(move |request| {
            late.push(json!({"return": "late", "id": request["id"]}).to_string());
            if late.len() == 1 { Vec::new() } else { late.iter().rev().cloned().collect() }
        }))
        .expect("greets");
        let pending = qmp.send("slow", json!({})).expect("sent");
        let error = qmp.collect_within(pending, Duration::from_millis(20)).expect_err("no answer");
        assert!(matches!(error, QmpError::TimedOut { .. }), "{error}");
        assert_eq!(qmp.execute("next", json!({})).expect("answered"), json!("late"));
        let pending = qmp.send("third", json!({})).expect("sent");
        qmp.collect(pending).expect("answered");
        assert!(qmp.waiting.is_empty());
    }

    #[test]
    fn a_monitor_in_use_does_not_greet() {
        let (ours, _theirs) = UnixStream::pair().expect("a socket pair");
        assert!(matches!(Qmp::over(ours), Err(QmpError::TimedOut { .. })));
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        drop(theirs);
        assert!(matches!(Qmp::over(ours), Err(QmpError::Closed)));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_message_or_an_error(chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..40), 0..20)) {
            let mut lines = Lines::default();
            for chunk in chunks {
                if lines.read_from(&mut chunk.as_slice()).is_err() { break; }
                while let Ok(Some(_)) = lines.next_message() {}
            }
        }

        #[test]
        fn messages_survive_any_cut(numbers in prop::collection::vec(any::<u64>(), 1..20), cut in 1_usize..30) {
            let text: String = numbers.iter().map(|n| format!("{{\"n\":{n}}}\r\n")).collect();
            let mut lines = Lines::default();
            let mut seen = Vec::new();
            for chunk in text.as_bytes().chunks(cut) {
                let mut chunk = chunk;
                lines.read_from(&mut chunk).expect("good bytes");
                while let Some(message) = lines.next_message().expect("good bytes") {
                    seen.push(message["n"].as_u64().expect("a number"));
                }
            }
            prop_assert_eq!(seen, numbers);
        }
    }
}
