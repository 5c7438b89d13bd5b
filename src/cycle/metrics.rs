//! What the loop reports: drift, alarms, updates, versions.

use prometheus::{
    Gauge, GaugeVec, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry as Prometheus,
};

use crate::completion::{Alarm, DriftState, InteractionType, Outcome, ScorecardRow, SignalKind};
use crate::learn::Measures;
use crate::registry::{Registry, VersionState};

use super::{handle::RECIPES, readings::Reading};

/// Gauges and counters of the loop.
#[derive(Debug, Clone)]
pub struct Metrics {
    readings: Readings,
    evidence: GaugeVec,
    threshold: GaugeVec,
    baseline: GaugeVec,
    current: GaugeVec,
    state: IntGaugeVec,
    alarms: IntCounterVec,
    updates: IntCounterVec,
    progress: Gauge,
    lag: IntGauge,
    /// `gyrostat_update_…` by TRL's name.
    measures: Vec<(&'static str, Gauge)>,
    version: IntGaugeVec,
}

/// What the loop reads off feedback, conversations and probes.
#[derive(Debug, Clone)]
struct Readings {
    satisfaction: HistogramVec,
    helpfulness: HistogramVec,
    satisfaction_sources: IntCounterVec,
    probes: IntCounterVec,
}

impl Readings {
    fn register(registry: &Prometheus) -> Result<Self, prometheus::Error> {
        let scores: Vec<f64> = (1..=10_u8).map(|tenths| f64::from(tenths) / 10.0).collect();
        let score = |name, help| {
            HistogramVec::new(
                HistogramOpts::new(name, help).buckets(scores.clone()),
                &["interaction", "version"],
            )
        };
        let readings = Self {
            satisfaction: score("gyrostat_satisfaction_score", "Satisfaction with answers, 0 to 1.")?,
            helpfulness: score("gyrostat_helpfulness_score", "Helpfulness of answers, 0 to 1.")?,
            satisfaction_sources: IntCounterVec::new(
                Opts::new(
                    "gyrostat_satisfaction_readings_total",
                    "Readings of satisfaction, by kind of feedback; next_turn is what a user says next.",
                ),
                &["source"],
            )?,
            probes: IntCounterVec::new(
                Opts::new(
                    "gyrostat_probes_total",
                    "Probes that were answered, by whether the model behaved as they expect.",
                ),
                &["type", "version", "outcome"],
            )?,
        };
        registry.register(Box::new(readings.satisfaction.clone()))?;
        registry.register(Box::new(readings.helpfulness.clone()))?;
        registry.register(Box::new(readings.satisfaction_sources.clone()))?;
        registry.register(Box::new(readings.probes.clone()))?;
        Ok(readings)
    }

    fn count(&self, reading: &Reading) {
        let signal = &reading.signal;
        let (interaction, version) = (signal.interaction.as_str(), signal.version.to_string());
        match signal.kind {
            SignalKind::Satisfaction => {
                self.satisfaction.with_label_values(&[interaction, &version]).observe(signal.value);
                self.satisfaction_sources.with_label_values(&[reading.source]).inc();
            }
            SignalKind::Probes => {
                let outcome = if signal.value > 0.5 { "passed" } else { "failed" };
                self.probes.with_label_values(&[interaction, &version, outcome]).inc();
            }
            SignalKind::Helpfulness => {
                self.helpfulness.with_label_values(&[interaction, &version]).observe(signal.value);
            }
            // Counted where the answer is given.
            SignalKind::Refusal | SignalKind::Kl => {}
        }
    }
}

/// TRL's names, and ours beside them, with what they mean.
const MEASURES: [(&str, &str); 12] = [
    ("objective/kl", "Sum of log-ratios to the reference over an answer, mean over the episodes, in nats."),
    ("objective/entropy", "Entropy of the policy over an answer, in nats."),
    ("objective/scores", "Mean score of the reward model."),
    ("objective/rlhf_reward", "Mean score less the KL penalty."),
    ("objective/non_score_reward", "Mean KL penalty, as a reward."),
    ("policy/approxkl_avg", "Half the mean squared log-ratio to the policy that made the episodes."),
    ("policy/clipfrac_avg", "Share of the tokens whose ratio was clipped."),
    ("policy/entropy_avg", "Entropy of the policy over a token, in nats."),
    ("loss/policy_avg", "Clipped policy loss."),
    ("loss/value_avg", "Clipped value loss."),
    ("val/ratio", "Mean probability ratio to the policy that made the episodes."),
    ("reward/accuracy", "Share of held-back judgements that the reward model orders rightly."),
];

fn lag(registry: &Prometheus) -> Result<IntGauge, prometheus::Error> {
    let help = "Answers and judgements in the store that the detectors have not seen yet.";
    let lag = IntGauge::new("gyrostat_sensing_lag_records", help)?;
    registry.register(Box::new(lag.clone()))?;
    Ok(lag)
}

impl Metrics {
    /// # Errors
    /// A name is taken in `registry`.
    pub fn register(registry: &Prometheus) -> Result<Self, prometheus::Error> {
        const STREAM: [&str; 2] = ["signal", "interaction"];
        let stream = |name: &str, help: &str| {
            let gauge = GaugeVec::new(Opts::new(name, help), &STREAM)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok::<_, prometheus::Error>(gauge)
        };
        let counter = |name: &str, help: &str, labels: &[&str]| {
            let counter = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(counter.clone()))?;
            Ok::<_, prometheus::Error>(counter)
        };
        let gauge = |name: &str, help: &str| {
            let gauge = Gauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok::<_, prometheus::Error>(gauge)
        };
        let integers = |name: &str, help: &str, labels: &[&str]| {
            let gauge = IntGaugeVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok::<_, prometheus::Error>(gauge)
        };
        let metrics = Self {
            readings: Readings::register(registry)?,
            evidence: stream(
                "gyrostat_drift_evidence_log10",
                "Evidence of a change, log10 of the e-SR statistic.",
            )?,
            threshold: stream(
                "gyrostat_drift_threshold_log10",
                "Evidence at which the stream alarms, log10.",
            )?,
            baseline: stream("gyrostat_drift_baseline", "Mean of the signal over its reference window.")?,
            current: stream("gyrostat_drift_current", "Mean of the signal's newest readings.")?,
            state: integers("gyrostat_drift_state", "0 learning its reference, 1 steady, 2 alarm.", &STREAM)?,
            alarms: counter(
                "gyrostat_alarms_total",
                "Drift alarms.",
                &["signal", "interaction", "direction"],
            )?,
            updates: counter("gyrostat_updates_total", "Updates that ended.", &["recipe", "outcome"])?,
            progress: gauge("gyrostat_update_progress_ratio", "Share of the running update that is done.")?,
            lag: lag(registry)?,
            measures: MEASURES
                .iter()
                .map(|(name, help)| {
                    Ok((*name, gauge(&format!("gyrostat_update_{}", name.replace('/', "_")), help)?))
                })
                .collect::<Result<_, prometheus::Error>>()?,
            version: integers(
                "gyrostat_policy_version_info",
                "1 for each version on disk, with its state.",
                &["version", "state"],
            )?,
        };
        for recipe in RECIPES {
            for outcome in Outcome::NAMES {
                metrics.updates.with_label_values(&[recipe, outcome]);
            }
        }
        Ok(metrics)
    }

    /// Shows the streams and the versions as they stand; `lag` records of the store are yet to be sensed.
    pub(super) fn show(&self, rows: &[ScorecardRow], registry: &Registry, lag: u64) {
        self.lag.set(lag as i64);
        for row in rows {
            let interaction = row.interaction.as_ref().map_or(InteractionType::ALL, InteractionType::as_str);
            let labels = [row.signal.as_str(), interaction];
            self.evidence.with_label_values(&labels).set(row.evidence_log10);
            self.threshold.with_label_values(&labels).set(row.threshold_log10);
            if let Some(baseline) = row.baseline {
                self.baseline.with_label_values(&labels).set(baseline);
            }
            if let Some(current) = row.current {
                self.current.with_label_values(&labels).set(current);
            }
            self.state.with_label_values(&labels).set(match row.state {
                DriftState::Learning => 0,
                DriftState::Steady => 1,
                DriftState::Alarm => 2,
            });
        }
        self.version.reset();
        for record in registry.history().unwrap_or_default() {
            let state = match record.state {
                VersionState::Staged => "staged",
                VersionState::Active => "active",
                VersionState::Canary => "canary",
                VersionState::Retired => "retired",
                VersionState::Rejected => "rejected",
            };
            let labels = [record.version.to_string(), state.to_owned()];
            self.version.with_label_values(&labels).set(1);
        }
    }

    /// A reading that is new to the loop, of whatever version.
    pub(super) fn reading(&self, reading: &Reading) {
        self.readings.count(reading);
    }

    pub(super) fn alarm(&self, alarm: &Alarm) {
        let interaction = alarm.interaction.as_ref().map_or(InteractionType::ALL, InteractionType::as_str);
        let labels = [alarm.signal.as_str(), interaction, alarm.direction.as_str()];
        self.alarms.with_label_values(&labels).inc();
    }

    pub(super) fn progress(&self, progress: f64, measures: Measures<'_>) {
        self.progress.set(progress);
        for (name, value) in measures {
            if let Some((_, gauge)) = self.measures.iter().find(|(known, _)| known == name) {
                gauge.set(*value);
            }
        }
    }

    pub(super) fn update(&self, recipe: &str, outcome: &Outcome) {
        self.progress.set(1.0);
        self.updates.with_label_values(&[recipe, outcome.as_str()]).inc();
    }
}
