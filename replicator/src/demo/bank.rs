//! One round of the demo with a database: clerks of a bank, each on one connection, never another one, while their database's host dies.
//!
//! A transaction moves money and notes itself under its clerk's name and number. Checked at the end, on the survivor: each
//! transaction that a clerk was told is committed is there, and none twice; the books balance; `amcheck` finds every table and index sound. Then
//! the survivor is killed, too, and its disk alone has to stand the same: file system and database are recovered from it as after a loss of power,
//! and the checksum of each page is right.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::figures::Figures;
use super::image;
use super::lab::{GUEST, Host, Lab, Machine, REDIS, VM};
use super::postgres::{Client, amcheck, serve_disk};
use super::round::{KILL_AFTER, KILL_WITHIN_MS, Plan, failover_report, first_reply, protect};
use super::wait::{ms_between, now_ns, until};

/// Clerks, each with a connection.
const CLERKS: u32 = 8;
/// Transactions of a clerk that show that it is at work.
const AT_WORK: u64 = 3;
/// How long an idle guest's clock is watched.
const IDLE: Duration = Duration::from_secs(3);
/// Bound on something that the clerks or the guest do by themselves.
const SOON: Duration = Duration::from_secs(120);

const SCHEMA: [&str; 4] = [
    "CREATE TABLE branches (id int PRIMARY KEY, balance bigint NOT NULL)",
    "CREATE TABLE tellers (id int PRIMARY KEY, balance bigint NOT NULL)",
    "CREATE TABLE accounts (id int PRIMARY KEY, balance bigint NOT NULL, filler text NOT NULL)",
    "CREATE TABLE history (clerk int, number bigint, account int, teller int, delta int, PRIMARY KEY (clerk, number))",
];
const CONTENT: [&str; 3] = [
    "INSERT INTO branches VALUES (1, 0)",
    "INSERT INTO tellers SELECT n, 0 FROM generate_series(1, 10) n",
    "INSERT INTO accounts SELECT n, 0, repeat('x', 80) FROM generate_series(1, 5000) n",
];

/// What the clerks do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Work,
    Rest,
    End,
}

/// What a clerk saw.
#[derive(Debug, Default)]
struct Ledger {
    acked: u64,
    broken: Option<String>,
    /// The longest time between two answers that was not over at an instant: kept as from, to.
    gaps_ns: Vec<(u64, u64)>,
}

/// All clerks.
struct Clerks {
    order: watch::Sender<Order>,
    counts: Vec<watch::Receiver<u64>>,
    tasks: Vec<JoinHandle<Ledger>>,
}

/// Gaps that are worth remembering.
const GAP: Duration = Duration::from_millis(20);

/// The SQL of a clerk's n-th transaction, sent and answered as one.
fn transaction(clerk: u32, number: u64) -> String {
    // Scattered, and the same whenever it is asked for.
    let mixed = (number * u64::from(CLERKS) + u64::from(clerk)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let (account, teller, delta) = (mixed % 5000 + 1, (mixed >> 20) % 10 + 1, (mixed >> 40) % 1000);
    format!(
        "BEGIN\\; UPDATE accounts SET balance = balance + {delta} WHERE id = {account}\\; \
         UPDATE tellers SET balance = balance + {delta} WHERE id = {teller}\\; \
         UPDATE branches SET balance = balance + {delta} WHERE id = 1\\; \
         INSERT INTO history VALUES ({clerk}, {number}, {account}, {teller}, {delta})\\; COMMIT"
    )
}

async fn clerk(
    number: u32,
    mut client: Client,
    mut order: watch::Receiver<Order>,
    count: watch::Sender<u64>,
) -> Ledger {
    let mut ledger = Ledger::default();
    loop {
        // Its giver lives as long as we are waited for.
        let now = *order.borrow_and_update();
        match now {
            Order::End => return ledger,
            Order::Rest => drop(order.changed().await),
            Order::Work => {
                let asked = now_ns();
                let done = client.run(&transaction(number, ledger.acked)).await;
                let answered = now_ns();
                if Duration::from_nanos(answered - asked) >= GAP {
                    ledger.gaps_ns.push((asked, answered));
                }
                if let Err(error) = done {
                    ledger.broken = Some(format!("{error:#}"));
                    return ledger;
                }
                ledger.acked += 1;
                count.send_replace(ledger.acked);
            }
        }
    }
}

impl Clerks {
    fn start(connect: impl Fn() -> Result<Client>) -> Result<Self> {
        let (order, obeyed) = watch::channel(Order::Work);
        let mut clerks = Self { order, counts: Vec::new(), tasks: Vec::new() };
        for number in 0..CLERKS {
            let (tell, count) = watch::channel(0);
            clerks.counts.push(count);
            clerks.tasks.push(tokio::spawn(clerk(number, connect()?, obeyed.clone(), tell)));
        }
        Ok(clerks)
    }

    fn done(&self) -> Vec<u64> {
        self.counts.iter().map(|count| *count.borrow()).collect()
    }

    /// Waits until each has done some transactions from now on.
    async fn are_at_work(&self) -> Result<()> {
        let before = self.done();
        until("every clerk to go on", SOON, async || {
            let now = self.done();
            if let Some(ended) = self.tasks.iter().position(JoinHandle::is_finished) {
                bail!("clerk {ended} has lost its connection");
            }
            let all = before.iter().zip(&now).all(|(before, now)| *now >= before + AT_WORK);
            Ok(if all { Ok(()) } else { Err(format!("{before:?}, now {now:?}")) })
        })
        .await
    }

    /// Transactions a second, over so many of them.
    async fn speed(&self, over: Duration) -> f64 {
        let (before, begun) = (self.done().iter().sum::<u64>(), now_ns());
        tokio::time::sleep(over).await;
        let done = self.done().iter().sum::<u64>() - before;
        done as f64 * 1e3 / ms_between(begun, now_ns())
    }

    async fn end(self) -> Result<Vec<Ledger>> {
        self.order.send_replace(Order::End);
        let mut ledgers = Vec::new();
        for task in self.tasks {
            ledgers.push(task.await.context("a clerk failed")?);
        }
        Ok(ledgers)
    }
}

/// Runs a round in a laboratory that was just built.
///
/// # Errors
/// If something does not work at all, or a checker is not content. A lost transaction and a broken connection are figures.
pub(super) async fn run(lab: &mut Lab, plan: &Plan, database: &Path) -> Result<Figures> {
    ensure!(database.join("disk.raw").is_file(), "there is no database's disk in {}", database.display());
    let database = database.canonicalize()?;
    let boot = lab.boot_as(&Machine { database: Some(database.clone()), ..Machine::default() }).await?;
    println!("  VM {VM} runs on {}, PostgreSQL answers after {:.1} s", Host::A.name(), boot.as_secs_f64());
    let (namespace, log) = (lab.namespace("c"), lab.dir().join("psql.log"));
    let connect = || Client::connect(&namespace, &database, &log);
    let mut own = connect()?;
    for sql in SCHEMA.into_iter().chain(CONTENT) {
        own.run(sql).await?;
    }
    let clerks = Clerks::start(connect)?;
    clerks.are_at_work().await?;
    let load = Duration::from_secs(plan.load_seconds);
    let unprotected = clerks.speed(load).await;
    println!("  unprotected: {unprotected:.0} transactions/s by {CLERKS} clerks");

    lab.start_daemons().await?;
    lab.pair().await.context("pairing")?;
    let begun = now_ns();
    protect(lab, plan).await?;
    println!("  protected after {:.1} s, the clerks at work", ms_between(begun, now_ns()) / 1e3);
    clerks.order.send_replace(Order::Rest);
    let idle = clock_lost(&mut own, IDLE).await?;
    clerks.order.send_replace(Order::Work);
    clerks.are_at_work().await?;
    let (protected, busy) = tokio::join!(clerks.speed(load), clock_lost(&mut own, load));
    let (busy, share) = (busy?, protected / unprotected);
    println!("  the guest's clock loses {idle:.1} % of the time while idle, {busy:.1} % under load");
    println!("  protected: {protected:.0} transactions/s, {share:.2} of unprotected");
    lab.check(&[Host::A, Host::B])?;

    let mut prober = lab.helper("the prober", &["probe", "--to", &REDIS.ip().to_string()])?;
    first_reply(&mut prober, now_ns()).await.context("before the kill")?;
    let random = uuid::Uuid::new_v4().as_u128() % u128::from(KILL_WITHIN_MS);
    // The moment is what is random here: there is no condition to wait for.
    tokio::time::sleep(KILL_AFTER + Duration::from_millis(u64::try_from(random).expect("below a u64"))).await;
    let status = lab.client(Host::A).vm_status(VM).await.context("asking host-a before its death")?;
    ensure!(status.state.word() == "protected", "before the kill the VM is {}: {}", status.state, status.reason);
    let before = status.epochs.context("host-a has committed no epoch")?;
    let death = lab.kill_host_a().await?;
    println!("  host-a is dead");
    let reply = first_reply(&mut prober, death.over_ns).await.context("after the kill")?;
    prober.end();
    let went_on = clerks.are_at_work().await;
    let ledgers = clerks.end().await?;
    for (number, why) in
        ledgers.iter().enumerate().filter_map(|(number, ledger)| Some((number, ledger.broken.as_ref()?)))
    {
        println!("  BROKEN CONNECTION of clerk {number}: {why}");
    }
    let broken = ledgers.iter().filter(|ledger| ledger.broken.is_some()).count();
    if broken == 0 {
        went_on?;
    }
    let report = failover_report(lab).await?;
    let activation = report.activation_ms.context("the survivor's agent reports no activation")?;

    let in_memory = lost(&mut connect()?, &ledgers).await?;
    amcheck(&GUEST.to_string(), &namespace, &database).await?;
    kill_survivor(lab).await?;
    let copies = image::below(&lab.state_dir(Host::B).join("images"));
    let [copy] = copies.as_slice() else { bail!("host-b has {} copies of the disk", copies.len()) };
    let served = serve_disk(copy, &namespace, &database, lab.dir()).await?;
    let on_disk = lost(&mut served.connect(&namespace, &database, &log)?, &ledgers).await?;
    amcheck(&served.host, &namespace, &database).await?;
    served.end(&database).await?;
    let lost = in_memory.max(on_disk);
    if lost > 0 {
        println!("  LOST TRANSACTIONS: {in_memory} in the survivor, {on_disk} on its disk");
    }
    println!("  the books balance, in the survivor and on its disk; amcheck, e2fsck and pg_checksums are content");

    let stall = ledgers.iter().flat_map(|ledger| &ledger.gaps_ns).filter(|(_, to)| *to >= death.begun_ns);
    let figures = Figures {
        rounds: 1,
        epochs: before.epochs,
        epoch_ms_p50: before.epoch_ms_p50,
        pause_ms_p50: before.pause_ms_p50,
        pause_ms_p99: before.pause_ms_p99,
        dirty_pages_p50: before.dirty_pages_p50,
        commit_ms_p50: before.commit_ms_p50,
        detection_ms: ms_between(death.begun_ns, report.detected_monotonic_ns),
        activation_ms: activation.total,
        failover_ms: ms_between(death.begun_ns, reply),
        client_stall_ms: stall.map(|&(from, to)| ms_between(from, to)).fold(0.0, f64::max),
        acked_writes: ledgers.iter().map(|ledger| ledger.acked).sum(),
        lost_writes: lost,
        connections_broken: u64::try_from(broken).expect("few clerks"),
        clock_lost_idle_percent: idle,
        clock_lost_busy_percent: busy,
        unprotected_ops_per_s: unprotected,
        protected_ops_per_s: protected,
    };
    println!("  {}", figures.line());
    Ok(figures)
}

/// What the guest's clock loses, in percent of the time.
async fn clock_lost(client: &mut Client, over: Duration) -> Result<f64> {
    const NOW: &str = "SELECT extract(epoch FROM clock_timestamp())";
    let mut read = async || -> Result<(f64, u64)> { Ok((client.value(NOW).await?.parse()?, now_ns())) };
    let (first, begun) = read().await?;
    tokio::time::sleep(over).await;
    let (last, ended) = read().await?;
    Ok(100.0 * (1.0 - (last - first) * 1e3 / ms_between(begun, ended)))
}

/// Transactions that a clerk was told are committed and that are not there as they were.
///
/// # Errors
/// If the books do not balance, or there is one that nobody asked for.
async fn lost(client: &mut Client, ledgers: &[Ledger]) -> Result<u64> {
    let mut lost = 0;
    for (clerk, ledger) in ledgers.iter().enumerate() {
        let acked = ledger.acked;
        let there = format!("SELECT count(*) FROM history WHERE clerk = {clerk} AND number < {acked}");
        lost += acked - client.value(&there).await?.parse::<u64>()?;
        // One more may be there: it was asked for, and its answer did not come.
        let beyond = format!("SELECT count(*) FROM history WHERE clerk = {clerk} AND number > {acked}");
        ensure!(client.value(&beyond).await? == "0", "clerk {clerk} has transactions that it never began");
    }
    let balances = "SELECT (SELECT sum(balance) FROM accounts) = sum(delta) AND (SELECT sum(balance) FROM tellers) = sum(delta) \
                    AND (SELECT sum(balance) FROM branches) = sum(delta) FROM history";
    ensure!(client.value(balances).await? == "t", "the books do not balance");
    let each = "SELECT count(*) FROM accounts a WHERE balance <> \
                (SELECT coalesce(sum(delta), 0) FROM history h WHERE h.account = a.id)";
    // Without it each account would look through all of history.
    client.run("CREATE INDEX IF NOT EXISTS by_account ON history (account)").await?;
    ensure!(client.value(each).await? == "0", "an account does not hold what was moved to it");
    Ok(lost)
}

/// Kills the survivor: what is on its disk then has to be enough.
async fn kill_survivor(lab: &Lab) -> Result<()> {
    let status = lab.client(Host::B).vm_status(VM).await.context("asking host-b about the survivor")?;
    let pid = status.survivor.context("host-b has no survivor")?.pid;
    let process = Pid::from_raw(i32::try_from(pid)?).context("no process")?;
    kill_process(process, Signal::KILL)?;
    lab.process_ended(pid, SOON).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_transactions_are_one_and_each_is_the_same_again() {
        let all: std::collections::BTreeSet<String> =
            (0..CLERKS).flat_map(|clerk| (0..100).map(move |number| transaction(clerk, number))).collect();
        assert_eq!(all.len(), usize::try_from(CLERKS).expect("few") * 100);
        assert!(all.contains(&transaction(3, 17)));
    }
}
