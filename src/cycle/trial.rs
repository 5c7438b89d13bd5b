//! A proven candidate on a share of the users, from the gate's word to the canary's ruling.

use serde::{Deserialize, Serialize};
use tracing::{info, warn};
use uuid::Uuid;

use crate::canary::{Arm, AtBudget, Canary, Config, Evidence, Measure, Ruling};
use crate::completion::{
    ArmReadings, CanaryCourse, Compared, Outcome, Risk, SignalKind, Timestamp, Update, UpdateState, Version,
};

use super::{Cycle, Error, Parts, readings::Reading};

/// The stage of an update whose candidate is on trial.
const STAGE: &str = "canary";

/// A candidate that serves a share of the users; kept with the detectors' state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Trial {
    update: Uuid,
    version: Version,
    incumbent: Version,
    canary: Canary,
}

/// What the last process had on trial, with its update. What it had no time to write down begins anew.
pub(super) fn resume(parts: &Parts, kept: Option<Trial>) -> Result<Option<(Trial, Update)>, Error> {
    const NEWEST: usize = 16;
    let serving = parts.registry.trial();
    let known = match &kept {
        Some(trial) => parts.store.update(trial.update)?,
        None => parts.store.updates(NEWEST)?.into_iter().find(is_on_trial),
    };
    match (known, kept) {
        (Some(update), Some(trial)) if is_on_trial(&update) => Ok(Some((trial, update))),
        (Some(update), None) => {
            let Some(version) = update.canary.as_ref().map(|course| course.version) else { return Ok(None) };
            let canary = Canary::new((parts.clock)());
            Ok(Some((Trial { update: update.id, version, incumbent: update.base, canary }, update)))
        }
        _ => {
            if serving.is_some() {
                parts.registry.end_trial()?;
            }
            Ok(None)
        }
    }
}

fn is_on_trial(update: &Update) -> bool {
    matches!(&update.state, UpdateState::Running { stage, .. } if stage == STAGE)
}

impl Cycle {
    /// Promotes a proven candidate, or puts it before a share of the users first; then there is no outcome yet.
    pub(super) fn admit(
        &mut self,
        update: &mut Update,
        version: Version,
        now: Timestamp,
    ) -> Result<Option<Outcome>, Error> {
        let config = &self.parts.canary;
        let course = CanaryCourse::new(version, config.share, config.samples, now);
        if config.share <= 0.0 {
            return Ok(Some(self.promote(version, now)));
        }
        let judged = self.judged_today(now)?;
        if !config.is_feasible(judged) {
            let days = config.days;
            let ruling = format!(
                "none: {judged} judgements a day do not bring {} readings together in {days} days",
                config.samples
            );
            update.canary = Some(CanaryCourse { ruling, ..course });
            return Ok(Some(self.promote(version, now)));
        }
        update.canary = Some(course);
        update.state = UpdateState::Running { stage: STAGE.to_owned(), progress: 0.0 };
        // Before the candidate serves anybody: a new process has to know whose it is.
        self.parts.store.put_update(update)?;
        if let Err(error) = self.parts.registry.begin_trial(version, config.share, now) {
            warn!(%version, %error, "a proven version is not served");
            return Ok(Some(Outcome::Withheld { version, reason: error.to_string() }));
        }
        info!(%version, share = config.share, "a canary begins");
        // Training is over; days without a step are no fault now.
        self.parts.metrics.progress(1.0, &[]);
        let canary = Canary::new(now);
        self.trial = Some(Trial { update: update.id, version, incumbent: self.version, canary });
        self.shared.begin(update.clone());
        self.remember()?;
        Ok(None)
    }

    /// Judgements of the last day, as far as they matter.
    fn judged_today(&self, now: Timestamp) -> Result<usize, Error> {
        const DAY: u64 = 86_400_000;
        let config = &self.parts.canary;
        let enough = (config.samples as f64 / (config.share * config.days)).ceil() as usize;
        let mut judged = 0;
        for feedback in self.parts.store.feedback().rev().take(enough) {
            if feedback?.at.0 + DAY < now.0 {
                break;
            }
            judged += 1;
        }
        Ok(judged)
    }

    pub(super) fn promote(&self, version: Version, now: Timestamp) -> Outcome {
        match self.parts.registry.promote(version, now) {
            Ok(_) => Outcome::Promoted { version },
            Err(error) => {
                warn!(%version, %error, "a proven version is not served");
                Outcome::Withheld { version, reason: error.to_string() }
            }
        }
    }

    /// Shows the readings of either arm to the canary.
    pub(super) fn try_on(&mut self, readings: &[Reading]) {
        let Some(trial) = &mut self.trial else { return };
        for reading in readings {
            trial.observe(reading, &self.parts.canary);
        }
    }

    /// Ends the trial where the canary has ruled, or somebody else has.
    pub(super) fn rule(&mut self, now: Timestamp) -> Result<Option<(Update, Outcome)>, Error> {
        let Some(trial) = &self.trial else { return Ok(None) };
        let (config, version) = (&self.parts.canary, trial.version);
        let ruling = trial.canary.ruling(now, config);
        let course = trial.course(config, self.shared.shown().and_then(|update| update.canary));
        let still_serves =
            self.parts.registry.trial().is_some_and(|serving| serving.served.version == version);
        let (words, outcome) = if self.shared.is_unwanted() {
            self.parts.registry.end_trial()?;
            ("cancelled".to_owned(), Outcome::Cancelled)
        } else if !still_serves {
            self.ended_elsewhere(version)
        } else {
            match (ruling, config.at_budget) {
                (Ruling::GoOn, _) => {
                    self.show_course(course);
                    return Ok(None);
                }
                (Ruling::Promote { .. }, _) => (in_words(ruling, &course), self.promote(version, now)),
                (Ruling::Budget, AtBudget::Promote) => (
                    "the budget is used up, nothing was shown: promoted, as configured".to_owned(),
                    self.promote(version, now),
                ),
                (Ruling::RollBack | Ruling::Budget, _) => {
                    let reason = in_words(ruling, &course);
                    self.parts.registry.end_trial()?;
                    if ruling == Ruling::RollBack {
                        self.parts.registry.reject(version, now)?;
                    }
                    (reason.clone(), Outcome::RolledBack { version, reason })
                }
            }
        };
        info!(%version, outcome = outcome.as_str(), words, "the canary ended");
        self.show_course(CanaryCourse { ruling: words, ended_at: Some(now), ..course });
        self.trial = None;
        Ok(self.shared.shown().map(|update| (update, outcome)))
    }

    /// Another version was promoted by hand, or this one.
    fn ended_elsewhere(&self, version: Version) -> (String, Outcome) {
        let active = self.parts.registry.active();
        if active == version {
            return ("promoted by hand".to_owned(), Outcome::Promoted { version });
        }
        let reason = format!("{active} was put before everybody meanwhile");
        (reason.clone(), Outcome::RolledBack { version, reason })
    }

    fn show_course(&self, course: CanaryCourse) {
        self.shared.revise(|update| {
            let progress = (course.samples as f64 / course.budget.max(1) as f64).min(1.0);
            update.state = UpdateState::Running { stage: STAGE.to_owned(), progress };
            update.canary = Some(course);
        });
    }
}

fn in_words(ruling: Ruling, course: &CanaryCourse) -> String {
    let mean = |arm: fn(&Compared) -> &ArmReadings| {
        course.measures.first().and_then(|satisfaction| arm(satisfaction).mean).unwrap_or(f64::NAN)
    };
    let (before, after) = (mean(|measure| &measure.incumbent), mean(|measure| &measure.candidate));
    let figures = format!("satisfaction {after:.3} of {} readings against {before:.3}", course.samples);
    match ruling {
        Ruling::Promote { better: true } => format!("better: {figures}"),
        Ruling::Promote { better: false } => format!("no worse: {figures}"),
        Ruling::RollBack => {
            let others: Vec<String> = course.measures[1..].iter().map(Compared::in_words).collect();
            format!("worse: {figures}; {}", others.join("; "))
        }
        Ruling::Budget | Ruling::GoOn => {
            format!("neither worse nor safe was shown within the budget: {figures}")
        }
    }
}

impl Trial {
    fn observe(&mut self, reading: &Reading, config: &Config) {
        let Some(asked) = reading.asked.filter(|asked| asked.at >= self.canary.since) else { return };
        let signal = &reading.signal;
        let arm = match signal.version {
            version if version == self.version => Arm::Candidate,
            version if version == self.incumbent => Arm::Incumbent,
            _ => return,
        };
        let (measure, value) = match (signal.kind, asked.risk) {
            (SignalKind::Satisfaction, _) => (Measure::Satisfaction, signal.value),
            (SignalKind::Refusal, Risk::Benign) => (Measure::Answered, 1.0 - signal.value),
            (SignalKind::Refusal, Risk::Harmful) => (Measure::Declined, signal.value),
            (SignalKind::Helpfulness | SignalKind::Kl | SignalKind::Probes, _) => return,
        };
        self.canary.observe(measure, arm, asked.unit, value, config);
    }

    /// The course so far, with what was said of it before.
    fn course(&self, config: &Config, before: Option<CanaryCourse>) -> CanaryCourse {
        let Evidence { worse, better, safe } = self.canary.evidence();
        let arm = |n, mean| ArmReadings { n, mean };
        let compared = self.canary.standings().map(|standing| Compared {
            measure: standing.measure.as_str().to_owned(),
            incumbent: arm(standing.n[0], standing.mean[0]),
            candidate: arm(standing.n[1], standing.mean[1]),
        });
        let fresh = CanaryCourse::new(self.version, config.share, config.samples, self.canary.since);
        CanaryCourse {
            measures: compared.to_vec(),
            samples: self.canary.samples(),
            worse_log10: worse,
            better_log10: better,
            safe_log10: safe,
            needed_log10: -config.error.log10(),
            ..before.unwrap_or(fresh)
        }
    }
}
