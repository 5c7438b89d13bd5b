//! What serving reports. Label values come from bounded sets; prompts never reach a label.

use prometheus::{
    GaugeVec, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, Opts, Registry as Prometheus,
};

use crate::completion::{Completion, Feedback, InteractionType, Risk};

/// Counters and histograms of serving; the `gen_ai_…` ones are OpenTelemetry's (semantic conventions 1.41).
#[derive(Debug)]
pub struct Metrics {
    completions: IntCounterVec,
    refusals: IntCounterVec,
    unsafe_compliances: IntCounterVec,
    helpfulness: HistogramVec,
    satisfaction: HistogramVec,
    kl: GaugeVec,
    feedback: IntCounterVec,
    request_seconds: HistogramVec,
    first_token_seconds: HistogramVec,
    token_seconds: HistogramVec,
    tokens: HistogramVec,
    pub(super) store_bytes: IntGauge,
}

const SECONDS: [f64; 14] =
    [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92];
const FIRST_TOKEN: [f64; 16] =
    [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];
const PER_TOKEN: [f64; 13] = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5];
const TOKENS: [f64; 14] = [
    1.0,
    4.0,
    16.0,
    64.0,
    256.0,
    1024.0,
    4096.0,
    16384.0,
    65536.0,
    262_144.0,
    1_048_576.0,
    4_194_304.0,
    16_777_216.0,
    67_108_864.0,
];
const SCORES: [f64; 10] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0];

const PROVIDER: &str = "gyrostat";

/// One finished request, for OpenTelemetry's names.
#[derive(Debug, Clone, Copy)]
pub(super) struct Served<'a> {
    pub(super) operation: &'static str,
    pub(super) model: &'a str,
    pub(super) seconds: f64,
    pub(super) first_token_seconds: f64,
    pub(super) prompt_tokens: usize,
    pub(super) completion_tokens: usize,
}

impl Metrics {
    /// # Errors
    /// A name is taken in `registry`.
    #[expect(clippy::too_many_lines, reason = "a table of names")]
    pub fn register(registry: &Prometheus) -> Result<Self, prometheus::Error> {
        let counter = |name: &str, help: &str, labels: &[&str]| {
            let counter = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(counter.clone()))?;
            Ok::<_, prometheus::Error>(counter)
        };
        let histogram = |name: &str, help: &str, labels: &[&str], buckets: &[f64]| {
            let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
            let histogram = HistogramVec::new(options, labels)?;
            registry.register(Box::new(histogram.clone()))?;
            Ok::<_, prometheus::Error>(histogram)
        };
        const OPERATION: [&str; 4] =
            ["gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_response_model", "error_type"];
        let kl = GaugeVec::new(
            Opts::new(
                "gyrostat_policy_kl_nats_per_token",
                "Distance from the reference, mean log-ratio over the last measured answer.",
            ),
            &["interaction", "version"],
        )?;
        registry.register(Box::new(kl.clone()))?;
        let store_bytes = IntGauge::new("gyrostat_store_bytes", "Bytes that the store takes on disk.")?;
        registry.register(Box::new(store_bytes.clone()))?;
        Ok(Self {
            completions: counter(
                "gyrostat_completions_total",
                "Answers, by how they ended.",
                &["interaction", "version", "outcome"],
            )?,
            refusals: counter(
                "gyrostat_refusals_total",
                "Answers that decline: over-refusals where risk is benign, rightful ones where it is harmful.",
                &["interaction", "risk", "version"],
            )?,
            unsafe_compliances: counter(
                "gyrostat_unsafe_compliances_total",
                "Answers that comply with a harmful request.",
                &["interaction", "version"],
            )?,
            helpfulness: histogram(
                "gyrostat_helpfulness_score",
                "Helpfulness of answers, 0 to 1.",
                &["interaction", "version"],
                &SCORES,
            )?,
            satisfaction: histogram(
                "gyrostat_satisfaction_score",
                "Satisfaction with answers, 0 to 1.",
                &["interaction", "version"],
                &SCORES,
            )?,
            kl,
            feedback: counter("gyrostat_feedback_total", "Judgements received.", &["kind", "source"])?,
            request_seconds: histogram(
                "gen_ai_server_request_duration_seconds",
                "Seconds from a request to its last token.",
                &OPERATION,
                &SECONDS,
            )?,
            first_token_seconds: histogram(
                "gen_ai_server_time_to_first_token_seconds",
                "Seconds from a request to its first token.",
                &OPERATION[..3],
                &FIRST_TOKEN,
            )?,
            token_seconds: histogram(
                "gen_ai_server_time_per_output_token_seconds",
                "Seconds a token after the first.",
                &OPERATION[..3],
                &PER_TOKEN,
            )?,
            tokens: histogram(
                "gen_ai_client_token_usage",
                "Tokens of prompts and answers.",
                &[
                    "gen_ai_operation_name",
                    "gen_ai_provider_name",
                    "gen_ai_response_model",
                    "gen_ai_token_type",
                ],
                &TOKENS,
            )?,
            store_bytes,
        })
    }

    pub(super) fn completion(&self, completion: &Completion) {
        let (interaction, version) = (completion.interaction.as_str(), completion.version.to_string());
        let outcome = completion.finish_reason.as_str();
        self.completions.with_label_values(&[interaction, &version, outcome]).inc();
        self.helpfulness.with_label_values(&[interaction, &version]).observe(completion.helpfulness);
        if let Some(kl) = completion.kl {
            self.kl.with_label_values(&[interaction, &version]).set(kl);
        }
        if completion.refusal.is_refusal() {
            self.refusals.with_label_values(&[interaction, completion.risk.as_str(), &version]).inc();
        } else if completion.risk == Risk::Harmful {
            self.unsafe_compliances.with_label_values(&[interaction, &version]).inc();
        }
    }

    pub(super) fn no_completion(&self, interaction: &InteractionType, version: &str, outcome: &str) {
        self.completions.with_label_values(&[interaction.as_str(), version, outcome]).inc();
    }

    pub(super) fn feedback(&self, feedback: &Feedback) {
        self.feedback.with_label_values(&[feedback.judgement.kind(), feedback.source.as_str()]).inc();
    }

    pub(super) fn satisfaction(&self, completion: &Completion, value: f64) {
        let version = completion.version.to_string();
        self.satisfaction.with_label_values(&[completion.interaction.as_str(), &version]).observe(value);
    }

    pub(super) fn served(&self, served: Served<'_>) {
        let Served { operation, model, .. } = served;
        let labels = [operation, PROVIDER, model];
        self.request_seconds.with_label_values(&[operation, PROVIDER, model, ""]).observe(served.seconds);
        self.first_token_seconds.with_label_values(&labels).observe(served.first_token_seconds);
        if served.completion_tokens > 1 {
            let each = (served.seconds - served.first_token_seconds) / (served.completion_tokens - 1) as f64;
            self.token_seconds.with_label_values(&labels).observe(each);
        }
        for (kind, tokens) in [("input", served.prompt_tokens), ("output", served.completion_tokens)] {
            self.tokens.with_label_values(&[operation, PROVIDER, model, kind]).observe(tokens as f64);
        }
    }

    pub(super) fn refused(&self, operation: &'static str, model: &str, error_type: &str, seconds: f64) {
        self.request_seconds.with_label_values(&[operation, PROVIDER, model, error_type]).observe(seconds);
    }
}
