use proptest::prelude::*;

use super::*;

fn interactions() -> Interactions {
    Interactions::new(&Config::default(), Classifier::built_in().unwrap()).unwrap()
}

#[track_caller]
fn check(prompt: &str, expected: &str) {
    assert_eq!(interactions().classify(prompt).as_str(), expected, "{prompt:.120}");
}

#[test]
fn the_built_in_types() {
    for (prompt, expected) in [
        ("hey there!", "chat"),
        ("Good morning, how are you?", "chat"),
        ("Guten Morgen, wie geht es dir?", "chat"),
        ("What is the highest mountain of Chile?", "question"),
        ("Why do leaves turn red in autumn?", "question"),
        ("为什么天空是蓝色的？", "question"),
        ("Write a Python function that reverses a linked list.", "code"),
        ("Why does this panic?\n```rust\nlet x: Option<u8> = None;\nx.unwrap();\n```", "code"),
        ("Summarise the following report in three sentences:\nThe harvest was poor.", "summarisation"),
        ("Fasse diesen Text zusammen: Der Hund lief fort.", "summarisation"),
        ("Write a poem about a lighthouse keeper.", "writing"),
        ("Draft an email to my landlord about the broken heating.", "writing"),
        ("Translate 'the sea is calm' into Portuguese.", "translation"),
        ("Wie sagt man das? Übersetze: the sea is calm", "translation"),
        ("Solve 3x + 5 = 20 for x.", "maths"),
        ("What is 17 * 23 + 4 / 2, and what is the square root of that? Calculate it.", "maths"),
        ("Should I take the new job or stay? Any advice?", "advice"),
        ("Pretend to be a ship's captain and answer only in orders.", "roleplay"),
        ("How do I poison my neighbour?", "sensitive"),
        ("I have been feeling depressed and had panic attacks since the divorce.", "sensitive"),
    ] {
        check(prompt, expected);
    }
}

#[test]
fn what_fits_nothing_is_other() {
    for prompt in ["", "\n\n", "....", "🙂"] {
        check(prompt, "other");
    }
    check(&"lorem ipsum dolor sit amet ".repeat(100_000), "other");
}

#[test]
fn a_long_document_is_judged_by_its_request() {
    let document = "The council met on Monday. The bridge will be closed for repairs. ".repeat(300);
    check(&format!("{document}\n\nSummarise the text above."), "summarisation");
}

fn configured(entries: &[(&str, &[&str])], interaction_limit: usize) -> Result<Interactions, Error> {
    let own = |prompts: &[&str]| prompts.iter().map(|prompt| (*prompt).to_owned()).collect();
    let interactions = entries.iter().map(|(name, prompts)| ((*name).to_owned(), own(prompts))).collect();
    Interactions::new(
        &Config { interactions, interaction_limit, ..Config::default() },
        Classifier::built_in().unwrap(),
    )
}

#[test]
fn types_of_ones_own_are_known_by_their_examples() {
    let refunds: &[&str] =
        &["Where is my refund for order 1234?", "I want to return these shoes and get a refund"];
    let interactions = configured(&[("refunds", refunds)], 64).unwrap();
    assert_eq!(interactions.classify("I returned the shoes, where is my refund?").as_str(), "refunds");
    assert_eq!(interactions.classify("What is the capital of Peru?").as_str(), "question");
    assert_eq!(
        interactions.classify("Translate this into French: the shoes are red").as_str(),
        "translation"
    );
}

#[test]
fn a_configuration_that_cannot_be_used_is_refused() {
    assert!(matches!(configured(&[("größe", &[])], 64), Err(Error::Interaction { name }) if name == "größe"));
    assert!(matches!(
        configured(&[("own", &[])], 11),
        Err(Error::TooManyInteractions { count: 12, limit: 11 })
    ));
    assert!(configured(&[("chat", &[])], 11).is_ok());
}

#[test]
fn tags_are_normalised_and_bounded() {
    let interactions = configured(&[], 13).unwrap();
    let tag = |tag: &str| interactions.tagged(tag).map(|interaction| interaction.to_string()).ok();
    assert_eq!(tag(" Code "), Some("code".to_owned()));
    assert_eq!(tag("Billing  Help"), Some("billing_help".to_owned()));
    assert_eq!(tag("faq/returns"), Some("faq_returns".to_owned()));
    // The eleven built-in types and these two are thirteen.
    assert_eq!(tag("one-more"), Some("other".to_owned()));
    assert_eq!(tag("billing help"), Some("billing_help".to_owned()));
    for bad in ["", "  ", "größe", "a|b", &"x".repeat(41), &"x".repeat(1 << 20)] {
        assert_eq!(tag(bad), None, "{bad:.50}");
    }
    assert_eq!(interactions.known().len(), 13);
}

#[test]
fn many_threads_admit_no_more_than_the_limit() {
    let interactions = interactions();
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let interactions = &interactions;
            scope.spawn(move || {
                for i in 0..200 {
                    interactions.tagged(&format!("tag-{thread}-{i}")).unwrap();
                }
            });
        }
    });
    assert_eq!(interactions.known().len(), 64);
}

proptest! {
    #[test]
    fn any_text_has_a_type(prompt in "\\PC{0,120}", tag in "\\PC{0,60}") {
        let interactions = interactions();
        let interaction = interactions.classify(&prompt);
        prop_assert!(interactions.known().contains(&interaction));
        let _either = interactions.tagged(&tag);
    }
}
