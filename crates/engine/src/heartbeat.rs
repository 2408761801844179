//! Heartbeats: how two engines know of each other that they live.
//!
//! Over the control connection each sends a message within every interval, and
//! what that costs an engine with many peers is being woken. So a heartbeat is
//! answered at once, unless ours has just gone; who has one to send sends it to
//! everybody who will need one soon; and who has several peers is early, and so
//! ahead of those who have one: it sends all its heartbeats at once and hears
//! the answers together.
//!
//! The intervals of two engines may differ, and neither knows the other's. Who
//! is not answered asks again soon, and a second heartbeat in a row is always
//! answered. So the one with the shorter interval hears as often as it needs,
//! and an answer is not answered.
//!
//! Processes of one host also beat in the rings that both map, which wakes
//! nobody. Messages are then rare: they only show that the control connection
//! still carries some.

use anyfabric_transports::shm::Pulse;
use anyfabric_wire::Control;

use crate::inner::{nanos, Inner};
use crate::peer::Peer;
use crate::peers::Known;

/// The messages that tell a peer and us of each other's life.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heartbeat {
    /// When we last sent one.
    told_ns: u64,
    /// When one last came.
    pub(crate) heard_ns: u64,
    /// The peer looks at our ring, and we at its.
    is_mapped: bool,
    /// One has come since ours last went.
    owes_answer: bool,
    /// Its control messages that ours last confirmed.
    confirmed: u64,
}

impl Heartbeat {
    pub(crate) const fn new(now_ns: u64) -> Self {
        Self { told_ns: now_ns, heard_ns: now_ns, is_mapped: false, owes_answer: false, confirmed: 0 }
    }

    /// Between messages.
    const fn interval_ns(&self, heartbeat_ns: u64) -> u64 {
        if self.is_mapped {
            heartbeat_ns.saturating_mul(MAPPED_INTERVALS)
        } else {
            heartbeat_ns
        }
    }

    /// Whether one must go now, to one of so many peers.
    const fn is_due(&self, now_ns: u64, heartbeat_ns: u64, num_peers: usize) -> bool {
        let interval_ns = self.interval_ns(heartbeat_ns);
        let early_ns = if num_peers > 1 { interval_ns / 8 } else { 0 };
        now_ns.saturating_sub(self.told_ns) >= interval_ns - early_ns || self.asks_again(now_ns, heartbeat_ns)
    }

    /// Whether ours was not answered: the peer's interval is longer, or it is gone.
    const fn asks_again(&self, now_ns: u64, heartbeat_ns: u64) -> bool {
        self.heard_ns < self.told_ns && now_ns.saturating_sub(self.told_ns) >= self.interval_ns(heartbeat_ns) / 4
    }

    /// Whether one goes when others do.
    const fn goes_along(&self, now_ns: u64, heartbeat_ns: u64) -> bool {
        self.is_near(now_ns, heartbeat_ns) || self.asks_again(now_ns, heartbeat_ns)
    }

    /// Notes that one came; returns whether it is answered.
    const fn hear(&mut self, now_ns: u64, heartbeat_ns: u64) -> bool {
        self.heard_ns = now_ns;
        let is_second = std::mem::replace(&mut self.owes_answer, true);
        is_second || self.is_near(now_ns, heartbeat_ns)
    }

    /// Notes that ours goes.
    const fn tell(&mut self, now_ns: u64) {
        (self.told_ns, self.owes_answer) = (now_ns, false);
    }

    /// Whether one may go along with another, or as an answer: half of the
    /// earliest interval, so that of two peers at different times the one is
    /// near when the other is due.
    const fn is_near(&self, now_ns: u64, heartbeat_ns: u64) -> bool {
        now_ns.saturating_sub(self.told_ns) >= self.interval_ns(heartbeat_ns) / 16 * 7
    }
}

impl Inner {
    /// Whether some peer must be told now that we live.
    pub(crate) fn is_beat(&self, known: &Known, now_ns: u64) -> bool {
        let (heartbeat_ns, num_peers) = (nanos(self.config.heartbeat), known.num_live());
        known.live().any(|peer| {
            let is_due = peer.state().heartbeat.is_due(now_ns, heartbeat_ns, num_peers);
            is_due && peer.has_session() && peer.base.has_control()
        })
    }

    /// Beats where both map a ring; why the peer must be given up, if nothing
    /// shows that it lives.
    pub(crate) fn exchange_beats(&self, peer: &Peer, now_ns: u64) -> Result<(), String> {
        if let Some(shm) = peer.shm() {
            let pulse = shm.beat();
            if pulse == Pulse::Beats {
                peer.heard(now_ns);
            }
            // One that beats less often than we need is asked by messages.
            let is_rare = now_ns.saturating_sub(peer.heard_ns()) > nanos(self.config.heartbeat);
            peer.state().heartbeat.is_mapped = pulse != Pulse::None && !is_rare;
        }
        let heartbeat = peer.state().heartbeat;
        let (heartbeat_ns, lost) = (nanos(self.config.heartbeat), u64::from(self.config.heartbeats_lost));
        let silent_ns = now_ns.saturating_sub(peer.heard_ns());
        if silent_ns > heartbeat_ns.saturating_mul(lost) {
            return Err(format!("nothing heard for {:.1} s", silent_ns as f64 / 1e9));
        }
        let silent_ns = now_ns.saturating_sub(heartbeat.heard_ns);
        if heartbeat.is_mapped && silent_ns > heartbeat.interval_ns(heartbeat_ns).saturating_mul(lost) {
            return Err(format!("nothing heard on its control connection for {:.1} s", silent_ns as f64 / 1e9));
        }
        Ok(())
    }

    /// Sends a heartbeat to a peer that will need one soon.
    pub(crate) fn send_heartbeat(&self, peer: &Peer, now_ns: u64) {
        if peer.state().heartbeat.goes_along(now_ns, nanos(self.config.heartbeat)) {
            self.tell(peer, now_ns);
        }
    }

    pub(crate) fn on_heartbeat(&self, peer: &Peer, received: u64) {
        peer.base.confirm(received);
        let now_ns = self.clock.now_ns();
        let is_answered = peer.state().heartbeat.hear(now_ns, nanos(self.config.heartbeat));
        if is_answered {
            self.tell(peer, now_ns);
        }
    }

    /// A control message has come: confirms many at once, for who sends them keeps them until then.
    pub(crate) fn confirm_many(&self, peer: &Peer) {
        let confirmed = peer.state().heartbeat.confirmed;
        if peer.base.received().saturating_sub(confirmed) >= MANY {
            self.tell(peer, self.clock.now_ns());
        }
    }

    fn tell(&self, peer: &Peer, now_ns: u64) {
        let received = peer.base.received();
        {
            let heartbeat = &mut peer.state().heartbeat;
            heartbeat.tell(now_ns);
            heartbeat.confirmed = received;
        }
        peer.base.send_control(Control::Heartbeat { received }.encode());
    }
}

/// Heartbeats in memory for each that is sent.
const MAPPED_INTERVALS: u64 = 4;
/// Control messages that are confirmed without waiting for a heartbeat to be due: seldom more than come in a turn.
const MANY: u64 = 512;

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: u64 = 1000;
    const TICK: u64 = 250;
    const PEERS: u64 = 64;

    /// One hub and many with no other peer, whose clocks tick at other moments: no silence is longer than an interval
    /// and a tick, and soon the hub says everything at once.
    #[test]
    fn who_has_many_peers_speaks_first() {
        let mut hub: Vec<_> = (0..PEERS).map(|idx| Heartbeat::new(idx * 13)).collect();
        let mut others = hub.clone();
        let mut early = 0;
        for now in INTERVAL..20 * INTERVAL {
            let is_tick = now % TICK == 7;
            let is_beat = is_tick && hub.iter().any(|ours| ours.is_due(now, INTERVAL, PEERS as usize));
            for (idx, (ours, theirs)) in (0..).zip(hub.iter_mut().zip(&mut others)) {
                let silence = now - ours.told_ns.min(theirs.told_ns);
                assert!(silence <= INTERVAL + TICK, "{silence} of silence");
                let they_tick = (now + idx * 31) % TICK == 0;
                let (says, answers) = if is_beat && ours.goes_along(now, INTERVAL) {
                    (ours, theirs)
                } else if they_tick && theirs.is_due(now, INTERVAL, 1) {
                    early += u32::from(now > 4 * INTERVAL);
                    (theirs, ours)
                } else {
                    continue;
                };
                says.tell(now);
                if answers.hear(now, INTERVAL) {
                    answers.tell(now);
                    assert!(!says.hear(now, INTERVAL), "an answer is answered");
                }
            }
        }
        assert_eq!(early, 0, "others still speak first");
        assert!(hub.iter().all(|ours| ours.told_ns == hub[0].told_ns), "the hub speaks more than once an interval");
    }

    /// However often each needs to hear: nobody's silence is twice as long, and messages stay few.
    #[test]
    fn who_beats_more_often_is_answered() {
        for theirs_ns in [INTERVAL, 2 * INTERVAL, 5 * INTERVAL, 100 * INTERVAL] {
            let (mut ours, mut theirs) = (Heartbeat::new(0), Heartbeat::new(0));
            let mut messages = 0;
            for now in 0..200 * INTERVAL {
                assert!(now - ours.heard_ns < 2 * INTERVAL, "{} of silence", now - ours.heard_ns);
                let (says, answers, interval, other) = if now % TICK == 7 && ours.is_due(now, INTERVAL, 1) {
                    (&mut ours, &mut theirs, INTERVAL, theirs_ns)
                } else if now % TICK == 77 && theirs.is_due(now, theirs_ns, 1) {
                    (&mut theirs, &mut ours, theirs_ns, INTERVAL)
                } else {
                    continue;
                };
                says.tell(now);
                messages += 1;
                if answers.hear(now, other) {
                    answers.tell(now);
                    messages += 1;
                    assert!(!says.hear(now, interval), "an answer is answered");
                }
            }
            assert!(messages <= 200 * 3, "{messages} messages in 200 intervals");
        }
    }
}
