//! The process that is injected into: many threads, each of which notices when anything about it was changed.

use std::io::BufRead;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// Pages of each arena.
pub(super) const ARENA_PAGES: usize = 64;
const PAGE: usize = 4096;

static HANDLED: AtomicU64 = AtomicU64::new(0);
static STOP: AtomicBool = AtomicBool::new(false);

fn running() -> bool {
    !STOP.load(Ordering::Relaxed)
}

fn tid() -> i32 {
    // SAFETY: gettid has no conditions.
    unsafe { libc::gettid() }
}

extern "C" fn handler(_: libc::c_int) {
    HANDLED.fetch_add(1, Ordering::Relaxed);
}

fn signal_number() -> libc::c_int {
    libc::SIGRTMIN() + 3
}

/// Blocks the test signal in this thread, so that no handler runs in it and no call of it may be seen interrupted.
fn block_signals() {
    // SAFETY: all bits zero are a valid `sigset_t`.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is a valid set of ours.
    unsafe { libc::sigaddset(&raw mut set, signal_number()) };
    // SAFETY: reads `set`; the old mask is not asked for.
    let result = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    assert_eq!(result, 0);
}

fn pipe() -> [libc::c_int; 2] {
    let mut ends = [0; 2];
    // SAFETY: pipe writes two ints to `ends`.
    assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
    ends
}

fn send(fd: libc::c_int, byte: u8) {
    // SAFETY: writes one byte from a live buffer.
    assert_eq!(unsafe { libc::write(fd, (&raw const byte).cast(), 1) }, 1);
}

fn receive(fd: libc::c_int) -> u8 {
    let mut byte = 0_u8;
    // SAFETY: reads one byte into a live buffer.
    let count = unsafe { libc::read(fd, (&raw mut byte).cast(), 1) };
    assert_eq!(count, 1, "a blocking read was seen interrupted: {}", std::io::Error::last_os_error());
    byte
}

/// The signal mask and the alternate signal stack of this thread.
fn signal_state() -> (Vec<bool>, usize, libc::c_int, usize) {
    // SAFETY: all bits zero are a valid `sigset_t`.
    let mut mask: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: writes the mask; sets none.
    assert_eq!(unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &raw mut mask) }, 0);
    // SAFETY: `mask` is a valid set.
    let blocked = (1..=64).map(|signal| unsafe { libc::sigismember(&raw const mask, signal) } == 1).collect();
    // SAFETY: all bits zero are a valid `stack_t`.
    let mut stack: libc::stack_t = unsafe { std::mem::zeroed() };
    // SAFETY: writes the stack; sets none.
    assert_eq!(unsafe { libc::sigaltstack(std::ptr::null(), &raw mut stack) }, 0);
    (blocked, stack.ss_sp as usize, stack.ss_flags, stack.ss_size)
}

/// Holds known values in all vector registers and in the red zone while it spins, and looks whether they are still there.
fn registers(progress: &AtomicU64) {
    let pattern: Vec<u8> = (0..512_usize).map(|i| u8::try_from(i % 251).expect("small") ^ 0x5a).collect();
    let mut after = vec![0_u8; 512];
    let wide = std::is_x86_feature_detected!("avx");
    let signals = signal_state();
    assert!(signals.0[usize::try_from(signal_number()).expect("small") - 1] && signals.1 != 0);
    while running() {
        after.fill(0);
        let red: u64;
        let spins: u64 = 200_000;
        if wide {
            // SAFETY: loads and stores 16 x 32 bytes of the two live buffers; uses the 128 bytes below the stack pointer, which
            // are free in an asm block that may use the stack; clobbers are declared.
            unsafe {
                std::arch::asm!(
                    "vmovdqu ymm0, [{p}]", "vmovdqu ymm1, [{p}+32]", "vmovdqu ymm2, [{p}+64]", "vmovdqu ymm3, [{p}+96]",
                    "vmovdqu ymm4, [{p}+128]", "vmovdqu ymm5, [{p}+160]", "vmovdqu ymm6, [{p}+192]", "vmovdqu ymm7, [{p}+224]",
                    "vmovdqu ymm8, [{p}+256]", "vmovdqu ymm9, [{p}+288]", "vmovdqu ymm10, [{p}+320]", "vmovdqu ymm11, [{p}+352]",
                    "vmovdqu ymm12, [{p}+384]", "vmovdqu ymm13, [{p}+416]", "vmovdqu ymm14, [{p}+448]", "vmovdqu ymm15, [{p}+480]",
                    "mov qword ptr [rsp-128], 0x1234567", "mov qword ptr [rsp-8], 0x7654321", "std",
                    "2:", "dec {n}", "jnz 2b", "cld",
                    "mov {n}, [rsp-128]", "add {n}, [rsp-8]",
                    "vmovdqu [{a}], ymm0", "vmovdqu [{a}+32], ymm1", "vmovdqu [{a}+64], ymm2", "vmovdqu [{a}+96], ymm3",
                    "vmovdqu [{a}+128], ymm4", "vmovdqu [{a}+160], ymm5", "vmovdqu [{a}+192], ymm6", "vmovdqu [{a}+224], ymm7",
                    "vmovdqu [{a}+256], ymm8", "vmovdqu [{a}+288], ymm9", "vmovdqu [{a}+320], ymm10", "vmovdqu [{a}+352], ymm11",
                    "vmovdqu [{a}+384], ymm12", "vmovdqu [{a}+416], ymm13", "vmovdqu [{a}+448], ymm14", "vmovdqu [{a}+480], ymm15",
                    p = in(reg) pattern.as_ptr(), a = in(reg) after.as_mut_ptr(), n = inout(reg) spins => red,
                    out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _, out("ymm4") _, out("ymm5") _, out("ymm6") _,
                    out("ymm7") _, out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _, out("ymm12") _, out("ymm13") _,
                    out("ymm14") _, out("ymm15") _,
                );
            }
            assert_eq!(after, pattern, "vector registers were changed");
            assert_eq!(red, 0x123_4567 + 0x765_4321, "the red zone was changed");
        }
        assert_eq!(signal_state(), signals, "the signal mask or the alternate stack was changed");
        let sum: f64 = (1..2000).map(|i| f64::from(i).sqrt().sin()).sum();
        let again: f64 = (1..2000).map(|i| f64::from(i).sqrt().sin()).sum();
        assert!(sum.to_bits() == again.to_bits(), "floating point went wrong");
        progress.fetch_add(1, Ordering::Relaxed);
    }
}

/// Waits without a time limit (`ERESTARTNOHAND`).
fn ppoll(progress: &AtomicU64, fd: libc::c_int) {
    let mut expected = 0_u8;
    while running() {
        let mut wait = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // SAFETY: all bits zero are a valid `sigset_t`.
        let mask: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: one live pollfd, no time limit, a valid mask. (The empty mask lets the test signal in: `EINTR` is right then.)
        let ready = unsafe { libc::ppoll(&raw mut wait, 1, std::ptr::null(), &raw const mask) };
        if ready < 0 {
            assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EINTR));
            continue;
        }
        assert_eq!(receive(fd), expected);
        expected = expected.wrapping_add(1);
        progress.fetch_add(1, Ordering::Relaxed);
    }
}

/// Waits with a time limit and blocked signals: only the limit may end it.
fn ppoll_limit(progress: &AtomicU64) {
    while running() {
        let limit = Duration::from_millis(15);
        let spec = libc::timespec { tv_sec: 0, tv_nsec: 15_000_000 };
        let start = Instant::now();
        // SAFETY: no descriptors, a live time limit, no mask.
        let ready = unsafe { libc::ppoll(std::ptr::null_mut(), 0, &raw const spec, std::ptr::null()) };
        assert_eq!(ready, 0, "a wait was seen interrupted without a handler");
        assert!(start.elapsed() >= limit, "a wait ended early");
        progress.fetch_add(1, Ordering::Relaxed);
    }
}

/// Sleeps and polls with a limit (`ERESTART_RESTARTBLOCK`).
fn sleeps(progress: &AtomicU64) {
    while running() {
        let start = Instant::now();
        let spec = libc::timespec { tv_sec: 0, tv_nsec: 12_000_000 };
        // SAFETY: a live time; the rest is not asked for.
        let result = unsafe { libc::clock_nanosleep(libc::CLOCK_MONOTONIC, 0, &raw const spec, std::ptr::null_mut()) };
        assert_eq!(result, 0, "a sleep was seen interrupted without a handler");
        // SAFETY: no descriptors.
        assert_eq!(unsafe { libc::poll(std::ptr::null_mut(), 0, 8) }, 0);
        assert!(start.elapsed() >= Duration::from_millis(20), "a sleep ended early");
        progress.fetch_add(1, Ordering::Relaxed);
    }
}

type Turn = (Mutex<u64>, Condvar);

/// Takes every second turn (futex waits without a limit: `ERESTARTSYS`).
fn turns(progress: &AtomicU64, turn: &Turn, parity: u64) {
    let mut last = None;
    loop {
        let mut now = turn.0.lock().expect("no thread has panicked");
        while *now % 2 != parity && running() {
            now = turn.1.wait(now).expect("no thread has panicked");
        }
        if !running() {
            break;
        }
        assert!(last.is_none_or(|last| last + 2 == *now), "a turn was lost");
        last = Some(*now);
        *now += 1;
        turn.1.notify_all();
        drop(now);
        progress.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(1));
    }
    turn.1.notify_all();
}

/// Queues signals to the process; each must be handled just once.
fn signals(progress: &AtomicU64) -> u64 {
    let mut sent = 0;
    let pid = libc::pid_t::try_from(std::process::id()).expect("a pid");
    while running() {
        if sent < HANDLED.load(Ordering::Relaxed) + 50 {
            let value = libc::sigval { sival_ptr: std::ptr::null_mut() };
            // SAFETY: sends a queued signal, which has a handler, to this process.
            let result = unsafe { libc::sigqueue(pid, signal_number(), value) };
            assert_eq!(result, 0);
            sent += 1;
            progress.fetch_add(1, Ordering::Relaxed);
        }
        std::thread::sleep(Duration::from_micros(300));
    }
    sent
}

fn arena(fd: libc::c_int, flags: libc::c_int) -> *mut u8 {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at a place of the kernel's choice.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), ARENA_PAGES * PAGE, protection, flags, fd, 0) };
    assert_ne!(start, libc::MAP_FAILED);
    start.cast()
}

/// Lives until it is told to exit, one line of standard input a command.
pub(super) fn live() {
    // SAFETY: all bits zero are a valid `sigaction`.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as extern "C" fn(libc::c_int) as usize;
    action.sa_flags = libc::SA_RESTART;
    // SAFETY: the handler makes one atomic addition.
    assert_eq!(unsafe { libc::sigaction(signal_number(), &raw const action, std::ptr::null_mut()) }, 0);

    let mut progress: Vec<(&str, Arc<AtomicU64>)> = Vec::new();
    let mut threads = Vec::new();
    let mut start = |name: &'static str, work: Box<dyn FnOnce(&AtomicU64) + Send>| {
        let counter = Arc::new(AtomicU64::new(0));
        progress.push((name, counter.clone()));
        let (told, tell) = std::sync::mpsc::channel();
        threads.push(std::thread::spawn(move || {
            if name != "signals" {
                block_signals();
            }
            told.send(tid()).expect("it is waited for");
            work(&counter);
        }));
        println!("thread {name} {}", tell.recv().expect("it starts"));
    };
    let [poll_out, poll_in] = pipe();
    let [read_out, read_in] = pipe();
    let turn: Arc<Turn> = Arc::default();
    let (even, odd) = (turn.clone(), turn);
    start("registers", Box::new(registers));
    start("ppoll", Box::new(move |p| ppoll(p, poll_out)));
    start("ppoll-limit", Box::new(ppoll_limit));
    start("sleeps", Box::new(sleeps));
    start("even", Box::new(move |p| turns(p, &even, 0)));
    start("odd", Box::new(move |p| turns(p, &odd, 1)));
    start(
        "read",
        Box::new(move |p| {
            let mut expected = 0_u8;
            while running() {
                assert_eq!(receive(read_out), expected);
                expected = expected.wrapping_add(1);
                p.fetch_add(1, Ordering::Relaxed);
            }
        }),
    );
    start(
        "feeder",
        Box::new(move |p| {
            let mut byte = 0_u8;
            while running() {
                send(poll_in, byte);
                send(read_in, byte);
                byte = byte.wrapping_add(1);
                p.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(3));
            }
            send(poll_in, byte);
            send(read_in, byte);
        }),
    );
    start(
        "spawner",
        Box::new(|p| {
            while running() {
                let work = std::thread::spawn(|| (0..1000_u64).sum::<u64>());
                assert_eq!(work.join().expect("it does not panic"), 499_500);
                p.fetch_add(1, Ordering::Relaxed);
            }
        }),
    );
    let sent = Arc::new(AtomicU64::new(0));
    let total = sent.clone();
    start("signals", Box::new(move |p| total.store(signals(p), Ordering::Relaxed)));

    // SAFETY: the name is a C string; the flags are none.
    let shared = unsafe { libc::memfd_create(c"arena".as_ptr(), 0) };
    // SAFETY: sizes a descriptor of ours.
    assert_eq!(unsafe { libc::ftruncate(shared, i64::try_from(ARENA_PAGES * PAGE).expect("small")) }, 0);
    let anonymous = arena(-1, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let shared = arena(shared, libc::MAP_SHARED);
    let say = |text: &str| println!("{text}");
    say(&format!("thread main {}", tid()));
    say(&format!("arena anonymous {:x}", anonymous as usize));
    say(&format!("arena shared {:x}", shared as usize));
    say("ready");

    let zero = std::fs::File::open("/dev/zero").expect("it exists");
    for line in std::io::stdin().lock().lines() {
        let line = line.expect("text");
        let words: Vec<&str> = line.split_whitespace().collect();
        let place = |arena: &str, page: &str| {
            let start = if arena == "shared" { shared } else { anonymous };
            let page: usize = page.parse().expect("a number");
            assert!(page < ARENA_PAGES);
            // SAFETY: within the arena.
            unsafe { start.add(page * PAGE + 100) }
        };
        match words[..] {
            ["touch", arena, page] => {
                // SAFETY: a mapped byte that nobody else uses.
                unsafe { place(arena, page).write_volatile(7) };
            }
            ["look", arena, page] => {
                // SAFETY: as above.
                let byte = unsafe { place(arena, page).read_volatile() };
                assert!(byte == 0 || byte == 7);
            }
            ["kernel", arena, page] => {
                use std::os::fd::AsRawFd;
                // SAFETY: the kernel writes 8 bytes within the page.
                let count = unsafe { libc::read(zero.as_raw_fd(), place(arena, page).cast(), 8) };
                assert_eq!(count, 8);
            }
            // A userfaultfd of the program's own, set up without any feature.
            ["userfaultfd"] => {
                // SAFETY: touches no memory.
                let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, 1) };
                let mut api = [0xaa_u64, 0, 0];
                let fd = libc::c_int::try_from(fd).expect("a descriptor");
                // SAFETY: UFFDIO_API reads and writes these three words.
                assert_eq!(unsafe { libc::ioctl(fd, 0xc018_aa3f, api.as_mut_ptr()) }, 0);
            }
            // Every worker goes on: each counter must move.
            ["check"] => {
                let before: Vec<u64> = progress.iter().map(|(_, p)| p.load(Ordering::Relaxed)).collect();
                let deadline = Instant::now() + Duration::from_secs(20);
                for ((name, p), before) in progress.iter().zip(before) {
                    while p.load(Ordering::Relaxed) == before {
                        assert!(Instant::now() < deadline, "{name} stands still");
                        std::thread::yield_now();
                    }
                }
            }
            ["exit"] => break,
            _ => panic!("unknown command {line}"),
        }
        say("done");
    }
    STOP.store(true, Ordering::Relaxed);
    for thread in threads {
        thread.join().expect("no worker has noticed anything");
    }
    let deadline = Instant::now() + Duration::from_secs(20);
    while HANDLED.load(Ordering::Relaxed) != sent.load(Ordering::Relaxed) {
        assert!(Instant::now() < deadline, "signals were lost or doubled");
        std::thread::yield_now();
    }
    say("done");
}
