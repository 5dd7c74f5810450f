//! Conversations byte by byte, hostile ones among them. The numbers are those of the protocol's document.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::super::memory::Memory;
use super::super::{BackendError, Features, NbdError, PAYLOAD_MAX};
use super::converse;

const SIZE: usize = 1 << 20;

fn memory() -> Arc<Memory> {
    Arc::new(Memory::new(SIZE))
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).expect("short");
    [b"IHAVEOPT", &number.to_be_bytes()[..], &length.to_be_bytes(), data].concat()
}

fn go(name: &str) -> Vec<u8> {
    let length = u32::try_from(name.len()).expect("short");
    option(7, &[&length.to_be_bytes()[..], name.as_bytes(), &[0, 1, 0, 3]].concat())
}

fn request(command: u16, flags: u16, offset: u64, length: u32, data: &[u8]) -> Vec<u8> {
    [
        &0x2560_9513_u32.to_be_bytes()[..],
        &flags.to_be_bytes(),
        &command.to_be_bytes(),
        b"cookie01",
        &offset.to_be_bytes(),
        &length.to_be_bytes(),
        data,
    ]
    .concat()
}

fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).expect("short");
    [
        &0x0003_e889_0455_65a9_u64.to_be_bytes()[..],
        &option.to_be_bytes(),
        &kind.to_be_bytes(),
        &length.to_be_bytes(),
        data,
    ]
    .concat()
}

fn reply(error: u32) -> Vec<u8> {
    [&0x6744_6698_u32.to_be_bytes()[..], &error.to_be_bytes(), b"cookie01"].concat()
}

const FLAGS: [u8; 4] = [0, 0, 0, 3];
const DISC: u16 = 2;

/// What is heard after `GO` was answered, and the end.
fn transmit(memory: &Arc<Memory>, requests: &[Vec<u8>]) -> (Vec<u8>, Result<(), NbdError>) {
    let start = [&FLAGS[..], &go("disk")].concat();
    let informed = converse(memory, &*start).0.len();
    let (mut heard, ended) = converse(memory, &*[start, requests.concat()].concat());
    heard.drain(..informed);
    (heard, ended)
}

#[test]
fn options_are_answered_as_the_protocol_says() {
    let said = [
        &FLAGS[..],
        &option(3, b""),
        &option(3, b"x"),
        &option(8, b""),
        &option(8, b"x"),
        &option(5, b""),
        &option(77, b"whatever"),
        &option(6, &[0, 0, 0, 4, b'd', b'i', b's', b'k', 0, 0]),
        &option(6, &[0, 0, 0, 4, b'd', b'a', b's', b'h', 0, 0]),
        &option(6, &[0, 0, 0, 9, b'd', b'i', b's', b'k', 0, 0]),
        &option(6, &[0, 0, 0, 4, b'd', b'i', b's', b'k', 0, 1]),
        &option(2, b"bye"),
    ]
    .concat();
    let (heard, ended) = converse(&memory(), &*said);
    ended.expect("it went in good order");
    const UNSUP: u32 = 0x8000_0001;
    const INVALID: u32 = 0x8000_0003;
    // Structured replies were asked for, so `DF` is offered: 0xed.
    let export = [&[0, 0][..], &(SIZE as u64).to_be_bytes(), &[0, 0xed]].concat();
    let sizes = [&[0, 3][..], &[0, 0, 0, 1], &[0, 0, 0x10, 0], &[2, 0, 0, 0]].concat();
    let expected = [
        option_reply(3, 2, b"\0\0\0\x04disk"),
        option_reply(3, 1, b""),
        option_reply(3, INVALID, b"data in a list"),
        option_reply(8, 1, b""),
        option_reply(8, INVALID, b"data with it"),
        option_reply(5, UNSUP, b"not supported"),
        option_reply(77, UNSUP, b"not supported"),
        option_reply(6, 3, &export),
        option_reply(6, 3, &sizes),
        option_reply(6, 1, b""),
        option_reply(6, 0x8000_0006, b"no such export"),
        option_reply(6, INVALID, b"lengths that do not fit"),
        option_reply(6, INVALID, b"lengths that do not fit"),
        option_reply(2, 1, b""),
    ];
    assert_eq!(heard, expected.concat());
}

#[test]
fn the_old_way_to_choose_works_with_and_without_zeroes() {
    for (flags, zeroes) in [([0, 0, 0, 3], 0), ([0, 0, 0, 1], 124)] {
        for name in [&b"disk"[..], b""] {
            let said = [&flags[..], &option(1, name), &request(DISC, 0, 0, 0, b"")].concat();
            let (heard, ended) = converse(&memory(), &*said);
            ended.expect("it went in good order");
            assert_eq!(heard, [&(SIZE as u64).to_be_bytes()[..], &[0, 0x6d], &vec![0; zeroes]].concat());
        }
    }
    let (heard, ended) = converse(&memory(), &*[&FLAGS[..], &option(1, b"other")].concat());
    assert!(matches!(ended, Err(NbdError::Protocol { .. })));
    assert_eq!(heard, b"", "there is no way to say no");
}

#[test]
fn requests_do_what_they_say_and_only_inside_the_export() {
    let memory = memory();
    let end = SIZE as u64;
    let (heard, ended) = transmit(
        &memory,
        &[
            request(1, 0, 10, 4, b"abcd"),
            request(1, 1, end - 2, 2, b"yz"),
            request(1, 0, end - 1, 2, b"no"),
            request(1, 0, u64::MAX, 2, b"no"),
            request(1, 0, 0, 0, b""),
            request(1, 4, 0, 1, b"n"),
            request(0, 0, 9, 6, b""),
            request(0, 0, end - 2, 3, b""),
            request(0, 4, 0, 1, b""),
            request(0, 0, 0, PAYLOAD_MAX + 1, b""),
            request(6, 0, 11, 1, b""),
            request(6, 3, 12, 1, b""),
            request(6, 0x10, 0, 1, b""),
            request(6, 0, end, 1, b""),
            request(4, 0, 10, 1, b""),
            request(4, 0, end, u32::MAX, b""),
            request(3, 0, 0, 0, b""),
            request(3, 0, 1, 0, b""),
            request(5, 0, 0, 1, b""),
            request(9, 0, 0, 0, b""),
            request(DISC, 0, 0, 0, b""),
        ],
    );
    ended.expect("it went in good order");
    let expected = [
        reply(0),
        reply(0),
        reply(28),
        reply(28),
        reply(22),
        reply(22),
        reply(0),
        b"\0abcd\0".to_vec(),
        reply(22),
        reply(22),
        reply(22),
        reply(0),
        reply(0),
        reply(22),
        reply(28),
        reply(0),
        reply(22),
        reply(0),
        reply(22),
        reply(22),
        reply(22),
    ];
    assert_eq!(heard, expected.concat());
    let content = memory.content();
    assert_eq!(&content[9..15], b"\0\0\0\0d\0");
    assert_eq!(&content[SIZE - 2..], b"yz");
}

#[test]
fn reads_are_structured_once_that_was_asked_for() {
    let memory = memory();
    memory.content()[5..8].copy_from_slice(b"abc");
    let reads = [
        request(0, 4, 5, 3, b""),
        request(0, 0, SIZE as u64, 1, b""),
        request(1, 0, 0, 1, b"x"),
        request(DISC, 0, 0, 0, b""),
    ];
    let start = [&FLAGS[..], &option(8, b""), &go("disk")].concat();
    let informed = converse(&memory, &*start).0.len();
    let (heard, ended) = converse(&memory, &*[start, reads.concat()].concat());
    ended.expect("it went in good order");
    let chunk = |kind: u16, data: &[u8]| {
        let length = u32::try_from(data.len()).expect("short");
        [&0x668e_33ef_u32.to_be_bytes()[..], &[0, 1], &kind.to_be_bytes(), b"cookie01", &length.to_be_bytes(), data]
            .concat()
    };
    let expected = [chunk(1, b"\0\0\0\0\0\0\0\x05abc"), chunk(0x8001, &[0, 0, 0, 22, 0, 0]), reply(0)];
    assert_eq!(&heard[informed..], expected.concat());
}

#[test]
fn what_the_backend_fails_with_reaches_the_client() {
    for (error, number) in [(BackendError::Io, 5), (BackendError::NoSpace, 28), (BackendError::Invalid, 22)] {
        let memory = Arc::new(Memory { fails: Some(error), ..Memory::new(SIZE) });
        let all = [0, 3, 4, 6].map(|command| request(command, 0, 0, u32::from(command != 3), b""));
        let (heard, _) = transmit(&memory, &[all.concat(), request(1, 0, 0, 1, b"x")]);
        assert_eq!(heard, reply(number).repeat(5));
    }
}

#[test]
fn what_is_not_offered_is_refused() {
    let features = Features { read_only: false, flush: false, fua: false, trim: false, zeroes: false };
    let memory = Arc::new(Memory { features, ..Memory::new(SIZE) });
    let requests =
        [request(1, 1, 0, 1, b"x"), request(3, 0, 0, 0, b""), request(4, 0, 0, 1, b""), request(6, 0, 0, 1, b"")];
    assert_eq!(transmit(&memory, &requests).0, reply(22).repeat(4));
    let features = Features { read_only: true, ..Features::default() };
    let memory = Arc::new(Memory { features, ..Memory::new(SIZE) });
    let requests = [request(1, 0, 0, 1, b"x"), request(4, 0, 0, 1, b""), request(6, 0, 0, 1, b"")];
    assert_eq!(transmit(&memory, &requests).0, reply(1).repeat(3));
}

#[test]
fn a_backend_that_is_taken_is_refused_in_words() {
    let memory = Arc::new(Memory { clients_max: 0, ..Memory::new(SIZE) });
    let (heard, ended) = converse(&memory, &*[&FLAGS[..], &go("disk"), &option(2, b"")].concat());
    ended.expect("it went in good order");
    assert_eq!(heard, [option_reply(7, 0x8000_0002, b"this export is in use"), option_reply(2, 1, b"")].concat());
    assert!(converse(&memory, &*[&FLAGS[..], &option(1, b"disk")].concat()).1.is_err());
}

#[test]
fn hostile_clients_are_hung_up_on() {
    let head = |number: u32, length: u32| [b"IHAVEOPT", &number.to_be_bytes()[..], &length.to_be_bytes()].concat();
    let protocol = |said: &[u8]| {
        let memory = memory();
        let ended = converse(&memory, said).1;
        assert!(matches!(ended, Err(NbdError::Protocol { .. })), "{ended:?}");
        assert_eq!(memory.clients.load(Ordering::SeqCst), 0);
    };
    protocol(&[0, 0, 1, 3]);
    protocol(&[&FLAGS[..], b"IHAVEOPTIHAVEOPTIHAVEOPT"].concat()[..12].repeat(3));
    protocol(&[&FLAGS[..], &head(1, 1 << 15)].concat());
    protocol(&[&FLAGS[..], &head(7, u32::MAX)].concat());
    protocol(&[&FLAGS[..], &option(3, b"").repeat(64)].concat());
    let start = [&FLAGS[..], &go("disk")].concat();
    protocol(&[&start[..], &[0; 28]].concat());
    protocol(&[&start[..], &request(1, 0, 0, PAYLOAD_MAX + 1, b"")].concat());
    // An option that is too long, but not absurd, is read past.
    let said = [&FLAGS[..], &head(3, 1 << 15), &vec![7; 1 << 15], &option(2, b"")].concat();
    let (heard, ended) = converse(&memory(), &*said);
    ended.expect("it went in good order");
    assert_eq!(heard, [option_reply(3, 0x8000_0009, b"too long"), option_reply(2, 1, b"")].concat());
}

#[test]
fn a_conversation_may_break_off_at_any_byte() {
    let said = [
        &FLAGS[..],
        &option(3, b""),
        &option(8, b""),
        &go("disk"),
        &request(1, 0, 0, 3, b"abc"),
        &request(0, 0, 0, 3, b""),
        &request(6, 0, 1, 1, b""),
        &request(DISC, 0, 0, 0, b""),
    ]
    .concat();
    for length in 0..said.len() {
        let memory = memory();
        let ended = converse(&memory, &said[..length]).1;
        assert!(matches!(ended, Err(NbdError::Io(_))), "{length}: {ended:?}");
        assert_eq!(memory.clients.load(Ordering::SeqCst), 0, "{length}");
    }
    converse(&memory(), &*said).1.expect("it is whole");
    // A write whose data did not come whole is not done.
    let memory = memory();
    transmit(&memory, &[request(1, 0, 0, 3, b"ab")]).1.expect_err("it is not whole");
    assert_eq!(memory.content()[0], 0);
}
