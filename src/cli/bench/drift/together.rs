//! Studies of monitors: hours, conversations, users of several types, many streams, types.

use serde_json::json;

use crate::drift::{Config, Kin, Kind, Monitor, Moved, Reading, Setup, Stream, Watch};

use super::{Error, Line, draw::Random, line, rounded};

/// One false alarm in so many readings.
const BUDGET: f64 = 1e4;
const DAY_MS: f64 = 86_400_000.0;

/// A stream of bits, and how it goes on after its reference.
struct Run<'a> {
    reference: usize,
    seasonal: bool,
    /// Readings before the change; none is a run without one, to `longest`.
    change: Option<usize>,
    longest: usize,
    /// The next reading, given its number and whether the change has come.
    next: &'a mut dyn FnMut(usize, bool) -> Reading,
}

impl Run<'_> {
    /// Readings from the reference or the change to the alarm; `Err` if none came.
    fn alarm(self) -> Result<Result<usize, usize>, Error> {
        let Self { reference, seasonal, change, longest, next } = self;
        let setup = Setup { kind: Kind::Bernoulli, watch: Watch::Both, reference, seasonal, strict: false };
        let mut stream = Stream::new(setup);
        let start = change.unwrap_or(reference);
        for at in 0..start + longest {
            if stream.observe(next(at, change.is_some_and(|change| at >= change)), |_| BUDGET)?.is_some() {
                // An alarm before the change is left out by its reader.
                return Ok(Ok((at + 1).saturating_sub(start)));
            }
        }
        Ok(Err(longest))
    }
}

/// False alarms over their budget with its standard error, and the mean delay of a change.
#[derive(Default)]
struct Tally {
    alarms: f64,
    readings: f64,
    delays: Vec<f64>,
}

impl Tally {
    fn same(&mut self, alarm: Result<usize, usize>) {
        self.alarms += f64::from(u8::from(alarm.is_ok()));
        self.readings += alarm.unwrap_or_else(|readings| readings) as f64;
    }

    fn changed(&mut self, alarm: Result<usize, usize>) {
        let delay = alarm.unwrap_or_else(|longest| longest);
        if delay > 0 {
            self.delays.push(delay as f64);
        }
    }

    fn columns(&self) -> [(&'static str, serde_json::Value); 3] {
        let delay = self.delays.iter().sum::<f64>() / self.delays.len().max(1) as f64;
        [
            ("false alarms / budget", rounded(self.alarms * BUDGET / self.readings, 2)),
            ("±", rounded(BUDGET * self.alarms.sqrt() / self.readings, 2)),
            ("delay", rounded(delay, 0)),
        ]
    }
}

/// The rate at a time of the day, over its mean.
#[derive(Debug, Clone, Copy)]
enum Course {
    Flat,
    Wave,
    /// Office hours against the rest.
    Square,
}

impl Course {
    fn at(self, ms: u64) -> f64 {
        let part = ms as f64 / DAY_MS % 1.0;
        match self {
            Self::Flat => 1.0,
            Self::Wave => 1.0 + 0.3 * (part * std::f64::consts::TAU).sin(),
            Self::Square if (1.0 / 3.0..5.0 / 6.0).contains(&part) => 1.3,
            Self::Square => 0.7,
        }
    }
}

/// Rates that swing by 30% with the hour: without and with the course of the day learned, and the paired design,
/// which holds each reading against one of the same hour of the day before. `delay` is to twice the rate.
pub(super) fn season(runs: usize) -> Result<Vec<Line>, Error> {
    const RATE: f64 = 0.1;
    let mut lines = Vec::new();
    for (seed, (course, per_day)) in (4000..).zip([
        (Course::Flat, 1000),
        (Course::Wave, 1000),
        (Course::Square, 1000),
        (Course::Wave, 5000),
        (Course::Square, 5000),
    ]) {
        for design in ["none", "course of the day", "paired days"] {
            let mut tally = Tally::default();
            let mut random = Random::new(seed);
            for run in 0..runs * 2 {
                let change = (run >= runs).then_some(3 * per_day);
                // Each run begins at an hour of its own.
                let begin = (random.uniform() * DAY_MS) as u64;
                let mut drawn: Vec<f64> = Vec::new();
                let mut next = |at: usize, changed: bool| {
                    let at_ms = begin + (at as f64 * DAY_MS / per_day as f64) as u64;
                    let rate = RATE * course.at(at_ms) * if changed { 2.0 } else { 1.0 };
                    let value = f64::from(u8::from(random.uniform() < rate));
                    Reading { value, at: at_ms, kin: Kin::default() }
                };
                let alarm = if design == "paired days" {
                    // Only pairs that differ count: which of the two is the 1 is a fair coin while nothing changes.
                    let mut read = |at: usize, changed: bool| {
                        drawn.push(next(at, changed).value);
                        at.checked_sub(per_day)
                            .and_then(|before| (drawn[at] != drawn[before]).then_some(drawn[at]))
                    };
                    paired(&mut read, per_day, change)
                } else {
                    let longest = if change.is_some() { 4000 } else { 20_000 };
                    let seasonal = design != "none";
                    Run { reference: 1000, seasonal, change, longest, next: &mut next }.alarm()?
                };
                if change.is_some() { tally.changed(alarm) } else { tally.same(alarm) }
            }
            let mut columns = line([
                ("course", json!(format!("{course:?}").to_lowercase())),
                ("readings a day", json!(per_day)),
                ("design", json!(design)),
            ]);
            columns.extend(tally.columns());
            lines.push(columns);
        }
    }
    Ok(lines)
}

/// The e-SR statistic of a coin that is known to be fair, with bets on sizes from .1 to .8, over the pairs.
fn paired(
    read: &mut dyn FnMut(usize, bool) -> Option<f64>,
    per_day: usize,
    change: Option<usize>,
) -> Result<usize, usize> {
    const SIZES: [f64; 4] = [0.1, 0.2, 0.4, 0.8];
    let (start, longest) = change.map_or((per_day, 20_000), |change| (change, 4000));
    let mut bets = [0.0; 8];
    // Only every other reading or so makes a pair: the budget counts readings, so the statistic adds per reading.
    for at in 0..start + longest {
        let pair = read(at, change.is_some_and(|change| at >= change));
        if at < per_day {
            continue;
        }
        for (bet, size) in bets.iter_mut().zip(SIZES.into_iter().flat_map(|size| [size, -size])) {
            *bet = (*bet + 0.125) * pair.map_or(1.0, |bit| 1.0 + size * (2.0 * bit - 1.0));
        }
        if bets.iter().sum::<f64>() >= BUDGET {
            return Ok((at + 1).saturating_sub(start));
        }
    }
    Err(longest)
}

/// Conversations of 1 to 20 turns, each with a rate of its own: its turns are alike. Taken as independent, then with
/// the kinship that is measured, then only the first turn of each. `delay` is to twice the rate.
pub(super) fn turns(runs: usize) -> Result<Vec<Line>, Error> {
    const RATE: f64 = 0.1;
    /// Conversations that go on at the same time.
    const OPEN: usize = 8;
    let mut lines = Vec::new();
    for (seed, correlation) in (5000..).zip([0.0, 0.1, 0.3, 0.6]) {
        for design in ["independent", "kinship", "first turns"] {
            let mut tally = Tally::default();
            let mut random = Random::new(seed);
            for run in 0..runs * 2 {
                let change = (run >= runs).then_some(3000);
                let begin = |random: &mut Random| {
                    (1 + random.below(20), 0usize, random.uniform(), f64::NAN, Kin::default())
                };
                let mut open: Vec<_> = (0..OPEN).map(|_| begin(&mut random)).collect();
                let mut next = |at: usize, changed: bool| loop {
                    let (left, turn, _, rate, kin) = &mut open[random.below(OPEN)];
                    if *left == 0 {
                        (*left, *turn, *rate, *kin) = (1 + random.below(20), 0, f64::NAN, Kin::default());
                    }
                    let mean = RATE * if changed { 2.0 } else { 1.0 };
                    if rate.is_nan() {
                        *rate = 0.0;
                    }
                    // A beta law of rates: with the probability of its correlation a turn repeats the conversation.
                    let share = *turn as f64 * correlation / (1.0 - correlation + *turn as f64 * correlation);
                    let repeated = *turn > 0 && random.uniform() < share;
                    let chance = if repeated { *rate / *turn as f64 } else { mean };
                    let value = f64::from(u8::from(random.uniform() < chance));
                    let before = *kin;
                    *rate += value;
                    *turn += 1;
                    *left -= 1;
                    *kin = kin.with((value - RATE) / (RATE * (1.0 - RATE)).sqrt());
                    let first = *turn == 1;
                    let at = at as u64 * 1000;
                    match design {
                        "independent" => break Reading { value, at, kin: Kin::default() },
                        "kinship" => break Reading { value, at, kin: before },
                        _ if first => break Reading { value, at, kin: Kin::default() },
                        _ => {}
                    }
                };
                let longest = if change.is_some() { 4000 } else { 20_000 };
                let alarm =
                    Run { reference: 1000, seasonal: false, change, longest, next: &mut next }.alarm()?;
                if change.is_some() { tally.changed(alarm) } else { tally.same(alarm) }
            }
            let mut columns = line([("correlation", json!(correlation)), ("design", json!(design))]);
            columns.extend(tally.columns());
            lines.push(columns);
        }
    }
    Ok(lines)
}

/// A type with probability `1/rank`, and the rate of each type.
struct Types {
    weights: Vec<f64>,
    rates: Vec<f64>,
}

impl Types {
    fn draw(&self, random: &mut Random) -> usize {
        let mut at = random.uniform() * self.weights.iter().sum::<f64>();
        let passed = |weight: &&f64| {
            at -= **weight;
            at >= 0.0
        };
        self.weights.iter().take_while(passed).count().min(self.weights.len() - 1)
    }

    fn reading(&self, random: &mut Random, at: u64) -> (usize, Reading) {
        let kind = self.draw(random);
        let value = f64::from(u8::from(random.uniform() < self.rates[kind]));
        (kind, Reading { value, at, kin: Kin::default() })
    }
}

fn ranked(count: usize, random: &mut Random) -> Types {
    Types {
        weights: (1..=count).map(|rank| 1.0 / rank as f64).collect(),
        rates: (0..count).map(|_| 0.02 + 0.28 * random.uniform()).collect(),
    }
}

fn monitor(reference: usize, days: f64, seasonal: bool) -> Result<Monitor<usize>, Error> {
    let config = Config { reference, false_alarm_days: days, seasonal, ..Config::default() };
    Ok(Monitor::new(config)?)
}

/// The key of the whole traffic.
const WHOLE: usize = usize::MAX;

/// Users who ask 1 to 20 things, eight users at a time, each thing of one of four types. All are pleased alike, or every sixth
/// less often, by a part. Taken as independent, as kin in everything, and as kin in requests of one type.
pub(super) fn users(runs: usize) -> Result<Vec<Line>, Error> {
    const PER_DAY: u64 = 3000;
    const DAYS: u64 = 33;
    const RATES: [f64; 4] = [0.97, 0.47, 0.93, 0.8];
    let mut lines = Vec::new();
    for (seed, part) in (6500..).zip([0.0, 0.1, 0.3]) {
        for design in ["independent", "kin in everything", "kin in one type"] {
            let mut random = Random::new(seed);
            let mut alarms = 0;
            for _ in 0..runs {
                let mut monitor = monitor(100, 30.0, true)?;
                let mut users = [(0, 1.0, [Kin::default(); RATES.len()]); 8];
                for at in 0..PER_DAY * DAYS {
                    let (left, factor, kin) = &mut users[random.below(8)];
                    if *left == 0 {
                        let pleased = if random.below(6) > 0 { 1.0 } else { 1.0 - part };
                        (*left, *factor, *kin) = (1 + random.below(20), pleased, Default::default());
                    }
                    *left -= 1;
                    let kind = random.below(RATES.len());
                    let value = f64::from(u8::from(random.uniform() < RATES[kind] * *factor));
                    let circle = if design == "kin in one type" { kind } else { 0 };
                    let known = if design == "independent" { Kin::default() } else { kin[circle] };
                    let reading = Reading { value, at: at * 86_400_000 / PER_DAY, kin: known };
                    let seen = monitor.observe(&kind, &WHOLE, Kind::Bernoulli, reading)?;
                    kin[circle] = kin[circle].with(seen.deviation);
                    alarms += u32::from(seen.segment.is_some()) + u32::from(seen.whole.is_some());
                }
            }
            let budget = runs as f64 * (DAYS - 1) as f64 / 30.0;
            lines.push(line([
                ("less pleased by", json!(part)),
                ("design", json!(design)),
                ("alarms", json!(alarms)),
                ("budget", rounded(budget, 1)),
                ("over budget", rounded(f64::from(alarms) / budget, 2)),
                ("±", rounded(f64::from(alarms).sqrt() / budget, 2)),
            ]));
        }
    }
    Ok(lines)
}

/// 50 types, `1/rank` of the traffic each, and the whole: alarms in 30 days over the one that the budget allows. The
/// rates keep still, then swing by 30% with the hour.
pub(super) fn fleet(runs: usize) -> Result<Vec<Line>, Error> {
    const PER_DAY: u64 = 3000;
    const DAYS: u64 = 33;
    let mut lines = Vec::new();
    for (seed, course) in (6000..).zip([Course::Flat, Course::Wave]) {
        let mut random = Random::new(seed);
        let (mut types, mut whole, mut days) = (0, 0, 0.0);
        for _ in 0..runs {
            let fleet = ranked(50, &mut random);
            let mut monitor = monitor(300, 30.0, true)?;
            for at in 0..PER_DAY * DAYS {
                let ms = at * 86_400_000 / PER_DAY;
                let kind = fleet.draw(&mut random);
                let rate = fleet.rates[kind] * course.at(ms);
                let value = f64::from(u8::from(random.uniform() < rate));
                let reading = Reading { value, at: ms, kin: Kin::default() };
                let seen = monitor.observe(&kind, &WHOLE, Kind::Bernoulli, reading)?;
                types += u32::from(seen.segment.is_some());
                whole += u32::from(seen.whole.is_some());
            }
            days += (DAYS - 1) as f64;
        }
        let budget = days / 30.0;
        lines.push(line([
            ("course", json!(format!("{course:?}").to_lowercase())),
            ("runs", json!(runs)),
            ("alarms of types", json!(types)),
            ("of the whole", json!(whole)),
            ("budget", rounded(budget, 1)),
            ("over budget", rounded(f64::from(types + whole) / budget, 2)),
            ("±", rounded(f64::from(types + whole).sqrt() / budget, 2)),
        ]));
    }
    Ok(lines)
}

/// Ten types; after ten days the shares of the traffic are turned round, and no type answers otherwise than before.
pub(super) fn mix(runs: usize) -> Result<Vec<Line>, Error> {
    const PER_DAY: u64 = 3000;
    let mut random = Random::new(7000);
    let (mut behaviour, mut traffic, mut types) = (0, 0, 0);
    for _ in 0..runs {
        let mut mix = ranked(10, &mut random);
        let mut monitor = monitor(1000, 30.0, true)?;
        for at in 0..PER_DAY * 20 {
            if at == PER_DAY * 10 {
                mix.weights.reverse();
            }
            let (kind, reading) = mix.reading(&mut random, at * 86_400_000 / PER_DAY);
            let seen = monitor.observe(&kind, &WHOLE, Kind::Bernoulli, reading)?;
            types += u32::from(seen.segment.is_some());
            match seen.whole.map(|alarm| alarm.moved) {
                Some(Moved::Readings) => behaviour += 1,
                Some(Moved::Whole) => traffic += 1,
                None => {}
            }
        }
    }
    let budget = runs as f64 * 20.0 / 30.0;
    Ok(vec![line([
        ("runs", json!(runs)),
        ("behaviour alarms of types", json!(types)),
        ("of the whole", json!(behaviour)),
        ("budget", rounded(budget, 1)),
        ("over budget", rounded(f64::from(types + behaviour) / budget, 2)),
        ("alarms that name the traffic", json!(traffic)),
    ])])
}

/// Ten types, one of them with 2% of the traffic; its rate goes from .05 to .4 after ten days.
pub(super) fn rare(runs: usize) -> Result<Vec<Line>, Error> {
    const PER_DAY: u64 = 3000;
    const RARE: usize = 9;
    let mut random = Random::new(8000);
    let (mut right, mut wrong, mut early, mut none) = (0, 0, 0, 0);
    let mut delays = Vec::new();
    for _ in 0..runs {
        let mut traffic = ranked(10, &mut random);
        let others: f64 = traffic.weights[..RARE].iter().sum();
        traffic.weights[RARE] = others * 0.02 / 0.98;
        traffic.rates[RARE] = 0.05;
        let mut monitor = monitor(300, 30.0, true)?;
        let mut first = None;
        for at in 0..PER_DAY * 20 {
            if at == PER_DAY * 10 {
                traffic.rates[RARE] = 0.4;
            }
            let (kind, reading) = traffic.reading(&mut random, at * 86_400_000 / PER_DAY);
            let seen = monitor.observe(&kind, &WHOLE, Kind::Bernoulli, reading)?;
            let named = seen.segment.map(|_| kind).or(seen.whole.map(|_| WHOLE));
            if named.is_some() {
                first = named.map(|named| (named, at));
                break;
            }
        }
        match first {
            None => none += 1,
            Some((_, at)) if at < PER_DAY * 10 => early += 1,
            Some((RARE, at)) => {
                right += 1;
                delays.push(at - PER_DAY * 10);
            }
            Some(_) => wrong += 1,
        }
    }
    delays.sort_unstable();
    Ok(vec![line([
        ("runs", json!(runs)),
        ("named right", json!(right)),
        ("named otherwise", json!(wrong)),
        ("alarm before the change", json!(early)),
        ("no alarm", json!(none)),
        ("right of those that alarm", rounded(f64::from(right) / f64::from(right + wrong).max(1.0), 3)),
        ("delay in its readings, median", json!(delays.get(delays.len() / 2).map(|delay| delay / 50))),
    ])])
}
