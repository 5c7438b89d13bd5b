//! What people said, as training data: comparisons, labels, demonstrations, prompts.

mod agreement;
mod judges;
mod opinion;
pub mod trust;
pub mod voice;
pub mod words;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::completion::{
    Completion, CompletionId, DataReport, Feedback, FeedbackId, InteractionType, Judgement, Prompt, Source,
};

use trust::Trust;
use voice::Voice;

/// How feedback is weighed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The share of the whole that one rater may have; what is beyond it is weighed down. Of a few raters each may have
    /// twice an equal share.
    pub rater_share: f64,
    /// People that an update needs behind its feedback.
    pub minimum_raters: usize,
    /// Judgements that a rater can read in so many seconds, at most; more are left out. 0 leaves none out.
    pub burst: usize,
    pub burst_seconds: f64,
    /// Pairs that are made of one prompt's judged answers, at most.
    pub pairs_a_prompt: usize,
    /// The share of the whole that judge models may have together, as far as people agree with them.
    pub ai_share: f64,
    /// Whether raters are held against what the others' judgements teach of the words of an answer.
    pub opinion: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            rater_share: 0.05,
            minimum_raters: 3,
            burst: 10,
            burst_seconds: 10.0,
            pairs_a_prompt: 4,
            ai_share: 0.5,
            opinion: true,
        }
    }
}

/// Which part of learning a prompt is for. A prompt belongs to one for ever, by its hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    Train,
    Validation,
    Gate,
}

impl Split {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Validation => "validation",
            Self::Gate => "gate",
        }
    }
}

/// 80% train, 10% validation, 10% gate.
pub fn split(prompt: &Prompt) -> Split {
    let hash = Sha256::digest(prompt.canonical().as_bytes());
    match u16::from_be_bytes([hash[0], hash[1]]) % 10 {
        0..=7 => Split::Train,
        8 => Split::Validation,
        _ => Split::Gate,
    }
}

/// Two answers to one prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    pub prompt: Prompt,
    pub chosen: String,
    pub rejected: String,
    pub weight: f64,
    pub split: Split,
}

/// One answer with its label in `[0, 1]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Labelled {
    pub prompt: Prompt,
    pub answer: String,
    pub label: f64,
    pub weight: f64,
    pub split: Split,
}

/// A better answer that somebody wrote.
#[derive(Debug, Clone, PartialEq)]
pub struct Demonstration {
    pub prompt: Prompt,
    pub answer: String,
    pub split: Split,
}

/// A prompt that was asked.
#[derive(Debug, Clone, PartialEq)]
pub struct Asked {
    pub prompt: Prompt,
    pub interaction: InteractionType,
    pub split: Split,
}

/// Training data.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Dataset {
    pub comparisons: Vec<Comparison>,
    pub labelled: Vec<Labelled>,
    pub demonstrations: Vec<Demonstration>,
    /// Each prompt once.
    pub prompts: Vec<Asked>,
    /// Everything that was learned from.
    pub feedback: Vec<FeedbackId>,
    pub report: DataReport,
}

impl Dataset {
    /// Builds it from judged answers. `value` is what a judgement says of its answer, in `[0, 1]`.
    pub fn build(
        records: Vec<(Completion, Vec<Feedback>)>,
        config: &Config,
        value: &dyn Fn(&Judgement) -> Option<f64>,
    ) -> Self {
        let trust = trusted(&records, config, value);
        let mut out = Self::default();
        let answers: HashMap<CompletionId, (Prompt, String)> = records
            .iter()
            .map(|(completion, _)| (completion.id, (completion.prompt.clone(), completion.answer.clone())))
            .collect();
        let mut judged: BTreeMap<String, Vec<(f64, String)>> = BTreeMap::new();
        let mut prompts: BTreeMap<String, Asked> = BTreeMap::new();
        let mut seen = BTreeSet::new();
        for (completion, feedback) in &records {
            let split = split(&completion.prompt);
            let canonical = completion.prompt.canonical();
            prompts.entry(canonical.clone()).or_insert_with(|| Asked {
                prompt: completion.prompt.clone(),
                interaction: completion.interaction.clone(),
                split,
            });
            let (mut sum, mut total) = (0.0, 0.0);
            for said in feedback {
                let weight = trust.weights.get(&said.id).copied().unwrap_or(0.0);
                if weight <= 0.0 || !seen.insert(said.id) {
                    continue;
                }
                out.feedback.push(said.id);
                if let Some(value) = value(&said.judgement) {
                    sum += value * weight;
                    total += weight;
                }
                out.compare(completion, said, &answers, weight);
            }
            if total > 0.0 {
                let label = sum / total;
                judged.entry(canonical).or_default().push((label, completion.answer.clone()));
                out.labelled.push(Labelled {
                    prompt: completion.prompt.clone(),
                    answer: completion.answer.clone(),
                    label,
                    weight: total.min(1.0),
                    split,
                });
            }
        }
        out.pair_labels(judged, &prompts, config);
        out.prompts = prompts.into_values().collect();
        out.report = out.told(trust);
        out
    }

    fn told(&self, trust: Trust) -> DataReport {
        let mut splits = BTreeMap::new();
        for asked in &self.prompts {
            *splits.entry(asked.split.as_str().to_owned()).or_default() += 1;
        }
        DataReport {
            found: trust.weights.len(),
            used: self.feedback.len(),
            weight: trust.weights.values().sum(),
            raters: trust.raters,
            comparisons: self.comparisons.len(),
            labels: self.labelled.len(),
            demonstrations: self.demonstrations.len(),
            prompts: self.prompts.len(),
            rehearsed: 0,
            splits,
            left_out: trust.left_out,
            weighed_down: trust.weighed_down,
            judges: trust.judges,
            warnings: trust.warnings,
        }
    }

    /// Comparisons that somebody made outright, and demonstrations over what they correct.
    fn compare(
        &mut self,
        completion: &Completion,
        said: &Feedback,
        answers: &HashMap<CompletionId, (Prompt, String)>,
        weight: f64,
    ) {
        let split = split(&completion.prompt);
        let mut push = |prompt: &Prompt, chosen: &str, rejected: &str| {
            if chosen != rejected {
                let (prompt, chosen, rejected) = (prompt.clone(), chosen.to_owned(), rejected.to_owned());
                self.comparisons.push(Comparison { prompt, chosen, rejected, weight, split });
            }
        };
        match &said.judgement {
            Judgement::Comparison { chosen, rejected } => {
                if let (Some((prompt, chosen)), Some((_, rejected))) =
                    (answers.get(chosen), answers.get(rejected))
                {
                    push(prompt, chosen, rejected);
                }
            }
            Judgement::TextComparison { prompt, chosen, rejected } => push(prompt, chosen, rejected),
            Judgement::Demonstration { answer } => {
                push(&completion.prompt, answer, &completion.answer);
                let (prompt, answer) = (completion.prompt.clone(), answer.clone());
                self.demonstrations.push(Demonstration { prompt, answer, split });
            }
            Judgement::Thumbs { .. }
            | Judgement::Rating { .. }
            | Judgement::Flag { .. }
            | Judgement::Behaviour { .. } => {}
        }
    }

    /// Answers to one prompt whose labels differ are comparisons too.
    fn pair_labels(
        &mut self,
        judged: BTreeMap<String, Vec<(f64, String)>>,
        prompts: &BTreeMap<String, Asked>,
        config: &Config,
    ) {
        for (canonical, answers) in judged {
            let Some(asked) = prompts.get(&canonical) else { continue };
            let pairs =
                answers.iter().enumerate().flat_map(|(at, a)| answers[at + 1..].iter().map(move |b| (a, b)));
            let differing = pairs.filter(|(a, b)| (a.0 - b.0).abs() > 0.25 && a.1 != b.1);
            for (a, b) in differing.take(config.pairs_a_prompt) {
                let (chosen, rejected) = if a.0 > b.0 { (a, b) } else { (b, a) };
                self.comparisons.push(Comparison {
                    prompt: asked.prompt.clone(),
                    chosen: chosen.1.clone(),
                    rejected: rejected.1.clone(),
                    weight: (chosen.0 - rejected.0).min(1.0),
                    split: asked.split,
                });
            }
        }
    }

    /// Judgements that can be learned from.
    pub fn judged(&self) -> usize {
        self.feedback.len()
    }
}

/// What each judgement counts.
pub fn trusted(
    records: &[(Completion, Vec<Feedback>)],
    config: &Config,
    value: &dyn Fn(&Judgement) -> Option<f64>,
) -> Trust {
    trust::weigh(voices(records, value), config)
}

/// Every judgement as trust sees it, once.
fn voices<'a>(
    records: &'a [(Completion, Vec<Feedback>)],
    value: &dyn Fn(&Judgement) -> Option<f64>,
) -> Vec<Voice<'a>> {
    let mut seen = BTreeSet::new();
    let texts: Texts<'_> =
        records.iter().map(|(one, _)| (one.id, (&one.prompt, one.answer.as_str()))).collect();
    let said = records.iter().flat_map(|(completion, said)| said.iter().map(move |said| (completion, said)));
    said.filter(|(_, said)| seen.insert(said.id))
        .map(|(completion, said)| {
            let (subject, texts, verdict) = subject(completion, said, &texts, value);
            let who = said.rater.clone().or_else(|| completion.user.clone());
            Voice {
                id: said.id,
                at: said.at.0,
                named: said.rater.is_some(),
                ai: said.source == Source::Ai,
                who: who.unwrap_or_else(|| format!("of {}", completion.id)),
                subject,
                texts,
                verdict,
                words: serde_json::to_string(&said.judgement).unwrap_or_default(),
            }
        })
        .collect()
}

/// Prompts and answers, as far as they are kept.
type Texts<'a> = HashMap<CompletionId, (&'a Prompt, &'a str)>;

/// What is judged, the same for the same words; these words; and whether for better or for worse.
fn subject<'a>(
    completion: &'a Completion,
    said: &'a Feedback,
    texts: &Texts<'a>,
    value: &dyn Fn(&Judgement) -> Option<f64>,
) -> (u64, [&'a str; 2], Option<bool>) {
    let pair = |prompt: &str, chosen: &'a str, rejected: &'a str| {
        let (first, second) = if chosen < rejected { (chosen, rejected) } else { (rejected, chosen) };
        (digest(&[prompt, first, second]), [first, second], Some(first == chosen))
    };
    match &said.judgement {
        Judgement::Comparison { chosen, rejected } => match (texts.get(chosen), texts.get(rejected)) {
            (Some((prompt, chosen)), Some((_, rejected))) if !chosen.is_empty() && chosen != rejected => {
                pair(&prompt.canonical(), chosen, rejected)
            }
            _ => {
                // Where texts are not kept, an answer is itself and no other.
                let (first, second) = if chosen < rejected { (chosen, rejected) } else { (rejected, chosen) };
                let subject = digest(&["", &first.to_string(), &second.to_string()]);
                (subject, ["", ""], Some(first == chosen))
            }
        },
        Judgement::TextComparison { prompt, chosen, rejected } => pair(&prompt.canonical(), chosen, rejected),
        judgement => {
            let answer = if completion.answer.is_empty() {
                digest(&[&completion.id.to_string()])
            } else {
                digest(&[&completion.prompt.canonical(), &completion.answer])
            };
            let verdict =
                value(judgement).filter(|value| (value - 0.5).abs() > 1e-9).map(|value| value > 0.5);
            (answer, [&completion.answer, ""], verdict)
        }
    }
}

fn digest(parts: &[&str]) -> u64 {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    hash.finalize().first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use crate::completion::{FinishReason, Refusal, RefusalLabel, Risk, Source, Timestamp, Version};

    use super::*;

    fn answered(
        prompt: &str,
        answer: &str,
        judgement: Judgement,
        rater: &str,
    ) -> (Completion, Vec<Feedback>) {
        let completion = Completion {
            id: CompletionId::new(),
            at: Timestamp(1),
            version: Version(0),
            interaction: InteractionType::other(),
            prompt: Prompt::Text(prompt.to_owned()),
            answer: answer.to_owned(),
            finish_reason: FinishReason::Stop,
            prompt_tokens: 1,
            completion_tokens: 1,
            refusal: Refusal { label: RefusalLabel::None, probability: 0.0, way_forward: false },
            risk: Risk::Benign,
            helpfulness: 1.0,
            kl: None,
            seconds: 0.1,
            user: None,
            metadata: BTreeMap::new(),
        };
        let feedback = Feedback {
            id: FeedbackId::new(),
            at: Timestamp(2),
            completion: Some(completion.id),
            judgement,
            rater: Some(rater.to_owned()),
            source: Source::Human,
            comment: None,
            idempotency_key: None,
            tags: BTreeMap::new(),
        };
        (completion, vec![feedback])
    }

    fn thumbs(judgement: &Judgement) -> Option<f64> {
        match judgement {
            Judgement::Thumbs { up } => Some(f64::from(u8::from(*up))),
            _ => None,
        }
    }

    #[test]
    fn differing_thumbs_on_one_prompt_are_a_comparison() {
        let records = vec![
            answered("p", "good", Judgement::Thumbs { up: true }, "a"),
            answered("p", "bad", Judgement::Thumbs { up: false }, "b"),
            answered("q", "fine", Judgement::Thumbs { up: true }, "a"),
        ];
        let dataset = Dataset::build(records, &Config::default(), &thumbs);
        assert_eq!(dataset.labelled.len(), 3);
        assert_eq!(dataset.prompts.len(), 2);
        assert_eq!(dataset.comparisons.len(), 1);
        assert_eq!((&*dataset.comparisons[0].chosen, &*dataset.comparisons[0].rejected), ("good", "bad"));
    }

    #[test]
    fn a_demonstration_beats_what_it_corrects() {
        let shown = Judgement::Demonstration { answer: "better".to_owned() };
        let dataset = Dataset::build(vec![answered("p", "worse", shown, "a")], &Config::default(), &thumbs);
        assert_eq!(dataset.demonstrations.len(), 1);
        assert_eq!((&*dataset.comparisons[0].chosen, &*dataset.comparisons[0].rejected), ("better", "worse"));
    }

    #[test]
    fn a_loud_rater_is_weighed_down() {
        let mut records: Vec<_> =
            (0..90).map(|n| answered(&n.to_string(), "x", Judgement::Thumbs { up: false }, "loud")).collect();
        let others =
            (0..10).map(|n| answered(&n.to_string(), "y", Judgement::Thumbs { up: true }, &format!("r{n}")));
        records.extend(others);
        let dataset = Dataset::build(records, &Config::default(), &thumbs);
        let loud: f64 = dataset.labelled.iter().filter(|l| l.answer == "x").map(|l| l.weight).sum();
        let share = loud / (loud + 10.0);
        // Of eleven raters each may have two elevenths; said at one time, most of it was never read.
        assert!(share <= 2.0 / 11.0 + 1e-9, "{loud}");
        assert_eq!(dataset.report.left_out["too fast to be read"], 80);
    }

    #[test]
    fn the_split_is_stable_and_in_proportion() {
        let count = |wanted| (0..2000).filter(|n| split(&Prompt::Text(n.to_string())) == wanted).count();
        assert!((1500..1700).contains(&count(Split::Train)));
        assert!((150..250).contains(&count(Split::Gate)));
        assert_eq!(split(&Prompt::Text("hello".to_owned())), Split::Train);
    }
}
