use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::*;

fn voice(who: &str, subject: u64, up: bool, at: u64) -> Voice<'static> {
    let words = if up { "up" } else { "down" }.to_owned();
    Voice {
        id: FeedbackId::new(),
        at,
        who: who.to_owned(),
        named: true,
        ai: false,
        subject,
        texts: ["", ""],
        verdict: Some(up),
        words,
    }
}

/// Honest raters are right nine times in ten; the others say the opposite of what they would have said.
fn world(honest: usize, flipping: usize, each: usize, seed: u64) -> Vec<Voice<'static>> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut voices = Vec::new();
    for rater in 0..honest + flipping {
        for nth in 0..each {
            let subject = random.random_range(0..200u64);
            let right = random.random_bool(0.9) == (rater < honest);
            voices.push(voice(
                &format!("r{rater}"),
                subject,
                (subject % 2 == 0) == right,
                (nth * 1_000_000) as u64,
            ));
        }
    }
    voices
}

/// Their share of the weight, and what is said of it.
fn flipped(voices: &[Voice<'_>], honest: usize) -> (f64, Trust) {
    let trust = weigh(voices.to_vec(), &Config::default());
    let of = |flips: bool| -> f64 {
        let theirs = voices.iter().filter(|v| (v.who[1..].parse::<usize>().unwrap() >= honest) == flips);
        theirs.map(|voice| trust.weights[&voice.id]).sum()
    };
    (of(true) / (of(true) + of(false)), trust)
}

#[test]
fn those_who_contradict_the_rest_count_for_nothing() {
    let mut voices = world(100, 0, 14, 1);
    // Three raters with 30% of the volume.
    let loud = world(0, 3, 200, 2);
    voices.extend(
        loud.into_iter()
            .map(|v| Voice { who: format!("r{}", 100 + v.who[1..].parse::<usize>().unwrap()), ..v }),
    );
    let (share, trust) = flipped(&voices, 100);
    assert!(share < 0.01, "{share}");
    assert!(
        trust.warnings.iter().any(|warning| warning.starts_with("3 raters contradict")),
        "{:?}",
        trust.warnings
    );
    assert!(trust.weighed_down[0].agreement.unwrap() < 0.2, "{:?}", trust.weighed_down);
}

#[test]
fn a_camp_of_many_small_raters_is_noticed() {
    let (share, trust) = flipped(&world(700, 300, 4, 3), 700);
    assert!(share < 0.1, "{share}");
    assert!(trust.warnings.iter().any(|warning| warning.contains("fall into camps")), "{:?}", trust.warnings);
    for seed in 0..20 {
        let (_, trust) = flipped(&world(300, 0, 4, seed), 300);
        assert!(trust.warnings.is_empty(), "{:?}", trust.warnings);
    }
}

/// Three loud raters who judge the same answers outvote the honest ones there, were it not for their share.
#[test]
fn a_loud_clique_does_not_outvote_the_rest() {
    let mut voices: Vec<Voice<'static>> =
        (0..600).map(|n| voice(&format!("r{}", n * 7 % 100), n / 3, true, n * 1000)).collect();
    voices.extend((0..258).map(|n| voice(&format!("r{}", 100 + n % 3), n / 3, false, n * 5000)));
    let (share, trust) = flipped(&voices, 100);
    assert!(share < 0.01, "{share} {:?}", trust.warnings);
}

#[test]
fn where_everybody_contradicts_everybody_nobody_is_right() {
    let voices: Vec<Voice<'static>> =
        (0..200).map(|n| voice(&format!("r{}", n % 40), n / 2, n % 2 == 0, n * 9000)).collect();
    let trust = weigh(voices, &Config::default());
    assert!(trust.weights.values().all(|weight| *weight == 1.0));
    assert!(
        trust.warnings.iter().any(|warning| warning.starts_with("people contradict")),
        "{:?}",
        trust.warnings
    );
}

#[test]
fn without_shared_answers_the_share_alone_bounds_a_rater() {
    let mut voices: Vec<Voice<'static>> =
        (0..700).map(|n| voice(&format!("r{}", n % 100), n, true, n * 100_000)).collect();
    voices.extend((0..300).map(|n| voice(&format!("r{}", 100 + n % 3), 1000 + n, false, n * 200_000)));
    let (share, _) = flipped(&voices, 100);
    assert!((share - 0.15).abs() < 1e-9, "{share}");
}

#[test]
fn repeats_and_second_thoughts_count_once() {
    let said =
        vec![voice("a", 1, true, 1), voice("a", 1, true, 2), voice("a", 1, false, 3), voice("b", 1, true, 3)];
    let trust = weigh(said.clone(), &Config::default());
    assert_eq!(trust.left_out, BTreeMap::from([("repeats".to_owned(), 1), ("taken back".to_owned(), 1)]));
    assert_eq!((trust.weights[&said[0].id], trust.weights[&said[2].id]), (0.0, 1.0));
    assert_eq!(trust.raters, 2);
}

#[test]
fn nobody_reads_fifty_answers_in_a_second() {
    let mut said: Vec<Voice<'static>> = (0..50).map(|n| voice("fast", n, true, 1000 + n)).collect();
    said.extend((0..50).map(|n| voice("slow", 100 + n, true, n * 5000)));
    let trust = weigh(said, &Config::default());
    assert_eq!(trust.left_out["too fast to be read"], 40);
    assert!(trust.warnings[0].contains("faster than anybody reads"));
}

#[test]
fn a_crowd_of_newcomers_counts_as_one() {
    let mut said: Vec<Voice<'static>> =
        (0..600).map(|n| voice(&format!("r{}", n % 60), n, true, n * 30_000)).collect();
    assert!(weigh(said.clone(), &Config::default()).warnings.is_empty());
    said.extend((0..300).map(|n| voice(&format!("s{n}"), 1000 + n, false, 9_000_000 + n * 150)));
    let trust = weigh(said.clone(), &Config::default());
    assert!(trust.warnings[0].starts_with("300 new raters"), "{:?}", trust.warnings);
    let theirs: f64 = said.iter().filter(|v| v.who.starts_with('s')).map(|v| trust.weights[&v.id]).sum();
    assert!(theirs < 40.0, "{theirs}");
}

#[test]
fn the_loudest_has_his_share_of_what_remains() {
    assert_eq!(loudest(vec![1.0; 40], 0.05), 2.0);
    let most = loudest([vec![100.0], vec![1.0; 99]].concat(), 0.05);
    assert!((most / (most + 99.0) - 0.05).abs() < 1e-9, "{most}");
    assert!(loudest(vec![7.0], 0.05) >= 7.0 && loudest(vec![], 0.05) > 0.0);
}

/// Everybody likes one word, but for three who say the opposite; no answer is judged twice.
#[test]
fn where_no_answer_is_judged_twice_the_words_tell() {
    let texts: Vec<[String; 2]> = (0..780)
        .map(|n| [format!("{} kindly put {}", n % 29, n % 31), format!("{} rudely put {}", n % 31, n % 37)])
        .collect();
    let mut voices: Vec<Voice<'_>> = Vec::new();
    for (n, [kind, rude]) in texts.iter().enumerate() {
        let who = if n < 600 { n % 60 } else { 60 + n % 3 };
        let turned = n % 2 == 0;
        let said = voice(&format!("r{who}"), n as u64, (who < 60) != turned, n as u64 * 60_000);
        voices.push(Voice { texts: if turned { [rude, kind] } else { [kind, rude] }, ..said });
    }
    let trust = weigh(voices.clone(), &Config::default());
    let weight = |voice: &Voice<'_>| trust.weights[&voice.id];
    assert!(voices[..600].iter().all(|voice| weight(voice) == 1.0), "{:?}", trust.weighed_down);
    assert!(voices[600..].iter().all(|voice| weight(voice) == 0.0), "{:?}", trust.weighed_down);
    assert_eq!(trust.warnings, ["3 raters contradict what the others' judgements teach"]);
    assert!(trust.weighed_down[0].opinion.is_some_and(|agreed| agreed < 0.1), "{:?}", trust.weighed_down);
    let without = weigh(voices.clone(), &Config { opinion: false, ..Config::default() });
    assert!(without.warnings.is_empty() && without.weighed_down.iter().all(|note| note.weight > 0.3));

    // People who are believed agree with one of them on other answers: he only likes something else.
    for n in 0..40 {
        for who in ["r1", "r2", "r60"] {
            voices.push(voice(who, 1000 + n, true, 60_000_000 + n * 60_000));
        }
    }
    let trust = weigh(voices.clone(), &Config::default());
    let vouched = voices[600..780].iter().filter(|voice| voice.who == "r60");
    assert!(
        vouched.map(|voice| trust.weights[&voice.id]).all(|weight| weight > 0.3),
        "{:?}",
        trust.weighed_down
    );
    assert_eq!(trust.warnings, ["2 raters contradict what the others' judgements teach"]);
}
