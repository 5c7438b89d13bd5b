//! The detectors against an independent implementation, and streams against interruption, constancy and budget.
//!
//! The golden alarms and evidence come from the recursions written in numpy, run over the same streams:
//!
//! ```python
//! G = 21; K = np.array([.08, .16, .32, .64, 1.28]); C = .95; z = -4 + 8 * np.arange(G) / (G - 1)
//!
//! def bern(x, n0, A):
//!     S = x[:n0].sum(); m = (S + .5) / (n0 + 1)
//!     p = np.sin(np.clip(np.arcsin(np.sqrt(m)) + z / (2 * np.sqrt(n0 + 1)), 1e-4, np.pi / 2 - 1e-4)) ** 2
//!     l1, l0 = np.log(p), np.log(1 - p); l = S * l1 + (n0 - S) * l0
//!     d = np.sqrt(p * (1 - p))[:, None] * K; P = p[:, None]
//!     q = np.concatenate([np.minimum(P + d, 1 - (1 - P) * (1 - C)), np.maximum(P - d, P * (1 - C))], 1)
//!     R = np.zeros_like(q)
//!     for t in range(n0, len(x)):
//!         l += l1 if x[t] else l0
//!         R = (R + 1) * (q / P if x[t] else (1 - q) / (1 - P))
//!         g = np.exp(l - l.max()); M = (g * R.mean(1)).sum() / g.sum()
//!         if M >= A: return t, np.log10(M)
//!
//! def bounded(x, n0, A):
//!     r = x[:n0]; m = r.mean(); v = r.var(ddof=1); mu3 = ((r - m) ** 3).mean(); sd = np.sqrt(v)
//!     p = np.clip(m + z * sd / np.sqrt(n0), 1e-4, 1 - 1e-4); P = p[:, None]
//!     vg = np.clip(v + (mu3 / v) * (p - m), .4 * v, 2.5 * v); lam = K / (sd * (1 + K * K))
//!     L = np.concatenate([np.minimum(lam, C / P), -np.minimum(lam, C / (1 - P))], 1)
//!     S = r.sum(); N = n0; R = np.zeros((G, 10))
//!     for t in range(n0, len(x)):
//!         S += x[t]; N += 1; l = -N * (S / N - p) ** 2 / (2 * vg)
//!         R = (R + 1) * (1 + L * (x[t] - P))
//!         g = np.exp(l - l.max()); M = (g * R.mean(1)).sum() / g.sum()
//!         if M >= A: return t, np.log10(M)
//! ```

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// Knuth's MMIX generator; the upper 53 bits make a number in `[0, 1)`.
struct Lcg(u64);

impl Lcg {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// A bit with rate `p`, or a score with mean `p/2 + 1/4`.
    fn reading(&mut self, kind: Kind, p: f64) -> f64 {
        match kind {
            Kind::Bernoulli => f64::from(u8::from(self.uniform() < p)),
            Kind::Bounded => (self.uniform() + self.uniform() + p * 2.0) / 4.0,
        }
    }
}

/// 1500 readings that change from `before` to `after` at the 700th.
fn stream(kind: Kind, seed: u64, before: f64, after: f64) -> Vec<f64> {
    let mut random = Lcg(seed);
    (0..1500).map(|i| random.reading(kind, if i < 700 { before } else { after })).collect()
}

fn first_alarm(kind: Kind, data: &[f64], watch: Watch) -> Option<(usize, f64)> {
    let mut detector = Detector::learn(Constants::Reference, kind, &data[..300], watch).unwrap();
    let alarm = data[300..].iter().position(|&x| detector.update(x) >= 1e3)?;
    Some((alarm + 300, detector.evidence_log10()))
}

#[track_caller]
fn check(kind: Kind, before: f64, after: f64, golden: [(usize, f64); 3]) {
    for (seed, (alarm, evidence)) in (1..).zip(golden) {
        let data = stream(kind, seed, before, after);
        let (at, log) = first_alarm(kind, &data, Watch::Both).unwrap();
        assert_eq!(at, alarm, "seed {seed}");
        assert!((log - evidence).abs() < 1e-9, "seed {seed}: {log}, not {evidence}");
        let (with, against) =
            if after > before { (Watch::Up, Watch::Down) } else { (Watch::Down, Watch::Up) };
        assert!(first_alarm(kind, &data, with).unwrap().0 <= at, "one direction alone is sooner");
        assert!(first_alarm(kind, &data, against).is_none_or(|(other, _)| !(700..=at).contains(&other)));
    }
}

#[test]
fn alarms_where_the_independent_implementation_does() {
    check(
        Kind::Bernoulli,
        0.1,
        0.3,
        [(726, 3.178_919_839_484_858), (735, 3.249_304_467_497_645), (710, 3.127_576_718_315_215_7)],
    );
    check(
        Kind::Bernoulli,
        0.4,
        0.15,
        [(724, 3.016_762_286_829_453), (724, 3.066_045_902_224_714_4), (717, 3.009_346_842_737_126)],
    );
    check(
        Kind::Bounded,
        0.3,
        0.42,
        [(729, 3.019_712_690_320_121_7), (764, 3.134_756_516_303_425_4), (739, 3.027_043_982_877_538)],
    );
    check(
        Kind::Bounded,
        0.6,
        0.48,
        [(734, 3.047_177_032_281_505_5), (721, 3.055_776_899_946_522_5), (714, 3.083_538_813_953_276)],
    );
}

fn setup(kind: Kind, reference: usize) -> Setup {
    Setup { kind, watch: Watch::Both, reference, seasonal: true, strict: false }
}

fn at(value: f64, at: u64) -> Reading {
    Reading { value, at, kin: Kin::default() }
}

/// The statistic written down once more, without the state that the detector keeps.
#[test]
fn the_default_detector_bets_against_the_mean_of_what_came_before() {
    let data = stream(Kind::Bernoulli, 1, 0.1, 0.3);
    let mut detector = Detector::learn(Constants::Default, Kind::Bernoulli, &data[..300], Watch::Up).unwrap();
    let sizes = [0.05, 0.08, 0.125, 0.2, 0.32, 0.5, 0.8, 1.28];
    let parts = [1.0, 2.0, 5.0, 5.0, 6.0, 8.0, 4.0, 1.0].map(|part: f64| part / 32.0);
    let mut bets = [0.0; 8];
    for now in 300..720 {
        let ones: f64 = data[..now].iter().sum();
        let mean = (ones + 0.5) / (now as f64 + 1.0);
        for ((bet, size), part) in bets.iter_mut().zip(sizes).zip(parts) {
            let stake = (size / (mean * (1.0 - mean)).sqrt()).min(0.95 / mean);
            *bet = (*bet + part) * (1.0 + stake * (data[now] - mean));
        }
        let statistic = detector.update(data[now]);
        let expected = bets.iter().sum::<f64>() / 0.93;
        assert!((statistic / expected - 1.0).abs() < 1e-9, "{statistic}, not {expected} at {now}");
    }
}

#[test]
fn a_stream_restored_anywhere_alarms_as_one_not_interrupted() {
    for (kind, before, after) in [(Kind::Bernoulli, 0.1, 0.3), (Kind::Bounded, 0.3, 0.42)] {
        let data = stream(kind, 2, before, after);
        let mut whole = Stream::new(setup(kind, 300));
        let mut broken = whole.clone();
        let mut alarms = 0;
        for (tag, &x) in (0..).zip(&data) {
            let kin = Kin { readings: (tag % 3) as f64, deviation: 0.1 };
            let reading = Reading { value: x, at: tag * 60_000, kin };
            if tag % 37 == 0 {
                broken = serde_json::from_str(&serde_json::to_string(&broken).unwrap()).unwrap();
                assert_eq!(broken, whole, "before reading {tag}");
            }
            let alarm = whole.observe(reading, |_| 1e3).unwrap();
            assert_eq!(broken.observe(reading, |_| 1e3).unwrap(), alarm);
            alarms += usize::from(alarm.is_some());
        }
        assert_eq!(alarms, 1, "a stream in alarm stays there");
        assert_eq!(whole.state(), State::Alarm);
    }
}

#[test]
fn the_alarm_says_which_way_and_since_when() {
    for (kind, before, after, direction) in [
        (Kind::Bernoulli, 0.1, 0.3, Direction::Up),
        (Kind::Bernoulli, 0.4, 0.15, Direction::Down),
        (Kind::Bounded, 0.3, 0.42, Direction::Up),
        (Kind::Bounded, 0.6, 0.48, Direction::Down),
    ] {
        let mut watched = Stream::new(setup(kind, 300));
        let alarm = (0..)
            .zip(stream(kind, 1, before, after))
            .find_map(|(i, x)| watched.observe(at(x, 1000 * i), |_| 1e3).unwrap())
            .unwrap();
        assert_eq!(alarm.direction, direction);
        assert!(alarm.change.from <= 700_000 && 700_000 <= alarm.change.to, "{alarm:?}");
        assert!(alarm.evidence_log10 >= 3.0 && (alarm.threshold_log10 - 3.0).abs() < 1e-12);
    }
}

#[test]
fn readings_that_never_move_never_alarm() {
    for (kind, value) in [
        (Kind::Bernoulli, 0.0),
        (Kind::Bernoulli, 1.0),
        (Kind::Bounded, 0.0),
        (Kind::Bounded, 0.5),
        (Kind::Bounded, 1.0),
    ] {
        let mut stream = Stream::new(setup(kind, 100));
        for tag in 0..5000 {
            assert_eq!(stream.observe(at(value, tag), |_| 200.0).unwrap(), None, "{kind:?} {value} at {tag}");
        }
        let other = if value > 0.5 { 0.0 } else { 1.0 };
        assert!(
            (5000..5050).any(|tag| stream.observe(at(other, tag), |_| 200.0).unwrap().is_some()),
            "{kind:?} {value}"
        );
    }
}

#[test]
fn what_is_no_reading_is_refused_and_changes_nothing() {
    for (kind, bad) in
        [(Kind::Bernoulli, 0.5), (Kind::Bernoulli, f64::NAN), (Kind::Bounded, 1.1), (Kind::Bounded, f64::NAN)]
    {
        let mut stream = Stream::new(setup(kind, 30));
        assert!(stream.observe(at(bad, 0), |_| 1e3).is_err());
        assert_eq!(stream.row().n, 0);
    }
    assert_eq!(Bernoulli::new(29, 3, Watch::Both), Err(Error::ShortReference(29)));
}

/// Mean readings to a false alarm at `A = 200`, the reference drawn anew each run. The bound is on this average.
#[test]
fn false_alarms_keep_to_the_budget() {
    const RUNS: u32 = 400;
    const CAP: u32 = 4000;
    let mut random = Lcg(20);
    let runs: Vec<f64> = (0..RUNS)
        .map(|_| {
            let reference: Vec<f64> = (0..300).map(|_| random.reading(Kind::Bernoulli, 0.1)).collect();
            let mut detector =
                Detector::learn(Constants::Default, Kind::Bernoulli, &reference, Watch::Both).unwrap();
            let alarm = (1..CAP).find(|_| detector.update(random.reading(Kind::Bernoulli, 0.1)) >= 200.0);
            f64::from(alarm.unwrap_or(CAP))
        })
        .collect();
    let n = f64::from(RUNS);
    let mean = runs.iter().sum::<f64>() / n;
    let error = (runs.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0) / n).sqrt();
    assert!(error < 30.0 && mean - 3.0 * error > 200.0, "{mean:.0} ± {error:.0}");
}

#[test]
fn a_monitor_shares_one_budget_and_refuses_further_keys() {
    let config = Config { reference: 30, max_streams: 2, ..Config::default() };
    let mut monitor = Monitor::new(config.clone()).unwrap();
    for minute in 0..40 {
        for key in ["chat", "code"] {
            monitor
                .show(
                    &key.to_owned(),
                    Kind::Bernoulli,
                    at(f64::from(minute % 4 == 0), 60_000 * minute as u64),
                )
                .unwrap();
        }
    }
    let third = monitor.show(&"maths".to_owned(), Kind::Bernoulli, at(0.0, 0));
    assert_eq!(third, Err(Error::TooManyStreams(2)));
    for (_, row) in monitor.rows() {
        let expected = threshold(30.0, 1440.0, 2).log10();
        assert!((row.threshold_log10 - expected).abs() < 0.02, "{row:?}");
    }
    let saved = serde_json::to_string(&monitor.save()).unwrap();
    let restored: Monitor<String> = Monitor::restore(config, serde_json::from_str(&saved).unwrap()).unwrap();
    assert_eq!(restored.rows(), monitor.rows());
    let other = saved.replacen("\"version\":3", "\"version\":9", 1);
    assert!(Monitor::<String>::restore(Config::default(), serde_json::from_str(&other).unwrap()).is_err());
}

/// Two types with rates .1 and .5 change places in the traffic: the whole's mean moves, no type's does.
#[test]
fn a_change_of_shares_alone_is_told_from_a_change_within() {
    let mut random = Lcg(3);
    let mut monitor = Monitor::new(Config { reference: 200, ..Config::default() }).unwrap();
    let mut alarms = Vec::new();
    for minute in 0..4000 {
        let common = if minute < 2000 { 0.9 } else { 0.3 };
        let (key, rate) = if random.uniform() < common { ("a", 0.1) } else { ("b", 0.5) };
        let value = f64::from(u8::from(random.uniform() < rate));
        let seen = monitor.observe(&key, &"all", Kind::Bernoulli, at(value, 60_000 * minute)).unwrap();
        assert_eq!(seen.segment, None, "at {minute}");
        alarms.extend(seen.whole);
    }
    assert_eq!(alarms.len(), 1);
    let change = alarms[0].change;
    assert_eq!((alarms[0].moved, alarms[0].direction), (Moved::Whole, Direction::Up));
    assert!((change.from..=change.to).contains(&(60_000 * 2000)), "{change:?}");
}

#[test]
fn after_an_alarm_the_reference_begins_at_the_change() {
    let mut stream_ = Stream::new(setup(Kind::Bernoulli, 300));
    let data = stream(Kind::Bernoulli, 1, 0.1, 0.3);
    let mut readings = (0..).zip(data).map(|(i, x)| at(x, 1000 * i));
    readings.find(|reading| stream_.observe(*reading, |_| 1e3).unwrap().is_some()).unwrap();
    let n = stream_.row().n;
    stream_.relearn();
    assert_eq!((stream_.state(), stream_.row().n), (State::Learning, n));
    let again: Vec<_> = readings.filter_map(|reading| stream_.observe(reading, |_| 1e3).unwrap()).collect();
    assert_eq!(again, []);
    assert_eq!(stream_.state(), State::Steady);
    let baseline = stream_.row().baseline.unwrap();
    assert!((baseline - 0.3).abs() < 0.06, "{baseline}");
}

/// Four types of traffic, whose users come back.
struct Traffic {
    monitor: Monitor<usize>,
    circles: BTreeMap<(usize, u64), Kin>,
    random: Lcg,
    time: u64,
}

impl Traffic {
    const WHOLE: usize = 4;

    fn new(seed: u64) -> Self {
        let config = Config {
            reference: 40,
            events_per_day: Some(1000.0),
            false_alarm_days: 10.0,
            ..Config::default()
        };
        let monitor = Monitor::new(config).unwrap();
        Self { monitor, circles: BTreeMap::new(), random: Lcg(seed), time: 60_000_000 + seed * 1_000_000 }
    }

    /// The alarms of so many rounds.
    fn serve(&mut self, rounds: usize, rates: [f64; 4]) -> Vec<(usize, Alarm)> {
        let mut alarms = Vec::new();
        for key in (0..rounds).flat_map(|_| 0..4) {
            self.time += 150;
            let user = (self.random.uniform() * 200.0) as u64;
            let kin = self.circles.entry((key, user)).or_default();
            let value = self.random.reading(Kind::Bernoulli, rates[key]);
            let reading = Reading { value, at: self.time, kin: *kin };
            let observed = self.monitor.observe(&key, &Self::WHOLE, Kind::Bernoulli, reading).unwrap();
            *kin = kin.with(observed.deviation);
            alarms.extend(observed.segment.map(|alarm| (key, alarm)));
            alarms.extend(observed.whole.map(|alarm| (Self::WHOLE, alarm)));
        }
        alarms
    }
}

/// One type drifts, then another, and then nothing happens any more. After each drift a version is promoted that mends it, or
/// the alarms are acknowledged.
#[test]
fn a_new_reference_has_not_learned_from_the_drift_before_it() {
    const RUNS: u64 = 200;
    for promoted in [true, false] {
        let (mut found, mut false_alarms) = (0, Vec::new());
        for run in 0..RUNS {
            let mut traffic = Traffic::new(run);
            let mut rates = [0.97, 0.97, 0.93, 0.97];
            for drifts in 0..2 {
                false_alarms.extend(traffic.serve(48, rates));
                let usual = std::mem::replace(&mut rates[drifts], 0.3);
                for (key, alarm) in traffic.serve(110, rates) {
                    match key {
                        Traffic::WHOLE => {}
                        key if key == drifts => found += 1,
                        _ => false_alarms.push((key, alarm)),
                    }
                }
                if promoted {
                    rates[drifts] = usual;
                    traffic.monitor.reset(|_| true);
                    traffic.circles.clear();
                } else {
                    for key in [drifts, Traffic::WHOLE] {
                        traffic.monitor.relearn(&key);
                    }
                }
            }
            false_alarms.extend(traffic.serve(170, rates));
        }
        // What was acknowledged goes on, and the whole traffic may still show it.
        false_alarms.retain(|(key, _)| promoted || *key != Traffic::WHOLE);
        // The thresholds promise one false alarm of a stream in ten million readings.
        assert!(false_alarms.len() <= 1, "promoted: {promoted}; {}: {false_alarms:?}", false_alarms.len());
        assert_eq!(found, 2 * RUNS, "promoted: {promoted}");
    }
}

/// What comes from conversations can carry the level out of the interval, where a standard deviation is no number.
#[test]
fn a_forecast_stays_a_rate_whatever_the_conversations_say() {
    for kin in [-9.0, 9.0] {
        let mut stream = Stream::new(setup(Kind::Bernoulli, 40));
        for at in 0..200 {
            let kin = Kin { readings: 3.0, deviation: if at % 3 == 0 { kin } else { 0.0 } };
            let reading = Reading { value: f64::from(u8::from(kin.deviation < 0.0)), at, kin };
            stream.observe(reading, |_| 1e7).unwrap();
            let expected = stream.expect(at, Kin::default()).map_or(0.5, |expected| expected.base);
            assert!(expected > 0.0 && expected < 1.0, "{expected}");
        }
    }
}

/// The largest log-likelihood ratio of a split, with each side summed anew.
fn naive(data: &[f64]) -> f64 {
    let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
    let term = |a: f64, b: f64| if a > 0.0 { a * (a / b).ln() } else { 0.0 };
    let divergence = |p: f64, q: f64| term(p, q) + term(1.0 - p, 1.0 - q);
    let all = mean(data);
    (1..data.len())
        .map(|split| {
            let (left, right) = data.split_at(split);
            left.len() as f64 * divergence(mean(left), all)
                + right.len() as f64 * divergence(mean(right), all)
        })
        .fold(0.0, f64::max)
}

proptest! {
    #[test]
    fn the_change_point_of_bits_is_the_naive_maximum(bits in prop::collection::vec(prop::bool::weighted(0.3), 2..120)) {
        let data: Vec<f64> = bits.iter().map(|&bit| f64::from(u8::from(bit))).collect();
        let found = change_point(&data).unwrap();
        prop_assert!((found.statistic - 2.0 * naive(&data)).abs() < 1e-9);
        prop_assert!(found.from <= found.index && found.index <= found.to && found.to < data.len());
    }

    #[test]
    fn the_change_point_of_scores_is_the_naive_maximum(data in prop::collection::vec(0.01..0.99_f64, 2..120)) {
        let found = change_point(&data).unwrap();
        let (left, right) = data.split_at(found.index);
        let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
        prop_assert!((found.before - mean(left)).abs() < 1e-9 && (found.after - mean(right)).abs() < 1e-9);
        let squares = |x: &[f64]| x.iter().map(|v| (v - mean(x)).powi(2)).sum::<f64>();
        let bits = |x: &[f64]| x.len() as f64 * mean(x) * (1.0 - mean(x));
        let dispersion = ((squares(left) + squares(right)) / (bits(left) + bits(right))).max(1.0 / data.len() as f64);
        prop_assert!((found.statistic * dispersion - 2.0 * naive(&data)).abs() < 1e-9);
    }
}
