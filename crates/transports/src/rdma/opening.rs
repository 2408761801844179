//! Opening NICs that nobody named: one that cannot be opened does not keep the others from serving.

use std::cmp::Reverse;

use super::nic::{Nic, NicError};

/// NICs that are opened one after the other, until there are enough.
pub(crate) struct Opening<N> {
    nics: Vec<N>,
    max_nics: usize,
    /// Why the first that could not be opened could not.
    failed: Option<NicError>,
}

impl<N: Nic> Opening<N> {
    pub(crate) const fn new(max_nics: usize) -> Self {
        Self { nics: Vec::new(), max_nics, failed: None }
    }

    /// Those that are open.
    pub(crate) fn nics(&self) -> &[N] {
        &self.nics
    }

    /// Opens one more, unless there are enough; one that cannot be opened is left out.
    ///
    /// # Errors
    /// [`NicError::Descriptors`]: what cannot be opened for want of them can be later.
    pub(crate) fn add(&mut self, name: &str, open: impl FnOnce() -> Result<N, NicError>) -> Result<(), NicError> {
        if self.nics.len() < self.max_nics {
            let opened = self.keep(name, open())?;
            self.nics.extend(opened);
        }
        Ok(())
    }

    /// Opens the fastest of some NICs, each with its speed and its name: in the order given, and
    /// slower ones only while no faster one can be opened.
    ///
    /// # Errors
    /// As [`Opening::add`].
    pub(crate) fn add_fastest<F>(
        &mut self,
        mut found: Vec<(u32, String, F)>,
        open: impl Fn(F) -> Result<N, NicError>,
    ) -> Result<(), NicError> {
        found.sort_by_key(|(gbps, ..)| Reverse(*gbps));
        let mut fastest = None;
        for (gbps, name, found) in found {
            if fastest.is_some_and(|fastest| gbps < fastest) {
                break;
            }
            self.add(&name, || open(found))?;
            fastest = fastest.or_else(|| (!self.nics.is_empty()).then_some(gbps));
        }
        Ok(())
    }

    /// What was opened; `None`, which is logged, for what could not be.
    ///
    /// # Errors
    /// As [`Opening::add`].
    pub(crate) fn keep<T>(&mut self, name: &str, opened: Result<T, NicError>) -> Result<Option<T>, NicError> {
        match opened.map_err(NicError::or_descriptors) {
            Ok(opened) => Ok(Some(opened)),
            Err(error @ NicError::Descriptors(_)) => Err(error),
            Err(error) => {
                log::warn!("NIC {name} is not used: {error}");
                self.failed.get_or_insert(error);
                Ok(None)
            }
        }
    }

    /// All that were opened.
    ///
    /// # Errors
    /// When there are none, why the first could not be opened, or else `none`.
    pub(crate) fn finish(self, none: impl FnOnce() -> NicError) -> Result<Vec<N>, NicError> {
        if self.nics.is_empty() {
            return Err(self.failed.unwrap_or_else(none));
        }
        Ok(self.nics)
    }
}
