//! What is done to those who are asked who may run the VM, as a whole and, of etcd, to single members.

use anyhow::{Context as _, Result};
use replicator::demo::lab::Host;
use replicator::demo::wait::until;
use rustix::process::Signal;

use super::fault::{Member, Side};
use super::field::{Field, SOON, process_state, signal};
use crate::etcd::MEMBERS;

/// How often, in thousandths, the primary's agent dies while a member is gone, so that the others are asked.
const ASKED: u64 = 500;

impl Field<'_> {
    /// Nobody can be asked any more: the witness dies, or most members of etcd do.
    pub(super) async fn kill_store(&mut self) -> Result<()> {
        let Some(etcd) = self.etcd.as_deref_mut() else {
            self.note("SIGKILL to the witness");
            return self.lab.kill_witness().await;
        };
        let leader = etcd.leader(self.lab).await?;
        let other = other_than(leader, self.rng.chance(500));
        for member in [leader, other] {
            etcd.kill(member).await?;
        }
        self.note(format!("SIGKILL to members {leader}, which leads, and {other} of etcd"));
        Ok(())
    }

    /// They can be asked again.
    pub(super) async fn start_store(&mut self) -> Result<()> {
        if self.etcd.is_none() {
            return self.start_witness().await;
        }
        for member in MEMBERS {
            self.start_member(member)?;
        }
        self.until_etcd_is_whole().await
    }

    /// SIGKILL to a member, which starts again after a while.
    pub(super) async fn kill_member(&mut self, which: Member) -> Result<()> {
        let member = self.member(which).await?;
        self.etcd()?.kill(member).await?;
        self.note(format!("SIGKILL to member {member} of etcd, {}", which.what()));
        self.without_member().await?;
        self.start_member(member)?;
        self.until_etcd_is_whole().await
    }

    /// SIGSTOP to a member, SIGCONT after a while.
    pub(super) async fn stop_member(&mut self, which: Member) -> Result<()> {
        let member = self.member(which).await?;
        let pid = self.etcd()?.pid(member)?;
        signal(pid, Signal::STOP)?;
        until("the member to stand still", SOON, async || {
            let state = process_state(pid)?;
            Ok(if state == 'T' { Ok(()) } else { Err(format!("state {state}")) })
        })
        .await?;
        self.note(format!("SIGSTOP to member {member} of etcd, {}", which.what()));
        let gone = self.without_member().await;
        signal(pid, Signal::CONT)?;
        self.note("SIGCONT to it");
        gone?;
        self.until_etcd_is_whole().await
    }

    /// The link of a member goes down for a while.
    pub(super) async fn cut_member(&mut self, which: Member) -> Result<()> {
        let member = self.member(which).await?;
        self.set_port(member, false)?;
        self.note(format!("the link of member {member} of etcd is down, {}", which.what()));
        let gone = self.without_member().await;
        self.set_port(member, true)?;
        self.note("it is up");
        gone?;
        self.until_etcd_is_whole().await
    }

    fn etcd(&mut self) -> Result<&mut crate::etcd::Etcd> {
        self.etcd.as_deref_mut().context("there is no etcd here")
    }

    async fn member(&mut self, which: Member) -> Result<&'static str> {
        let etcd = self.etcd.as_deref_mut().context("there is no etcd here")?;
        let leader = etcd.leader(self.lab).await?;
        Ok(match which {
            Member::Leader => leader,
            Member::Follower => other_than(leader, self.rng.chance(500)),
        })
    }

    /// Starts a member, if it is dead.
    fn start_member(&mut self, member: &'static str) -> Result<()> {
        let etcd = self.etcd.as_deref_mut().context("there is no etcd here")?;
        if etcd.pid(member).is_err() {
            etcd.run(self.lab, member)?;
            self.note(format!("member {member} of etcd started again"));
        }
        Ok(())
    }

    /// A member is gone for a while. Nothing happens, or the others are asked.
    async fn without_member(&mut self) -> Result<()> {
        if !self.rng.chance(ASKED) {
            self.hold().await;
            return Ok(());
        }
        self.moment(1_000).await;
        let host: Host = self.host(Side::Primary);
        self.kill_agent(host).await?;
        self.hold().await;
        self.start_agent(host).await
    }

    async fn until_etcd_is_whole(&mut self) -> Result<()> {
        let etcd = self.etcd.as_deref_mut().context("there is no etcd here")?;
        let leader = etcd.leader(self.lab).await?;
        self.note(format!("etcd is whole, and member {leader} leads"));
        Ok(())
    }
}

/// One of the two other members.
fn other_than(member: &'static str, first: bool) -> &'static str {
    let others: Vec<&'static str> = MEMBERS.into_iter().filter(|its| *its != member).collect();
    others[usize::from(!first)]
}
