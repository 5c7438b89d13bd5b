//! What serving reports. Label values come from bounded sets; prompts never reach a label.

use prometheus::{
    GaugeVec, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, Opts, Registry as Prometheus,
};

use crate::completion::{Completion, Feedback, InteractionType, Risk};

/// Counters and histograms of serving.
#[derive(Debug)]
pub struct Metrics {
    completions: IntCounterVec,
    refusals: IntCounterVec,
    unsafe_compliances: IntCounterVec,
    kl: GaugeVec,
    feedback: IntCounterVec,
    gen_ai: GenAi,
    pub(super) store_bytes: IntGauge,
}

/// OpenTelemetry's names (semantic conventions 1.41), with their buckets and labels.
#[derive(Debug)]
struct GenAi {
    request_seconds: HistogramVec,
    first_token_seconds: HistogramVec,
    token_seconds: HistogramVec,
    tokens: HistogramVec,
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

const PROVIDER: &str = "gyrostat";

/// One finished request with all its choices, for OpenTelemetry's names.
#[derive(Debug, Clone, Copy)]
pub(super) struct Served<'a> {
    pub(super) operation: &'static str,
    pub(super) model: &'a str,
    pub(super) seconds: f64,
    /// `None` where nobody knows, as of an upstream's answer that came at once.
    pub(super) first_token_seconds: Option<f64>,
    pub(super) prompt_tokens: Option<usize>,
    pub(super) completion_tokens: Option<usize>,
    /// Of the longest choice; the choices are generated side by side.
    pub(super) most_tokens: usize,
}

fn counter(
    to: &Prometheus,
    name: &str,
    help: &str,
    labels: &[&str],
) -> Result<IntCounterVec, prometheus::Error> {
    let counter = IntCounterVec::new(Opts::new(name, help), labels)?;
    to.register(Box::new(counter.clone()))?;
    Ok(counter)
}

fn histogram(
    to: &Prometheus,
    name: &str,
    help: &str,
    labels: &[&str],
    buckets: &[f64],
) -> Result<HistogramVec, prometheus::Error> {
    let histogram = HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), labels)?;
    to.register(Box::new(histogram.clone()))?;
    Ok(histogram)
}

impl GenAi {
    fn register(to: &Prometheus) -> Result<Self, prometheus::Error> {
        let [operation, provider, model] =
            ["gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_response_model"];
        Ok(Self {
            request_seconds: histogram(
                to,
                "gen_ai_server_request_duration_seconds",
                "Seconds from a request to its last token.",
                &[operation, provider, model, "error_type"],
                &SECONDS,
            )?,
            first_token_seconds: histogram(
                to,
                "gen_ai_server_time_to_first_token_seconds",
                "Seconds from a request to its first token.",
                &[operation, provider, model],
                &FIRST_TOKEN,
            )?,
            token_seconds: histogram(
                to,
                "gen_ai_server_time_per_output_token_seconds",
                "Seconds a token after the first.",
                &[operation, provider, model],
                &PER_TOKEN,
            )?,
            tokens: histogram(
                to,
                "gen_ai_client_token_usage",
                "Tokens of prompts and answers.",
                &[operation, provider, model, "gen_ai_token_type"],
                &TOKENS,
            )?,
        })
    }
}

impl Metrics {
    /// # Errors
    /// A name is taken in `registry`.
    pub fn register(registry: &Prometheus) -> Result<Self, prometheus::Error> {
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
        let counter = |name, help, labels: &[&str]| counter(registry, name, help, labels);
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
            kl,
            feedback: counter("gyrostat_feedback_total", "Judgements received.", &["kind", "source"])?,
            gen_ai: GenAi::register(registry)?,
            store_bytes,
        })
    }

    pub(crate) fn completion(&self, completion: &Completion) {
        let (interaction, version) = (completion.interaction.as_str(), completion.version.to_string());
        let outcome = completion.finish_reason.as_str();
        self.completions.with_label_values(&[interaction, &version, outcome]).inc();
        if let Some(kl) = completion.kl {
            self.kl.with_label_values(&[interaction, &version]).set(kl);
        }
        // Both series are there from the first answer on: a rate of a series that is missing is no rate of 0.
        let refused = completion.refusal.is_refusal();
        let refusals = self.refusals.with_label_values(&[interaction, completion.risk.as_str(), &version]);
        refusals.inc_by(u64::from(refused));
        let complied = !refused && completion.risk == Risk::Harmful;
        self.unsafe_compliances.with_label_values(&[interaction, &version]).inc_by(u64::from(complied));
    }

    pub(super) fn no_completion(
        &self,
        interaction: &InteractionType,
        version: &str,
        outcome: &str,
        choices: u64,
    ) {
        self.completions.with_label_values(&[interaction.as_str(), version, outcome]).inc_by(choices);
    }

    pub(crate) fn feedback(&self, feedback: &Feedback) {
        self.feedback.with_label_values(&[feedback.judgement.kind(), feedback.source.as_str()]).inc();
    }

    pub(super) fn served(&self, served: Served<'_>) {
        let Served { operation, model, .. } = served;
        let labels = [operation, PROVIDER, model];
        self.gen_ai
            .request_seconds
            .with_label_values(&[operation, PROVIDER, model, ""])
            .observe(served.seconds);
        if let Some(first) = served.first_token_seconds {
            self.gen_ai.first_token_seconds.with_label_values(&labels).observe(first);
            if served.most_tokens > 1 {
                let each = (served.seconds - first) / (served.most_tokens - 1) as f64;
                self.gen_ai.token_seconds.with_label_values(&labels).observe(each);
            }
        }
        for (kind, tokens) in [("input", served.prompt_tokens), ("output", served.completion_tokens)] {
            let Some(tokens) = tokens else { continue };
            self.gen_ai.tokens.with_label_values(&[operation, PROVIDER, model, kind]).observe(tokens as f64);
        }
    }

    pub(super) fn refused(&self, operation: &'static str, model: &str, error_type: &str, seconds: f64) {
        self.gen_ai
            .request_seconds
            .with_label_values(&[operation, PROVIDER, model, error_type])
            .observe(seconds);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use prometheus::{Encoder, TextEncoder};

    use crate::completion::{CompletionId, FinishReason, Prompt, Refusal, RefusalLabel, Timestamp, Version};

    use super::*;

    fn completion(risk: Risk, label: RefusalLabel) -> Completion {
        Completion {
            id: CompletionId::new(),
            at: Timestamp(0),
            version: Version(3),
            interaction: InteractionType::other(),
            prompt: Prompt::Text("a secret".to_owned()),
            answer: "another secret".to_owned(),
            finish_reason: FinishReason::Stop,
            prompt_tokens: 2,
            completion_tokens: 3,
            refusal: Refusal { label, probability: 0.5, way_forward: false },
            risk,
            helpfulness: 1.0,
            kl: Some(0.25),
            seconds: 1.0,
            user: Some("ann".to_owned()),
            metadata: BTreeMap::new(),
        }
    }

    fn shown(report: impl FnOnce(&Metrics)) -> String {
        let registry = Prometheus::new();
        report(&Metrics::register(&registry).unwrap());
        let mut text = Vec::new();
        TextEncoder::new().encode(&registry.gather(), &mut text).unwrap();
        String::from_utf8(text).unwrap()
    }

    #[track_caller]
    fn check(text: &str, line: &str) {
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }

    #[test]
    fn refusals_are_told_apart_by_risk() {
        let text = shown(|metrics| {
            metrics.completion(&completion(Risk::Benign, RefusalLabel::Partial));
            metrics.completion(&completion(Risk::Harmful, RefusalLabel::Full));
            metrics.completion(&completion(Risk::Harmful, RefusalLabel::None));
            metrics.completion(&completion(Risk::Benign, RefusalLabel::None));
        });
        check(&text, r#"gyrostat_completions_total{interaction="other",outcome="stop",version="v3"} 4"#);
        check(&text, r#"gyrostat_refusals_total{interaction="other",risk="benign",version="v3"} 1"#);
        check(&text, r#"gyrostat_refusals_total{interaction="other",risk="harmful",version="v3"} 1"#);
        check(&text, r#"gyrostat_unsafe_compliances_total{interaction="other",version="v3"} 1"#);
        assert!(!text.contains("secret") && !text.contains("ann"), "{text}");
    }

    #[test]
    fn a_request_counts_once_with_all_its_choices() {
        let text = shown(|metrics| {
            metrics.served(Served {
                operation: "chat",
                model: "tiny",
                seconds: 1.5,
                first_token_seconds: Some(0.5),
                prompt_tokens: Some(7),
                completion_tokens: Some(15),
                most_tokens: 11,
            });
            metrics.refused("chat", "tiny", "queue_full", 0.25);
        });
        let labels =
            r#"gen_ai_operation_name="chat",gen_ai_provider_name="gyrostat",gen_ai_response_model="tiny""#;
        let sum =
            |name: &str, more: &str, value: &str| check(&text, &format!("{name}_sum{{{more}}} {value}"));
        sum("gen_ai_server_request_duration_seconds", &format!(r#"error_type="",{labels}"#), "1.5");
        sum(
            "gen_ai_server_request_duration_seconds",
            &format!(r#"error_type="queue_full",{labels}"#),
            "0.25",
        );
        sum("gen_ai_server_time_to_first_token_seconds", labels, "0.5");
        sum("gen_ai_server_time_per_output_token_seconds", labels, "0.1");
        sum("gen_ai_client_token_usage", &format!(r#"{labels},gen_ai_token_type="input""#), "7");
        sum("gen_ai_client_token_usage", &format!(r#"{labels},gen_ai_token_type="output""#), "15");
    }
}
