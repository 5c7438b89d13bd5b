//! Two answers to one prompt, for people and judge models to compare: which pairs there are, who gets which, and what a
//! choice says. Pure.

pub mod judge;

use std::collections::{HashMap, HashSet, VecDeque};

use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::completion::{Completion, CompletionId, Feedback, FeedbackId, Judgement, Prompt, Source, Version};

pub use judge::{Config, Judge};

/// Two different answers to one prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Pair {
    /// The recorded answer that what is said of the pair is kept with: one of the two.
    pub about: CompletionId,
    pub prompt: Prompt,
    pub answers: [String; 2],
}

/// One of a pair's answers, by its place in [`Pair::answers`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    First,
    Second,
}

impl Side {
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::First => Self::Second,
            Self::Second => Self::First,
        }
    }
}

impl Pair {
    /// The same for the same words, whichever answer stands first.
    pub fn key(&self) -> u64 {
        let [first, second] = &self.answers;
        let (low, high) = if first <= second { (first, second) } else { (second, first) };
        digest(&[&self.prompt.canonical(), low, high])
    }

    pub fn answer(&self, side: Side) -> &str {
        let [first, second] = &self.answers;
        match side {
            Side::First => first,
            Side::Second => second,
        }
    }

    /// As feedback: texts, so that it is kept whatever becomes of the second answer, and so that it is no reading of
    /// satisfaction: of two answers one is always better, however good both are.
    pub fn preference(&self, better: Side) -> Judgement {
        Judgement::TextComparison {
            prompt: self.prompt.clone(),
            chosen: self.answer(better).to_owned(),
            rejected: self.answer(better.other()).to_owned(),
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

/// A pair, and who has compared it.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    pub pair: Pair,
    pub judged: Vec<(Option<String>, Source)>,
}

impl Candidate {
    pub fn is_judged_by(&self, rater: Option<&str>) -> bool {
        self.judged.iter().any(|(who, _)| who.as_deref() == rater)
    }

    /// People who compared it.
    pub fn people(&self) -> usize {
        self.judged.iter().filter(|(_, source)| *source == Source::Human).count()
    }
}

/// Pairs of one prompt's recorded answers, at most.
const PAIRS_A_PROMPT: usize = 3;

/// The pairs among recorded answers, given newest first: what was compared before, then two answers to the same prompt,
/// one of them the served version's.
pub fn candidates(records: &[(Completion, Vec<Feedback>)], served: Version) -> Vec<Candidate> {
    let mut found = Found::default();
    let answers: HashMap<CompletionId, &Completion> =
        records.iter().map(|(completion, _)| (completion.id, completion)).collect();
    let mut told = HashSet::<FeedbackId>::new();
    for (completion, feedback) in records {
        for said in feedback.iter().filter(|said| told.insert(said.id)) {
            if let Some(pair) = compared(completion, said, &answers) {
                found.add(pair).push((said.rater.clone(), said.source));
            }
        }
    }
    let mut prompts: HashMap<String, Vec<&Completion>> = HashMap::new();
    for (completion, _) in records {
        if completion.answer.trim().is_empty() {
            continue;
        }
        let same = prompts.entry(completion.prompt.canonical()).or_default();
        for before in same.iter().filter(|before| before.answer != completion.answer).take(PAIRS_A_PROMPT) {
            let both = [*before, completion];
            let Some(about) = both.iter().find(|one| one.version == served) else { continue };
            found.add(Pair {
                about: about.id,
                prompt: completion.prompt.clone(),
                answers: both.map(|one| one.answer.clone()),
            });
        }
        if same.len() < PAIRS_A_PROMPT && same.iter().all(|before| before.answer != completion.answer) {
            same.push(completion);
        }
    }
    found.candidates
}

/// Candidates in the order in which they were found, each once.
#[derive(Default)]
struct Found {
    candidates: Vec<Candidate>,
    places: HashMap<u64, usize>,
}

impl Found {
    /// Who has judged this pair, to be added to.
    fn add(&mut self, pair: Pair) -> &mut Vec<(Option<String>, Source)> {
        let next = self.candidates.len();
        let place = *self.places.entry(pair.key()).or_insert(next);
        if place == next {
            self.candidates.push(Candidate { pair, judged: Vec::new() });
        }
        &mut self.candidates[place].judged
    }
}

/// The pair that a judgement compares, as far as its texts are known.
fn compared(
    completion: &Completion,
    said: &Feedback,
    answers: &HashMap<CompletionId, &Completion>,
) -> Option<Pair> {
    let (prompt, chosen, rejected) = match &said.judgement {
        Judgement::TextComparison { prompt, chosen, rejected } => (prompt, chosen, rejected),
        Judgement::Comparison { chosen, rejected } => {
            let (chosen, rejected) = (answers.get(chosen)?, answers.get(rejected)?);
            (&chosen.prompt, &chosen.answer, &rejected.answer)
        }
        _ => return None,
    };
    let differ = !chosen.is_empty() && !rejected.is_empty() && chosen != rejected;
    differ.then(|| Pair {
        about: completion.id,
        prompt: prompt.clone(),
        answers: [chosen.clone(), rejected.clone()],
    })
}

/// A pair on its way to a person.
#[derive(Debug, Clone, PartialEq)]
pub struct Given {
    pub id: Uuid,
    pub rater: Option<String>,
    pub pair: Pair,
    /// Whether the pair's second answer is shown as `a`.
    pub swapped: bool,
    answered: bool,
}

impl Given {
    /// The answers as they are shown: `a`, then `b`.
    pub fn shown(&self) -> [&str; 2] {
        [self.side(true), self.side(false)].map(|side| self.pair.answer(side))
    }

    /// The answer that is shown as `a`, or as `b`.
    pub fn side(&self, is_a: bool) -> Side {
        if is_a == self.swapped { Side::Second } else { Side::First }
    }
}

/// What was given to whom, in memory: the newest of everything, so that nobody can fill it up. What was chosen is in the
/// store; a tie or a pair that was passed over is remembered here only, until the process ends.
#[derive(Debug, Default)]
pub struct Desk {
    seed: u64,
    given: VecDeque<Given>,
    /// Marks of [`mark`].
    passed: VecDeque<u64>,
    sampled: VecDeque<Pair>,
}

impl Desk {
    /// Pairs on their way, at most; the oldest gives way.
    pub const GIVEN: usize = 1024;
    const PASSED: usize = 16_384;
    const SAMPLED: usize = 256;

    /// `seed` is that of the sides.
    pub fn new(seed: u64) -> Self {
        Self { seed, ..Self::default() }
    }

    /// The pair that this rater holds and has not answered; it is shown again rather than another.
    pub fn held(&self, rater: Option<&str>) -> Option<&Given> {
        self.given.iter().rev().find(|given| given.rater.as_deref() == rater && !given.answered)
    }

    pub fn given(&self, id: Uuid) -> Option<&Given> {
        self.given.iter().find(|given| given.id == id)
    }

    /// Recorded pairs, and those whose second answer was sampled before.
    pub fn with_sampled(&self, mut candidates: Vec<Candidate>) -> Vec<Candidate> {
        let known: HashSet<u64> = candidates.iter().map(|candidate| candidate.pair.key()).collect();
        let sampled = self.sampled.iter().rev().filter(|pair| !known.contains(&pair.key()));
        candidates.extend(sampled.map(|pair| Candidate { pair: pair.clone(), judged: Vec::new() }));
        candidates
    }

    /// The pair for this rater. What one or two have compared comes first: where nobody judges the same, nothing tells
    /// whose judgement is to be trusted.
    pub fn choose(&self, candidates: Vec<Candidate>, rater: Option<&str>) -> Option<Pair> {
        let passed: HashSet<u64> = self.passed.iter().copied().collect();
        let open = candidates
            .into_iter()
            .filter(|one| !one.is_judged_by(rater) && !passed.contains(&mark(rater, &one.pair)));
        let order = |candidate: &Candidate| match candidate.judged.len() {
            1 | 2 => 0,
            0 => 1,
            _ => 2,
        };
        open.min_by_key(order).map(|candidate| candidate.pair)
    }

    /// Hands a pair out. Which answer is shown as `a` is drawn from the seed, the pair and the rater.
    pub fn give(&mut self, id: Uuid, rater: Option<&str>, pair: Pair) -> Given {
        let drawn = [self.seed.to_string(), pair.key().to_string(), rater.unwrap_or_default().to_owned()];
        // The pair's own order may tell which answer is newer: the drawn bit is about the order of their words.
        let [first, second] = &pair.answers;
        let swapped = (digest(&drawn.each_ref().map(String::as_str)) & 1 == 1) != (first > second);
        let given = Given { id, rater: rater.map(str::to_owned), pair, swapped, answered: false };
        keep(&mut self.given, given.clone(), Self::GIVEN);
        given
    }

    /// The rater has judged the pair that was given as `id`, or passed it over.
    pub fn answered(&mut self, id: Uuid, rater: Option<&str>) {
        if let Some(given) = self.given.iter_mut().find(|given| given.id == id) {
            given.answered = true;
            let passed = mark(rater, &given.pair);
            keep(&mut self.passed, passed, Self::PASSED);
        }
    }

    /// Keeps a pair whose second answer was sampled for it, for other raters.
    pub fn sampled(&mut self, pair: Pair) {
        keep(&mut self.sampled, pair, Self::SAMPLED);
    }

    /// The newest recorded answer to which a second one may be sampled for this rater: nothing of the kind was done.
    pub fn alone<'a>(
        &self,
        records: &'a [(Completion, Vec<Feedback>)],
        served: Version,
    ) -> Option<&'a Completion> {
        let compared = |said: &Feedback| matches!(said.judgement, Judgement::TextComparison { .. });
        let sampled: HashSet<CompletionId> = self.sampled.iter().map(|pair| pair.about).collect();
        let alone = records.iter().find(|(completion, feedback)| {
            completion.version == served
                && !completion.answer.trim().is_empty()
                && !sampled.contains(&completion.id)
                && !feedback.iter().any(compared)
        });
        alone.map(|(completion, _)| completion)
    }
}

/// This rater's word on this pair.
fn mark(rater: Option<&str>, pair: &Pair) -> u64 {
    let who = rater.map_or_else(String::new, |rater| format!("rater {rater}"));
    digest(&[&who, &pair.key().to_string()])
}

fn keep<T>(queue: &mut VecDeque<T>, one: T, most: usize) {
    if queue.len() == most {
        queue.pop_front();
    }
    queue.push_back(one);
}

#[cfg(test)]
mod tests;
