//! What a model that learned from the others says of each judgement. Pure.
//!
//! Where no answer is judged twice nobody contradicts anybody, and still who flips every label says the opposite of what
//! the others' judgements teach of the words of an answer. A linear model learns from the judgements of nine tenths of the raters
//! and has an opinion of the last tenth's, of no answer that it has seen; a rater is believed as far as he agrees with it, and it
//! learns again from those who are believed (after Raykar et al., *Learning from crowds*, 2010). How raters differ is the mixture
//! of [`slopes`].
//!
//! It says nothing at all but after two hurdles. All together, nobody with more than his share, have to agree with the
//! first opinion, which believes everybody alike, more than chance would have it ([`SURE`]). And the raters have to be
//! likelier, by [`APART`], where some of them say the opposite than where all agree more or less, or not at all. The second
//! hurdle is the one that holds false warnings down: none in 800 simulated worlds without a liar (a hundred each with no
//! slips, with one in ten, with four, with slips that differ, with tastes that differ, with two judgements each, with
//! thumbs, and with nothing but noise; `cargo test --release --lib honest_worlds -- --ignored --nocapture`).
//!
//! What it cannot tell: whether those who contradict lie or want the opposite, and who of two camps is right, but for their size. A taste
//! that is merely another (slope 0) counts where the mixture is sure of it. Thumbs and ratings are compared with others of the same
//! rater, one that he liked with one that he disliked, so that who only complains contradicts nobody; who said but one thing
//! of one answer cannot be told at all.

mod slopes;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap, HashSet};

use super::agreement::Tally;
use super::voice::{Voice, loudest};
use super::words::{Example, Features, Linear, of_answer, of_pair};
use slopes::Likelihoods;

/// Judgements that the model learns from, the newest ones.
const MOST: usize = 10_000;
/// Raters without whom there is no rest to disagree with.
const LEAST_RATERS: usize = 6;
const FOLDS: usize = 10;
/// Judgements without which a model has no opinion.
const LEAST_EXAMPLES: usize = 50;
const ROUNDS: usize = 12;
/// Standard errors above chance, by rater; chance alone has so many in one case of six. It tells which side is the larger.
const SURE: f64 = 1.0;
/// Twice the logarithm of the likelihood ratio.
const APART: f64 = 10.0;
const SEED: u64 = 7;

/// What it says of the raters.
#[derive(Debug, Clone, Default)]
pub(super) struct Opinion {
    views: HashMap<String, View>,
    /// Raters who are not named, each as far as he is against it, and their judgements, if they are a camp.
    pub camp: Option<(f64, f64)>,
}

/// What it says of one.
#[derive(Debug, Clone, Copy)]
pub(super) struct View {
    /// Judgements that it has an opinion of, or pairs of them.
    pub judged: Tally,
    pub weight: f64,
}

impl Opinion {
    /// `None` where nothing can be told. `believed` is what is known of a rater before.
    pub(super) fn form(voices: &[Voice<'_>], share: f64, believed: &dyn Fn(&str) -> f64) -> Option<Self> {
        let heard = Heard::of(voices, share, believed);
        if heard.raters.len() < LEAST_RATERS {
            return None;
        }
        let mut weights: Vec<f64> = heard.raters.iter().map(|rater| rater.believed).collect();
        let mut look = heard.look(&weights);
        if look.sure < SURE {
            return None;
        }
        for _ in 1..ROUNDS {
            let next: Vec<f64> = heard
                .raters
                .iter()
                .zip(&look.weights)
                .map(|(rater, weight)| rater.believed * weight)
                .collect();
            if next.iter().zip(&weights).all(|(next, weight)| (next - weight).abs() < 0.02) {
                break;
            }
            weights = next;
            look = heard.look(&weights);
        }
        (look.apart > APART).then(|| heard.told(&look))
    }

    pub(super) fn of(&self, who: &str) -> Option<&View> {
        self.views.get(who)
    }

    /// What a rater counts; in full if nothing is known of him.
    pub(super) fn weight(&self, who: &str) -> f64 {
        self.of(who).map_or(1.0, |view| view.weight)
    }
}

struct Rater {
    who: String,
    judgements: f64,
    believed: f64,
    fold: usize,
}

struct Said {
    rater: usize,
    subject: u64,
    good: bool,
    features: Features,
}

/// Judgements whose words are known.
struct Heard {
    raters: Vec<Rater>,
    said: Vec<Said>,
    /// What can be held against an opinion: a comparison, or of one rater something good and something bad.
    tests: Vec<(usize, Option<usize>)>,
    share: f64,
}

/// An opinion that believed raters by given weights.
struct Look {
    /// Standard errors by which all together agree with it.
    sure: f64,
    tallies: Vec<Tally>,
    likelihoods: Vec<Likelihoods>,
    shares: Likelihoods,
    apart: f64,
    weights: Vec<f64>,
}

impl Heard {
    fn of(voices: &[Voice<'_>], share: f64, believed: &dyn Fn(&str) -> f64) -> Self {
        let known = voices.iter().filter(|voice| voice.verdict.is_some() && !voice.texts[0].is_empty());
        let newest: Vec<&Voice<'_>> = known.rev().take(MOST).collect();
        let mut volumes: BTreeMap<&str, f64> = BTreeMap::new();
        for voice in &newest {
            *volumes.entry(&voice.who).or_default() += 1.0;
        }
        let mut raters: Vec<Rater> = volumes
            .into_iter()
            .map(|(who, judgements)| Rater {
                who: who.to_owned(),
                judgements,
                believed: believed(who),
                fold: 0,
            })
            .collect();
        // The loudest first, each into the fold that has the least.
        raters.sort_by(|a, b| b.judgements.total_cmp(&a.judgements).then_with(|| a.who.cmp(&b.who)));
        let mut loads = [0f64; FOLDS];
        for rater in &mut raters {
            rater.fold = (0..FOLDS).min_by(|a, b| loads[*a].total_cmp(&loads[*b])).unwrap_or(0);
            loads[rater.fold] += rater.judgements;
        }
        let places: HashMap<&str, usize> =
            raters.iter().enumerate().map(|(place, rater)| (&*rater.who, place)).collect();
        let mut said = Vec::with_capacity(newest.len());
        let mut tests = Vec::new();
        let mut alone: Vec<[Vec<usize>; 2]> = vec![Default::default(); raters.len()];
        for voice in newest {
            let (Some(good), Some(rater)) = (voice.verdict, places.get(&*voice.who).copied()) else {
                continue;
            };
            let [first, second] = voice.texts;
            let features = if second.is_empty() {
                alone[rater][usize::from(good)].push(said.len());
                of_answer(first)
            } else {
                tests.push((said.len(), None));
                of_pair(first, second)
            };
            said.push(Said { rater, subject: voice.subject, good, features });
        }
        for [bad, good] in alone {
            tests.extend(good.into_iter().zip(bad).map(|(good, bad)| (good, Some(bad))));
        }
        Self { raters, said, tests, share }
    }

    /// What each judgement counts of raters who count so much, nobody having more than his share.
    fn bounded(&self, weights: &[f64]) -> Vec<f64> {
        let sums: Vec<f64> =
            self.raters.iter().zip(weights).map(|(rater, weight)| rater.judgements * weight).collect();
        let most = loudest(sums.clone(), self.share);
        weights.iter().zip(sums).map(|(weight, sum)| weight * (most / sum.max(1e-9)).min(1.0)).collect()
    }

    /// The opinion of each judgement by a model of the other folds, as a margin; 0 is none. It has seen no other judgement of the
    /// same answers: what several judged is for [`super::agreement`], and who is contradicted there must not be
    /// contradicted here for the same reason.
    fn margins(&self, weights: &[f64]) -> Vec<f64> {
        let mut margins = vec![0.0; self.said.len()];
        for fold in 0..FOLDS {
            let theirs = |said: &&Said| self.raters[said.rater].fold == fold;
            let subjects: HashSet<u64> = self.said.iter().filter(theirs).map(|said| said.subject).collect();
            let others = self.said.iter().filter(|said| {
                !theirs(said) && weights[said.rater] > 1e-3 && !subjects.contains(&said.subject)
            });
            let examples: Vec<Example<'_>> = others
                .map(|said| Example {
                    features: &said.features,
                    good: said.good,
                    weight: weights[said.rater],
                })
                .collect();
            if examples.len() < LEAST_EXAMPLES {
                continue;
            }
            let model = Linear::fit(&examples, SEED);
            for (margin, said) in margins.iter_mut().zip(&self.said).filter(|(_, said)| theirs(said)) {
                *margin = f64::from(model.margin(&said.features));
            }
        }
        margins
    }

    /// Tests as rater and margin, above 0 where he agrees; comparisons and single answers on one scale.
    fn tested(&self, margins: &[f64]) -> Vec<(usize, f64)> {
        let signed = |(first, second): &(usize, Option<usize>)| {
            let margin = margins[*first] - second.map_or(0.0, |second| margins[second]);
            if self.said[*first].good { margin } else { -margin }
        };
        let scale = |alone: bool| {
            let own = self.tests.iter().filter(|(_, second)| second.is_some() == alone);
            let (sum, count) =
                own.fold((0.0, 0.0), |(sum, count), test| (sum + signed(test).powi(2), count + 1.0));
            (sum / f64::max(count, 1.0)).sqrt().max(1e-9)
        };
        let scales = [scale(false), scale(true)];
        let test = |test: &(usize, Option<usize>)| {
            (self.said[test.0].rater, signed(test) / scales[usize::from(test.1.is_some())])
        };
        self.tests.iter().map(test).filter(|(_, margin)| *margin != 0.0).collect()
    }

    fn look(&self, weights: &[f64]) -> Look {
        let bounded = self.bounded(weights);
        let tests = self.tested(&self.margins(&bounded));
        let mut sums = vec![0.0; self.raters.len()];
        let mut tallies = vec![Tally::default(); self.raters.len()];
        for (rater, margin) in &tests {
            sums[*rater] += bounded[*rater] * margin;
            tallies[*rater].count(*margin > 0.0);
        }
        // By rater, as what one of them says hangs together.
        let error = sums.iter().map(|sum| sum * sum).sum::<f64>().sqrt().max(1e-9);
        let weighed: Vec<(f64, f64)> =
            tests.iter().map(|(rater, margin)| (*margin, bounded[*rater])).collect();
        let common = slopes::common(&weighed).max(1e-6);
        let likelihoods = slopes::likelihoods(&tests, common, self.raters.len());
        let (apart, shares) = slopes::mixture(&of(&likelihoods, &tallies, |tally| tally.of > 0.0));
        // Of whom it is a coin's toss whether he says the opposite teaches nothing.
        let weight = |(own, tally): (&Likelihoods, &Tally)| match tally {
            tally if tally.of == 0.0 => 1.0,
            tally if tally.contradicts() => 0.0,
            _ => (1.0 - 2.0 * slopes::against(own, &shares)).max(0.0),
        };
        let weights = likelihoods.iter().zip(&tallies).map(weight).collect();
        Look { sure: sums.iter().sum::<f64>() / error, tallies, likelihoods, shares, apart, weights }
    }

    /// Who contradicts; the others count as they are believed if there is a camp among them, and in full if there is none.
    fn told(&self, look: &Look) -> Opinion {
        let among = |tally: Tally| tally.of > 0.0 && !tally.contradicts();
        let (apart, _) = slopes::mixture(&of(&look.likelihoods, &look.tallies, among));
        let mut opinion = Opinion::default();
        let (mut count, mut judgements) = (0.0, 0.0);
        for (place, rater) in self.raters.iter().enumerate() {
            let judged = look.tallies[place];
            if among(judged) {
                let against = slopes::against(&look.likelihoods[place], &look.shares);
                (count, judgements) = (count + against, judgements + against * rater.judgements);
            }
            let weight = if judged.contradicts() || apart > APART { look.weights[place] } else { 1.0 };
            opinion.views.insert(rater.who.clone(), View { judged, weight });
        }
        opinion.camp = (apart > APART).then_some((count, judgements));
        opinion
    }
}

fn of<'a>(
    likelihoods: &'a [Likelihoods],
    tallies: &[Tally],
    these: impl Fn(Tally) -> bool,
) -> Vec<&'a Likelihoods> {
    likelihoods.iter().zip(tallies).filter(|(_, tally)| these(**tally)).map(|(own, _)| own).collect()
}
