//! What the library's errors mean.

use super::sys::{FI_ENORX, FI_EOVERRUN};
use crate::rdma::Fault;

/// The fault that a (positive) error of an operation or of a call stands for.
pub(super) const fn fault_of(error: i32) -> Fault {
    match error {
        libc::EACCES | libc::EPERM | libc::EKEYREJECTED => Fault::Refused,
        // A provider over sockets drops the connection of whoever used a bad key, and says no more than this.
        libc::ECANCELED | libc::ECONNRESET | libc::ECONNABORTED | libc::ECONNREFUSED => Fault::Unanswered,
        libc::ENOTCONN | libc::ESHUTDOWN | libc::EPIPE | libc::ETIMEDOUT => Fault::Unanswered,
        libc::EHOSTUNREACH | libc::EHOSTDOWN | libc::ENETUNREACH | libc::ENETDOWN => Fault::Unanswered,
        FI_ENORX => Fault::NotReady,
        libc::EINVAL | libc::EFAULT | libc::ENOMEM | FI_EOVERRUN => Fault::Local(error as u32),
        error => Fault::Other(error as u32),
    }
}

/// Whether a (positive) error of a call says that there is no such operation.
pub(super) const fn is_unsupported(error: i32) -> bool {
    matches!(error, libc::ENOSYS | libc::EOPNOTSUPP | libc::EINVAL | super::sys::FI_EBADFLAGS)
}
