//! Pairs, desks, and what judges say.

use crate::completion::{FinishReason, InteractionType, Message, Refusal, RefusalLabel, Risk, Timestamp};

use super::{
    judge::{CONSTITUTION, Letter, Outcome, letter, next, outcome, question},
    *,
};

fn answered(prompt: &str, answer: &str, version: u32) -> Completion {
    Completion {
        id: CompletionId::new(),
        at: Timestamp(1),
        version: Version(version),
        interaction: InteractionType::other(),
        prompt: Prompt::Chat(vec![Message::user(prompt)]),
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
        metadata: std::collections::BTreeMap::new(),
    }
}

fn said(judgement: Judgement, about: &Completion, rater: &str, source: Source) -> Feedback {
    Feedback {
        id: FeedbackId::new(),
        at: Timestamp(2),
        completion: Some(about.id),
        judgement,
        rater: Some(rater.to_owned()),
        source,
        comment: None,
        idempotency_key: None,
        tags: std::collections::BTreeMap::new(),
    }
}

fn pair(prompt: &str, first: &str, second: &str) -> Pair {
    let prompt = Prompt::Chat(vec![Message::user(prompt)]);
    Pair { about: CompletionId::new(), prompt, answers: [first.to_owned(), second.to_owned()] }
}

fn texts(candidates: &[Candidate]) -> Vec<[&str; 2]> {
    candidates.iter().map(|one| one.pair.answers.each_ref().map(String::as_str)).collect()
}

#[test]
fn two_answers_to_one_prompt_are_a_pair_if_one_is_the_served_versions() {
    let records: Vec<_> = [
        ("p", "new", 2),
        ("q", "alone", 2),
        ("p", "new", 2),
        ("p", "old", 1),
        ("p", "  ", 2),
        ("r", "x", 1),
        ("r", "y", 0),
    ]
    .map(|(prompt, answer, version)| (answered(prompt, answer, version), Vec::new()))
    .into();
    let found = candidates(&records, Version(2));
    assert_eq!(texts(&found), [["new", "old"]]);
    // Kept with the answer of the served version, which is what an update reads.
    assert_eq!(found[0].pair.about, records[0].0.id);
    assert!(candidates(&records, Version(7)).is_empty());
}

#[test]
fn who_compared_a_pair_is_known_by_ids_and_by_texts() {
    let (a, b) = (answered("p", "good", 2), answered("p", "bad", 2));
    let by_ids = said(Judgement::Comparison { chosen: a.id, rejected: b.id }, &a, "ann", Source::Human);
    let by_texts = Judgement::TextComparison {
        prompt: a.prompt.clone(),
        chosen: "bad".to_owned(),
        rejected: "good".to_owned(),
    };
    let by_texts = said(by_texts, &a, "judge", Source::Ai);
    let records = vec![(a, vec![by_ids.clone(), by_texts]), (b, vec![by_ids])];
    let found = candidates(&records, Version(2));
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!((found[0].judged.len(), found[0].people()), (2, 1));
    assert!(found[0].is_judged_by(Some("ann")) && !found[0].is_judged_by(None));
}

#[test]
fn a_choice_is_about_the_answer_that_was_shown() {
    let mut desk = Desk::new(3);
    let mut swapped = 0;
    for nth in 0..200 {
        let pair = pair(&format!("p{nth}"), "better", "worse");
        let given = desk.give(Uuid::now_v7(), Some("ann"), pair.clone());
        let [a, _] = given.shown();
        assert_eq!(pair.answer(given.side(true)), a);
        assert_eq!(given.side(true), given.side(false).other());
        swapped += usize::from(given.swapped);
        // The same seed, pair and rater: the same sides, whichever answer the pair has first.
        let turned = Pair { answers: ["worse".to_owned(), "better".to_owned()], ..pair };
        let again = Desk::new(3).give(Uuid::now_v7(), Some("ann"), turned);
        assert_eq!(given.shown(), again.shown());
    }
    assert!((70..130).contains(&swapped), "{swapped} of 200");
}

#[test]
fn a_pair_is_given_once_to_each_and_shown_again_until_it_is_answered() {
    let mut desk = Desk::default();
    let all = || {
        let pairs = [pair("p", "a", "b"), pair("q", "a", "b")];
        pairs.map(|pair| Candidate { pair, judged: Vec::new() }).to_vec()
    };
    for rater in [Some("ann"), None] {
        for left in [2, 1] {
            let pair = desk.choose(all(), rater).unwrap_or_else(|| panic!("{left} are left"));
            let given = desk.give(Uuid::now_v7(), rater, pair);
            assert_eq!(desk.held(rater), Some(&given));
            desk.answered(given.id, rater);
            assert_eq!(desk.held(rater), None);
        }
        assert_eq!(desk.choose(all(), rater), None);
    }
}

#[test]
fn desks_are_bounded() {
    let mut desk = Desk::default();
    let first = desk.give(Uuid::now_v7(), None, pair("p", "a", "b"));
    for nth in 0..Desk::GIVEN {
        desk.give(Uuid::now_v7(), Some(&nth.to_string()), pair("p", "a", "b"));
    }
    assert_eq!((desk.given(first.id), desk.given.len()), (None, Desk::GIVEN));
}

#[test]
fn what_one_has_compared_is_asked_of_a_second_first() {
    let judged = |count: usize| (0..count).map(|n| (Some(format!("r{n}")), Source::Human)).collect();
    let all = [("none", 0), ("three", 3), ("one", 1)]
        .map(|(prompt, count)| Candidate { pair: pair(prompt, "a", "b"), judged: judged(count) })
        .to_vec();
    assert_eq!(Desk::default().choose(all, Some("ann")).unwrap().prompt.request(), "one");
}

#[test]
fn a_second_answer_is_sampled_where_there_is_none() {
    let mut desk = Desk::default();
    let (old, new, empty) = (answered("p", "x", 1), answered("q", "y", 2), answered("r", "", 2));
    let records = vec![(empty, Vec::new()), (old, Vec::new()), (new.clone(), Vec::new())];
    assert_eq!(desk.alone(&records, Version(2)), Some(&new));
    desk.sampled(Pair { about: new.id, ..pair("q", "y", "z") });
    assert_eq!(desk.alone(&records, Version(2)), None);
    // It is there for the next rater, too.
    assert_eq!(desk.choose(desk.with_sampled(Vec::new()), Some("bob")).unwrap().answers, ["y", "z"]);
}

#[test]
fn two_orders_make_one_verdict() {
    use Letter::{A, B, Neither};
    for (forth, back, expected) in [
        (Some(A), Some(B), Outcome::Preferred(Side::First)),
        (Some(B), Some(A), Outcome::Preferred(Side::Second)),
        (Some(A), Some(A), Outcome::TieByOrder),
        (Some(B), Some(B), Outcome::TieByOrder),
        (Some(Neither), Some(A), Outcome::Tie),
        (Some(B), Some(Neither), Outcome::Tie),
        (None, Some(A), Outcome::Unreadable),
        (Some(A), None, Outcome::Unreadable),
    ] {
        assert_eq!(outcome(forth, back), expected, "{forth:?} {back:?}");
        assert!(Outcome::NAMES.contains(&expected.as_str()));
    }
}

#[test]
fn a_judges_words_are_read() {
    for answer in [
        "A",
        " A\n",
        "**A**",
        "A.",
        "(A)",
        "Answer A",
        "Answer A is better, as it is shorter.",
        "The better answer is A",
        "I prefer A because it is true.",
        "<think>B? No, B is wrong.</think>\nA",
        "Both are fine, but B is long. [[A]]",
    ] {
        assert_eq!(letter(answer), Some(Letter::A), "{answer}");
    }
    for answer in ["B", "b", "\"B\"", "Verdict: B", "It is a hard case, but answer B wins."] {
        assert_eq!(letter(answer), Some(Letter::B), "{answer}");
    }
    for answer in ["tie", "Neither.", "They are equal", "[[C]]"] {
        assert_eq!(letter(answer), Some(Letter::Neither), "{answer}");
    }
    for answer in [
        "",
        "A or B",
        "A good answer would be polite.",
        "C",
        "I cannot compare these.",
        "Answer A. Answer B.",
    ] {
        assert_eq!(letter(answer), None, "{answer}");
    }
}

#[test]
fn the_question_shows_both_orders_and_is_bounded() {
    let long = pair(&"é".repeat(9000), &"x".repeat(9000), "short");
    let forth = question(CONSTITUTION, &long, Side::First);
    let back = question(CONSTITUTION, &long, Side::Second);
    assert!(forth.contains("<answer_b>\nshort\n") && back.contains("<answer_a>\nshort\n"));
    assert!(forth.chars().count() < 8500, "{}", forth.chars().count());
    assert!(forth.contains("é […]") || forth.contains("[…] é"));
    let conversation =
        Prompt::Chat(vec![Message::user("Hi"), Message::assistant("Yes?"), Message::user("Why?")]);
    let turns = question("Rules.", &Pair { prompt: conversation, ..pair("", "a", "b") }, Side::First);
    assert!(turns.contains("user: Hi\n\nassistant: Yes?\n\nuser: Why?"), "{turns}");
}

#[test]
fn a_judge_is_measured_on_what_people_compared() {
    let people =
        Candidate { pair: pair("p", "a", "b"), judged: vec![(Some("ann".to_owned()), Source::Human)] };
    let nobodys = Candidate { pair: pair("q", "a", "b"), judged: Vec::new() };
    let own = Candidate { pair: pair("r", "a", "b"), judged: vec![(Some("judge".to_owned()), Source::Ai)] };
    let all = vec![own, nobodys.clone(), people.clone()];
    let asked = |turn, done: Option<u64>| next(all.clone(), "judge", |key| Some(key) == done, turn);
    assert_eq!(asked(0, None), Some(people.pair.clone()));
    assert_eq!(asked(1, None), Some(nobodys.pair.clone()));
    assert_eq!(asked(0, Some(people.pair.key())), Some(nobodys.pair.clone()));
    assert_eq!(next(vec![], "judge", |_| false, 0), None);
}

#[test]
fn a_judge_that_there_is_not_is_refused() {
    assert_eq!(Judge::try_from("policy".to_owned()), Ok(Judge::Policy));
    assert_eq!(String::from(Judge::try_from("http://h/v1".to_owned()).unwrap()), "http://h/v1");
    assert!(Judge::try_from("polcy".to_owned()).unwrap_err().contains("must be"));
}
