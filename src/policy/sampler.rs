//! Draws the next token: bias, penalties and mask, then temperature, top-k, the nucleus and min-p, from a seeded
//! generator.

use std::collections::BTreeMap;

use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::{
    grammar::{Grammar, Guide, TooComplex},
    ops::exp,
    request::Sampling,
};

/// Space that one draw needs, shared by all sequences of a thread.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// The row as it is drawn from, where it is not the model's own.
    logits: Vec<f32>,
    /// Tokens that may be drawn, with their weights relative to the likeliest.
    candidates: Vec<Candidate>,
}

/// A token and its weight, in (0, 1].
type Candidate = (f32, u32);

/// Below this temperature the likeliest token is taken.
const GREEDY: f64 = 1e-7;

/// One sequence's sampler. The same seed draws the same tokens from the same logits.
#[derive(Debug)]
pub(crate) struct Sampler {
    sampling: Sampling,
    rng: StdRng,
    guide: Option<Guide>,
    /// What the grammar asks for is there, and nothing may follow.
    complete: bool,
    /// How often each token has been drawn; kept only where a penalty needs it.
    drawn: BTreeMap<u32, u32>,
}

impl Sampler {
    pub(crate) fn new(sampling: Sampling) -> Self {
        Self {
            rng: StdRng::seed_from_u64(sampling.seed),
            guide: sampling.grammar.as_ref().map(Grammar::begin),
            complete: false,
            sampling,
            drawn: BTreeMap::new(),
        }
    }

    /// Whether the answer has the form that was asked for and cannot go on.
    pub(crate) fn is_complete(&self) -> bool {
        self.complete
    }

    /// Draws from one row of logits.
    pub(crate) fn sample(&mut self, logits: &[f32], scratch: &mut Scratch) -> Result<u32, TooComplex> {
        let Scratch { logits: row, candidates } = scratch;
        let logits = if self.is_plain() {
            logits
        } else {
            row.clear();
            row.extend_from_slice(logits);
            self.shape(row);
            if let Some(guide) = &mut self.guide {
                guide.mask(row)?;
            }
            row.as_slice()
        };
        let token = if self.sampling.temperature < GREEDY {
            likeliest(logits)
        } else {
            self.weigh(logits, candidates);
            self.draw(candidates)
        };
        if self.has_penalty() {
            *self.drawn.entry(token).or_default() += 1;
        }
        if let Some(guide) = &mut self.guide {
            self.complete = guide.push(token)?;
        }
        Ok(token)
    }

    fn has_penalty(&self) -> bool {
        self.sampling.presence_penalty != 0.0 || self.sampling.frequency_penalty != 0.0
    }

    fn is_plain(&self) -> bool {
        self.sampling.logit_bias.is_empty() && self.drawn.is_empty() && self.guide.is_none()
    }

    /// OpenAI's rule: a token that has been drawn `c > 0` times loses `c · frequency + presence`; a bias is added.
    fn shape(&self, logits: &mut [f32]) {
        let Sampling { presence_penalty, frequency_penalty, .. } = self.sampling;
        for (token, count) in &self.drawn {
            if let Some(logit) = logits.get_mut(*token as usize) {
                *logit -= (f64::from(*count) * frequency_penalty + presence_penalty) as f32;
            }
        }
        for (token, bias) in &self.sampling.logit_bias {
            if let Some(logit) = logits.get_mut(*token as usize) {
                *logit += bias;
            }
        }
    }

    /// The tokens that the rule leaves, each with its weight.
    fn weigh(&self, logits: &[f32], candidates: &mut Vec<Candidate>) {
        let Sampling { temperature, top_p, top_k, min_p, .. } = self.sampling;
        let most = logits.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
        let sharpness = (1.0 / temperature) as f32;
        candidates.clear();
        let weighed =
            logits.iter().zip(0u32..).map(|(logit, token)| (exp((logit - most) * sharpness), token));
        let least = min_p as f32;
        // What is masked has no weight at all, although `exp` stops at a small one.
        candidates.extend(
            weighed.filter(|(weight, token)| *weight >= least && logits[*token as usize] > f32::NEG_INFINITY),
        );
        if top_k > 0 && top_k < candidates.len() {
            candidates.select_nth_unstable_by(top_k - 1, heavier);
            candidates.truncate(top_k);
        }
        if top_p < 1.0 {
            nucleus(candidates, top_p);
        }
    }

    /// One of the candidates, each with the chance of its weight.
    fn draw(&mut self, candidates: &[Candidate]) -> u32 {
        let total: f64 = candidates.iter().map(|(weight, _)| f64::from(*weight)).sum();
        let mut left = self.rng.random::<f64>() * total;
        for (weight, token) in candidates {
            left -= f64::from(*weight);
            if left < 0.0 {
                return *token;
            }
        }
        // Rounding may leave a crumb.
        candidates.last().map_or(0, |(_, token)| *token)
    }
}

/// Heavier first; of equals the one with the smaller id, so that the order is one only.
fn heavier(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

/// Keeps the fewest, heaviest candidates with at least `top_p` of the mass, and at least one (Holtzman et al., 2020).
///
/// Nearly always a few tokens are the nucleus, so that a few are sorted; more only where those are too light.
fn nucleus(candidates: &mut Vec<Candidate>, top_p: f64) {
    let total: f64 = candidates.iter().map(|(weight, _)| f64::from(*weight)).sum();
    let wanted = top_p * total;
    let mut few = 32;
    loop {
        few = few.min(candidates.len());
        if few < candidates.len() {
            candidates.select_nth_unstable_by(few, heavier);
        }
        candidates[..few].sort_unstable_by(heavier);
        let mut mass = 0.0;
        let nucleus = candidates[..few].iter().position(|(weight, _)| {
            mass += f64::from(*weight);
            mass >= wanted
        });
        match nucleus {
            Some(last) => return candidates.truncate(last + 1),
            None if few == candidates.len() => return,
            None => few *= 8,
        }
    }
}

/// The index of the largest logit; the first of equals.
pub(crate) fn likeliest(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (index, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = index;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Probabilities 0.5, 0.25, 0.15, 0.07, 0.03 at temperature 1.
    fn logits() -> Vec<f32> {
        [0.5f32, 0.25, 0.15, 0.07, 0.03].iter().map(|p| p.ln()).collect()
    }

    /// The share of each token in many draws, each with a sampler of its own.
    #[track_caller]
    fn check(sampling: Sampling, expected: &[f64]) {
        let mut scratch = Scratch::default();
        let mut sampler = Sampler::new(Sampling { seed: 7, ..sampling });
        let mut found = vec![0f64; expected.len()];
        for _ in 0..20_000 {
            found[sampler.sample(&logits(), &mut scratch).unwrap() as usize] += 1.0 / 20_000.0;
        }
        for (one, share) in found.iter().zip(expected) {
            assert!((one - share).abs() < 0.015, "{found:?} but {expected:?}");
        }
    }

    fn rule(temperature: f64, top_k: usize, top_p: f64) -> Sampling {
        Sampling { temperature, top_p, top_k, ..Sampling::default() }
    }

    #[test]
    fn draws_follow_the_rule() {
        check(rule(1.0, 0, 1.0), &[0.5, 0.25, 0.15, 0.07, 0.03]);
        check(rule(0.0, 0, 1.0), &[1.0, 0.0, 0.0, 0.0, 0.0]);
        check(rule(1.0, 2, 1.0), &[0.667, 0.333, 0.0, 0.0, 0.0]);
        check(rule(1.0, 0, 0.8), &[0.556, 0.278, 0.167, 0.0, 0.0]);
        check(rule(0.5, 0, 1.0), &[0.735, 0.184, 0.066, 0.014, 0.003]);
        // The nucleus of what top-k has left.
        check(rule(1.0, 2, 0.6), &[1.0, 0.0, 0.0, 0.0, 0.0]);
        check(rule(1.0, 0, 0.0), &[1.0, 0.0, 0.0, 0.0, 0.0]);
        // At least 0.3 of 0.5.
        let min_p = Sampling { min_p: 0.3, ..Sampling::default() };
        check(min_p, &[0.556, 0.278, 0.167, 0.0, 0.0]);
    }

    #[test]
    fn a_bias_moves_the_odds() {
        let biased = |bias: &[(u32, f32)]| Sampling { logit_bias: bias.to_vec(), ..Sampling::default() };
        check(biased(&[(4, 100.0)]), &[0.0, 0.0, 0.0, 0.0, 1.0]);
        check(biased(&[(0, -100.0)]), &[0.0, 0.5, 0.3, 0.14, 0.06]);
        check(biased(&[(1, 2f32.ln())]), &[0.4, 0.4, 0.12, 0.056, 0.024]);
        // An id beyond the vocabulary is nobody's.
        check(biased(&[(9, 100.0)]), &[0.5, 0.25, 0.15, 0.07, 0.03]);
    }

    #[test]
    fn penalties_count_what_was_drawn() {
        #[track_caller]
        fn check(presence_penalty: f64, frequency_penalty: f64, expected: &[u32]) {
            let greedy =
                Sampling { temperature: 0.0, presence_penalty, frequency_penalty, ..Sampling::default() };
            let (mut sampler, mut scratch) = (Sampler::new(greedy), Scratch::default());
            let drawn: Vec<u32> =
                expected.iter().map(|_| sampler.sample(&logits(), &mut scratch).unwrap()).collect();
            assert_eq!(drawn, expected);
        }
        check(0.0, 0.0, &[0, 0, 0]);
        // ln 0.5 − 1 lies between ln 0.25 and ln 0.15; after that everything drawn has lost the same.
        check(1.0, 0.0, &[0, 1, 0, 0, 0]);
        // Each draw costs again: −0.69, −1.39, −1.69, −1.90, −2.39, −2.66, −2.69.
        check(0.0, 1.0, &[0, 1, 0, 2, 1, 3, 0]);
        // A negative penalty invites repetition.
        check(-1.0, 0.0, &[0, 0, 0]);
    }

    #[test]
    fn a_wide_nucleus_is_found_too() {
        let mut scratch = Scratch::default();
        let sampler = Sampler::new(rule(1.0, 0, 0.5));
        sampler.weigh(&vec![0.0; 5000], &mut scratch.candidates);
        let tokens: Vec<u32> = scratch.candidates.iter().map(|(_, token)| *token).collect();
        assert_eq!(tokens, (0..2500).collect::<Vec<_>>());
    }

    #[test]
    fn the_seed_decides() {
        let draw = |seed| {
            let (mut sampler, mut scratch) =
                (Sampler::new(Sampling { seed, ..Sampling::default() }), Scratch::default());
            (0..20).map(|_| sampler.sample(&[0f32; 50], &mut scratch).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }
}
