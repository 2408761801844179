//! A variable of the environment that only one call sees.
//!
//! Some settings libfabric takes from the environment alone. `setenv` would do harm: it may free the list of variables
//! under a thread that reads it without a lock, as C does, and what it sets stays for every process that is started
//! later. So the list is exchanged for another, with the variable and then without; no list is ever freed.

use std::ffi::{c_char, CStr};
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

type List = *mut *mut c_char;

extern "C" {
    /// The C library's: variables ("NAME=value"), and a null pointer at the end.
    #[link_name = "environ"]
    static ENVIRONMENT: AtomicPtr<*mut c_char>;
}

/// Runs `call` with one more variable, "NAME=value", unless there is one of that
/// name.
pub(super) fn with_variable<R>(variable: &'static CStr, call: impl FnOnce() -> R) -> R {
    let ours = variable.as_ptr().cast_mut();
    exchange(|variables| {
        if variables.iter().all(|other| name_of(*other) != name_of(ours)) {
            variables.push(ours);
        }
    });
    let result = call();
    exchange(|variables| variables.retain(|other| *other != ours));
    result
}

/// Exchanges the list for a changed one, unless nothing changes.
fn exchange(change: impl Fn(&mut Vec<*mut c_char>)) {
    // SAFETY: the C library's, as long as the process lives.
    let environment = unsafe { &ENVIRONMENT };
    loop {
        // ORDERING: acquire the list; partners: the exchange below, and the C library's own.
        let old = environment.load(Ordering::Acquire);
        let before = read(old);
        let mut variables = before.clone();
        change(&mut variables);
        if variables == before {
            return;
        }
        variables.push(ptr::null_mut());
        // Never freed: somebody may read it for as long as it pleases.
        let new: List = Box::leak(variables.into_boxed_slice()).as_mut_ptr();
        // ORDERING: release the list.
        if environment.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire).is_ok() {
            return;
        }
    }
}

fn read(list: List) -> Vec<*mut c_char> {
    let mut variables = Vec::new();
    if list.is_null() {
        return variables;
    }
    // SAFETY: the list ends with a null pointer.
    unsafe {
        while !(*list.add(variables.len())).is_null() {
            variables.push(*list.add(variables.len()));
        }
    }
    variables
}

fn name_of(variable: *mut c_char) -> Vec<u8> {
    // SAFETY: variables are strings that end with a null.
    let text = unsafe { CStr::from_ptr(variable) }.to_bytes();
    text.split(|byte| *byte == b'=').next().unwrap_or(text).to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(name: &CStr) -> Option<String> {
        // SAFETY: a string; what comes back is one too, and lives until the variable is changed.
        unsafe {
            let value = libc::getenv(name.as_ptr());
            (!value.is_null()).then(|| CStr::from_ptr(value).to_string_lossy().into_owned())
        }
    }

    // One test, for there is one environment.
    #[test]
    fn a_variable_is_seen_by_one_call() {
        const NAME: &CStr = c"ANYFABRIC_TEST_VARIABLE";
        let seen = with_variable(c"ANYFABRIC_TEST_VARIABLE=1", || {
            // What others change meanwhile is not lost.
            std::env::set_var("ANYFABRIC_TEST_OTHER", "2");
            std::env::remove_var("ANYFABRIC_TEST_OTHER");
            value(NAME)
        });
        assert_eq!(seen.as_deref(), Some("1"));
        with_variable(c"ANYFABRIC_TEST_VARIABLE=3", || {
            std::env::set_var("ANYFABRIC_TEST_KEPT", "4");
        });
        assert_eq!((value(NAME), value(c"ANYFABRIC_TEST_KEPT").as_deref()), (None, Some("4")));
        std::env::set_var("ANYFABRIC_TEST_VARIABLE", "5");
        assert_eq!(
            with_variable(c"ANYFABRIC_TEST_VARIABLE=6", || value(NAME)).as_deref(),
            Some("5"),
            "the user's stays"
        );
        std::env::remove_var("ANYFABRIC_TEST_VARIABLE");
        with_variable(c"ANYFABRIC_TEST_VARIABLE=7", || ());
        assert_eq!(value(NAME), None);
        assert!(value(c"PATH").is_some(), "the others are there");
    }
}
