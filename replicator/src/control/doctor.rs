//! The checklist of this host, and of one VM: what `understudy doctor` prints with an agent and without one.

use vmm_hooks::qemu;

use super::api::{Check, DoctorReport, ErrorBody, Verdict};

/// Checks this host, and `vm` (a name, a QMP socket's path or a PID) if given. Blocks: it asks the kernel and the VM's
/// monitor. Changes nothing.
///
/// # Errors
/// If no running VM, or more than one, is meant by `vm`.
pub fn local(vm: Option<&str>) -> Result<DoctorReport, ErrorBody> {
    let target = vm.map(qemu::resolve).transpose()?;
    let checks = qemu::doctor(target.as_ref()).into_iter().map(Check::from).collect();
    Ok(DoctorReport { checks })
}

impl From<qemu::Check> for Check {
    fn from(check: qemu::Check) -> Self {
        let verdict = match check.level {
            qemu::CheckLevel::Ok => Verdict::Ok,
            qemu::CheckLevel::Warning => Verdict::Warning,
            qemu::CheckLevel::Refusal => Verdict::Refused,
        };
        Self { name: check.name, verdict, found: check.message, advice: check.advice }
    }
}
