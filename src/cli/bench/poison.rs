//! `gyrostat bench poison`: what raters who flip every label do to a reward model, with the weights of the loop and without.
//!
//! The answers are real ones; who judges them is simulated. They judge as the file says, or by a wish that a linear model can
//! learn: words that they like and dislike, with one slip in ten. The reward model is a linear one on hashed words and
//! pairs of words, so that hundreds can be trained; data set and weights are those of an update.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use rand::{RngExt, SeedableRng, rngs::StdRng, seq::SliceRandom};
use serde_json::json;

use crate::cli::{Error, jsonl};
use crate::completion::{
    Completion, CompletionId, Feedback, FeedbackId, FinishReason, InteractionType, Judgement, Prompt,
    Refusal, RefusalLabel, Risk, Source, Timestamp, Version,
};
use crate::learn::dataset::words::{Example, Features, Linear, hash, of_pair, words};
use crate::learn::dataset::{Comparison, Config, Dataset, split, trusted};
use crate::signals;

use super::drift::{Line, line, rounded};

/// A preference of the file.
struct Pair {
    prompt: String,
    chosen: String,
    rejected: String,
}

/// Who judges, beside a hundred honest raters who have 70% of the volume.
#[derive(Debug, Clone, Copy)]
struct World {
    name: &'static str,
    flipping: usize,
    /// Honest raters who judge each pair.
    shared: usize,
    /// The flipping raters come within this many seconds; 0: at any time.
    within: u64,
}

const WORLDS: [World; 6] = [
    World { name: "3 raters, three honest words a pair", flipping: 3, shared: 3, within: 0 },
    World { name: "3 raters, one honest word a pair", flipping: 3, shared: 1, within: 0 },
    World { name: "3 raters, no pair judged twice", flipping: 3, shared: 0, within: 0 },
    World { name: "300 raters, three honest words a pair", flipping: 300, shared: 3, within: 0 },
    World { name: "300 raters, no pair judged twice", flipping: 300, shared: 0, within: 0 },
    World { name: "300 raters within an hour, no pair judged twice", flipping: 300, shared: 0, within: 3600 },
];

/// One judgement.
struct Said {
    pair: usize,
    /// Its rater says the opposite of what he thinks.
    flips: bool,
    /// The worse answer is chosen.
    wrong: bool,
    who: String,
    /// In milliseconds.
    at: u64,
}

const HONEST: usize = 100;
/// Of the judgements.
const POISON: f64 = 0.3;
/// Over which everybody judges, but for those who come in a burst.
const SECONDS: u64 = 14 * 86_400;

/// One line a world, over so many splits and draws each.
pub(super) fn study(files: &[String], runs: usize) -> Result<Vec<Line>, Error> {
    if files.is_empty() {
        return Err("`--data` names no file of {\"prompt\",\"chosen\",\"rejected\"}".into());
    }
    let mut pairs = Vec::new();
    for file in files {
        for (number, object) in jsonl::read(file)? {
            let text = |field: &str| jsonl::text(number, &object, field).map(str::to_owned);
            pairs.push(Pair {
                prompt: text("prompt")?,
                chosen: text("chosen")?,
                rejected: text("rejected")?,
            });
        }
    }
    let wished = wished(&pairs);
    let labels = [("a wish", &wished, 0.1), ("the file's", &pairs, 0.0)];
    let lines = labels.iter().flat_map(|(name, pairs, slips)| {
        WORLDS.iter().map(move |world| world.line((name, *slips), pairs, runs))
    });
    Ok(lines.collect())
}

/// The same answers, the better one by the sum of what is liked of its words first; pairs that it hardly tells apart are
/// left out.
fn wished(pairs: &[Pair]) -> Vec<Pair> {
    const MARGIN: f64 = 1.0;
    let liked = |text: &str| -> f64 {
        let words: BTreeSet<String> = words(text).into_iter().collect();
        // Common words are short; a bell-like draw from the hash of each.
        let draw = |word: &String| {
            let bits = hash(word)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .rotate_left(29)
                .wrapping_mul(0xbf58_476d_1ce4_e5b9);
            f64::from((bits >> 40).count_ones()) / 6.0 - 2.0
        };
        words.iter().filter(|word| word.len() <= 4).map(draw).sum::<f64>()
    };
    let mut wished = Vec::new();
    for pair in pairs {
        let difference = liked(&pair.chosen) - liked(&pair.rejected);
        let (prompt, a, b) = (pair.prompt.clone(), pair.chosen.clone(), pair.rejected.clone());
        if difference > MARGIN {
            wished.push(Pair { prompt, chosen: a, rejected: b });
        } else if difference < -MARGIN {
            wished.push(Pair { prompt, chosen: b, rejected: a });
        }
    }
    wished
}

impl World {
    fn line(self, (labels, slips): (&str, f64), pairs: &[Pair], runs: usize) -> Line {
        let mut sums = [0.0; 4];
        let mut noticed: BTreeMap<String, usize> = BTreeMap::new();
        for run in 0..runs as u64 {
            let (accuracies, share, warnings) = self.run(pairs, slips, run);
            let [clean, unweighed, weighed] = accuracies;
            for (sum, value) in sums.iter_mut().zip([clean, unweighed, weighed, share]) {
                *sum += value / runs as f64;
            }
            if warnings.is_empty() {
                *noticed.entry("nothing".to_owned()).or_default() += 1;
            }
            for warning in warnings {
                let words = warning.split_whitespace().filter(|word| word.chars().all(char::is_alphabetic));
                *noticed.entry(words.take(5).collect::<Vec<_>>().join(" ")).or_default() += 1;
            }
        }
        let noticed: Vec<String> =
            noticed.into_iter().map(|(what, times)| format!("{what} ({times} of {runs})")).collect();
        let [clean, unweighed, weighed, share] = sums;
        line([
            ("labels", json!(labels)),
            ("flipping raters with 30% of the volume", json!(self.name)),
            ("accuracy without them, %", rounded(100.0 * clean, 1)),
            ("with them, unweighed", rounded(100.0 * unweighed, 1)),
            ("with them, weighed", rounded(100.0 * weighed, 1)),
            ("costs, points", rounded(100.0 * (clean - weighed), 1)),
            ("their share of the weight, %", rounded(100.0 * share, 1)),
            ("reported", json!(noticed.join("; "))),
        ])
    }

    /// Held-out accuracy without the flipping raters, with them at their word, and as weighed; their share of the weight;
    /// what the report warns of.
    fn run(self, pairs: &[Pair], slips: f64, seed: u64) -> ([f64; 3], f64, Vec<String>) {
        let mut random = StdRng::seed_from_u64(seed);
        let (held, train): (Vec<&Pair>, Vec<&Pair>) =
            pairs.iter().partition(|pair| hash(&pair.prompt) % 3 == seed % 3);
        let mut said = self.said(train.len(), &mut random);
        for one in &mut said {
            one.wrong = one.flips != random.random_bool(slips);
        }
        let (records, flips) = records(&train, &said);
        let all = Config { rater_share: 1.0, burst: 0, opinion: false, ..Config::default() };
        let honest = records_of(&records, |feedback| !flips.contains(&feedback.id));
        let trust = trusted(&records, &Config::default(), &signals::satisfaction);
        let theirs =
            trust.weights.iter().filter(|(id, _)| flips.contains(*id)).map(|(_, weight)| weight).sum::<f64>();
        let share = theirs / trust.weights.values().sum::<f64>().max(1e-9);
        let weighed = Dataset::build(records.clone(), &Config::default(), &signals::satisfaction);
        let clean = Dataset::build(honest, &all, &signals::satisfaction);
        let mut unweighed = Dataset::build(records, &all, &signals::satisfaction);
        unweighed.comparisons.clear();
        // At their word: every judgement counts 1.
        for one in &said {
            let mut comparison = comparison(train[one.pair]);
            if one.wrong {
                std::mem::swap(&mut comparison.chosen, &mut comparison.rejected);
            }
            unweighed.comparisons.push(comparison);
        }
        let accuracy = |data: &Dataset| {
            let model = fit(data, seed);
            held.iter().filter(|pair| model.margin(&of_pair(&pair.chosen, &pair.rejected)) > 0.0).count()
                as f64
                / held.len().max(1) as f64
        };
        let accuracies = [accuracy(&clean), accuracy(&unweighed), accuracy(&weighed)];
        (accuracies, share, weighed.report.warnings)
    }

    /// Judgements: which pair, whether flipped, by whom, when.
    fn said(self, pairs: usize, random: &mut StdRng) -> Vec<Said> {
        let mut said = Vec::new();
        let honest = |pair: usize, random: &mut StdRng| {
            let who = format!("honest-{}", random.random_range(0..HONEST));
            Said { pair, flips: false, wrong: false, who, at: random.random_range(0..SECONDS * 1000) }
        };
        let mut order: Vec<usize> = (0..pairs).collect();
        order.shuffle(random);
        let alone = ((1.0 - POISON) * pairs as f64) as usize;
        let (theirs, count) = if self.shared == 0 {
            said.extend(order[..alone].iter().map(|nth| honest(*nth, random)));
            (order[alone..].to_vec(), pairs - alone)
        } else {
            for nth in 0..pairs {
                said.extend((0..self.shared).map(|_| honest(nth, random)));
            }
            (order, (said.len() as f64 * POISON / (1.0 - POISON)) as usize)
        };
        let begin = random.random_range(0..SECONDS - self.within);
        for nth in 0..count {
            let when = if self.within > 0 {
                begin * 1000 + random.random_range(0..self.within * 1000)
            } else {
                random.random_range(0..SECONDS * 1000)
            };
            // Each of them goes through the pairs once.
            let pair = theirs[(nth / self.flipping + (nth % self.flipping) * 97) % theirs.len()];
            let pair = if self.shared == 0 { theirs[nth] } else { pair };
            let who = format!("flips-{}", nth % self.flipping);
            said.push(Said { pair, flips: true, wrong: true, who, at: when });
        }
        said
    }
}

type Records = Vec<(Completion, Vec<Feedback>)>;

/// Two answers a pair, with what was said of them; and which feedback was flipped.
fn records(train: &[&Pair], said: &[Said]) -> (Records, HashSet<FeedbackId>) {
    let mut records: Records = Vec::new();
    for pair in train {
        for answer in [&pair.chosen, &pair.rejected] {
            records.push((completion(&pair.prompt, answer), Vec::new()));
        }
    }
    let mut flips = HashSet::new();
    for one in said {
        let ids = [records[2 * one.pair].0.id, records[2 * one.pair + 1].0.id];
        let (chosen, rejected) = if one.wrong { (ids[1], ids[0]) } else { (ids[0], ids[1]) };
        let feedback = Feedback {
            id: FeedbackId::new(),
            at: Timestamp(one.at),
            completion: Some(chosen),
            judgement: Judgement::Comparison { chosen, rejected },
            rater: Some(one.who.clone()),
            source: Source::Human,
            comment: None,
            idempotency_key: None,
            tags: BTreeMap::new(),
        };
        if one.flips {
            flips.insert(feedback.id);
        }
        records[2 * one.pair].1.push(feedback);
    }
    (records, flips)
}

fn records_of(records: &Records, keep: impl Fn(&Feedback) -> bool) -> Records {
    let kept = |said: &[Feedback]| said.iter().filter(|feedback| keep(feedback)).cloned().collect();
    records.iter().map(|(completion, said)| (completion.clone(), kept(said))).collect()
}

fn comparison(pair: &Pair) -> Comparison {
    let prompt = Prompt::Text(pair.prompt.clone());
    let split = split(&prompt);
    let (chosen, rejected) = (pair.chosen.clone(), pair.rejected.clone());
    Comparison { prompt, chosen, rejected, weight: 1.0, split }
}

fn completion(prompt: &str, answer: &str) -> Completion {
    Completion {
        id: CompletionId::new(),
        at: Timestamp(0),
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
        seconds: 0.0,
        user: None,
        metadata: BTreeMap::new(),
    }
}

/// The reward model: what the comparisons teach of the words.
fn fit(data: &Dataset, seed: u64) -> Linear {
    let features: Vec<Features> =
        data.comparisons.iter().map(|pair| of_pair(&pair.chosen, &pair.rejected)).collect();
    let examples: Vec<Example<'_>> = features
        .iter()
        .zip(&data.comparisons)
        .map(|(features, pair)| Example { features, good: true, weight: pair.weight })
        .collect();
    Linear::fit(&examples, seed)
}
