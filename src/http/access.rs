//! One log line a request, without a word of what was said.

use std::{
    sync::{Arc, OnceLock},
    time::Instant,
};

use tracing::{debug, info};

use crate::completion::Version;

/// A request's line. It is written when everybody is gone who may have something to say of the request.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) method: String,
    /// The route's pattern, not the path.
    pub(super) route: String,
    pub(super) request_id: String,
    pub(super) started: Instant,
    pub(super) status: OnceLock<u16>,
    pub(super) seconds: OnceLock<f64>,
    told: OnceLock<Told>,
}

/// What is known of an answer.
#[derive(Debug)]
pub(super) struct Told {
    pub(super) model: String,
    pub(super) version: Version,
    pub(super) input_tokens: Option<usize>,
    pub(super) output_tokens: Option<usize>,
}

/// Routes that machines ask every few seconds.
pub(super) const QUIET: [&str; 3] = ["/healthz", "/readyz", "/metrics"];

impl Line {
    pub(super) fn new(method: String, route: String, request_id: String) -> Arc<Self> {
        Arc::new(Self {
            method,
            route,
            request_id,
            started: Instant::now(),
            status: OnceLock::new(),
            seconds: OnceLock::new(),
            told: OnceLock::new(),
        })
    }

    pub(super) fn tell(&self, told: Told) {
        let _first = self.told.set(told);
    }

    /// The last byte was sent, or the client is gone.
    pub(super) fn over(&self) {
        let _first = self.seconds.set(self.started.elapsed().as_secs_f64());
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.over();
        let (method, route, request_id) = (&self.method, &self.route, &self.request_id);
        // 0: the client hung up before there was a status.
        let status = self.status.get().copied().unwrap_or(0);
        let seconds = self.seconds.get().copied().unwrap_or_default();
        let told = self.told.get();
        let model = told.map(|told| told.model.as_str());
        let version = told.map(|told| told.version.to_string());
        let input_tokens = told.and_then(|told| told.input_tokens);
        let output_tokens = told.and_then(|told| told.output_tokens);
        macro_rules! line {
            ($level:ident) => {
                $level!(
                    target: "gyrostat::access", method, route, status, seconds, request_id, model, version,
                    input_tokens, output_tokens, "request"
                )
            };
        }
        if QUIET.contains(&route.as_str()) {
            line!(debug);
        } else {
            line!(info);
        }
    }
}
