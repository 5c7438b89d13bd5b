//! Sentences drawn from patterns, so that a page of text stands for thousands of rows.
//!
//! `{a|b|c}` is one of its alternatives, which may be empty and may hold others; `<name>` is an item of a list of that
//! name. Everything else stands for itself.

use std::collections::BTreeMap;

use rand::{RngExt, rngs::StdRng};

/// Lists by name.
pub type Lists = BTreeMap<String, Vec<String>>;

/// Patterns in patterns go so deep at most.
const DEPTH: usize = 16;

/// One text of the pattern's.
///
/// # Errors
/// A bracket is not closed, a list is unknown or empty, or lists hold themselves.
pub fn draw(pattern: &str, lists: &Lists, rng: &mut StdRng) -> Result<String, String> {
    let mut text = String::new();
    Draw { lists, rng }.pattern(pattern, 0, &mut text)?;
    Ok(text)
}

struct Draw<'a> {
    lists: &'a Lists,
    rng: &'a mut StdRng,
}

impl Draw<'_> {
    fn pattern(&mut self, pattern: &str, depth: usize, text: &mut String) -> Result<(), String> {
        if depth > DEPTH {
            return Err(format!("`{pattern:.60}` is nested too deeply"));
        }
        let mut rest = pattern;
        while let Some(at) = rest.find(['{', '<']) {
            text.push_str(&rest[..at]);
            let braced = rest[at..].starts_with('{');
            rest = &rest[at + 1..];
            if braced {
                let (options, after) =
                    alternatives(rest).ok_or_else(|| format!("`{pattern:.60}` lacks a `}}`"))?;
                let chosen = options[self.rng.random_range(0..options.len())];
                self.pattern(chosen, depth + 1, text)?;
                rest = after;
                continue;
            }
            // A sign "less than" is no list.
            let name = rest.split_once('>').filter(|(name, _)| is_name(name));
            let Some((name, after)) = name else {
                text.push('<');
                continue;
            };
            let items = self.lists.get(name).filter(|items| !items.is_empty());
            let items = items.ok_or_else(|| format!("there is no list `{name}`"))?;
            let item = &items[self.rng.random_range(0..items.len())];
            self.pattern(item, depth + 1, text)?;
            rest = after;
        }
        text.push_str(rest);
        Ok(())
    }
}

fn is_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
}

/// What stands between the bars up to the closing brace, and what follows it.
fn alternatives(text: &str) -> Option<(Vec<&str>, &str)> {
    let (mut options, mut depth, mut from) = (Vec::new(), 0_usize, 0);
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'{' => depth += 1,
            b'|' if depth == 0 => {
                options.push(&text[from..at]);
                from = at + 1;
            }
            b'}' if depth == 0 => {
                options.push(&text[from..at]);
                return Some((options, &text[at + 1..]));
            }
            b'}' => depth -= 1,
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use rand::SeedableRng;

    use super::*;

    fn drawn(pattern: &str) -> Result<BTreeSet<String>, String> {
        let lists = Lists::from([
            ("pet".to_owned(), vec!["cat".to_owned(), "{old |}dog".to_owned()]),
            ("loop".to_owned(), vec!["<loop>".to_owned()]),
        ]);
        let mut rng = StdRng::seed_from_u64(1);
        (0..200).map(|_| draw(pattern, &lists, &mut rng)).collect()
    }

    #[track_caller]
    fn check(pattern: &str, expected: &[&str]) {
        assert_eq!(drawn(pattern).unwrap(), expected.iter().map(|text| (*text).to_owned()).collect());
    }

    #[test]
    fn patterns_give_each_of_their_texts() {
        check("plain, if x < 3", &["plain, if x < 3"]);
        check("{a|b{c|}}!", &["a!", "bc!", "b!"]);
        check("my <pet>", &["my cat", "my dog", "my old dog"]);
    }

    #[test]
    fn what_cannot_be_drawn_is_named() {
        for (pattern, part) in [("{a|b", "lacks"), ("<bird>", "bird"), ("<loop>", "deep")] {
            let error = drawn(pattern).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
