//! The process of a microVM, for the tests of this crate: `vmm_hooks::kvm::process`. The product's is `understudy` itself.

fn main() -> std::process::ExitCode {
    vmm_hooks::kvm::process::child::main()
}
