//! What a device announces beside completions: that it, a port, a queue or a queue pair is in trouble.
//!
//! Whoever looks at a port reads the announcements of its device. Those of queues and queue pairs are noted for the NIC
//! that made them, which acts on them after the look ([`Nic::heed`](crate::rdma::Nic::heed)). What becomes of a port, or
//! of its addresses, the look itself finds, and the next rail; the rest changes nothing here.

use std::ffi::c_void;
use std::os::fd::RawFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use super::device::VerbsDomain;
use super::sys::{self, AsyncEvent, Cq, Qp, Srq};
use crate::lock;
use crate::rdma::Fault;

/// Announcements of what one NIC made, until it acts on them. Its queues and queue pairs have it as their context.
#[derive(Default)]
pub(super) struct Notices(Mutex<Vec<Notice>>);

/// An announcement.
pub(super) enum Notice {
    /// A queue is of no more use.
    Queues(Fault),
    /// A queue pair, by its number, neither.
    Pair(u32, Fault),
}

impl Notices {
    pub(super) fn take(&self) -> Vec<Notice> {
        std::mem::take(&mut *lock(&self.0))
    }

    /// As the context of what the library makes.
    pub(super) fn as_context(self: &Arc<Self>) -> *mut c_void {
        Arc::as_ptr(self).cast_mut().cast()
    }

    /// For as long as the process lives: what the library does not give back, and what that uses, has it as its context.
    ///
    /// # Safety
    /// It is a context of ours that lives.
    pub(super) unsafe fn keep(context: *mut c_void) {
        // SAFETY: from `as_context`, and alive.
        unsafe { Arc::increment_strong_count(context.cast::<Self>().cast_const()) };
    }

    /// # Safety
    /// `context` is that of something whose event was not acknowledged yet.
    unsafe fn note(context: *mut c_void, notice: Notice) {
        // SAFETY: what is made with a context lives until its events are acknowledged, and the notices for longer.
        if let Some(notices) = unsafe { context.cast::<Self>().as_ref() } {
            lock(&notices.0).push(notice);
        }
    }
}

impl VerbsDomain {
    /// Readable when there is an announcement.
    pub(super) fn announcements(&self) -> RawFd {
        // SAFETY: an open device.
        unsafe { (*self.context).async_fd }
    }

    /// Reads what was announced; from any thread.
    pub(super) fn hear(&self) {
        let mut event = AsyncEvent { element: std::ptr::null_mut(), event_type: 0 };
        // SAFETY: an open device; the descriptor does not block. An element is of the kind that its event says, and lives
        // until that is acknowledged, as each is.
        unsafe {
            while (self.library.get_async_event)(self.context, &raw mut event) == 0 {
                let (element, code) = (event.element, event.event_type);
                match code {
                    sys::EVENT_DEVICE_FATAL => {
                        log::error!("{}: the device has failed", self.name);
                        // ORDERING: a hint; whoever looks at the port does so after this.
                        self.is_lost.store(true, Ordering::Relaxed);
                    }
                    sys::EVENT_CQ_ERR => {
                        Notices::note((*element.cast::<Cq>()).cq_context, Notice::Queues(Fault::Missed(code)));
                    }
                    sys::EVENT_SRQ_ERR => {
                        Notices::note((*element.cast::<Srq>()).srq_context, Notice::Queues(Fault::Announced(code)));
                    }
                    sys::EVENT_QP_FATAL | sys::EVENT_QP_REQ_ERR | sys::EVENT_QP_ACCESS_ERR => {
                        let Qp { qp_context, qp_num, .. } = *element.cast::<Qp>();
                        Notices::note(qp_context, Notice::Pair(qp_num, Fault::Announced(code)));
                    }
                    _ => log::debug!("{}: event {code}", self.name),
                }
                (self.library.ack_async_event)(&raw mut event);
            }
        }
    }
}
