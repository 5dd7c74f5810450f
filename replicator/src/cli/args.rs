//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use super::dashboards::DashboardsCommand;
use super::drill::ChaosCommand;
use super::exit::EXIT_CODES;
use super::microvm::RunArgs;
use super::units::{HostPort, Listen};
use crate::control::policy::{DurabilityPolicy, EpochPolicy, ShadowPolicy, WithoutWitness};
use crate::demo::DemoArgs;

/// The longest time that a pairing window may stay open.
pub const MAX_PAIRING: Duration = Duration::from_secs(3_600);

/// Makes a running virtual machine survive the death of its host.
#[derive(Debug, Clone, Parser)]
#[command(name = "understudy", version, about, after_help = EXIT_CODES, propagate_version = true)]
pub struct Cli {
    /// Control socket of the agent (or witness) to talk to
    #[arg(long, global = true, value_name = "SOCKET", env = "UNDERSTUDY_CONTROL")]
    pub control: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Run this host's agent
    Agent(AgentArgs),
    /// Run a witness: keeps who owns each VM; on a third host
    Witness(WitnessArgs),
    /// The process of a microVM, which the agent starts
    #[command(hide = true)]
    Microvm {
        /// What the microVM is called, for who lists processes.
        name: String,
    },
    /// Those that ask a running agent.
    #[command(flatten)]
    Ask(AskCommand),
    /// Dashboards and alerts for Grafana and Prometheus
    #[command(subcommand)]
    Dashboards(DashboardsCommand),
    /// Show all of it on this machine: two hosts as network namespaces, a VM with Redis, a kill
    Demo(DemoArgs),
}

/// The subcommands that are clients of the control API.
#[derive(Debug, Clone, Subcommand)]
pub enum AskCommand {
    /// Pair with another node, or let one pair with this one
    ///
    /// Without HOST this opens a pairing window and prints a one-time code; run `understudy pair
    /// HOST --code CODE` on the other host then.
    Pair(PairArgs),
    /// Say what would stop protection here, and what to do about it
    Doctor(DoctorArgs),
    /// Start a microVM on KVM, in a process of this host's agent
    ///
    /// It ends when the agent's process does: one that is protected goes on with its standby then.
    Run(RunArgs),
    /// End a microVM that is not protected
    End(VmArgs),
    /// Protect a running VM: keep a copy of it ready on another host
    ///
    /// Shows progress until the VM is protected. Interrupting it does not end the work.
    Protect(ProtectArgs),
    /// Show VMs, their protection, and peers
    Status(StatusArgs),
    /// Show what happened to a VM on this host, also before the agent's last start
    Events(EventsArgs),
    /// Prove that the standby's copy of a VM loads
    Rehearse(VmArgs),
    /// Let the other host go on with a VM
    Failover(FailoverArgs),
    /// Move a VM back to the host that it was first protected on, without loss; on the host that runs it
    Failback(VmArgs),
    /// End the protection of a VM and leave it as it was found, running
    Unprotect(VmArgs),
    /// Break something on purpose and see the VM go on
    #[command(subcommand)]
    Chaos(ChaosCommand),
    /// Say whether a VM may be booted from its disks here: for a unit's ExecCondition=, libvirt's hook, and for you
    ///
    /// Exit code 0 is yes; any other is no, with one sentence that says why.
    MayStart(MayStartArgs),
}

/// `understudy may-start`
#[derive(Debug, Clone, Args)]
pub struct MayStartArgs {
    /// The VM's name
    #[arg(required_unless_present = "images")]
    pub vm: Option<String>,
    /// An image that it is to be booted from; may be given again
    #[arg(long = "image", value_name = "FILE")]
    pub images: Vec<PathBuf>,
    /// Boot from these images even if they were the VM's disks only before it ran elsewhere: what it wrote since is not in them
    #[arg(long, requires = "images")]
    pub release: bool,
    /// How long to wait for an answer: when a host boots, its agent and the witness may not be there yet
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = humantime::parse_duration)]
    pub wait: Duration,
    /// The agent's state directory, which is looked at if no agent answers [default: as in /etc/understudy/agent.toml]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
}

/// `understudy events`
#[derive(Debug, Clone, Args)]
pub struct EventsArgs {
    /// The VM's name
    pub vm: String,
    /// How many, the newest
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub last: usize,
    /// Print JSON, one event a line
    #[arg(long)]
    pub json: bool,
}

/// `understudy agent`
#[derive(Debug, Clone, Default, Args)]
pub struct AgentArgs {
    /// Configuration file [default: /etc/understudy/agent.toml if it exists]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Name under which peers know this host [default: the host's name]
    #[arg(long)]
    pub name: Option<String>,
    /// UDP address of replication [default: 0.0.0.0:7844]
    #[arg(long, value_name = "ADDR")]
    pub listen: Option<SocketAddr>,
    /// UDP address of heartbeats; once for each link to the other hosts, in the same order on all of them [default: port 7845 of the
    /// same address]
    #[arg(long, value_name = "ADDR")]
    pub heartbeat_listen: Vec<SocketAddr>,
    /// UDP address of pairing windows, bound while one is open [default: port 7843 of the same address]
    #[arg(long, value_name = "ADDR")]
    pub pair_listen: Option<SocketAddr>,
    /// What must survive a restart [default: /var/lib/understudy/agent]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Sockets of the agent and of twins [default: /run/understudy]
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// Where /metrics and the status page are served, or `off` [default: 127.0.0.1:9644]
    #[arg(long, value_name = "ADDR")]
    pub metrics: Option<Listen>,
}

/// `understudy witness`
#[derive(Debug, Clone, Default, Args)]
pub struct WitnessArgs {
    /// Configuration file [default: /etc/understudy/witness.toml if it exists]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Name under which peers know this witness [default: the host's name]
    #[arg(long)]
    pub name: Option<String>,
    /// UDP address [default: 0.0.0.0:7846]
    #[arg(long, value_name = "ADDR")]
    pub listen: Option<SocketAddr>,
    /// UDP address of pairing windows, bound while one is open [default: port 7843 of the same address]
    #[arg(long, value_name = "ADDR")]
    pub pair_listen: Option<SocketAddr>,
    /// Its records; losing them makes it another witness [default: /var/lib/understudy/witness]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Its control socket [default: /run/understudy-witness]
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
}

/// `understudy pair`
#[derive(Debug, Clone, Args)]
pub struct PairArgs {
    /// The node to pair with; its window must be open [default port: 7843]
    #[arg(value_name = "HOST[:PORT]", requires = "code")]
    pub host: Option<HostPort>,
    /// The code that the other node printed
    #[arg(long, requires = "host")]
    pub code: Option<String>,
    /// How long the window stays open
    #[arg(long, default_value = "5m", value_parser = pairing_time, conflicts_with = "host")]
    pub ttl: Duration,
    /// Open the window on this host's witness instead of its agent; with HOST: expect it to be a witness
    #[arg(long)]
    pub witness: bool,
}

/// `understudy doctor`
#[derive(Debug, Clone, Args)]
pub struct DoctorArgs {
    /// Also look at this VM: a name, a QMP socket's path or a PID
    pub vm: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `understudy protect`
#[derive(Debug, Clone, Args)]
pub struct ProtectArgs {
    /// A name, a QMP socket's path or a PID
    pub vm: String,
    /// The standby, by the name it was paired as
    #[arg(long, value_name = "HOST")]
    pub to: String,
    /// When an epoch ends: `auto` (as soon as output waits) or a length such as `25ms` [default: the agent's]
    #[arg(long, value_name = "auto|TIME")]
    pub epoch: Option<EpochPolicy>,
    /// Memory for a copy of the sent pages, which makes epochs small: `full`, a size, or `off` [default: the agent's]
    #[arg(long, value_name = "full|SIZE|off")]
    pub shadow: Option<ShadowPolicy>,
    /// When the standby acknowledges disk writes: on its stable storage (`disk`), or in its memory (`memory`)
    #[arg(long, value_name = "disk|memory", default_value = "disk")]
    pub durability: DurabilityPolicy,
    /// The witness, by the name it was paired as [default: the agent's]
    #[arg(long, value_name = "NAME")]
    pub witness: Option<String>,
    /// There is no third host: one of the two keeps the record of who may run the VM, this one at first. When that host is lost the VM
    /// stands until it is back (`stall`), or until `failover --force` on the other one (`manual`)
    #[arg(long, value_name = "stall|manual", num_args = 0..=1, require_equals = true, default_missing_value = "stall", conflicts_with = "witness")]
    pub without_witness: Option<WithoutWitness>,
    /// One more host that may stand by later, by the name it was paired as; may be given again, best first
    ///
    /// After a failure whoever runs the VM protects it again by itself: with the host of --to, with one of these, or with the
    /// first host when it is back.
    #[arg(long = "standby", value_name = "HOST")]
    pub standbys: Vec<String>,
    /// Protect it once: after a failure nobody looks for another standby
    #[arg(long)]
    pub once: bool,
}

/// `understudy status`
#[derive(Debug, Clone, Args)]
pub struct StatusArgs {
    /// Only this VM, in detail
    pub vm: Option<String>,
    /// Draw again each second until ^C
    #[arg(long)]
    pub watch: bool,
    /// Print JSON, exactly as the agent answers; with --watch one document a line
    #[arg(long)]
    pub json: bool,
}

/// A subcommand that takes a VM and nothing else.
#[derive(Debug, Clone, Args)]
pub struct VmArgs {
    /// The VM's name
    pub vm: String,
}

/// `understudy failover`
#[derive(Debug, Clone, Args)]
pub struct FailoverArgs {
    /// The VM's name
    pub vm: String,
    /// On the primary: stop here, commit the last epoch, go on there. Without it, on the standby: ask the witness for
    /// ownership at once, as if the primary were silent
    #[arg(long)]
    pub planned: bool,
    /// Of a VM that is protected with `--without-witness=manual`: go on here, because the other host is dead. That must be confirmed, by the
    /// agent's fence command or by --confirm-dead; what the other host did alone since is lost. Of a VM that waits here for its other host to be
    /// off (`[fence] required`): try the fence command now, or take your word for it
    #[arg(long, conflicts_with = "planned")]
    pub force: bool,
    /// You know that this host is dead: it has no power, or was reset. To cut its network is not enough
    #[arg(long, value_name = "HOST", requires = "force")]
    pub confirm_dead: Option<String>,
    /// Of a VM that waits here for its other host to be off: that host is well, give it the VM back
    #[arg(long, conflicts_with_all = ["planned", "force"])]
    pub give_back: bool,
}

fn pairing_time(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|_| "write a time such as `5m`".to_owned())?;
    if time < Duration::from_secs(1) || time > MAX_PAIRING {
        return Err("a pairing window is open for 1s to 1h".to_owned());
    }
    Ok(time)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("understudy").chain(line.split_whitespace()))
    }

    #[test]
    fn the_definition_holds_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn protect_reads_its_policies() {
        let Command::Ask(AskCommand::Protect(args)) =
            parse("protect web-1 --to host-b --epoch 25ms --shadow 1GiB").unwrap().command
        else {
            panic!("another command");
        };
        assert_eq!((args.vm.as_str(), args.to.as_str()), ("web-1", "host-b"));
        assert_eq!(args.epoch, Some(EpochPolicy::Fixed(Duration::from_millis(25))));
        assert_eq!(args.shadow, Some(ShadowPolicy::Size(1 << 30)));
    }

    #[test]
    fn the_control_socket_may_stand_anywhere() {
        for line in ["--control /s status", "status --control /s", "status web-1 --control=/s --json"] {
            assert_eq!(parse(line).unwrap().control, Some("/s".into()), "{line}");
        }
    }

    #[test]
    fn pairing_either_opens_or_joins() {
        let Command::Ask(AskCommand::Pair(open)) = parse("pair --ttl 90s --witness").unwrap().command else { panic!() };
        assert_eq!((open.ttl, open.witness, open.host), (Duration::from_secs(90), true, None));
        let Command::Ask(AskCommand::Pair(join)) = parse("pair host-b:99 --code 1-2").unwrap().command else {
            panic!()
        };
        assert_eq!(join.host, Some(HostPort { host: "host-b".into(), port: Some(99) }));
        for line in ["pair host-b", "pair --code 1", "pair --ttl 2h", "pair --ttl soon", "pair :1 --code 1"] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn wrong_lines_say_what_to_write() {
        for (line, expected) in [
            ("protect web-1", "--to <HOST>"),
            ("protect web-1 --to b --epoch often", "write `auto` or a duration"),
            ("protect web-1 --to b --epoch 1us", "1ms to 10s"),
            ("protect web-1 --to b --shadow some", "write `full`, `off` or a size"),
            ("protect web-1 --to b --durability some", "write `disk` or `memory`"),
            ("agent --metrics yes", "write IP:PORT, or `off`"),
            ("agent --listen host-a", "invalid socket address"),
            ("failover web-1 --force --planned", "cannot be used with"),
            ("failover web-1 --confirm-dead host-a", "--force"),
            ("failover web-1 --give-back --force", "cannot be used with"),
            ("protect web-1 --to b --without-witness=never", "stall, manual"),
            ("rehearse", "<VM>"),
        ] {
            let error = parse(line).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{line}");
            assert!(error.to_string().contains(expected), "{line}: {error}");
        }
    }

    #[test]
    fn the_help_has_the_exit_codes() {
        let help = Cli::command().render_help().to_string();
        assert!(help.contains("4  no agent answers"), "{help}");
    }
}
