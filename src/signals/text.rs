//! Text prepared for cue matching, and the matcher: one pass each, no regular expressions.

/// Lower-cased, white space collapsed (a line break stays one), typographic apostrophes straightened, markdown's
/// emphasis and invisible characters dropped. Reads at most `limit` bytes, so that the cost is bounded.
pub(super) fn fold(text: &str, limit: usize) -> String {
    let text = prefix(text, limit);
    let mut folded = String::with_capacity(text.len() + 16);
    // Leading white space would be a sentence of its own.
    let mut last = '\n';
    for c in text.chars() {
        let c = match c {
            'A'..='Z' => c.to_ascii_lowercase(),
            '*' | '\u{200b}'..='\u{200f}' | '\u{feff}' | '\u{ad}' => continue,
            '’' | '‘' | 'ʼ' | '＇' | '`' => '\'',
            '“' | '”' | '„' | '«' | '»' => '"',
            '\n' | '\r' => '\n',
            c if c.is_ascii() => {
                if c.is_ascii_whitespace() {
                    ' '
                } else {
                    c
                }
            }
            c if c.is_whitespace() => ' ',
            c if c.is_uppercase() => {
                folded.extend(c.to_lowercase());
                last = c;
                continue;
            }
            c => c,
        };
        if c == ' ' && matches!(last, ' ' | '\n') || c == '\n' && last == '\n' {
            continue;
        }
        if c == '\n' && last == ' ' {
            folded.pop();
        }
        folded.push(c);
        last = c;
    }
    folded
}

/// What is asked stands at the beginning or, behind a long text, at the end: so many bytes of each are read.
pub(super) const END: usize = 2048;

/// The folded beginning and, of a long prompt, also its end, as lines of their own.
pub(super) fn ends(prompt: &str) -> String {
    let mut folded = fold(prompt, END);
    if prompt.len() > 2 * END {
        let start = prompt.ceil_char_boundary(prompt.len() - END);
        folded.push('\n');
        folded.push_str(&fold(&prompt[start..], END));
    }
    folded
}

/// At most `limit` bytes of the text's beginning, cut between two characters.
pub(super) fn prefix(text: &str, limit: usize) -> &str {
    &text[..text.floor_char_boundary(limit)]
}

/// Chinese, Japanese and Korean are written without the spaces (or with other ones) that would show where a word begins.
pub(super) fn is_unspaced(c: char) -> bool {
    matches!(c, '\u{3040}'..='\u{30ff}' | '\u{3400}'..='\u{9fff}' | '\u{ac00}'..='\u{d7af}' | '\u{0e00}'..='\u{0e7f}')
}

/// Words: runs of letters and digits with inner apostrophes; in scripts without spaces every character is one.
pub(super) fn words(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let start = rest.find(char::is_alphanumeric)?;
        rest = &rest[start..];
        let first = rest.chars().next()?;
        let end = if is_unspaced(first) {
            first.len_utf8()
        } else {
            let inner = |c: char| (c.is_alphanumeric() && !is_unspaced(c)) || c == '\'';
            rest.find(|c| !inner(c)).unwrap_or(rest.len())
        };
        let (word, after) = rest.split_at(end);
        rest = after;
        Some(word.trim_end_matches('\''))
    })
}

/// Where a cue was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Hit<T> {
    pub(super) tag: T,
    pub(super) start: usize,
    pub(super) end: usize,
    /// Index of the sentence, from 0.
    pub(super) sentence: usize,
    /// Between quotation marks that do not enclose the whole text, or in fenced code.
    pub(super) quoted: bool,
}

/// Cues: phrases that begin where a word begins. A trailing `*` lets the last word go on.
///
/// Cues are found through a table by their first three bytes, so that the cost grows with the text and not with the
/// number of cues.
#[derive(Debug)]
pub(super) struct Lexicon<T> {
    buckets: Vec<Vec<Cue<T>>>,
}

#[derive(Debug)]
struct Cue<T> {
    text: String,
    open: bool,
    tag: T,
}

const BUCKETS: usize = 2048;

impl<T: Copy> Lexicon<T> {
    /// Each entry is a tag and its cues, separated by `|`. English cues also match their contracted forms.
    pub(super) fn new(entries: &[(T, &str)]) -> Self {
        let mut buckets: Vec<Vec<Cue<T>>> = Vec::new();
        buckets.resize_with(BUCKETS, Vec::new);
        let cues = entries.iter().flat_map(|(tag, cues)| cues.split('|').map(move |cue| (*tag, cue.trim())));
        for (tag, cue) in cues {
            for text in contractions(cue) {
                let open = text.ends_with('*') || text.chars().next_back().is_some_and(is_unspaced);
                let text = text.trim_end_matches('*').to_owned();
                if let Some(bucket) = bucket(text.as_bytes()) {
                    buckets[bucket].push(Cue { text, open, tag });
                }
            }
        }
        Self { buckets }
    }

    /// All cues in folded text, in order of their beginning.
    pub(super) fn hits(&self, folded: &str) -> Vec<Hit<T>> {
        let mut hits = Vec::new();
        let (mut sentence, mut quote, mut fence) = (0, false, false);
        let (mut before, mut in_word) = (' ', false);
        let mut chars = folded.char_indices().peekable();
        while let Some((at, c)) = chars.next() {
            match c {
                '.' | '!' | '?' if chars.peek().is_none_or(|(_, next)| next.is_whitespace()) => sentence += 1,
                '。' | '！' | '？' => sentence += 1,
                '\n' => {
                    quote = false;
                    if !matches!(before, '.' | '!' | '?') {
                        sentence += 1;
                    }
                }
                // The fold has made backticks apostrophes.
                '\'' if at > 0 && folded[at..].starts_with("'''") && before != '\'' => fence = !fence,
                '"' if quote => quote = false,
                '"' if at > 0 && !before.is_alphanumeric() => quote = true,
                c if c.is_alphanumeric() && (is_unspaced(c) || !in_word) => {
                    let quoted = quote || fence;
                    let rest = &folded[at..];
                    let found = self.starting(rest).map(|cue| Hit {
                        tag: cue.tag,
                        start: at,
                        end: at + cue.text.len(),
                        sentence,
                        quoted,
                    });
                    hits.extend(found);
                }
                _ => {}
            }
            in_word = (c.is_alphanumeric() && !is_unspaced(c)) || (c == '\'' && in_word);
            before = c;
        }
        hits
    }

    fn starting<'a>(&'a self, rest: &'a str) -> impl Iterator<Item = &'a Cue<T>> {
        let cues = bucket(rest.as_bytes()).map_or(&[][..], |bucket| self.buckets[bucket].as_slice());
        cues.iter().filter(move |cue| {
            rest.strip_prefix(cue.text.as_str())
                .is_some_and(|after| cue.open || !after.chars().next().is_some_and(char::is_alphanumeric))
        })
    }
}

fn bucket(bytes: &[u8]) -> Option<usize> {
    let [a, b, c] = *bytes.first_chunk::<3>()?;
    Some((usize::from(a) * 31 + usize::from(b) * 641 + usize::from(c) * 7) % BUCKETS)
}

/// The cue itself and the forms in which people shorten it.
fn contractions(cue: &str) -> Vec<String> {
    const SHORT: &[(&str, &str)] = &[
        ("i am ", "i'm "),
        ("i would ", "i'd "),
        ("i have ", "i've "),
        ("it is ", "it's "),
        ("that is ", "that's "),
        ("here is ", "here's "),
        ("is not ", "isn't "),
        ("do not ", "don't "),
        ("does not ", "doesn't "),
        ("did not ", "didn't "),
        ("will not ", "won't "),
        ("would not ", "wouldn't "),
        ("are not ", "aren't "),
        ("can not ", "can't "),
    ];
    let mut forms = vec![cue.to_owned()];
    // A space after the last word lets it be shortened too.
    let padded = format!("{cue} ");
    for (long, short) in SHORT {
        for form in forms.clone() {
            let shortened = format!("{form} ").replacen(long, short, 1).trim_end().to_owned();
            if shortened != form {
                forms.push(shortened);
            }
        }
    }
    if padded.contains("cannot ") {
        forms.extend(
            ["can not ", "can't "].map(|form| padded.replacen("cannot ", form, 1).trim_end().to_owned()),
        );
    }
    forms
}

/// `1 / (1 + e^-x)`.
pub(super) fn logistic(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_fold(text: &str, expected: &str) {
        assert_eq!(fold(text, 1 << 16), expected);
    }

    #[test]
    fn folding_keeps_words_and_lines() {
        check_fold("  I\u{2019}m **SORRY**,\t but\u{a0}no \r\n\n Ok", "i'm sorry, but no\nok");
        check_fold("ÄRGER\nÉté İ", "ärger\nété i\u{307}");
        check_fold("", "");
        assert_eq!(fold("日本語", 4), "日");
    }

    #[test]
    fn words_of_several_scripts() {
        assert_eq!(words("don't stop, 3 日本").collect::<Vec<_>>(), ["don't", "stop", "3", "日", "本"]);
        assert_eq!(words("... !").count(), 0);
    }

    #[test]
    fn cues_begin_and_end_with_words() {
        let lexicon = Lexicon::new(&[(1, "i cannot|help*"), (2, "无法"), (3, "it is not ok")]);
        let tags = |text: &str| lexicon.hits(&fold(text, 999)).iter().map(|hit| hit.tag).collect::<Vec<_>>();
        assert_eq!(tags("I can't. I CANNOT! i can not"), [1, 1, 1]);
        assert_eq!(tags("helping unhelpful whelp"), [1]);
        assert_eq!(tags("hi cannot; i cannotate"), [0; 0]);
        assert_eq!(tags("很抱歉我无法做"), [2]);
        assert_eq!(tags("it's not ok, it isn't ok"), [3, 3]);
    }

    #[test]
    fn sentences_and_quotations_are_told() {
        let lexicon = Lexicon::new(&[((), "sorry")]);
        let hits = lexicon.hits("sorry. say \"sorry\"\nsorry");
        assert_eq!(
            hits.iter().map(|hit| (hit.sentence, hit.quoted)).collect::<Vec<_>>(),
            [(0, false), (1, true), (2, false)]
        );
    }
}
