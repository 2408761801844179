//! Two that are connected by a cable which the test holds in its hands.

use anyfabric_engine::{Remote, WriteOptions};
use anyfabric_wire::Descriptor;

use crate::ask::Settings;
use crate::fabric::Fabric;
use crate::harness::{eventually, Pair, LONG};
use crate::proxy::Proxy;

/// A pair whose connections run through a proxy.
pub(crate) struct Cabled {
    pub(crate) pair: Pair,
    pub(crate) proxy: Proxy,
    /// The peer's region, by way of the proxy.
    pub(crate) remote: Remote,
}

impl Cabled {
    pub(crate) fn new(fabric: &Fabric, nbytes: u64, change: impl Fn(&mut Settings)) -> Self {
        let pair = Pair::with(fabric, nbytes, change);
        let proxy = Proxy::before(&pair.peer.address);
        let descriptor = Descriptor { address: proxy.address.clone(), ..pair.remote.descriptor().clone() };
        let remote: Remote = descriptor.into();
        pair.engine.connect(&proxy.address, Some(LONG)).unwrap();
        assert_eq!(pair.engine.path(&proxy.address).transport, fabric.transport);
        Self { pair, proxy, remote }
    }

    pub(crate) fn write(&self, nbytes: u64, imm: u32) -> anyfabric_engine::Result<()> {
        let options = WriteOptions { imm: Some(imm), timeout: Some(LONG), ..WriteOptions::default() };
        let (src, dst) = (self.pair.region.slice(0..nbytes).unwrap(), self.remote.slice(0..nbytes).unwrap());
        self.pair.engine.write(&src, &dst, options)?.wait(None)
    }

    pub(crate) fn state(&self) -> String {
        self.pair.engine.path(&self.proxy.address).state
    }

    pub(crate) fn wait_for_streams(&self, fabric: &Fabric) {
        eventually("every stream stands", || {
            self.proxy.num_connections() > fabric.streams.0 && self.state() == "ready"
        });
    }
}
