//! An answer as the store keeps it, whoever gave it.

use std::collections::BTreeMap;

use crate::completion::{
    Completion, CompletionId, FinishReason, InteractionType, Prompt, Risk, Timestamp, Version,
};
use crate::signals::{Classifier, risk_label, usable};

/// What is kept of a request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Request<'a> {
    pub(super) at: Timestamp,
    pub(super) prompt: &'a Prompt,
    pub(super) interaction: &'a InteractionType,
    /// The caller's word; without it the classifier's.
    pub(super) risk: Option<Risk>,
    pub(super) user: Option<&'a str>,
    pub(super) metadata: &'a BTreeMap<String, String>,
}

/// One choice of its answer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Answer<'a> {
    pub(super) id: CompletionId,
    pub(super) version: Version,
    pub(super) text: &'a str,
    pub(super) finish_reason: FinishReason,
    pub(super) prompt_tokens: usize,
    pub(super) completion_tokens: usize,
    pub(super) kl: Option<f64>,
    pub(super) seconds: f64,
}

/// Reads the signals of an answer.
pub(super) fn completion(request: Request<'_>, answer: Answer<'_>, classifier: &Classifier) -> Completion {
    let (refusal, risk) = classifier.read(request.prompt.request(), answer.text);
    Completion {
        id: answer.id,
        at: request.at,
        version: answer.version,
        interaction: request.interaction.clone(),
        prompt: request.prompt.clone(),
        answer: answer.text.to_owned(),
        finish_reason: answer.finish_reason,
        prompt_tokens: answer.prompt_tokens,
        completion_tokens: answer.completion_tokens,
        refusal,
        risk: request.risk.unwrap_or_else(|| risk_label(risk)),
        helpfulness: usable(answer.text, answer.finish_reason),
        // The store keeps finite numbers only, and an answer is worth more than its measurement.
        kl: answer.kl.filter(|kl| kl.is_finite()),
        seconds: answer.seconds,
        user: request.user.map(str::to_owned),
        metadata: request.metadata.clone(),
    }
}
