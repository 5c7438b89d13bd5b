//! `gyrostat bench canary`: simulated canaries, each ruled on as in service.

use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::json;

use crate::canary::{Arm, Canary, Config, Measure, Ruling};
use crate::completion::Timestamp;

use super::drift::{Line, line, rounded};

/// Who the users are.
#[derive(Debug, Clone, Copy)]
struct World {
    name: &'static str,
    /// Content users of the incumbent and of the candidate.
    incumbent: f64,
    candidate: f64,
    /// Harmless requests that are declined.
    declined: [f64; 2],
    share: f64,
    /// Readings of one user, and how many of them count.
    readings: u32,
    counted: u32,
    /// Users differ: each one's rate is drawn by ± this.
    spread: f64,
    /// The rate swings by ± this in the course of the canary, for both arms.
    swing: f64,
}

const EQUAL: World = World {
    name: "equal",
    incumbent: 0.7,
    candidate: 0.7,
    declined: [0.02, 0.02],
    share: 0.1,
    readings: 1,
    counted: 1,
    spread: 0.0,
    swing: 0.0,
};

const WORLDS: [World; 13] = [
    EQUAL,
    World { name: "equal, share .5", share: 0.5, ..EQUAL },
    World { name: "equal, .5 content", incumbent: 0.5, candidate: 0.5, ..EQUAL },
    World { name: "equal, .95 content", incumbent: 0.95, candidate: 0.95, ..EQUAL },
    World { name: "equal, rate swings by .2", swing: 0.2, ..EQUAL },
    World { name: "equal, users differ by .25, 10 readings, 1 counts", spread: 0.25, readings: 10, ..EQUAL },
    World {
        name: "equal, users differ by .25, 10 readings, all count",
        spread: 0.25,
        readings: 10,
        counted: 10,
        ..EQUAL
    },
    World { name: "worse by the margin (.05)", candidate: 0.65, ..EQUAL },
    World { name: "worse by .10", candidate: 0.6, ..EQUAL },
    World { name: "worse by .10, .5 content", incumbent: 0.5, candidate: 0.4, ..EQUAL },
    World { name: "as content, declines .10 more", declined: [0.02, 0.12], ..EQUAL },
    World { name: "better by .05", candidate: 0.75, ..EQUAL },
    World { name: "better by .10", candidate: 0.8, ..EQUAL },
];

#[derive(Default)]
struct Tally {
    better: u32,
    no_worse: u32,
    back: u32,
    budget: u32,
    samples: u64,
}

/// One line a world, over so many canaries each.
pub(super) fn study(runs: usize) -> Vec<Line> {
    (0..).zip(WORLDS).map(|(seed, world)| world.line(runs, seed)).collect()
}

impl World {
    fn line(self, runs: usize, seed: u64) -> Line {
        let config = Config { share: self.share, readings_a_user: self.counted, ..Config::default() };
        let mut tally = Tally::default();
        for run in 0..runs as u64 {
            let (ruling, samples) = self.run(&config, seed << 32 | run);
            tally.samples += samples;
            *match ruling {
                Ruling::Promote { better: true } => &mut tally.better,
                Ruling::Promote { better: false } => &mut tally.no_worse,
                Ruling::RollBack => &mut tally.back,
                Ruling::Budget | Ruling::GoOn => &mut tally.budget,
            } += 1;
        }
        let share = |count: u32| rounded(100.0 * f64::from(count) / runs as f64, 1);
        line([
            ("candidate", json!(self.name)),
            ("promoted as better, %", share(tally.better)),
            ("promoted as no worse, %", share(tally.no_worse)),
            ("rolled back on evidence, %", share(tally.back)),
            ("at the budget (rolled back), %", share(tally.budget)),
            ("the candidate's readings, mean", rounded(tally.samples as f64 / runs as f64, 0)),
        ])
    }

    fn run(self, config: &Config, seed: u64) -> (Ruling, u64) {
        let mut random = StdRng::seed_from_u64(seed);
        let mut canary = Canary::new(Timestamp(0));
        // The canary in thousands of readings, of which the swing has its course.
        let whole = config.samples as f64 / config.share;
        for user in 0u64.. {
            let candidate = random.random_bool(config.share);
            let arm = if candidate { Arm::Candidate } else { Arm::Incumbent };
            let own = self.spread * (2.0 * random.random::<f64>() - 1.0);
            let swing = self.swing * (std::f64::consts::TAU * user as f64 / whole * 3.0).sin();
            let rate = if candidate { self.candidate } else { self.incumbent };
            for _ in 0..self.readings {
                let answered = random.random::<f64>() >= self.declined[usize::from(candidate)];
                canary.observe(Measure::Answered, arm, user, f64::from(u8::from(answered)), config);
                let content = random.random::<f64>() < rate + own + swing;
                canary.observe(Measure::Satisfaction, arm, user, f64::from(u8::from(content)), config);
                let ruling = canary.ruling(Timestamp(0), config);
                if ruling != Ruling::GoOn {
                    return (ruling, canary.samples());
                }
            }
        }
        (Ruling::GoOn, canary.samples())
    }
}
