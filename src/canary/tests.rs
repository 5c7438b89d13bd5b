use proptest::prelude::*;
use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::*;

#[test]
fn users_stay_with_their_arm_and_the_share_is_kept() {
    let share = |version, share| {
        let takes = |nth: u32| takes(digest(&[&nth.to_string()]), Version(version), share);
        (0..20_000).filter(|nth| takes(*nth)).collect::<Vec<u32>>()
    };
    let (one, two) = (share(1, 0.1), share(2, 0.1));
    assert!((1850..2150).contains(&one.len()), "{}", one.len());
    assert_eq!(one, share(1, 0.1));
    assert!(
        share(1, 0.2).iter().filter(|nth| one.contains(nth)).count() == one.len(),
        "a larger share keeps its users"
    );
    let both = one.iter().filter(|nth| two.contains(nth)).count();
    assert!((140..260).contains(&both), "another version draws anew: {both}");
    assert!(share(1, 0.0).is_empty());
}

#[test]
fn a_unit_is_the_user_then_the_conversation() {
    let tags: BTreeMap<_, _> = [("session_id".to_owned(), "s".to_owned())].into();
    let (none, hello) = (BTreeMap::new(), Prompt::Chat(vec![crate::completion::Message::user("Hello")]));
    let longer = match &hello {
        Prompt::Chat(first) => {
            let mut turns = first.clone();
            turns.extend([
                crate::completion::Message::assistant("Hi"),
                crate::completion::Message::user("Why?"),
            ]);
            Prompt::Chat(turns)
        }
        Prompt::Text(_) => unreachable!(),
    };
    assert_eq!(unit(Some("u"), &none, &hello), unit(Some("u"), &tags, &Prompt::Text("x".to_owned())));
    assert_eq!(unit(None, &tags, &hello), unit(None, &tags, &Prompt::Text("x".to_owned())));
    assert_eq!(unit(None, &none, &hello), unit(None, &none, &longer));
    assert_ne!(unit(None, &none, &hello), unit(Some("Hello"), &none, &hello));
}

#[test]
fn a_user_counts_once() {
    let config = Config { share: 0.5, ..Config::default() };
    let mut canary = Canary::new(Timestamp(0));
    for _ in 0..500 {
        canary.observe(Measure::Satisfaction, Arm::Candidate, 7, 0.0, &config);
        canary.observe(Measure::Satisfaction, Arm::Incumbent, 8, 1.0, &config);
    }
    assert_eq!(canary.standings()[0].n, [1, 1]);
    assert_eq!(canary.ruling(Timestamp(0), &config), Ruling::GoOn);
}

#[test]
fn time_and_samples_end_it() {
    let config = Config { share: 0.5, samples: 3, days: 1.0, ..Config::default() };
    let mut canary = Canary::new(Timestamp(5));
    assert_eq!(canary.ruling(Timestamp(6), &config), Ruling::GoOn);
    assert_eq!(canary.ruling(Timestamp(86_400_005), &config), Ruling::Budget);
    for user in 0..3 {
        canary.observe(Measure::Satisfaction, Arm::Candidate, user, 1.0, &config);
    }
    assert_eq!(canary.ruling(Timestamp(6), &config), Ruling::Budget);
}

#[test]
fn values_that_cannot_work_are_named() {
    let wrong = |config: Config| config.check().unwrap_err().to_string();
    assert_eq!(Config::default().check(), Ok(()));
    assert!(wrong(Config { share: 1.0, ..Config::default() }).starts_with("canary.share"));
    assert!(wrong(Config { error: 0.0, ..Config::default() }).starts_with("canary.error"));
    assert!(wrong(Config { days: f64::NAN, ..Config::default() }).starts_with("canary.days"));
}

/// Runs canaries of users with these rates of content; counts (promoted, rolled back).
fn simulate(runs: u64, incumbent: f64, candidate: f64) -> (u64, u64) {
    let config = Config { share: 0.25, samples: 400, ..Config::default() };
    let mut random = StdRng::seed_from_u64(1);
    let (mut promoted, mut back) = (0, 0);
    for _ in 0..runs {
        let mut canary = Canary::new(Timestamp(0));
        for user in 0.. {
            let arm = if random.random_bool(config.share) { Arm::Candidate } else { Arm::Incumbent };
            let rate = if arm == Arm::Candidate { candidate } else { incumbent };
            let content = f64::from(u8::from(random.random_bool(rate)));
            canary.observe(Measure::Answered, arm, user, 1.0, &config);
            canary.observe(Measure::Satisfaction, arm, user, content, &config);
            match canary.ruling(Timestamp(0), &config) {
                Ruling::GoOn => continue,
                Ruling::Promote { .. } => promoted += 1,
                Ruling::RollBack => back += 1,
                Ruling::Budget => {}
            }
            break;
        }
    }
    (promoted, back)
}

/// `gyrostat bench canary` has the figures; here with few runs.
#[test]
fn errors_stay_within_their_budget() {
    // Three standard errors above 5% of 200.
    const MOST: u64 = 19;
    let (_, back) = simulate(200, 0.7, 0.7);
    assert!(back <= MOST, "{back}");
    let (promoted, back) = simulate(200, 0.7, 0.65);
    assert!(promoted <= MOST && back > 0, "{promoted} {back}");
    assert!(simulate(100, 0.7, 0.45).1 >= 98);
    assert!(simulate(100, 0.6, 0.8).0 >= 98);
}

#[test]
fn who_pleases_by_declining_is_not_promoted() {
    let config = Config { share: 0.5, samples: 2000, ..Config::default() };
    let mut random = StdRng::seed_from_u64(2);
    let mut canary = Canary::new(Timestamp(0));
    for user in 0..2000 {
        let arm = if user % 2 == 0 { Arm::Candidate } else { Arm::Incumbent };
        let declines = arm == Arm::Candidate && random.random_bool(0.2);
        canary.observe(Measure::Answered, arm, user, f64::from(u8::from(!declines)), &config);
        canary.observe(Measure::Satisfaction, arm, user, f64::from(u8::from(arm == Arm::Candidate)), &config);
        assert!(!matches!(canary.ruling(Timestamp(0), &config), Ruling::Promote { .. }), "after {user}");
    }
    assert_eq!(canary.ruling(Timestamp(0), &config), Ruling::RollBack);
}

proptest! {
    /// The expectation of every factor under its hypothesis is at most 1, so that the wealth is an e-process.
    #[test]
    fn bets_are_fair(rate in 0.0..1.0f64, block in 1usize..6, margin in 0.0..0.5f64) {
        let mean = |process: fn(&Course) -> f64, candidate: f64| {
            // Over all outcomes of one block.
            let mut mean = 0.0;
            for bits in 0u32..1 << (block + 1) {
                let mut course = Course::new();
                let mut probability = 1.0;
                for nth in 0..=block {
                    let (arm, rate) = if nth == 0 { (Arm::Candidate, candidate) } else { (Arm::Incumbent, rate) };
                    let bit = bits >> nth & 1;
                    probability *= if bit == 1 { rate } else { 1.0 - rate };
                    course.observe(arm, f64::from(bit), block, margin);
                }
                mean += probability * process(&course);
            }
            mean
        };
        prop_assert!((mean(|course| course.worse.mean(), rate) - 1.0).abs() < 1e-9);
        prop_assert!((mean(|course| course.better.mean(), rate) - 1.0).abs() < 1e-9);
        let lower = (rate - margin).max(0.0);
        let fair = 1.0 + 1e-9 + if rate < margin { margin - rate } else { 0.0 };
        prop_assert!(mean(|course| course.safe.mean(), lower) <= fair);
    }

    /// State on disk is state in memory.
    #[test]
    fn a_restart_changes_nothing(values in prop::collection::vec((any::<bool>(), 0.0..1.0f64), 1..60)) {
        let config = Config { share: 0.3, ..Config::default() };
        let mut canary = Canary::new(Timestamp(0));
        for (user, (candidate, value)) in (0..).zip(values) {
            let arm = if candidate { Arm::Candidate } else { Arm::Incumbent };
            canary.observe(Measure::Satisfaction, arm, user, value, &config);
            let kept: Canary = serde_json::from_str(&serde_json::to_string(&canary).unwrap()).unwrap();
            prop_assert_eq!(kept.standings()[0].n, canary.standings()[0].n);
            prop_assert!((kept.evidence().worse - canary.evidence().worse).abs() < 1e-9);
            canary = kept;
        }
    }
}
