//! The protector's side of a capture, against a process that says whatever a test has it say.

use std::sync::mpsc::{Receiver, channel};

use super::*;
use crate::guest::{Guest as _, GuestErrorKind};
use crate::kvm::gate::GateBounds;
use crate::kvm::guest::Body;
use crate::kvm::host;
use crate::kvm::machine::{Dirty, Spec};
use crate::kvm::process::board::{Board, FEW, nanos};
use crate::kvm::process::guest::{Ends, Microvm, Plan, attach};
use crate::kvm::process::link::{Link, pair, receive, send};
use crate::kvm::process::spawn::{Process, Program};
use crate::kvm::process::wire::{Failure, MESSAGE_MAX, Started, What, decode, encode};
use crate::layout::{PAGE_SIZE, PageSet};
use crate::sys::memory::SharedMemory;

const PAGES: u64 = 1000;
/// What a copy on the board has added to the number of its page; memory has the number.
const COPIED: u8 = 0x80;

/// What the process answers; `None`: what is no answer.
type Script = Box<dyn FnMut(&Request, &Board) -> Option<Answer> + Send>;

/// A handle of a process that answers by `script`, and what that was asked. `None`: it cannot be had here.
fn played(mut script: Script) -> Option<(Microvm, Receiver<Request>)> {
    if let Err(error) = host() {
        println!("skipped: no /dev/kvm: {error}");
        return None;
    }
    let bytes = PAGES * PAGE_SIZE as u64;
    let spec =
        Spec { name: "played".to_owned(), memory: bytes, cpus: 1, net: None, disks: Vec::new(), dirty: Dirty::Bitmap };
    let body = Body { spec: spec.clone(), cpuid: Vec::new(), chips: false };
    let body = serde_json::to_string(&body).expect("plain data");
    let ram = SharedMemory::new("played", bytes).expect("a small one");
    for page in 0..PAGES {
        ram.write(page * PAGE_SIZE as u64, &[memory(page); PAGE_SIZE]);
    }
    let ((ours, theirs), (tell, told)) = (pair().expect("sockets"), channel());
    std::thread::spawn(move || {
        let (mut inbox, mut out, mut fds) = (vec![0; MESSAGE_MAX], vec![0; MESSAGE_MAX], Vec::new());
        let mut board = None;
        while let Ok(length) = receive(&theirs, &mut inbox, &mut fds) {
            let (number, request) = decode::<Request>(&inbox[..length]).expect("it comes from here");
            let answer = if matches!(request, Request::Start(_)) {
                let mut fds = std::mem::take(&mut fds).into_iter().skip(2);
                let mut next = || fds.next().expect("the board and its bell are there");
                let memory = SharedMemory::from_fd(next()).expect("it is");
                board = Board::of(memory, next(), 1, PAGES);
                Some(Answer::Started(Started { body: body.clone(), disks: Vec::new(), note: None }))
            } else {
                let answer = script(&request, board.as_ref().expect("it was made for this machine"));
                // Nobody reads it at the end.
                let _ = tell.send(request);
                answer
            };
            if number == 0 {
                continue;
            }
            // One byte more is no message.
            let surplus = usize::from(answer.is_none());
            let length = encode(number, &answer.unwrap_or(Answer::Done), &mut out).expect("it is short");
            let _ = send(&theirs, &out[..length + surplus], &[], true);
        }
    });
    let program = Program::new("/bin/sh", &["-c", "exec sleep 1000"]);
    let (process, _link) = Process::start(&program, "played").expect("it is there");
    let plan = Plan {
        spec: &spec,
        description: String::new(),
        what: What::Twin { scratch: false },
        memory: &ram,
        wire: None,
        files: Vec::new(),
        disks: &[],
        bounds: GateBounds::default(),
    };
    let (ends, answer) = Ends::begin(process, Link::new(ours), "played", &plan).expect("it answers");
    Some((Microvm::of(ends, answer, spec, &ram, &[]).expect("it says what it is to say"), told))
}

/// What memory has in a page.
fn memory(page: u64) -> u8 {
    u8::try_from(page % 100).expect("small")
}

/// Finds pages, as a process does.
fn find(board: &Board, pages: impl Iterator<Item = u64>) {
    let mut found = PageSet::empty(PAGES);
    pages.for_each(|page| found.insert(page));
    board.add_found(&found);
}

/// What the process of a machine that stands says.
fn stands() -> Captured {
    Captured { held: 4, harvest_nanos: 1, device_nanos: 2, state: 5, writes: Writes::default(), gone_on: None }
}

/// Finds `pages`, copies them, and says that the machine has gone on.
fn goes_on(board: &Board, pages: std::ops::Range<u64>) -> Captured {
    find(board, pages.clone());
    let copies: Vec<u8> = pages.clone().take(FEW).flat_map(|page| [COPIED + memory(page); PAGE_SIZE]).collect();
    board.put_copies(&copies);
    board.put_state(b"state");
    let pages = pages.end - pages.start;
    Captured { gone_on: Some(GoneOn { at: nanos(), copy_nanos: 3, resume_nanos: 4, pages }), ..stands() }
}

/// The first byte of each page that was captured, which is that of all of it.
fn captured(capture: &Capture) -> Vec<(u64, u8)> {
    let pages = capture.pages.iter().zip(capture.bytes.chunks(PAGE_SIZE));
    pages
        .inspect(|(_, bytes)| assert!(bytes.iter().all(|byte| *byte == bytes[0])))
        .map(|(&page, bytes)| (page, bytes[0]))
        .collect()
}

fn epoch(go_on: bool) -> Request {
    Request::Epoch { begin: false, next: 2, go_on }
}

#[test]
fn a_small_epoch_is_what_the_process_copied_and_its_guest_needs_no_message_to_run() {
    let Some((machine, asked)) = played(Box::new(|request, board| match request {
        Request::Epoch { go_on: true, .. } => Some(Answer::Captured(goes_on(board, 3..6))),
        Request::Epoch { .. } => {
            find(board, 8..9);
            Some(Answer::Captured(stands()))
        }
        _ => Some(Answer::Done),
    })) else {
        return;
    };
    let mut guest = attach(&machine).expect("nobody is");
    let (mut capture, mut parts) = (Capture::default(), PauseParts::default());
    let start = Instant::now();
    let held = guest.capture_epoch(false, 2, After::Run, &mut capture, &mut parts).expect("it is answered");
    let ran = parts.ran_again.expect("it went on");
    assert!(start <= ran && ran <= Instant::now());
    assert_eq!((held, capture.device.as_slice()), (4, &b"state"[..]));
    assert_eq!(captured(&capture), [(3, COPIED + 3), (4, COPIED + 4), (5, COPIED + 5)]);
    let nanos = |duration: Duration| duration.as_nanos();
    let told = [parts.harvest, parts.device, parts.copy, parts.resume].map(nanos);
    assert_eq!(told, [1, 2, 3, 4]);
    let resuming = Instant::now();
    guest.resume().expect("it is told nothing");
    assert_eq!(parts.end(start, resuming), ran);
    assert_eq!((nanos(parts.total), nanos(parts.resume)), (nanos(ran - start), 4));
    assert!(nanos(parts.stop) + 1 + 2 + 3 + 4 <= nanos(parts.total), "{parts:?}");
    // Told that it is to run, as anybody may tell it at any time.
    guest.resume().expect("it is there");
    guest.pause().expect("it is there");
    guest.resume().expect("it is there");
    // Paused from where it went on.
    guest.capture_epoch(false, 2, After::Run, &mut capture, &mut parts).expect("it is answered");
    guest.pause().expect("it is there");
    guest.resume().expect("it is there");
    guest.capture_epoch(false, 2, After::Stand, &mut capture, &mut parts).expect("it is answered");
    assert_eq!((captured(&capture), parts.ran_again), (vec![(8, 8)], None), "out of its memory");
    guest.resume().expect("it is there");
    assert!(!machine.is_running());
    use Request::{Look, Pause, Resume};
    let expected = [epoch(true), Resume, Pause, Resume, epoch(true), Pause, Resume, epoch(false), Resume, Look];
    assert_eq!(asked.try_iter().collect::<Vec<_>>(), expected);
}

#[test]
fn what_a_process_says_of_its_copies_is_not_believed_if_it_cannot_be() {
    let many = FEW as u64 + 1;
    type Lie = fn(&mut Captured);
    let lies: [(u64, After, Lie); 6] = [
        (3, After::Run, |said| said.gone_on.as_mut().expect("it is there").pages = 2),
        (3, After::Run, |said| said.gone_on.as_mut().expect("it is there").pages = 4),
        (3, After::Run, |said| said.gone_on.as_mut().expect("it is there").pages = u64::MAX),
        // More than there is room for, and as many as it says.
        (many, After::Run, |_| {}),
        (3, After::Run, |said| said.state = u64::MAX),
        // Nobody has let it.
        (3, After::Stand, |_| {}),
    ];
    for (number, (pages, after, lie)) in lies.into_iter().enumerate() {
        let mut first = true;
        let script: Script = Box::new(move |request, board| match request {
            Request::Epoch { .. } if std::mem::take(&mut first) => {
                let mut said = goes_on(board, 0..pages);
                lie(&mut said);
                Some(Answer::Captured(said))
            }
            Request::Epoch { .. } => Some(Answer::Captured(stands())),
            _ => Some(Answer::Done),
        });
        let Some((machine, asked)) = played(script) else { return };
        let mut guest = attach(&machine).expect("nobody is");
        guest.mirror_disks().expect("it is answered");
        let (mut capture, mut parts) = (Capture::default(), PauseParts::default());
        let error = guest.capture_epoch(false, 2, after, &mut capture, &mut parts).expect_err("a lie");
        assert!(error.message.contains("answers what was not asked"), "{number}: {error}");
        guest.resume().expect("it is there");
        let error = guest.capture_epoch(false, 2, after, &mut capture, &mut parts).expect_err("writes were lost");
        assert!(error.message.contains("not whole"), "{number}: {error}");
        guest.resume().expect("it is there");
        guest.unmirror_disks().expect("it is answered");
        guest.capture_epoch(false, 2, After::Run, &mut capture, &mut parts).expect("it is answered");
        let expected = (0..pages).map(|page| (page, memory(page))).collect::<Vec<_>>();
        assert_eq!(captured(&capture), expected, "{number}: all come again, out of memory");
        // Its guest is told to run exactly if it did not say, and was let, that it does.
        let resumes = |asked: &[Request]| asked.iter().filter(|request| matches!(request, Request::Resume)).count();
        let asked: Vec<_> = asked.try_iter().collect();
        let lied_to = epoch(after == After::Run);
        let epochs: Vec<_> = asked.iter().filter(|request| matches!(request, Request::Epoch { .. })).collect();
        assert_eq!(epochs, [&lied_to, &epoch(false)], "{number}");
        assert_eq!(resumes(&asked), if after == After::Run { 1 } else { 2 }, "{number}: {asked:?}");
    }
}

#[test]
fn no_time_that_a_process_says_is_longer_than_its_answer_took() {
    for at in [0, 1, u64::MAX] {
        let Some((machine, _)) = played(Box::new(move |_, board| {
            let gone_on = Some(GoneOn { at, copy_nanos: u64::MAX, resume_nanos: u64::MAX, pages: 1 });
            let said = goes_on(board, 7..8);
            Some(Answer::Captured(Captured { harvest_nanos: u64::MAX, device_nanos: u64::MAX, gone_on, ..said }))
        })) else {
            return;
        };
        let mut guest = attach(&machine).expect("nobody is");
        let (mut capture, mut parts) = (Capture::default(), PauseParts::default());
        let start = Instant::now();
        guest.capture_epoch(false, 2, After::Run, &mut capture, &mut parts).expect("it is answered");
        let took = start.elapsed();
        let ran = parts.ran_again.expect("it went on");
        assert!(start <= ran && ran <= start + took, "{at}");
        for part in [parts.stop, parts.harvest, parts.device, parts.copy, parts.resume] {
            assert!(part <= took, "{at}: {parts:?}");
        }
    }
}

#[test]
fn a_process_does_not_go_on_by_itself_while_pages_are_owed_that_it_does_not_know_of() {
    let mut number = 0;
    let script: Script = Box::new(move |request, board| {
        let Request::Epoch { go_on, .. } = request else { return Some(Answer::Done) };
        number += 1;
        let failed = || Failure::from(GuestError::new(GuestErrorKind::Failed, "it cannot"));
        match number {
            // An answer that is lost, and one that is an error; what they found is on the board.
            1 => {
                goes_on(board, 1..3);
                None
            }
            2 => {
                find(board, 5..6);
                Some(Answer::Failed(failed()))
            }
            _ if *go_on => Some(Answer::Captured(goes_on(board, 20..21))),
            _ => {
                find(board, 9..10);
                Some(Answer::Captured(stands()))
            }
        }
    });
    let Some((machine, asked)) = played(script) else { return };
    let mut guest = attach(&machine).expect("nobody is");
    let (mut capture, mut parts) = (Capture::default(), PauseParts::default());
    let mut capture_one = |guest: &mut ProcessGuest| {
        let taken = guest.capture_epoch(false, 2, After::Run, &mut capture, &mut parts);
        guest.resume().expect("it is there");
        taken.map(|_| captured(&capture))
    };
    capture_one(&mut guest).expect_err("it was not understood");
    capture_one(&mut guest).expect_err("it failed");
    assert_eq!(capture_one(&mut guest).expect("it is answered"), [(1, 1), (2, 2), (5, 5), (9, 9)]);
    let copied = [(20, COPIED + 20)];
    assert_eq!(capture_one(&mut guest).expect("it is answered"), copied);
    let mut back = PageSet::empty(PAGES);
    back.insert(20);
    guest.put_back(&back);
    assert_eq!(capture_one(&mut guest).expect("it is answered"), [(9, 9), (20, 20)]);
    assert_eq!(capture_one(&mut guest).expect("it is answered"), copied);
    assert!(!machine.is_running());
    use Request::{Look, Resume};
    let told = [
        [epoch(true), Resume, epoch(false), Resume, epoch(false), Resume],
        [epoch(true), epoch(false), Resume, epoch(true), Look, Look],
    ];
    assert_eq!(asked.try_iter().collect::<Vec<_>>(), told.concat()[..11]);
}
