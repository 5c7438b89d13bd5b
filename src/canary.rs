//! The canary: a share of the users is served by a proven candidate, and what they say is held against the rest.
//! Numbers in, a ruling out; no IO, no clock.
//!
//! Readings of both arms are taken in blocks of one of the candidate's and `m` of the incumbent's, `m : 1` being how
//! users are shared out (the blocks of Turner, Ly and Grünwald, *Generic E-variables for exact sequential k-sample tests
//! that allow for optional stopping*, 2024). `d` is the candidate's reading less the mean of the incumbent's, in
//! `[−1, 1]`. A bet of `λ` on its sign (Waudby-Smith and Ramdas, *Estimating means of bounded random variables by
//! betting*, 2024) makes three processes:
//!
//! ```text
//! worse    ← worse    · (1 − λ d)          fair or losing as long as the candidate is no worse
//! better   ← better   · (1 + λ d)          … as long as it is no better
//! safe     ← safe     · (1 + λ (d + δ))    … as long as it is worse by δ or more
//! ```
//! each a mean over a few `λ`, beginning at 1. By Ville's inequality none passes `1/α` with a probability above `α`, however
//! often one looks and whenever one stops. Nothing is said of the rates themselves: they may change in the course of the
//! day, as long as they do so for both arms. What one user says again and again is not independent, so that each user
//! counts a bounded number of times.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::completion::{Prompt, Role, Timestamp, Version};

/// How a candidate that the gate has passed is tried on users.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The share of the users who get the candidate. 0: what the gate passes is promoted at once.
    pub share: f64,
    /// Readings of the candidate's satisfaction, at most.
    pub samples: u64,
    /// The longest that a canary lasts. Where the last day's feedback would not bring the samples together in this time,
    /// there is none, and what the gate passes is promoted at once.
    pub days: f64,
    /// The probability of rolling back what is no worse, and that of promoting what is worse by the margin.
    pub error: f64,
    /// The candidate must be shown not to lose so much satisfaction, nor to decline so many more harmless requests.
    pub margin: f64,
    /// What becomes of a candidate of which neither was shown when samples or days are used up.
    pub at_budget: AtBudget,
    /// Readings of each kind that count of one user, at most.
    pub readings_a_user: u32,
}

/// What is done with a candidate that could not be told from the incumbent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AtBudget {
    /// Nothing was proven: the incumbent stays.
    #[default]
    RollBack,
    /// The gate's word holds.
    Promote,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            share: 0.1,
            samples: 1000,
            days: 7.0,
            error: 0.05,
            margin: 0.05,
            at_budget: AtBudget::default(),
            readings_a_user: 1,
        }
    }
}

/// A value of the configuration that cannot work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("canary.{field} must be {range}")]
pub struct Invalid {
    field: &'static str,
    range: &'static str,
}

impl Config {
    /// # Errors
    /// The first field whose value cannot work.
    pub fn check(&self) -> Result<(), Invalid> {
        let fields = [
            ("share", "from 0 to 0.9", (0.0..=0.9).contains(&self.share)),
            ("samples", "at least 1", self.samples > 0),
            ("days", "above 0", self.days > 0.0 && self.days.is_finite()),
            ("error", "above 0 and at most 0.5", self.error > 0.0 && self.error <= 0.5),
            ("margin", "above 0 and at most 0.5", self.margin > 0.0 && self.margin <= 0.5),
            ("readings_a_user", "at least 1", self.readings_a_user > 0),
        ];
        match fields.into_iter().find(|(_, _, fits)| !fits) {
            Some((field, range, _)) => Err(Invalid { field, range }),
            None => Ok(()),
        }
    }

    /// The incumbent's readings in a block.
    fn block(&self) -> usize {
        ((1.0 - self.share) / self.share.max(0.01)).round().max(1.0) as usize
    }

    fn milliseconds(&self) -> u64 {
        (self.days * 86_400_000.0) as u64
    }

    /// Whether so many judgements a day would bring the samples together in time.
    pub fn is_feasible(&self, judgements_a_day: usize) -> bool {
        self.share > 0.0 && judgements_a_day as f64 * self.share * self.days >= self.samples as f64
    }
}

/// Whom a request comes from, as a number: the user where the caller names one, else the conversation by its tag, else by
/// how it began. The same in every process.
pub fn unit(user: Option<&str>, metadata: &BTreeMap<String, String>, prompt: &Prompt) -> u64 {
    const TAGS: [&str; 4] = ["conversation_id", "conversation", "session_id", "thread_id"];
    if let Some(user) = user {
        return digest(&["user", user]);
    }
    if let Some(tag) = TAGS.iter().find_map(|tag| metadata.get(*tag)) {
        return digest(&["conversation", tag]);
    }
    match prompt {
        Prompt::Text(text) => digest(&["text", text]),
        Prompt::Chat(messages) => {
            let first = messages.iter().find(|message| message.role == Role::User);
            digest(&["opening", first.map_or("", |message| message.content.as_str())])
        }
    }
}

/// FNV-1a, with Stafford's finish that makes every bit depend on every other.
fn digest(parts: &[&str]) -> u64 {
    let bytes = parts.iter().flat_map(|part| part.bytes().chain([0xff]));
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

/// Whether this user gets the candidate: always the same as long as version and share are.
pub fn takes(unit: u64, version: Version, share: f64) -> bool {
    let drawn = digest(&[&unit.to_string(), &version.to_string()]);
    // 53 bits are what a double holds.
    ((drawn >> 11) as f64) / ((1u64 << 53) as f64) < share
}

/// What is held against each other. 1 is good in all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    Satisfaction,
    /// 1 where a harmless request was answered.
    Answered,
    /// 1 where a harmful request was declined.
    Declined,
}

impl Measure {
    pub const ALL: [Self; 3] = [Self::Satisfaction, Self::Answered, Self::Declined];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Satisfaction => "satisfaction",
            Self::Answered => "harmless requests answered",
            Self::Declined => "harmful requests declined",
        }
    }
}

/// Who answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arm {
    Incumbent,
    Candidate,
}

/// What the canary comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ruling {
    GoOn,
    /// Neither satisfaction nor the rate of answers is lower by the margin; `better`: satisfaction is higher.
    Promote {
        better: bool,
    },
    RollBack,
    /// Samples or days are used up.
    Budget,
}

/// What is bet. Worth its cost of `ln 4` for differences of 3 to 40 points alike.
const BETS: [f64; 4] = [0.1, 0.2, 0.4, 0.8];
/// Readings that wait for their block, of each arm.
const WAITING: usize = 4096;
/// Users who are told apart; later ones do not count.
const USERS: usize = 1 << 16;

/// One bet's wealth at each of [`BETS`]; an e-process under its hypothesis.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
struct Wealth([f64; BETS.len()]);

impl Wealth {
    const FRESH: Self = Self([1.0; BETS.len()]);
    /// Beyond this nothing depends on it, and what is finite stays so on disk.
    const MOST: f64 = 1e100;

    fn bet(&mut self, outcome: f64) {
        for (wealth, bet) in self.0.iter_mut().zip(BETS) {
            *wealth = (*wealth * (1.0 + bet * outcome)).min(Self::MOST);
        }
    }

    fn mean(&self) -> f64 {
        self.0.iter().sum::<f64>() / BETS.len() as f64
    }
}

/// One measure of both arms.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Course {
    /// Incumbent's, candidate's.
    n: [u64; 2],
    sum: [f64; 2],
    waiting: [VecDeque<f64>; 2],
    worse: Wealth,
    better: Wealth,
    safe: Wealth,
}

impl Course {
    fn new() -> Self {
        let (fresh, waiting) = (Wealth::FRESH, [VecDeque::new(), VecDeque::new()]);
        Self { n: [0; 2], sum: [0.0; 2], waiting, worse: fresh, better: fresh, safe: fresh }
    }

    fn observe(&mut self, arm: Arm, value: f64, block: usize, margin: f64) {
        let arm = usize::from(arm == Arm::Candidate);
        self.n[arm] += 1;
        self.sum[arm] += value;
        self.waiting[arm].push_back(value);
        if self.waiting[arm].len() > WAITING {
            self.waiting[arm].pop_front();
        }
        let [incumbent, candidate] = &mut self.waiting;
        if incumbent.len() < block {
            return;
        }
        let Some(value) = candidate.pop_front() else { return };
        let difference = value - incumbent.drain(..block).sum::<f64>() / block as f64;
        self.worse.bet(-difference);
        self.better.bet(difference);
        self.safe.bet(difference + margin);
    }

    fn mean(&self, arm: usize) -> Option<f64> {
        (self.n[arm] > 0).then(|| self.sum[arm] / self.n[arm] as f64)
    }
}

/// A canary under way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Canary {
    pub since: Timestamp,
    courses: [Course; 3],
    /// Readings of each measure that were counted, by user.
    users: BTreeMap<u64, [u32; 3]>,
}

/// One measure as it stands, for people.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Standing {
    pub measure: Measure,
    /// Readings and their mean, the incumbent's and the candidate's.
    pub n: [u64; 2],
    pub mean: [Option<f64>; 2],
}

/// What was found so far, as log10 of what was won by betting.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Evidence {
    pub worse: f64,
    pub better: f64,
    pub safe: f64,
}

impl Canary {
    pub fn new(since: Timestamp) -> Self {
        Self { since, courses: [Course::new(), Course::new(), Course::new()], users: BTreeMap::new() }
    }

    /// Takes a reading in `[0, 1]`; not, if its user has said enough.
    pub fn observe(&mut self, measure: Measure, arm: Arm, unit: u64, value: f64, config: &Config) {
        if !(0.0..=1.0).contains(&value) || (self.users.len() >= USERS && !self.users.contains_key(&unit)) {
            return;
        }
        let counted = &mut self.users.entry(unit).or_default()[measure as usize];
        if *counted < config.readings_a_user {
            *counted += 1;
            self.courses[measure as usize].observe(arm, value, config.block(), config.margin);
        }
    }

    /// What to do now. Over all looks a candidate that is no worse is rolled back with a probability of at most
    /// `config.error`, and one that is worse by the margin is promoted with a probability of at most that.
    pub fn ruling(&self, now: Timestamp, config: &Config) -> Ruling {
        let evidence = self.evidence();
        let needed = -config.error.log10();
        if evidence.worse >= needed {
            return Ruling::RollBack;
        }
        if evidence.safe >= needed {
            return Ruling::Promote { better: evidence.better >= needed };
        }
        let late = now.0.saturating_sub(self.since.0) >= config.milliseconds();
        if late || self.samples() >= config.samples { Ruling::Budget } else { Ruling::GoOn }
    }

    /// The mean of three e-processes is one, whatever they have to do with each other.
    pub fn evidence(&self) -> Evidence {
        let worse = self.courses.iter().map(|course| course.worse.mean()).sum::<f64>() / 3.0;
        let [satisfaction, answered, _] = &self.courses;
        let log10 = |e: f64| e.max(1e-300).log10();
        Evidence {
            worse: log10(worse),
            better: log10(satisfaction.better.mean()),
            // Worse by the margin in either, its own process is small with the promised probability.
            safe: log10(satisfaction.safe.mean().min(answered.safe.mean())),
        }
    }

    pub fn standings(&self) -> [Standing; 3] {
        Measure::ALL.map(|measure| {
            let course = &self.courses[measure as usize];
            Standing { measure, n: course.n, mean: [course.mean(0), course.mean(1)] }
        })
    }

    /// Readings of the candidate's satisfaction.
    pub fn samples(&self) -> u64 {
        let [satisfaction, ..] = &self.courses;
        satisfaction.n[1]
    }
}
