//! The log: one line an event, on stderr, as text or as JSON.

use std::io;

use tracing_subscriber::EnvFilter;

use crate::config::LogFormat;

/// Starts it. `RUST_LOG` overrides what is shown; `access` shows each request.
pub(super) fn start(format: LogFormat, access: bool) {
    let usual = if access { "warn,gyrostat=info" } else { "warn,gyrostat=info,gyrostat::access=warn" };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(usual));
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    // Somebody who uses the library may have a log already, which stays.
    let _ours_or_theirs = match format {
        LogFormat::Text => lines.try_init(),
        LogFormat::Json => lines.json().flatten_event(true).try_init(),
    };
}
