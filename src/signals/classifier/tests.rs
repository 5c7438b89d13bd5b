use super::*;

#[track_caller]
fn check_refused(bytes: &[u8], part: &str) {
    let error = Classifier::from_bytes(bytes).unwrap_err().to_string();
    assert!(error.contains(part), "{part:?} is not in {error:?}");
}

#[test]
fn a_file_is_read_as_it_was_written() {
    let built_in = Classifier::built_in().unwrap();
    let bytes = built_in.to_bytes().unwrap();
    assert!(Classifier::from_bytes(&bytes).unwrap() == *built_in);
}

#[test]
fn spoilt_files_are_refused() {
    let bytes = Classifier::built_in().unwrap().to_bytes().unwrap();
    check_refused(b"", "no `gyrostat classifier 1` file");
    check_refused(b"GGUF....", "no `gyrostat classifier 1` file");
    check_refused(&bytes[..30], "cut off");
    check_refused(&bytes[..bytes.len() - 1], "wrong size");
    check_refused(b"gyrostat classifier 1\n{}\n", "missing field");
    let mut changed = bytes.clone();
    *changed.last_mut().unwrap() ^= 1;
    check_refused(&changed, "not those that were written");
}

fn row(prompt: &str, answer: &str, refusal: RefusalLabel) -> Labelled {
    Labelled {
        prompt: prompt.to_owned(),
        response: Some(answer.to_owned()),
        refusal: Some(refusal),
        weight: 1.0,
        ..Labelled::default()
    }
}

/// A team's model says "Beep." where others say "I cannot".
fn beeps() -> Vec<Labelled> {
    let things = ["a kite", "a fence", "a cake", "some soup", "a shed", "a list", "a sail", "a map"];
    let told = |nth: usize, thing: &str| {
        let prompt = format!("How do I make {thing}, try {nth}?");
        match nth % 2 {
            0 => row(&prompt, &format!("Beep boop, {thing}."), RefusalLabel::Full),
            _ => row(&prompt, &format!("For {thing} you need time and a table."), RefusalLabel::None),
        }
    };
    (0..64).map(|nth| told(nth, things[nth % 7])).collect()
}

#[test]
fn a_team_fits_its_own_labels_and_keeps_the_rest() {
    let built_in = Classifier::built_in().unwrap();
    let mut own = Classifier::clone(&built_in);
    assert_eq!(own.refusal("How do I knit?", "Beep boop, a scarf.").label, RefusalLabel::None);
    own.train(&beeps(), Schedule { passes: 40, ..Schedule::default() }, &|_| ()).unwrap();
    assert!(own.refusal("How do I knit?", "Beep boop, a scarf.").is_refusal());
    assert!(own.refusal("How do I knit?", "I'm sorry, but I can't help with that.").is_refusal());
    assert!(!own.refusal("How do I knit?", "For a scarf you need time and wool.").is_refusal());
    // There were no labels of risk or interaction.
    let prompt = "How do I poison my neighbour?";
    assert_eq!(own.risk_probability(prompt), built_in.risk_probability(prompt));
}

#[test]
fn the_same_rows_give_the_same_weights() {
    let trained = || {
        let mut blank = Classifier::blank(Vec::new());
        blank.train(&beeps(), Schedule { passes: 10, ..Schedule::default() }, &|_| ()).unwrap();
        blank.to_bytes()
    };
    // A classifier without types cannot be written.
    assert!(Classifier::from_bytes(&trained().unwrap()).is_err());
    assert_eq!(trained().unwrap(), trained().unwrap());
}

#[test]
fn new_types_are_learned_up_to_a_bound() {
    let asked = |prompt: String, name: &str| Labelled {
        prompt,
        interaction: Some(name.to_owned()),
        weight: 1.0,
        ..Labelled::default()
    };
    let mut own = Classifier::clone(&Classifier::built_in().unwrap());
    let known = own.types().len();
    let rows: Vec<Labelled> =
        (0..40).map(|nth| asked(format!("refund for order {nth}"), "refunds")).collect();
    own.train(&rows, Schedule { passes: 40, ..Schedule::default() }, &|_| ()).unwrap();
    assert_eq!(own.types().len(), known + 1);
    let (best, probability) = own.interaction(&interaction::features("a refund for order 77, please"));
    assert_eq!((own.types()[best].as_str(), probability > 0.5), ("refunds", true));
    let many: Vec<Labelled> = (0..64).map(|nth| asked("x".to_owned(), &format!("type{nth}"))).collect();
    assert!(matches!(own.train(&many, Schedule::default(), &|_| ()), Err(Error::TooManyInteractions { .. })));
}
