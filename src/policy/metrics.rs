//! What the engine reports of itself.

use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};

/// Gauges and counters of the engine.
#[derive(Debug, Clone)]
pub struct Metrics {
    pub(crate) queue_depth: IntGaugeVec,
    pub(crate) queue_capacity: IntGaugeVec,
    pub(crate) running: IntGauge,
    pub(crate) cache_blocks: IntGaugeVec,
    pub(crate) preemptions: IntCounter,
    pub(crate) evictions: IntCounter,
    pub(crate) tokens: IntCounterVec,
}

impl Metrics {
    /// The depth of a queue of another module, whose capacity is shown from now on.
    pub fn queue(&self, name: &str, capacity: usize) -> IntGauge {
        self.queue_capacity.with_label_values(&[name]).set(capacity as i64);
        self.queue_depth.with_label_values(&[name])
    }

    /// # Errors
    /// A name is taken in `registry`.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let metrics = Self {
            queue_depth: IntGaugeVec::new(
                Opts::new("gyrostat_queue_depth", "Requests that wait in a queue."),
                &["queue"],
            )?,
            queue_capacity: IntGaugeVec::new(
                Opts::new("gyrostat_queue_capacity", "Requests that a queue holds at most."),
                &["queue"],
            )?,
            running: IntGauge::new(
                "gyrostat_engine_running_sequences",
                "Sequences that are being generated.",
            )?,
            cache_blocks: IntGaugeVec::new(
                Opts::new(
                    "gyrostat_engine_cache_blocks",
                    "Blocks of 32 tokens' keys and values: used by running sequences, kept for requests with the same \
                     beginning, and capacity.",
                ),
                &["state"],
            )?,
            preemptions: IntCounter::new(
                "gyrostat_engine_preemptions_total",
                "Sequences that gave their blocks back and started anew, because there was no room.",
            )?,
            evictions: IntCounter::new(
                "gyrostat_engine_evictions_total",
                "Kept blocks that were given up for others.",
            )?,
            tokens: IntCounterVec::new(
                Opts::new(
                    "gyrostat_engine_tokens_total",
                    "Tokens by how they came into the cache: prefill, decode, or shared with an earlier request.",
                ),
                &["phase"],
            )?,
        };
        registry.register(Box::new(metrics.queue_depth.clone()))?;
        registry.register(Box::new(metrics.queue_capacity.clone()))?;
        registry.register(Box::new(metrics.running.clone()))?;
        registry.register(Box::new(metrics.cache_blocks.clone()))?;
        registry.register(Box::new(metrics.preemptions.clone()))?;
        registry.register(Box::new(metrics.evictions.clone()))?;
        registry.register(Box::new(metrics.tokens.clone()))?;
        Ok(metrics)
    }
}
