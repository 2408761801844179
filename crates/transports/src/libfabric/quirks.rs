//! What a provider needs that no capability of it says.
//!
//! The only place where providers are known by name. An entry applies to a
//! provider's entries of `fi_getinfo`; everything else is decided by what they
//! say of themselves.

use super::sys::{FI_OPT_CUDA_API_PERMITTED, FI_OPT_EFA_USE_UNSOLICITED_WRITE_RECV, FI_OPT_SHARED_MEMORY_PERMITTED};

/// What is special about a provider.
#[derive(Debug, PartialEq, Eq)]
pub struct Quirks {
    /// Name of the provider, as `fi_getinfo` gives it.
    pub provider: &'static str,
    /// Name of the fabric, where a provider has several; empty for any.
    pub fabric: &'static str,
    /// Of two entries for one NIC, the one with the higher preference is used.
    pub preference: u8,
    /// Peers with another number cannot talk to it, although the protocol that
    /// it names is the same.
    pub dialect: u32,
    /// Flags of an endpoint, set before it is enabled. A library that does not
    /// know one is used as it is.
    pub options: &'static [(i32, bool)],
    /// Does not announce delivery completeness although its writes complete only
    /// when the peer's NIC has acknowledged them.
    pub acknowledges_writes: bool,
    /// Remembers endpoints that were closed, and crashes in `fi_trywait` for it. From
    /// then on that is not called, and waiting may return for nothing.
    pub crashes_after_close: bool,
    /// Frees an endpoint although connections to it are accepted that have not said
    /// whose they are, and looks at what was freed when they do. They are ended
    /// before an endpoint is closed.
    pub forgets_handshakes: bool,
    /// Drops completions for which its queue has no room; and immediates of peers
    /// need none of our receives, so that nothing bounds how many come at once.
    pub drops_completions: bool,
    /// Drops the immediates of writes, or carries them only with keys of its own
    /// choice for memory, which would change with every endpoint.
    pub drops_write_data: bool,
}

impl Quirks {
    /// The entry for a provider; most need nothing.
    pub fn of(provider: &str, fabric: &str) -> &'static Self {
        let applies =
            |quirks: &&Self| quirks.provider == provider && (quirks.fabric.is_empty() || quirks.fabric == fabric);
        QUIRKS.iter().find(applies).unwrap_or(&NONE)
    }
}

const NONE: Quirks = Quirks {
    provider: "",
    fabric: "",
    preference: 0,
    dialect: 0,
    options: &[],
    acknowledges_writes: false,
    crashes_after_close: false,
    forgets_handshakes: false,
    drops_completions: false,
    drops_write_data: false,
};

/// EFA: its shared-memory path bypasses the NIC and its key checks, and failed on
/// GPU memory; its CUDA calls would make a context of their own; an unsolicited
/// immediate needs no posted receive, so that many may arrive at once.
const EFA_OPTIONS: &[(i32, bool)] = &[
    (FI_OPT_SHARED_MEMORY_PERMITTED, false),
    (FI_OPT_CUDA_API_PERMITTED, false),
    (FI_OPT_EFA_USE_UNSOLICITED_WRITE_RECV, true),
];

const QUIRKS: &[Quirks] = &[
    // Hands every call to the device, without a protocol of the provider's own between.
    Quirks {
        provider: "efa",
        fabric: "efa-direct",
        preference: 2,
        dialect: 1,
        options: EFA_OPTIONS,
        acknowledges_writes: true,
        drops_completions: true,
        ..NONE
    },
    Quirks { provider: "efa", preference: 1, options: EFA_OPTIONS, drops_completions: true, ..NONE },
    // Seen with 1.17.
    Quirks { provider: "tcp;ofi_rxm", crashes_after_close: true, ..NONE },
    // One provider, under its name of 1.17 and its later one. Mended by ofiwg/libfabric pull request 12709, after 2.6.
    Quirks { provider: "net", forgets_handshakes: true, ..NONE },
    Quirks { provider: "tcp", forgets_handshakes: true, ..NONE },
    // Before 2.5 the one; later the other, if FI_CXI_ENABLE_WRITEDATA=1.
    Quirks { provider: "cxi", drops_write_data: true, ..NONE },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_direct_fabric_of_efa_comes_first_and_does_not_talk_to_the_other() {
        let (direct, efa) = (Quirks::of("efa", "efa-direct"), Quirks::of("efa", "efa"));
        assert!(direct.preference > efa.preference);
        assert_ne!(direct.dialect, efa.dialect);
        assert_eq!(direct.options, efa.options);
    }

    #[test]
    fn most_providers_need_nothing() {
        for provider in ["psm3", "verbs;ofi_rxm", "opx"] {
            assert_eq!(Quirks::of(provider, "any"), &NONE);
        }
    }
}
