//! One error type, stable codes.

use std::time::Duration;

use anyfabric_transports::Failure;

/// Result with an [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// What kind of thing went wrong. The names are stable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Code {
    /// Something passed in cannot be right.
    InvalidArgument,
    /// Nothing here can serve the request.
    Unsupported,
    /// A bound was reached: descriptors, memory, unread messages.
    ResourceExhausted,
    /// The submission queue is full.
    QueueFull,
    /// A connection could not be made or kept; the peer may live.
    ConnectionBroken,
    /// This incarnation of the peer is gone for good.
    PeerLost,
    /// A transfer ended without placing all its bytes.
    TransferFailed,
    /// The peer turned the operation down.
    Refused,
    /// The deadline of a submission passed.
    TransferTimeout,
    /// A wait gave up; what it waited for goes on.
    WaitTimeout,
    /// Cancelled by its owner.
    Cancelled,
    /// The engine, region, counter or watcher is closed.
    Closed,
    /// The engine belongs to the parent of this process.
    EngineForked,
    /// A device is gone.
    DeviceLost,
    /// A broken invariant of ours.
    Internal,
}

impl Code {
    /// Every code, in order.
    pub const ALL: [Self; 15] = [
        Self::InvalidArgument,
        Self::Unsupported,
        Self::ResourceExhausted,
        Self::QueueFull,
        Self::ConnectionBroken,
        Self::PeerLost,
        Self::TransferFailed,
        Self::Refused,
        Self::TransferTimeout,
        Self::WaitTimeout,
        Self::Cancelled,
        Self::Closed,
        Self::EngineForked,
        Self::DeviceLost,
        Self::Internal,
    ];

    /// The stable name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::InvalidArgument => "invalid_argument",
            Self::Unsupported => "unsupported",
            Self::ResourceExhausted => "resource_exhausted",
            Self::QueueFull => "queue_full",
            Self::ConnectionBroken => "connection_broken",
            Self::PeerLost => "peer_lost",
            Self::TransferFailed => "transfer_failed",
            Self::Refused => "refused",
            Self::TransferTimeout => "transfer_timeout",
            Self::WaitTimeout => "wait_timeout",
            Self::Cancelled => "cancelled",
            Self::Closed => "closed",
            Self::EngineForked => "engine_forked",
            Self::DeviceLost => "device_lost",
            Self::Internal => "internal",
        }
    }
}

/// Where it went wrong, as far as known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Context {
    /// What was being done.
    pub operation: Option<&'static str>,
    /// Printed address of the peer.
    pub peer: Option<String>,
    /// Number of the local region.
    pub region: Option<u64>,
    /// Bytes of the operation.
    pub nbytes: Option<u64>,
    /// Transport.
    pub path: Option<&'static str>,
}

/// What failed, what was given, what was expected, what to try.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// The kind.
    pub code: Code,
    /// For people.
    pub message: String,
    /// Where.
    pub context: Box<Context>,
}

impl Error {
    /// An error without context.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), context: Box::default() }
    }

    /// Shorthand for the most common kind.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Code::InvalidArgument, message)
    }

    /// Adds what was being done.
    #[must_use]
    pub fn during(mut self, operation: &'static str) -> Self {
        self.context.operation = Some(operation);
        self
    }

    /// What the system's refusal means here.
    pub(crate) fn system(what: &str, error: &std::io::Error) -> Self {
        let (code, hint) = match error.raw_os_error() {
            Some(libc::EMFILE | libc::ENFILE) => {
                (Code::ResourceExhausted, ": no file descriptor is left; raise the limit (ulimit -n)")
            }
            Some(libc::ENOMEM | libc::ENOSPC) => (Code::ResourceExhausted, ": no memory is left"),
            Some(libc::EAGAIN) => (Code::ResourceExhausted, ": no thread is left, or no memory; see ulimit -u"),
            Some(libc::EFBIG) => (Code::ResourceExhausted, ": files may not be so large; raise the limit (ulimit -f)"),
            _ => (Code::InvalidArgument, ""),
        };
        Self::new(code, format!("{what}: {error}{hint}"))
    }

    /// The error of a failed operation.
    pub(crate) fn from_failure(failure: &Failure, context: Context) -> Self {
        let code = match failure {
            Failure::Refused(anyfabric_wire::Refusal::Full) | Failure::Exhausted(_) => Code::ResourceExhausted,
            Failure::Refused(_) => Code::Refused,
            Failure::PeerLost(_) => Code::PeerLost,
            Failure::ConnectionBroken(_) | Failure::Unauthenticated(_) => Code::ConnectionBroken,
            Failure::Timeout(_) => Code::TransferTimeout,
            Failure::Cancelled => Code::Cancelled,
            Failure::Closed => Code::Closed,
            Failure::NoPath(_) | Failure::Unsupported(_) => Code::Unsupported,
            Failure::DeviceLost(_) => Code::DeviceLost,
            Failure::System(_) => Code::TransferFailed,
        };
        let mut message = format!("{} failed: {failure}", context.operation.unwrap_or("transfer"));
        let mut rest = String::new();
        // Of what moves no bytes none are told.
        if let Some(nbytes) = context.nbytes.filter(|nbytes| *nbytes > 0 || context.region.is_some()) {
            rest += &format!(" {nbytes} bytes");
        }
        if let Some(region) = context.region {
            rest += &format!(" from region {region}");
        }
        if let Some(peer) = &context.peer {
            rest += &format!(" to {peer}");
        }
        if let Some(path) = context.path {
            rest += &format!(" over {path}");
        }
        if !rest.is_empty() {
            message += &format!(";{rest}");
        }
        Self { code, message, context: Box::new(context) }
    }
}

/// How long somebody waited, for people; who did not say how long is never told.
pub(crate) fn seconds(timeout: Option<Duration>) -> String {
    format!("{} s", timeout.unwrap_or_default().as_secs_f64())
}
