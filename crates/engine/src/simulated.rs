//! An engine that lives in a simulation: no socket, no thread, no real time.
//!
//! Everything but the bytes on the wire is the engine's own code: sessions,
//! heartbeats, loss, fencing, counting. A wait lets the simulation go on; then
//! every engine of it takes its turn, in the waiting thread.

use std::io;
use std::sync::{Arc, Weak};

use anyfabric_transports::loopback::{Endpoint, Mail, Resident, Simulation};
use anyfabric_wire::handshake::{Hello, Host};
use anyfabric_wire::VERSION;

use crate::control::Way;
use crate::driver::Driver;
use crate::inner::{lock, Inner};
use crate::meet::{Calling, MeetError};
use crate::peer::Peer;
use crate::{Config, Engine, Error, Result};

impl Engine {
    /// Starts an engine inside a simulation; `nics` are the speeds of its NICs,
    /// 1 or more of them. `transports`, `require`, `listen` and `secret` mean
    /// nothing there.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// use anyfabric_engine::transports::loopback::{Fabric, Fault, Simulation};
    /// use anyfabric_engine::{Code, Config, Engine};
    ///
    /// # fn main() -> Result<(), anyfabric_engine::Error> {
    /// let simulation = Simulation::new(7, Fabric::default());
    /// let decode = Engine::simulated(&simulation, Config::default(), &[400, 400])?;
    /// let prefill = Engine::simulated(&simulation, Config::default(), &[400])?;
    ///
    /// let counter = decode.counter(None, &[prefill.address().clone()])?;
    /// simulation.schedule(Duration::from_secs(5), Fault::Kill(prefill.address().engine));
    /// // The clock is the simulation's: the wait is over at once.
    /// let error = counter.wait(1, Some(Duration::from_secs(60))).expect_err("nothing comes");
    /// assert_eq!(error.code, Code::PeerLost);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// `InvalidArgument` for a setting.
    pub fn simulated(simulation: &Simulation, config: Config, nics: &[u32]) -> Result<Self> {
        if nics.is_empty() {
            return Err(Error::invalid("an engine has at least one NIC").during("start"));
        }
        let inner = Arc::new(Inner::new(config, Some(simulation.endpoint(nics)))?);
        if let Some(endpoint) = &inner.simulated {
            let resident: Weak<dyn Resident> = Arc::downgrade(&(Arc::clone(&inner) as Arc<dyn Resident>));
            endpoint.attend(resident);
        }
        Ok(Self::without_worker(inner))
    }
}

impl Resident for Inner {
    fn turn(&self) {
        if self.presence.is_stopped() {
            return;
        }
        let mut driver = lock(&self.driver);
        self.take_mail(&mut driver);
        while self.poll_links(&mut driver) {}
        self.tick(&mut driver, self.clock.now_ns());
        while self.poll_links(&mut driver) {}
    }

    fn next_turn_ns(&self) -> u64 {
        if self.presence.is_stopped() {
            return u64::MAX;
        }
        lock(&self.driver).next_tick_ns()
    }
}

impl Inner {
    pub(crate) fn call_simulated(&self, driver: &mut Driver, peer: &Arc<Peer>, hello: Hello, endpoint: &Endpoint) {
        let call = endpoint.call(peer.address.engine, hello.clone());
        let deadline_ns = self.clock.now_ns() + self.patience_ns(&hello.purpose);
        let calling = Calling { peer: Arc::clone(peer), hello, to: None, others: Vec::new(), failed: None };
        driver.calls.insert(call, (calling, deadline_ns));
    }

    fn take_mail(&self, driver: &mut Driver) {
        while let Some(mail) = self.simulated.as_ref().and_then(Endpoint::take_mail) {
            match mail {
                Mail::Called { call, hello } => self.introduced(driver, Way::Call(call), *hello, VERSION),
                Mail::Answered { call, welcome } => {
                    if let Some((calling, _)) = driver.calls.remove(&call) {
                        self.welcomed(driver, calling, Way::Call(call), *welcome, VERSION);
                    }
                }
                Mail::Failed { call, refused } => {
                    let kind = if refused { io::ErrorKind::ConnectionRefused } else { io::ErrorKind::ConnectionReset };
                    self.simulated_call_failed(driver, call, kind);
                }
            }
        }
    }

    pub(crate) fn expire_calls(&self, driver: &mut Driver, now_ns: u64) {
        let expired: Vec<u64> =
            driver.calls.iter().filter(|(_, (_, until_ns))| *until_ns <= now_ns).map(|(call, _)| *call).collect();
        for call in expired {
            self.simulated_call_failed(driver, call, io::ErrorKind::TimedOut);
        }
    }

    fn simulated_call_failed(&self, driver: &mut Driver, call: u64, kind: io::ErrorKind) {
        if let Some((calling, _)) = driver.calls.remove(&call) {
            let error = MeetError::Io(io::Error::from(kind));
            self.call_failed(&calling.peer, &calling.hello.purpose, &error);
        }
    }
}

/// A host of its own for every engine.
pub(crate) fn simulated_host(endpoint: &Endpoint) -> Host {
    Host { boot_id: endpoint.random(), pid: 0, name: "simulated".into() }
}
