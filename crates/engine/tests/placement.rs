//! Which NICs and cores an engine takes on recorded machines, whose NICs are the null NIC's.

// A test may unwrap: its panic is the report.
#![allow(clippy::unwrap_used)]

#[path = "../../transports/tests/topology/machine.rs"]
#[allow(dead_code, reason = "others read machines as they are")]
mod machine;
#[path = "../../transports/tests/null_nic/mod.rs"]
#[allow(dead_code, reason = "no knob is turned here")]
mod null_nic;

use anyfabric_engine::transports::verbs::VerbsSettings;
use anyfabric_engine::{Code, Config, Engine};
use machine::{described, Machine};

/// An HGX H100 whose InfiniBand NICs are `null0` to `null7`, in the order of its GPUs.
fn hgx() -> Machine {
    let mut lines = described("hgx-h100");
    for (idx, name) in
        ["mlx5_0", "mlx5_1", "mlx5_2", "mlx5_5", "mlx5_6", "mlx5_7", "mlx5_8", "mlx5_9"].iter().enumerate()
    {
        lines = lines.replace(&format!("nic {name} "), &format!("nic null{idx} "));
    }
    Machine::from(&lines)
}

fn config(machine: &Machine, devices: &[&str]) -> Config {
    Config {
        transports: vec!["verbs".into()],
        devices: devices.iter().map(|name| (*name).to_owned()).collect(),
        machine: machine.root.clone(),
        verbs: VerbsSettings { library: Some(null_nic::library().to_owned()), ..VerbsSettings::default() },
        ..Config::default()
    }
}

/// Names of the NICs that an engine has opened.
fn opened(engine: &Engine) -> Vec<String> {
    let transports = engine.info().transports;
    let verbs = transports.iter().find(|transport| transport.name == "verbs").unwrap();
    verbs.nics.iter().map(|nic| nic.name.split(' ').next().unwrap().to_owned()).collect()
}

fn with(config: Config) -> Vec<String> {
    opened(&Engine::new(config).unwrap())
}

#[test]
fn nics_are_those_near_the_devices() {
    let hgx = hgx();
    let given = |devices: &[&str]| config(&hgx, devices);
    // Each GPU has one beside it; more are on its node.
    assert_eq!(with(given(&["gpu:0000:61:00.0"])), ["null3"]);
    assert_eq!(with(Config { nics_per_device: Some(2), ..given(&["gpu:0000:9d:00.0"]) })[0], "null4");
    let four = with(Config { nics_per_device: Some(4), ..given(&["gpu:0000:9d:00.0"]) });
    assert_eq!(four.len(), 4);
    assert!(four.iter().all(|name| ["null4", "null5", "null6", "null7"].contains(&name.as_str())), "{four:?}");
    let eight = with(Config { nics_per_device: Some(8), ..given(&["gpu:0000:9d:00.0"]) });
    assert_eq!((eight.len(), eight[0].as_str()), (8, "null4"));
    // Devices take turns, until there are eight.
    assert_eq!(with(given(&["gpu:0000:df:00.0", "gpu:0000:1b:00.0"])), ["null7", "null0"]);
    let two = Config { nics_per_device: Some(3), ..given(&["gpu:0000:df:00.0", "gpu:0000:1b:00.0"]) };
    assert_eq!(with(two.clone())[..2], ["null7", "null0"]);
    // Three of each node, and none twice.
    assert_eq!(with(two).len(), 6);
    let both = Config { nics_per_device: Some(7), ..given(&["gpu:0000:df:00.0", "gpu:0000:1b:00.0"]) };
    assert_eq!(with(both).len(), 8);
    assert_eq!(with(given(&["cpu:1"])), ["null4", "null5", "null6", "null7"]);
    assert_eq!(with(given(&["cpu:0", "cpu:1"])).len(), 8);
    // Whoever names NICs means them.
    assert_eq!(with(Config { nics: vec!["null7".into()], ..given(&["gpu:0000:1b:00.0"]) }), ["null7"]);
}

#[test]
fn what_serves_a_device_is_told() {
    let hgx = hgx();
    let far = Config { nics: vec!["null7".into(), "null0".into()], ..config(&hgx, &["gpu:0000:1b:00.0"]) };
    let info = Engine::new(far).unwrap().info();
    assert_eq!(info.devices.len(), 1);
    assert_eq!(info.devices[0].device, "gpu:0000:1b:00.0");
    let nics: Vec<_> = info.devices[0].nics.iter().map(|nic| (nic.name.as_str(), nic.distance)).collect();
    assert_eq!(nics, [("null0", "switch"), ("null7", "system")]);
    assert!(info.devices[0].cpus.iter().all(|cpu| (1..56).contains(cpu)));
}

#[test]
fn a_device_that_is_not_there_is_an_error_at_the_start() {
    let hgx = hgx();
    for name in ["gpu:0000:00:00.0", "cuda:x", "cuda:8", "cpu:2", "nonsense", ""] {
        let error = Engine::new(config(&hgx, &[name])).err().unwrap();
        assert_eq!(error.code, Code::InvalidArgument);
        assert!(error.to_string().contains("this machine has cpu:0, cpu:1, gpu:0000:1b:00.0"), "{error}");
    }
    // Also where no NIC is used.
    let tcp = Config { transports: vec!["tcp".into()], ..config(&hgx, &["cpu:7"]) };
    assert_eq!(Engine::new(tcp).err().unwrap().code, Code::InvalidArgument);
}

#[test]
fn nics_that_cannot_be_opened_are_left_out() {
    // The second is not one of the library's: a container that was given only some devices.
    let some = Machine::from(
        "cpus 0-7 node 0\n\
         nic null1 pci0000:00/0000:00:01.0/0000:01:00.0 node 0 link InfiniBand rate 400\n\
         nic other pci0000:00/0000:00:02.0/0000:02:00.0 node 0 link InfiniBand rate 400\n",
    );
    assert_eq!(with(config(&some, &[])), ["null1"]);
    let none = Machine::from(
        "cpus 0-7 node 0\nnic other pci0000:00/0000:00:02.0/0000:02:00.0 node 0 link InfiniBand rate 400\n",
    );
    assert_eq!(with(config(&none, &[])), ["null0"], "the library's own choice");
}
