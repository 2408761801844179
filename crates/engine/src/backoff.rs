//! How long the attempts to restore a connection stand apart: the first is made at
//! once, and each wait after that is twice the one before, between two bounds. A
//! connection that lasted starts it again; one that ends as soon as it is made
//! does not.

/// The waits between attempts to restore one connection.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Backoff {
    wait_ns: u64,
    has_tried: bool,
    connected_ns: u64,
}

impl Backoff {
    /// How long to wait before the next attempt.
    pub(crate) fn next_ns(&mut self, heartbeat_ns: u64) -> u64 {
        if !std::mem::replace(&mut self.has_tried, true) {
            return 0;
        }
        let shortest_ns = (heartbeat_ns / SHORTEST).clamp(1, LONGEST_NS);
        self.wait_ns = (self.wait_ns * 2).clamp(shortest_ns, LONGEST_NS);
        self.wait_ns
    }

    /// The connection stands.
    pub(crate) const fn connected(&mut self, now_ns: u64) {
        self.connected_ns = now_ns;
    }

    /// The connection has broken.
    pub(crate) fn broke(&mut self, now_ns: u64, heartbeat_ns: u64) {
        if now_ns.saturating_sub(self.connected_ns) >= heartbeat_ns {
            *self = Self::default();
        }
    }
}

/// So many of the shortest waits are one heartbeat.
const SHORTEST: u64 = 64;
/// Several attempts fit the heartbeats after which a peer is lost.
const LONGEST_NS: u64 = 250_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn waits_double_between_their_bounds() {
        let mut backoff = Backoff::default();
        let waits: Vec<_> = (0..8).map(|_| backoff.next_ns(SECOND)).collect();
        let first = SECOND / 64;
        assert_eq!(waits, [0, first, 2 * first, 4 * first, 8 * first, LONGEST_NS, LONGEST_NS, LONGEST_NS]);
    }

    #[test]
    fn a_connection_that_lasted_starts_again_and_one_that_did_not_goes_on() {
        let mut backoff = Backoff::default();
        assert_eq!((0..4).map(|_| backoff.next_ns(SECOND)).last(), Some(SECOND / 16));
        backoff.connected(5 * SECOND);
        backoff.broke(6 * SECOND - 1, SECOND);
        assert_eq!(backoff.next_ns(SECOND), SECOND / 8);
        backoff.connected(7 * SECOND);
        backoff.broke(8 * SECOND, SECOND);
        assert_eq!((backoff.next_ns(SECOND), backoff.next_ns(SECOND)), (0, SECOND / 64));
    }

    /// Any interval can be configured.
    #[test]
    fn no_heartbeat_is_too_short_or_too_long() {
        for heartbeat_ns in [1, 63, 20 * SECOND, u64::MAX] {
            let mut backoff = Backoff::default();
            assert_eq!(backoff.next_ns(heartbeat_ns), 0);
            let waits: Vec<_> = (0..70).map(|_| backoff.next_ns(heartbeat_ns)).collect();
            assert!(waits.is_sorted() && waits[0] > 0 && waits[69] == LONGEST_NS, "{heartbeat_ns}: {waits:?}");
        }
    }
}
