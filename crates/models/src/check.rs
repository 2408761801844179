//! Runs models, and tests that they would notice.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::panic::Location;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;

/// A model.
#[derive(Debug, Clone, Copy)]
pub struct Model {
    /// Of its test.
    pub name: &'static str,
    /// Once through it.
    pub run: fn(),
    /// Only orders in which threads are interrupted no more often: there are too
    /// many of three threads.
    pub max_preemptions: Option<usize>,
}

impl Model {
    /// Runs it in every order of its threads, and with either meaning of
    /// sequentially consistent accesses.
    ///
    /// # Panics
    /// When it does not hold.
    pub fn holds(&self) {
        WEAKENED.set(std::env::var(WEAKEN).ok());
        for is_before in [true, false] {
            FENCES_BEFORE.set(is_before);
            let mut builder = loom::model::Builder::new();
            builder.preemption_bound = self.max_preemptions;
            builder.check(self.run);
        }
    }
}

/// Weakens each of these orderings of the product to relaxed, or leaves out what is
/// called there, one at a time, and has the test of at least one of the models fail.
/// They are named by function and line. With `ANYFABRIC_MODELS_SURVEY` in the environment it says of all that
/// the models come by whether they would notice.
///
/// # Panics
/// When none fails, or when there is no such ordering.
pub fn needs_orderings(models: &[Model], orderings: &[&str]) {
    PLACES.take();
    models.iter().for_each(Model::holds);
    let places: Vec<_> = PLACES.take().into_iter().map(|place| (text_at(&place), place)).collect();
    let is_noticed = |place: &str| models.iter().any(|model| !holds_with(model.name, place));
    if std::env::var_os(SURVEY).is_some() {
        for (text, place) in &places {
            println!("{}: {text}", if is_noticed(place) { "noticed" } else { "not noticed" });
        }
    }
    for ordering in orderings {
        let mut named = places.iter().filter(|(text, _)| text == ordering).peekable();
        assert!(named.peek().is_some(), "no model comes by `{ordering}`");
        assert!(named.all(|(_, place)| is_noticed(place)), "no model fails without `{ordering}`");
    }
}

/// Whether a model holds with one ordering weakened. In a process of its own: a
/// model that fails leaves threads behind.
fn holds_with(model: &str, place: &str) -> bool {
    let own = std::env::current_exe().expect("the test has a file");
    let mut child = Command::new(own);
    child.args([model, "--exact"]).env(WEAKEN, place).env("RUST_BACKTRACE", "0");
    child.stdout(Stdio::null()).stderr(Stdio::null()).status().expect("the test starts").success()
}

/// The function and the line that a place lies in.
fn text_at(place: &str) -> String {
    let mut parts = place.rsplitn(3, ':').skip(1);
    let (line, file) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let line: usize = line.parse().expect("a place is file:line:column");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(file);
    let text = std::fs::read_to_string(path).expect("the file that was compiled");
    let lines: Vec<_> = text.lines().take(line).collect();
    let function = lines.iter().rev().find_map(|line| line.split_once("fn ")?.1.split(['(', '<']).next());
    format!("{}: {}", function.unwrap_or_default(), lines.last().unwrap_or(&"").trim())
}

/// What is asked for there; weaker if it is tested whether that is noticed.
pub(crate) fn ordering(asked: Ordering, by: &Location<'_>) -> Ordering {
    if asked == Ordering::Relaxed || is_kept(by) {
        asked
    } else {
        Ordering::Relaxed
    }
}

/// Whether what is asked for there is done; not if it is tested whether that is noticed.
pub(crate) fn is_kept(by: &Location<'_>) -> bool {
    // The product's, not the models'.
    if !by.file().contains("/../../") {
        return true;
    }
    let place = by.to_string();
    let is_weakened = WEAKENED.with_borrow(|weakened| weakened.as_ref() == Some(&place));
    PLACES.with_borrow_mut(|places| places.insert(place));
    !is_weakened
}

pub(crate) fn fences_before() -> bool {
    FENCES_BEFORE.get()
}

// A model's threads are all of one thread.
thread_local! {
    static FENCES_BEFORE: Cell<bool> = const { Cell::new(true) };
    static WEAKENED: RefCell<Option<String>> = const { RefCell::new(None) };
    static PLACES: RefCell<BTreeSet<String>> = const { RefCell::new(BTreeSet::new()) };
}

const SURVEY: &str = "ANYFABRIC_MODELS_SURVEY";
/// Names the place of the ordering to weaken.
const WEAKEN: &str = "ANYFABRIC_MODELS_WEAKEN";
