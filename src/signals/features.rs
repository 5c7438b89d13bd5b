//! Text as numbered features: runs of words hashed into a table of fixed size (Weinberger et al., "Feature Hashing for
//! Large Scale Multitask Learning", 2009), and readable cues beside them.

use super::text::is_unspaced;

/// Rows of a weight table; a feature's number is below it.
pub(super) const BUCKETS: usize = 1 << 16;

/// A word, or whatever stands in its place, as a number.
pub(super) type Token = u64;

/// The beginning of a text.
pub(super) const START: Token = 1;
/// Somebody else's word.
pub(super) const QUOTED: Token = 2;

/// What a linear model reads: a feature's number and its value. A number occurs once, however often its text does.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Features {
    pub(super) list: Vec<(u32, f32)>,
    seen: [u64; BUCKETS / 64],
}

impl Features {
    pub(super) fn new() -> Self {
        Self { list: Vec::with_capacity(1024), seen: [0; BUCKETS / 64] }
    }

    fn add(&mut self, hash: u64, value: f32) {
        // The upper half of a product is its well-mixed half.
        let mixed = (hash ^ (hash >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let feature = (mixed >> 40) as u32 & (BUCKETS as u32 - 1);
        let (word, bit) = (feature as usize / 64, 1 << (feature % 64));
        if self.seen[word] & bit == 0 {
            self.seen[word] |= bit;
            self.list.push((feature, value));
        }
    }

    /// Cues in a fixed order; `family` keeps them apart from other features.
    pub(super) fn cues(&mut self, family: u64, values: &[f64]) {
        for (index, value) in values.iter().enumerate().filter(|(_, value)| **value != 0.0) {
            self.add(join(family, index as u64 + 2), *value as f32);
        }
    }

    /// Every run of one to `longest` tokens. Together they have length one, however long the text is.
    pub(super) fn runs(&mut self, family: u64, tokens: &[Token], longest: usize) {
        let from = self.list.len();
        for start in 0..tokens.len() {
            let mut hash = family;
            for token in &tokens[start..tokens.len().min(start + longest)] {
                hash = join(hash, *token);
                self.add(hash, 1.0);
            }
        }
        self.normalise(from);
    }

    /// Every two tokens of which the second stands at most `reach` places behind the first; of length one like runs.
    pub(super) fn pairs(&mut self, family: u64, tokens: &[Token], reach: usize) {
        let from = self.list.len();
        for (start, first) in tokens.iter().enumerate() {
            let first = join(family, *first);
            for second in &tokens[start + 1..tokens.len().min(start + 1 + reach)] {
                self.add(join(first, *second), 1.0);
            }
        }
        self.normalise(from);
    }

    fn normalise(&mut self, from: usize) {
        // A few words are no strong evidence.
        let value = 1.0 / ((self.list.len() - from).max(12) as f32).sqrt();
        self.list[from..].iter_mut().for_each(|(_, own)| *own = value);
    }
}

fn join(hash: u64, token: Token) -> u64 {
    (hash.rotate_left(23) ^ token).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// A word with where it stands.
#[derive(Debug, Clone, Copy)]
pub(super) struct Word {
    pub(super) token: Token,
    /// The word without its commonest English endings: "stealing" and "steals" are "steal".
    pub(super) stem: Token,
    /// Its first byte in the folded text.
    pub(super) start: usize,
    /// Index of its sentence, from 0.
    pub(super) sentence: usize,
    /// Between quotation marks that do not enclose the whole text.
    pub(super) quoted: bool,
}

/// At most `most` words of folded text; in scripts without spaces every character is one.
pub(super) fn words(folded: &str, most: usize) -> Vec<Word> {
    let mut words = Vec::with_capacity(most.min(folded.len() / 4 + 1));
    let (mut sentence, mut ended, mut quoted) = (0, false, false);
    let mut open: Option<usize> = None;
    let mut chars = folded.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        let inner = c.is_ascii_alphanumeric()
            || c == '\'' && open.is_some()
            || !c.is_ascii() && (c.is_alphanumeric() || is_mark(c)) && !is_unspaced(c);
        if inner {
            if open.is_none() {
                sentence += usize::from(ended);
                ended = false;
                open = Some(at);
            }
            continue;
        }
        if let Some(start) = open.take() {
            words.push(word(folded[start..at].trim_end_matches('\''), start, sentence, quoted));
        }
        if words.len() >= most {
            return words;
        }
        if is_unspaced(c) {
            sentence += usize::from(ended);
            ended = false;
            words.push(word(&folded[at..at + c.len_utf8()], at, sentence, quoted));
        }
        quoted = match c {
            '"' => !quoted && at > 0,
            '\n' => false,
            _ => quoted,
        };
        ended |= match c {
            '.' | '!' | '?' => chars.peek().is_none_or(|(_, next)| next.is_whitespace()),
            '\n' | '。' | '！' | '？' | '।' | '؟' | '۔' => true,
            _ => false,
        };
    }
    if let Some(start) = open {
        words.push(word(folded[start..].trim_end_matches('\''), start, sentence, quoted));
    }
    words
}

/// Vowel signs of Hindi, Bengali and Arabic, which are no letters but belong to words.
fn is_mark(c: char) -> bool {
    matches!(c, '\u{0900}'..='\u{0963}' | '\u{0980}'..='\u{09e3}' | '\u{064b}'..='\u{065f}' | '\u{0670}')
}

fn word(text: &str, start: usize, sentence: usize, quoted: bool) -> Word {
    let token = hash(text);
    let stem = stem(text);
    Word { token, stem: if stem.len() == text.len() { token } else { hash(stem) }, start, sentence, quoted }
}

/// FNV-1a.
pub(super) fn hash(text: &str) -> Token {
    text.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

fn stem(word: &str) -> &str {
    const ENDINGS: [&str; 7] = ["'s", "ing", "ers", "er", "ed", "es", "s"];
    let ending = ENDINGS.iter().find(|ending| word.ends_with(**ending));
    let stem = &word[..word.len() - ending.map_or(0, |ending| ending.len())];
    if stem.len() < 3 || !word.is_ascii() { word } else { stem.strip_suffix('e').unwrap_or(stem) }
}
