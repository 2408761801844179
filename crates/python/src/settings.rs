//! The native configuration, as `anyfabric.config.native_config` makes it.

use anyfabric_engine as native;
use native::{Config, Polling, QueueFull};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::arguments::Seconds;
use crate::error::exception;

/// Reads the dictionary: flat, complete, already parsed. What is unknown or
/// missing is a mistake of the package.
pub(crate) fn config(given: &Bound<'_, PyDict>) -> PyResult<Config> {
    let py = given.py();
    let mut config = Config::default();
    let mut num_known = 0;
    for (name, value) in given {
        let name: String = name.extract()?;
        if !set(&mut config, &name, &value)? {
            return Err(internal(py, format!("unknown setting {name:?}")));
        }
        num_known += 1;
    }
    if num_known == NUM_SETTINGS {
        return Ok(config);
    }
    Err(internal(py, format!("{num_known} settings of {NUM_SETTINGS}: {}", given.keys())))
}

fn set(config: &mut Config, name: &str, value: &Bound<'_, PyAny>) -> PyResult<bool> {
    let py = value.py();
    match name {
        "transports" => config.transports = value.extract()?,
        "require" => config.require = value.extract()?,
        "secret" => config.secret = value.extract()?,
        "listen" => config.listen = value.extract()?,
        "devices" => config.devices = value.extract::<Option<_>>()?.unwrap_or_default(),
        "nics" => config.nics = value.extract::<Option<_>>()?.unwrap_or_default(),
        "nics_per_device" => config.nics_per_device = value.extract()?,
        "pin_worker" => config.pin_worker = value.extract()?,
        "gid_index" => config.verbs.gid_index = value.extract()?,
        "traffic_class" => config.verbs.traffic_class = value.extract()?,
        "service_level" => config.verbs.service_level = value.extract()?,
        "pkey_index" => config.verbs.pkey_index = value.extract()?,
        "ack_timeout" => config.verbs.timeout = value.extract()?,
        "retry_count" => config.verbs.retry_count = value.extract()?,
        "rnr_retry" => config.verbs.rnr_retry = value.extract()?,
        "rnr_timer" => config.verbs.rnr_timer = value.extract()?,
        "relaxed_ordering" => config.verbs.relaxed_ordering = value.extract()?,
        "verbs_library" => config.verbs.library = value.extract()?,
        "libfabric_provider" => config.libfabric.provider = value.extract()?,
        "libfabric_library" => config.libfabric.library = value.extract()?,
        "libfabric_answer_timeout_s" => config.libfabric.answer_timeout = value.extract::<Seconds>()?.0,
        "libfabric_max_endpoints" => config.libfabric.max_endpoints = value.extract()?,
        "cuda_library" => config.cuda_library = value.extract()?,
        "tcp_streams" => config.tcp_streams = value.extract()?,
        "polling" => {
            config.polling = match value.extract()? {
                "adaptive" => Polling::Adaptive,
                "busy" => Polling::Busy,
                other => return Err(internal(py, format!("unknown polling {other:?}"))),
            }
        }
        "isolate" => config.isolate = value.extract()?,
        "heartbeat_s" => config.heartbeat = value.extract::<Seconds>()?.0,
        "heartbeats_lost" => config.heartbeats_lost = value.extract()?,
        "timeout_s" => config.timeout = value.extract::<Seconds>()?.0,
        "queue_depth" => config.queue_depth = value.extract()?,
        "queue_full" => {
            config.queue_full = match value.extract()? {
                "block" => QueueFull::Block,
                "raise" => QueueFull::Raise,
                other => return Err(internal(py, format!("unknown queue_full {other:?}"))),
            }
        }
        "max_message_bytes" => config.max_message_bytes = value.extract()?,
        _ => return Ok(false),
    }
    Ok(true)
}

fn internal(py: Python<'_>, message: String) -> PyErr {
    exception(py, &native::Error::new(native::Code::Internal, message).during("start"))
}

const NUM_SETTINGS: usize = 32;
