//! A linear model of answers, on their hashed words and pairs of words. Pure.
//!
//! It says little of an answer, but it learns in milliseconds what people like of the words, which is enough to notice that
//! somebody likes the opposite. `bench poison` takes it for a reward model.

use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};

/// Places of hashed words.
const PLACES: usize = 1 << 16;
/// Where every answer that is judged alone has a 1: how much is liked at all.
const ALONE: u32 = PLACES as u32;

/// What is not 0 of a vector, in order.
pub type Features = Vec<(u32, f32)>;

/// FNV-1a.
pub fn hash(text: &str) -> u64 {
    text.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// In lower case, without what is between them.
pub fn words(text: &str) -> Vec<String> {
    let words = text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
    words.map(str::to_lowercase).collect()
}

/// Words and pairs of words that are in one answer and not in the other, as a unit vector.
pub fn of_pair(first: &str, second: &str) -> Features {
    let (first, second) = (places(first), places(second));
    let mut features: Features = Vec::new();
    features
        .extend(first.iter().filter(|place| second.binary_search(place).is_err()).map(|place| (*place, 1.0)));
    features.extend(
        second.iter().filter(|place| first.binary_search(place).is_err()).map(|place| (*place, -1.0)),
    );
    features.sort_unstable_by_key(|(place, _)| *place);
    let norm = (features.len() as f32).sqrt().max(1.0);
    for (_, value) in &mut features {
        *value /= norm;
    }
    features
}

/// The same of one answer, with [`ALONE`].
pub fn of_answer(answer: &str) -> Features {
    let mut features = of_pair(answer, "");
    features.push((ALONE, 1.0));
    features
}

/// Each place once, in order.
fn places(text: &str) -> Vec<u32> {
    let words = words(text);
    let pairs = words.windows(2).map(|pair| hash(&pair.join(" ")));
    let hashes = words.iter().map(|word| hash(word)).chain(pairs);
    let mut places: Vec<u32> = hashes.map(|hash| (hash % PLACES as u64) as u32).collect();
    places.sort_unstable();
    places.dedup();
    places
}

/// What is learned from.
#[derive(Debug, Clone, Copy)]
pub struct Example<'a> {
    pub features: &'a [(u32, f32)],
    /// The answer is good, or the first is the better one.
    pub good: bool,
    pub weight: f64,
}

/// What each place is worth.
#[derive(Debug, Clone)]
pub struct Linear(Vec<f32>);

impl Linear {
    /// Logistic regression by AdaGrad (Duchi et al., *Adaptive subgradient methods*, 2011), in an order that is drawn from
    /// the seed.
    pub fn fit(examples: &[Example<'_>], seed: u64) -> Self {
        const EPOCHS: usize = 5;
        const RATE: f32 = 0.5;
        let (mut worth, mut squares) = (vec![0f32; PLACES + 1], vec![1e-2f32; PLACES + 1]);
        let mut random = StdRng::seed_from_u64(seed);
        let mut order: Vec<usize> = (0..examples.len()).collect();
        for _ in 0..EPOCHS {
            order.shuffle(&mut random);
            for nth in &order {
                let Example { features, good, weight } = examples[*nth];
                let sign = if good { 1.0 } else { -1.0 };
                let slope = sign * weight as f32 / (1.0 + (sign * margin(&worth, features)).exp());
                for (place, value) in features {
                    let place = *place as usize;
                    let gradient = slope * value - 1e-4 * worth[place];
                    squares[place] += gradient * gradient;
                    worth[place] += RATE * gradient / squares[place].sqrt();
                }
            }
        }
        Self(worth)
    }

    /// The logit of the answer's being good, or the first's being better.
    pub fn margin(&self, features: &[(u32, f32)]) -> f32 {
        margin(&self.0, features)
    }
}

fn margin(worth: &[f32], features: &[(u32, f32)]) -> f32 {
    features.iter().map(|(place, value)| worth[*place as usize] * value).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_both_answers_have_is_no_feature() {
        assert!(of_pair("One, two!", "one TWO").is_empty());
        let pair = of_pair("one two three", "one two");
        assert_eq!(pair.len(), 2, "a word and the pair that ends in it: {pair:?}");
        assert!((pair.iter().map(|(_, value)| value * value).sum::<f32>() - 1.0).abs() < 1e-6);
        let turned: Features =
            of_pair("one two", "one two three").iter().map(|(at, value)| (*at, -value)).collect();
        assert_eq!(pair, turned);
    }

    #[test]
    fn it_learns_which_word_is_liked() {
        let texts: Vec<(String, bool)> = (0..200)
            .map(|n| {
                (format!("answer {} {}", n % 17, if n % 3 == 0 { "kindly" } else { "rudely" }), n % 3 == 0)
            })
            .collect();
        let features: Vec<Features> = texts.iter().map(|(text, _)| of_answer(text)).collect();
        let examples: Vec<Example<'_>> = features
            .iter()
            .zip(&texts)
            .map(|(features, (_, good))| Example { features, good: *good, weight: 1.0 })
            .collect();
        let model = Linear::fit(&examples, 1);
        assert!(model.margin(&of_pair("it kindly said", "it rudely said")) > 0.0);
        assert!(model.margin(&of_answer("a rudely new one")) < 0.0, "most are not liked");
        assert_eq!(model.0, Linear::fit(&examples, 1).0);
    }
}
