//! Bad weather on a host's link: a relay of ours takes the link's place for a while, and loses, delays, doubles, reorders or
//! damages frames, or carries only so many.
//!
//! Two tap interfaces, one in the host's bridge and one in the switch's, whose frames this process carries from one to the other;
//! the cable between host and switch is down meanwhile. A tap takes no offloaded frames, so each frame here is one on the wire.
//!
//! Promise: what was done to how many frames is counted; dropping the relay puts the cable back.

use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use replicator::demo::netns::ip;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_hooks::sys::tap;

use super::space;
use crate::sim::rng::Rng;

/// The longest frame.
const FRAME: usize = 2048;
/// How long a thread waits for a frame before it looks whether it is to end.
const LOOK: Duration = Duration::from_millis(50);
/// Bound on the bytes that wait in the relay, in each direction; more are lost, as at any router.
const QUEUE: usize = 4 << 20;

/// What happens to the frames of a link, each direction for itself. All zero: nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Weather {
    /// Lost, of 1000.
    pub lose: u64,
    /// Carried twice, of 1000.
    pub double: u64,
    /// With one bit turned, of 1000; a UDP datagram's checksum is taken away, so that its reader gets it.
    pub damage: u64,
    /// Overtaken by those that come up to 10 ms later, of 1000.
    pub overtake: u64,
    /// Every frame comes so much later.
    pub delay: Duration,
    /// And up to so much more, each for itself, but in order.
    pub jitter: Duration,
    /// Bytes a second, if there is a bound.
    pub rate: Option<u64>,
}

/// What was done to frames.
#[derive(Debug, Default)]
pub struct Counts {
    /// Carried.
    pub carried: AtomicU64,
    /// Lost, doubled, damaged, overtaken, or kept waiting by delay or rate.
    pub hit: AtomicU64,
}

/// See the module.
#[derive(Debug)]
pub struct Relay {
    cable: String,
    end: Arc<AtomicBool>,
    counts: Arc<Counts>,
    threads: Vec<JoinHandle<()>>,
}

impl Relay {
    /// Takes the place of the cable between the bridges of `host` and `switch`, two namespaces. `cable` is its end in the switch.
    ///
    /// # Errors
    /// If the interfaces cannot be made.
    pub fn start(host: &str, switch: &str, cable: &str, weather: Weather, seed: u64) -> Result<Self> {
        let (one, other) = (open(host)?, open(switch)?);
        let mut relay = Self {
            cable: format!("-n {switch} link set {cable}"),
            end: Arc::default(),
            counts: Arc::default(),
            threads: Vec::new(),
        };
        ip(&format!("{} down", relay.cable))?;
        let ways = [(one.try_clone()?, other.try_clone()?), (other, one)];
        for (way, (from, to)) in (1..).zip(ways) {
            let (end, counts) = (Arc::clone(&relay.end), Arc::clone(&relay.counts));
            let way = Way {
                weather,
                rng: Rng::new(seed + way),
                counts,
                waiting: BinaryHeap::new(),
                bytes: 0,
                number: 0,
                free: Instant::now(),
                last: Instant::now(),
            };
            relay.threads.push(std::thread::spawn(move || carry(from, to, way, &end)));
        }
        Ok(relay)
    }

    /// How many frames were carried, and to how many something was done.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        (self.counts.carried.load(Ordering::SeqCst), self.counts.hit.load(Ordering::SeqCst))
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.end.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        // The taps went with their descriptors.
        if let Err(error) = ip(&format!("{} up", self.cable)) {
            eprintln!("a cable stays down: {error:#}");
        }
    }
}

/// A tap in the bridge `br0` of a namespace; it lives as long as the file.
fn open(space: &str) -> Result<File> {
    let (send, receive) = std::sync::mpsc::channel();
    space::spawn(space, || Ok(tap::open("weather")?), move |tap| send.send(tap))?;
    let tap = receive.recv().context("no tap")?;
    ip(&format!("-n {space} link set weather master br0 up"))?;
    Ok(File::from(tap))
}

/// A frame that is on its way: first the one that is due first.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Waiting {
    due: std::cmp::Reverse<(Instant, u64)>,
    frame: Vec<u8>,
}

/// One direction.
struct Way {
    weather: Weather,
    rng: Rng,
    counts: Arc<Counts>,
    waiting: BinaryHeap<Waiting>,
    /// Bytes that wait.
    bytes: usize,
    number: u64,
    /// When the bounded link is free again.
    free: Instant,
    /// When the last frame that was not overtaken is due.
    last: Instant,
}

impl Way {
    fn hit(&self) {
        self.counts.hit.fetch_add(1, Ordering::SeqCst);
    }

    /// A frame comes in.
    fn take(&mut self, mut frame: Vec<u8>, now: Instant) {
        self.counts.carried.fetch_add(1, Ordering::SeqCst);
        let weather = self.weather;
        if self.rng.chance(weather.lose) || self.bytes + frame.len() > QUEUE {
            return self.hit();
        }
        if self.rng.chance(weather.damage) && damage(&mut frame, &mut self.rng) {
            self.hit();
        }
        let mut due = now + weather.delay;
        if !weather.jitter.is_zero() {
            due += self.rng.micros(0, u64::try_from(weather.jitter.as_micros()).unwrap_or(u64::MAX));
        }
        if let Some(rate) = weather.rate {
            self.free = self.free.max(now) + Duration::from_secs_f64(frame.len() as f64 / rate as f64);
            due = due.max(self.free);
        }
        if due > now {
            self.hit();
        }
        if self.rng.chance(weather.overtake) {
            self.hit();
            due += self.rng.micros(100, 10_000);
        } else {
            due = due.max(self.last);
            self.last = due;
        }
        if self.rng.chance(weather.double) {
            self.hit();
            self.queue(due, frame.clone());
        }
        self.queue(due, frame);
    }

    fn queue(&mut self, due: Instant, frame: Vec<u8>) {
        self.number += 1;
        self.bytes += frame.len();
        self.waiting.push(Waiting { due: std::cmp::Reverse((due, self.number)), frame });
    }

    /// The next frame that is due.
    fn give(&mut self, now: Instant) -> Option<Vec<u8>> {
        if self.waiting.peek()?.due.0.0 > now {
            return None;
        }
        let frame = self.waiting.pop()?.frame;
        self.bytes -= frame.len();
        Some(frame)
    }
}

/// Turns one bit behind the headers. Whether there was one.
fn damage(frame: &mut [u8], rng: &mut Rng) -> bool {
    const PAYLOAD: usize = 14 + 20 + 8;
    if frame.len() <= PAYLOAD || frame[12..14] != [8, 0] {
        return false;
    }
    let at = PAYLOAD + rng.index(frame.len() - PAYLOAD);
    frame[at] ^= 1 << rng.below(8);
    let (plain, udp) = (frame[14] == 0x45, frame[23] == 17);
    if plain && udp {
        frame[40..42].fill(0);
    }
    true
}

fn carry(mut from: File, mut to: File, mut way: Way, end: &AtomicBool) {
    let mut buffer = [0; FRAME];
    while !end.load(Ordering::SeqCst) {
        let now = Instant::now();
        while let Some(frame) = way.give(now) {
            // A bridge that is not up yet takes no frame: it is lost, as on a cable that is not plugged in.
            let _ = to.write(&frame);
        }
        let next = way.waiting.peek().map_or(LOOK, |waiting| waiting.due.0.0.saturating_duration_since(now).min(LOOK));
        let wait = Timespec { tv_sec: 0, tv_nsec: i64::from(next.subsec_nanos()) };
        let _ = poll(&mut [PollFd::from_borrowed_fd(from.as_fd(), PollFlags::IN)], Some(&wait));
        // A bound, so that what is due goes out also while much comes in.
        for _ in 0..64 {
            match from.read(&mut buffer) {
                Ok(length) => way.take(buffer[..length].to_vec(), Instant::now()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => break,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pass(weather: Weather, frames: u64) -> (Vec<(u64, Duration)>, u64) {
        let now = Instant::now();
        let mut way = Way {
            weather,
            rng: Rng::new(9),
            counts: Arc::default(),
            waiting: BinaryHeap::new(),
            bytes: 0,
            number: 0,
            free: now,
            last: now,
        };
        for number in 0..frames {
            let mut frame = vec![0; 142];
            frame[12..15].copy_from_slice(&[8, 0, 0x45]);
            frame[23] = 17;
            frame[40..42].copy_from_slice(&[1, 1]);
            frame[42..50].copy_from_slice(&number.to_be_bytes());
            way.take(frame, now + Duration::from_millis(number));
        }
        let mut came = Vec::new();
        while let Some(waiting) = way.waiting.peek() {
            let due = waiting.due.0.0;
            assert_eq!(way.give(due - Duration::from_nanos(1)), None);
            let frame = way.give(due).expect("it is due");
            let number = u64::from_be_bytes(frame[42..50].try_into().unwrap());
            came.push((number, due - now));
        }
        assert_eq!(way.bytes, 0);
        let hit = way.counts.hit.load(Ordering::SeqCst);
        (came, hit)
    }

    #[test]
    fn each_kind_of_weather_does_what_it_says_and_fair_weather_nothing() {
        let fair = Weather::default();
        let in_order = |came: &[(u64, Duration)]| came.is_sorted_by_key(|(number, _)| *number);
        let (came, hit) = pass(fair, 1000);
        assert!(came.len() == 1000 && hit == 0 && in_order(&came));
        assert!(came.iter().all(|(number, due)| *due == Duration::from_millis(*number)));

        let (came, hit) = pass(Weather { lose: 200, ..fair }, 1000);
        assert!((700..900).contains(&came.len()) && hit == 1000 - came.len() as u64 && in_order(&came));
        let (came, hit) = pass(Weather { double: 200, ..fair }, 1000);
        assert!((1100..1300).contains(&came.len()) && hit == came.len() as u64 - 1000);
        let (came, _) = pass(Weather { overtake: 200, ..fair }, 1000);
        assert!(came.len() == 1000 && !in_order(&came));
        let delay = Duration::from_millis(30);
        let (came, hit) = pass(Weather { delay, jitter: delay, ..fair }, 1000);
        assert!(came.len() == 1000 && hit == 1000 && in_order(&came));
        assert!(came.iter().all(|(number, due)| *due >= Duration::from_millis(*number) + delay));
        // 142 bytes a millisecond, at half of that.
        let (came, _) = pass(Weather { rate: Some(71_000), ..fair }, 1000);
        assert!(came.last().unwrap().1 >= Duration::from_millis(1999), "{:?}", came.last());
        let (came, _) = pass(Weather { rate: Some(1), ..fair }, 40_000);
        assert!(came.len() <= QUEUE / 142, "no more waits than fits");
    }

    #[test]
    fn a_damaged_datagram_differs_in_one_bit_and_has_no_checksum() {
        let mut rng = Rng::new(3);
        for _ in 0..100 {
            let mut frame = vec![7; 100];
            frame[12..15].copy_from_slice(&[8, 0, 0x45]);
            frame[23] = 17;
            let before = frame.clone();
            assert!(damage(&mut frame, &mut rng));
            let bits: u32 = frame[42..].iter().zip(&before[42..]).map(|(now, old)| (now ^ old).count_ones()).sum();
            assert_eq!((bits, &frame[40..42], &frame[..40]), (1, &[0, 0][..], &before[..40]));
        }
        assert!(!damage(&mut [0; 60], &mut rng), "ARP is left alone");
    }
}
