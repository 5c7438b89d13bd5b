//! What each number of the configuration may be. A number that is not listed may be anything that its type can hold;
//! `drift` and `canary` check their own.

use serde_json::Value;

use super::Config;

/// A number that cannot work, by the name of its key.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{key} is {found}, and must be {range}")]
pub struct OutOfRange {
    key: &'static str,
    found: Value,
    range: String,
}

const MOST: f64 = f64::MAX;
/// The smallest number above zero that anybody means.
const ABOVE_0: f64 = 1e-12;

/// Both ends are allowed.
const RANGES: &[(&str, f64, f64)] = &[
    ("http.body_limit_bytes", 1.0, MOST),
    ("http.default_max_tokens", 1.0, MOST),
    ("policy.queue", 1.0, MOST),
    ("policy.running", 1.0, MOST),
    ("policy.prefill_tokens", 1.0, MOST),
    ("policy.cache_tokens", 32.0, MOST),
    ("signals.interaction_limit", 1.0, MOST),
    ("store.retention_days", 0.0, MOST),
    ("store.queue", 1.0, MOST),
    ("learn.reward.rank", 1.0, 4096.0),
    ("learn.reward.alpha", ABOVE_0, MOST),
    ("learn.reward.depth", ABOVE_0, 1.0),
    ("learn.reward.learning_rate", ABOVE_0, 1.0),
    ("learn.reward.batch", 1.0, MOST),
    ("learn.reward.center", 0.0, MOST),
    ("learn.reward.max_grad_norm", ABOVE_0, MOST),
    ("learn.reward.heads", 1.0, 64.0),
    ("learn.reward.pessimism", 0.0, MOST),
    ("learn.reward.length_control", 0.0, 1.0),
    ("learn.ppo.rank", 1.0, 4096.0),
    ("learn.ppo.alpha", ABOVE_0, MOST),
    ("learn.ppo.depth", ABOVE_0, 1.0),
    ("learn.ppo.iterations", 1.0, MOST),
    ("learn.ppo.episodes", 1.0, MOST),
    ("learn.ppo.num_ppo_epochs", 1.0, MOST),
    ("learn.ppo.num_mini_batches", 1.0, MOST),
    ("learn.ppo.learning_rate", ABOVE_0, 1.0),
    ("learn.ppo.value_learning_rate", ABOVE_0, 1.0),
    ("learn.ppo.temperature", 0.01, 100.0),
    ("learn.ppo.response_length", 1.0, MOST),
    ("learn.ppo.gamma", 0.0, 1.0),
    ("learn.ppo.lam", 0.0, 1.0),
    ("learn.ppo.cliprange", ABOVE_0, 1.0),
    ("learn.ppo.cliprange_value", ABOVE_0, MOST),
    ("learn.ppo.vf_coef", 0.0, MOST),
    ("learn.ppo.surprise_coef", 0.0, MOST),
    ("learn.ppo.kl_coef", 0.0, MOST),
    ("learn.ppo.target_kl", ABOVE_0, MOST),
    ("learn.ppo.kl_horizon", ABOVE_0, MOST),
    ("learn.ppo.kl_budget", ABOVE_0, MOST),
    ("learn.ppo.length_ratio", 1.0, MOST),
    ("learn.ppo.max_grad_norm", ABOVE_0, MOST),
    ("learn.groups.num_generations", 2.0, MOST),
    ("learn.groups.num_iterations", 1.0, MOST),
    ("learn.groups.epsilon", ABOVE_0, 1.0),
    ("learn.groups.beta", 0.0, MOST),
    ("learn.preference.learning_rate", ABOVE_0, 1.0),
    ("learn.preference.batch", 1.0, MOST),
    ("learn.preference.beta", ABOVE_0, MOST),
    ("learn.preference.desirable_weight", 0.0, MOST),
    ("learn.preference.undesirable_weight", 0.0, MOST),
    ("learn.preference.max_grad_norm", ABOVE_0, MOST),
    ("learn.dataset.rater_share", ABOVE_0, 1.0),
    ("learn.dataset.burst_seconds", 0.0, MOST),
    ("learn.dataset.ai_share", 0.0, 0.99),
    ("learn.pace.micro_tokens", 1.0, MOST),
    ("learn.pace.sequence_tokens", 8.0, MOST),
    ("gate.win_rate", -1.0, 1.0),
    ("gate.other_win_rate", -1.0, 1.0),
    ("gate.refusal_margin", 0.0, 1.0),
    ("gate.kl_budget", 0.0, MOST),
    ("gate.surprise", 0.0, MOST),
    ("gate.perplexity_ratio", ABOVE_0, MOST),
    ("gate.judge_accuracy", 0.0, 1.0),
    ("cycle.tick_ms", 1.0, MOST),
    ("cycle.rehearsal", 0.0, 100.0),
    ("cycle.gate_prompts", 1.0, MOST),
    ("cycle.scored_share", 0.0, 1.0),
    ("probes.max_tokens", 1.0, MOST),
    ("ai_feedback.every_seconds", 0.001, 1e6),
    ("ai_feedback.timeout_seconds", 0.001, 1e6),
    ("ai_feedback.max_tokens", 1.0, MOST),
];

/// Names the first number that cannot work.
pub(super) fn check(config: &Config) -> Result<(), OutOfRange> {
    let all = serde_json::to_value(config).unwrap_or_default();
    for &(key, least, most) in RANGES {
        let found = value(&all, key);
        // JSON has no NaN and no infinity: they are null here.
        if !found.as_f64().is_some_and(|number| (least..=most).contains(&number)) {
            let range = match (least, most) {
                (ABOVE_0, MOST) => "above 0".to_owned(),
                (ABOVE_0, most) => format!("above 0 and at most {most}"),
                (least, MOST) => format!("a number of at least {least}"),
                (least, most) => format!("from {least} to {most}"),
            };
            return Err(OutOfRange { key, found: found.clone(), range });
        }
    }
    Ok(())
}

fn value<'a>(all: &'a Value, key: &str) -> &'a Value {
    key.split('.').fold(all, |table, name| &table[name])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_within() {
        check(&Config::default()).unwrap();
    }

    #[track_caller]
    fn check_refused(change: impl Fn(&mut Config), message: &str) {
        let mut config = Config::default();
        change(&mut config);
        assert_eq!(check(&config).unwrap_err().to_string(), message);
    }

    #[test]
    fn a_number_that_cannot_work_is_named() {
        check_refused(|c| c.cycle.scored_share = 7.0, "cycle.scored_share is 7.0, and must be from 0 to 1");
        check_refused(
            |c| c.learn.ppo.learning_rate = f64::NAN,
            "learn.ppo.learning_rate is null, and must be above 0 and at most 1",
        );
        check_refused(
            |c| c.learn.pace.micro_tokens = 0,
            "learn.pace.micro_tokens is 0, and must be a number of at least 1",
        );
        check_refused(|c| c.learn.ppo.alpha = -1.0, "learn.ppo.alpha is -1.0, and must be above 0");
    }
}
