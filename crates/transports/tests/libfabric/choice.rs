//! Which NICs are opened, and what becomes of those that cannot be.

use std::path::Path;

use anyfabric_transports::libfabric::{open, FabricError, FabricSettings, Library};
use anyfabric_transports::rdma::{Nic, NicChoice, NicError};

use crate::fake::Copy;

/// Nobody named it; the others serve. Whoever names one wants that one.
// One test, for a process opens one library.
#[test]
fn a_nic_that_cannot_be_opened_is_left_out() {
    let Some(mut copy) = Copy::new(|fake| (fake.nics, fake.shut) = (5, 1 << 0 | 1 << 2)) else { return };
    a_library_that_cannot_be_used_is_no_obstacle();
    let library = copy.path().to_str().map(str::to_owned);
    let settings = FabricSettings { provider: Some("fake".into()), library, ..FabricSettings::default() };
    let list = |names: &[&str]| -> Vec<String> { names.iter().map(|name| (*name).to_owned()).collect() };
    let names = |choice: NicChoice<'_>| -> Result<Vec<String>, NicError> {
        Ok(open(choice, &settings)?.iter().map(|nic| nic.about().name.clone()).collect())
    };
    let near = |near: &[&str], max_nics| names(NicChoice::Near(&list(near), max_nics));
    assert_eq!(near(&["fake4", "fake0", "fake1", "fake3"], 2).unwrap(), ["fake4", "fake1"]);
    assert_eq!(near(&[], 8).unwrap(), ["fake1", "fake3", "fake4"]);
    assert_eq!(near(&["fake2", "fake0"], 1).unwrap(), ["fake1"], "none that is near can be opened");
    assert_eq!(names(NicChoice::Named(&list(&["fake3", "fake1"]))).unwrap(), ["fake3", "fake1"]);
    let named = names(NicChoice::Named(&list(&["fake1", "fake2"])));
    assert!(named.unwrap_err().to_string().starts_with("fake2: fi_domain"));
    copy.get().shut = u64::MAX;
    assert!(near(&["fake3", "fake1"], 2).unwrap_err().to_string().starts_with("fake3: fi_domain"), "the first error");
    assert!(near(&[], 2).unwrap_err().to_string().starts_with("fake0: fi_domain"), "the first error");

    copy.get().shut = 0;
    let machine = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("choice-{}", std::process::id()));
    let says = |states: [&str; 5]| {
        for (nic, state) in states.iter().enumerate() {
            let folder = machine.join(format!("fake{nic}"));
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join("operstate"), state).unwrap();
        }
    };
    says(["down", "up", "unknown", "down", "down"]);
    copy.get().place(&machine);
    assert_eq!(near(&[], 8).unwrap(), ["fake1", "fake2"]);
    assert_eq!(names(NicChoice::Named(&list(&["fake2", "fake1"]))).unwrap(), ["fake2", "fake1"]);
    let as_the_system_calls_it = format!("../../..{}/fake2", machine.display());
    assert_eq!(names(NicChoice::Named(&list(&["fake1", &as_the_system_calls_it]))).unwrap(), ["fake1", "fake2"]);
    let none = names(NicChoice::Named(&list(&["fake7"]))).unwrap_err().to_string();
    assert!(none.contains("has no NIC fake7 for provider fake; it has fake0 (fake), fake1 (fake)"), "{none}");
    let down = names(NicChoice::Named(&list(&["fake1", "fake3"]))).unwrap_err().to_string();
    assert_eq!(down, "fake3: no active port: it is down");
    std::fs::remove_dir_all(machine.join("fake3")).unwrap();
    assert_eq!(names(NicChoice::Named(&list(&["fake3"]))).unwrap(), ["fake3"], "one of which the system says nothing");
    says(["down"; 5]);
    assert_eq!(near(&[], 8).unwrap_err().to_string(), "no NIC that libfabric drives is up");
    std::fs::remove_dir_all(machine).unwrap();
}

/// The next that is named is opened; what is told is of the one that was named.
fn a_library_that_cannot_be_used_is_no_obstacle() {
    let Some(old) = Copy::new(|fake| fake.version = 1 << 16 | 9) else { return };
    let why = |path: &str| Library::get(Some(path)).unwrap_err();
    for _ in 0..2 {
        assert!(matches!(why("/nowhere/libfabric.so.1"), FabricError::Missing(why) if why.contains("/nowhere/")));
        let name = old.path().to_str().unwrap();
        assert!(matches!(why(name), FabricError::Unfit { path, why } if path == name && why.contains("1.9")));
    }
}
