//! Is an answer of any use, judged by its form alone?

use std::collections::HashSet;

use crate::completion::FinishReason;

use super::text::{prefix, words};

/// Read at most, from the beginning and from the end.
const READ: usize = 16 << 10;
/// Words in the part that shows a loop into which the answer runs at its end.
const TAIL: usize = 96;
/// The length of the word sequences whose repetition is counted.
const N: usize = 4;
/// Fewer words cannot loop.
const WORDS: usize = 16;
/// The share of repeated sequences that verse, tables and lists have without being loops.
const TOLERATED: f64 = 0.3;
/// An answer cut off by the token limit is worth so much, if the cut is in a sentence or after one.
const CUT: (f64, f64) = (0.7, 0.9);

/// How usable the answer is, in `[0, 1]`: 0 for nothing or nothing but signs, less for cut off, little for loops.
///
/// Stands in for helpfulness until there is a reward model. Says nothing about whether the answer is right.
pub fn usable(answer: &str, finish: FinishReason) -> f64 {
    if !answer.contains(char::is_alphanumeric) {
        return 0.0;
    }
    let complete = match finish {
        FinishReason::Stop => 1.0,
        FinishReason::Length if ends_a_sentence(answer) => CUT.1,
        FinishReason::Length => CUT.0,
    };
    complete * (1.0 - looping(answer))
}

fn ends_a_sentence(answer: &str) -> bool {
    answer.trim_end().ends_with(['.', '!', '?', '。', '！', '？', '`', '"', '”', ')', '}'])
}

/// 0 for text that does not repeat itself, 1 for nothing but repetition.
fn looping(answer: &str) -> f64 {
    let start = answer.len().saturating_sub(READ);
    let end = &answer[answer.ceil_char_boundary(start)..];
    let (head, tail) = (repeated(prefix(answer, READ), usize::MAX), repeated(end, TAIL));
    let share = head.max(tail).max(one_character(end));
    ((share - TOLERATED) / (0.9 - TOLERATED)).clamp(0.0, 1.0)
}

/// The share of word sequences among the last `tail` words that were there before.
fn repeated(text: &str, tail: usize) -> f64 {
    let words: Vec<&str> = words(text).collect();
    let words = &words[words.len().saturating_sub(tail)..];
    if words.len() < WORDS {
        return 0.0;
    }
    let sequences = words.windows(N);
    let total = sequences.len();
    let distinct: HashSet<&[&str]> = sequences.collect();
    1.0 - distinct.len() as f64 / total as f64
}

/// The share of the longest run of one letter or digit, where it is too long for any word: "aaaaaaaa…".
fn one_character(text: &str) -> f64 {
    const LONGEST: usize = 32;
    let (mut longest, mut run, mut last, mut total) = (0_usize, 0_usize, None, 0_usize);
    for c in text.chars().filter(|c| !c.is_whitespace()) {
        run = if last == Some(c) && c.is_alphanumeric() { run + 1 } else { 1 };
        last = Some(c);
        longest = longest.max(run);
        total += 1;
    }
    if longest < LONGEST { 0.0 } else { longest as f64 / total as f64 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[track_caller]
    fn check(answer: &str, finish: FinishReason, expected: std::ops::RangeInclusive<f64>) {
        let value = usable(answer, finish);
        assert!(expected.contains(&value), "{value} for {answer:.60?}");
    }

    #[test]
    fn nothing_is_of_no_use() {
        for answer in ["", "   \n\t", "...", "— * — *", "\u{200b}", "🙂🙂"] {
            check(answer, FinishReason::Stop, 0.0..=0.0);
            check(answer, FinishReason::Length, 0.0..=0.0);
        }
    }

    #[test]
    fn ordinary_answers_are_of_full_use() {
        check("42", FinishReason::Stop, 1.0..=1.0);
        check("Paris.", FinishReason::Stop, 1.0..=1.0);
        check("フランスの首都はパリです。", FinishReason::Stop, 1.0..=1.0);
        let table = (1..30)
            .map(|i| format!("| item {i} | price {} | in stock |", i * 7))
            .collect::<Vec<_>>()
            .join("\n");
        check(&table, FinishReason::Stop, 0.9..=1.0);
        let song = "Row on, row on, the river is wide,\nand the moon is up on the other side.\n";
        let verses = ["We left at dawn with bread and rope.", "At noon the rain came down like hope."];
        check(&verses.map(|verse| format!("{verse}\n{song}")).concat(), FinishReason::Stop, 0.8..=1.0);
    }

    #[test]
    fn a_cut_answer_is_worth_less_but_something() {
        check("The three steps are: first, open the", FinishReason::Length, 0.7..=0.7);
        check("The first step is done.", FinishReason::Length, 0.9..=0.9);
    }

    #[test]
    fn loops_are_found_in_words_characters_and_at_the_end() {
        check(&"I think so. ".repeat(50), FinishReason::Stop, 0.0..=0.05);
        check(&"好的谢谢".repeat(60), FinishReason::Length, 0.0..=0.05);
        check(&"a".repeat(500), FinishReason::Stop, 0.0..=0.0);
        let sound = (0..400).map(|i| format!("word{i}")).collect::<Vec<_>>().join(" ") + " ";
        check(&(sound.clone() + &"and then he said ".repeat(60)), FinishReason::Stop, 0.0..=0.1);
        check(&sound, FinishReason::Stop, 1.0..=1.0);
    }

    proptest! {
        #[test]
        fn stays_in_the_unit_interval(answer in "\\PC{0,300}") {
            prop_assert!((0.0..=1.0).contains(&usable(&answer, FinishReason::Length)));
        }
    }
}
