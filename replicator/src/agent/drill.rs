//! Whether a drill may begin: only if everything that it hits is whole elsewhere.
//!
//! Promise: nothing is changed but the VM's list of events.

use vmm_hooks::sys::process::PidFd;

use super::Agent;
use super::api::not_known;
use super::durable::Durable;
use super::sessions::blocking;
use crate::control::api::{ErrorBody, ErrorKind, ProtectionState, Role, VmStatus, WithoutWitness};
use crate::control::drill::{DrillPlan, DrillRequest, ProcessAt};

fn refused(message: impl Into<String>) -> ErrorBody {
    ErrorBody::new(ErrorKind::Refused, message)
}

impl Agent {
    /// What the drill would hit.
    pub(super) async fn plan_drill(&self, request: DrillRequest) -> Result<DrillPlan, ErrorBody> {
        let DrillRequest { vm: name, fault, confirmed } = request;
        let view = self.vms().get(&name).map(|vm| vm.view.clone()).ok_or_else(|| not_known(&name))?;
        let status = view.status();
        may_begin(&status)?;
        let (state_dir, of) = (self.config.state_dir.clone(), name.clone());
        let found = blocking(move || Durable::find(&state_dir, &of)).await?;
        let durable = found.ok().flatten().ok_or_else(|| refused(format!("what is kept of {name} cannot be read")))?;
        let Some(protection) = durable.protection() else {
            return Err(refused(format!("it is not known how {name} is to be protected")));
        };
        if protection.once {
            return Err(refused(format!("{name} is protected once: after the drill nobody would protect it again"))
                .advise("unprotect it and protect it without --once"));
        }
        let at = durable.guest().filter(|at| at.attached).ok_or_else(|| refused(format!("{name} is not attached")))?;
        let others = if fault.hits_agent() { self.beside(&name)? } else { Vec::new() };
        let warnings = if fault.hits_agent() { warnings(protection.without_witness, &name) } else { Vec::new() };
        let agent = PidFd::open(std::process::id())
            .map_err(|error| ErrorBody::new(ErrorKind::Failed, "this agent cannot find itself").because(&error))?;
        if confirmed {
            view.drill(&format!("a drill begins: {fault}"));
        }
        Ok(DrillPlan {
            host: self.identity.name().to_owned(),
            peer: status.peer,
            incarnation: self.identity.incarnation().0,
            generation: status.generation,
            agent: ProcessAt { pid: agent.pid(), started: agent.start_time() },
            vm: Some(ProcessAt { pid: at.pid, started: at.started }),
            others,
            warnings,
        })
    }

    /// The other VMs that run here, if all of them stand it.
    fn beside(&self, name: &str) -> Result<Vec<String>, ErrorBody> {
        let known: Vec<VmStatus> = self.vms().values().map(|vm| vm.view.status()).collect();
        let others = known.into_iter().chain(self.unprotected_microvms()).filter(|vm| vm.name != name);
        let mut beside = Vec::new();
        for vm in others {
            // A copy for somebody else is made anew; what has ended or moved on is not hit.
            if vm.role == Role::Standby || vm.state == ProtectionState::Fenced {
                continue;
            }
            if vm.state != ProtectionState::Protected {
                return Err(refused(format!("this agent also has {}, which is {}", vm.name, vm.state))
                    .advise("protect it first, or drill with kill-vm, which does not hit the agent"));
            }
            beside.push(vm.name);
        }
        Ok(beside)
    }
}

fn may_begin(status: &VmStatus) -> Result<(), ErrorBody> {
    let name = &status.name;
    if status.role == Role::Standby {
        return Err(
            refused(format!("{name} does not run on this host")).advise(format!("begin the drill on {}", status.peer))
        );
    }
    if status.state != ProtectionState::Protected {
        return Err(refused(format!("{name} is not protected: it is {}", status.state))
            .advise("it would be lost; begin the drill when it is protected"));
    }
    Ok(())
}

fn warnings(without_witness: Option<WithoutWitness>, name: &str) -> Vec<String> {
    let told = without_witness.map(|_| {
        format!("{name} has no witness: if this host keeps its record, it stands until the agent here is started again")
    });
    told.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_protected_vm_that_runs_here_may_be_drilled() {
        let mut status = VmStatus::new("web-1", "1", Role::Primary);
        "host-b".clone_into(&mut status.peer);
        let error = may_begin(&status).unwrap_err();
        assert_eq!(
            (error.kind, error.message.as_str()),
            (ErrorKind::Refused, "web-1 is not protected: it is unprotected")
        );
        status.state = ProtectionState::Protected;
        assert_eq!(may_begin(&status), Ok(()));
        status.role = Role::Standby;
        assert_eq!(may_begin(&status).unwrap_err().advice, "begin the drill on host-b");
    }

    #[test]
    fn whoever_has_no_witness_is_told_what_that_means() {
        assert!(warnings(None, "web-1").is_empty());
        assert!(warnings(Some(WithoutWitness::Stall), "web-1")[0].contains("stands until the agent"));
    }
}
