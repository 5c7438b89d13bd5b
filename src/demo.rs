//! `gyrostat demo`: the whole loop on a real model over real HTTP, with simulated users.
//!
//! The users' rule is known to the simulation alone: the program sees their thumbs. Part-way the users of one type change
//! what they want, in further loops those of a second and a third; the demo succeeds if each alarm names that type, the
//! gate promotes the candidate, satisfaction of the type rises on prompts that nobody asked before, and the types that
//! were mended before stay mended.

mod client;
mod screen;
pub(crate) mod users;

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::app::{self, App};
use crate::canary::AtBudget;
use crate::config::Config;

use client::Client;
use screen::Screen;
use users::{Asked, KINDS, Kind, Users, Wish};

/// What the demo is run with.
#[derive(Debug, Clone)]
pub struct Options {
    /// Changes traffic, raters, sampling and training alike.
    pub seed: u64,
    /// The model to serve.
    pub model: PathBuf,
    /// Where to keep the data; a scratch directory that is removed if `None`.
    pub data: Option<PathBuf>,
    /// The port to listen on; 0 takes a free one.
    pub port: u16,
    /// The share of the users who get the candidate first.
    pub canary: f64,
    /// How many types change, one after the other.
    pub loops: usize,
}

/// Why the demo did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    App(#[from] app::Error),
    #[error("HTTP: {0}")]
    Http(#[from] reqwest::Error),
    #[error("{route} answered {status}: {body}")]
    Refused { route: String, status: u16, body: String },
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("no alarm within {0} rounds after the change")]
    NoAlarm(usize),
    #[error("the alarm named {found}, but it was {changed} that changed")]
    WrongAlarm { found: String, changed: &'static str },
    #[error("the candidate was not promoted: {0}")]
    NotPromoted(String),
    #[error("satisfaction on fresh prompts did not rise: {before:.2} before, {after:.2} after")]
    NoBetter { before: f64, after: f64 },
    #[error("{interaction} was mended, and is worse again: {after:.2} then, {now:.2} now")]
    Forgotten { interaction: &'static str, after: f64, now: f64 },
    #[error("the update did not end within {} seconds", .0.as_secs())]
    TooSlow(Duration),
}

/// Readings of each stream before the change: the shortest reference that the detector learns from, and a few to spare.
const REFERENCE: usize = 80;
/// Rounds (one request of each type) that are under way together.
const TOGETHER: usize = 8;
/// Rounds after the change in which the alarm must come.
const ROUNDS_TO_ALARM: usize = 200;
/// Judged answers of the changed type that the update waits for.
const JUDGED: usize = 160;
/// Answers to fresh prompts, before and after.
const FRESH: usize = 36;
/// Tokens of an answer at most.
const ANSWER: usize = 28;
/// The whole update must end within this.
const UPDATE: Duration = Duration::from_mins(20);

/// The configuration of the demo: the defaults, but for what has to go quicker than in production.
fn config(options: &Options, data: &Path) -> Config {
    let mut config = Config::default();
    config.http.bind = ([127, 0, 0, 1], options.port).into();
    config.store.path = data.to_owned();
    config.policy.model = options.model.to_string_lossy().into_owned();
    config.policy.running = 40;
    config.drift.reference = REFERENCE;
    config.drift.events_per_day = Some(1000.0);
    config.drift.false_alarm_days = 10.0;
    config.cycle.tick_ms = 300;
    config.cycle.minimum_feedback = JUDGED;
    config.cycle.gate_prompts = 72;
    config.cycle.seed = options.seed;
    config.canary.share = options.canary;
    config.canary.samples = 160;
    config.canary.margin = 0.1;
    config.canary.at_budget = AtBudget::Promote;
    config.canary.readings_a_user = 4;
    config.learn.reward.depth = 0.2;
    config.learn.reward.learning_rate = 2e-3;
    config.learn.reward.examples = 240;
    config.learn.ppo.depth = 0.5;
    config.learn.ppo.iterations = 10;
    config.learn.ppo.episodes = 24;
    config.learn.ppo.num_ppo_epochs = 2;
    config.learn.ppo.response_length = ANSWER;
    config.learn.ppo.learning_rate = 2e-4;
    config.learn.ppo.target_kl = 3.0;
    config.learn.pace.give_way_ms = 50;
    config
}

/// Runs the demo; everything it has to say goes to stdout, progress bars to stderr.
///
/// # Errors
/// It did not succeed; the message says at which point.
pub async fn run(options: &Options) -> Result<(), Error> {
    let scratch = std::env::temp_dir().join(format!("gyrostat-demo-{}", std::process::id()));
    let data = options.data.clone().unwrap_or_else(|| scratch.clone());
    let started = Instant::now();
    let app = App::start(config(options, &data)).await?;
    let screen = Screen::new(started);
    let outcome = tell(options, &app, &screen).await;
    app.stop(Duration::from_secs(20)).await;
    if options.data.is_none() {
        // The scratch directory is ours alone; if it stays, the system's own clean-up takes it.
        let _left = std::fs::remove_dir_all(&scratch);
    }
    outcome
}

/// One type's change and what became of it; satisfaction as a share of [`FRESH`] answers.
struct Mended {
    kind: &'static Kind,
    before: f64,
    after: f64,
}

async fn tell(options: &Options, app: &App, screen: &Screen) -> Result<(), Error> {
    let client = Client::new(app.address, ANSWER);
    let mut users = Users::new(options.seed);
    screen.title(&format!("gyrostat demo · {} on http://{}", app.state.backend.model_name(), app.address));
    screen.say(
        "All users are simulated. They judge by a rule that the program sees through their thumbs only.",
    );
    screen.say(&format!(
        "Reference windows are {REFERENCE} readings here (1000 by default), so that the demo does not take a day."
    ));
    let mut mended: Vec<Mended> = Vec::new();
    for change in users::changing().take(options.loops) {
        let found = turn(&client, &mut users, screen, (mended.len(), change)).await?;
        mended.push(found);
        still_mended(&client, screen, &mended).await?;
    }
    screen.title(&format!("done in {} s: drift found, learned from, proven and mended", screen.seconds()));
    Ok(())
}

/// The loop once: traffic, a change, its alarm, feedback, the update, and what it was good for.
async fn turn(
    client: &Client,
    users: &mut Users,
    screen: &Screen,
    (past, (kind, wish)): (usize, (&'static Kind, &Wish)),
) -> Result<Mended, Error> {
    let (changed, now) = (kind.interaction, past + 1);
    screen.title("1 · ordinary traffic: the baselines are learned");
    let mut bar = Screen::bar("traffic", (REFERENCE + TOGETHER) as u64);
    for _ in 0..(REFERENCE + TOGETHER).div_ceil(TOGETHER) {
        client.serve(&users.rounds(TOGETHER), past).await?;
        client.ask(&users.harmful()).await?;
        bar.inc(TOGETHER as u64);
    }
    bar.finish_and_clear();
    settle().await;
    screen.scorecard(&client.alignment().await?);

    screen.title(&format!("2 · from now on, users who ask for {changed} want {}", wish.told));
    let before = share(client, kind, now).await?;
    screen.say(&format!(
        "satisfaction with {changed} on {FRESH} answers to fresh prompts: {before:.2} (measured aside)"
    ));
    let alarm = until_alarm(client, users, now).await?;
    screen.alarm(&alarm);
    screen.scorecard(&client.alignment().await?);
    let named = alarm["interaction"].as_str().unwrap_or("all traffic");
    if named != changed || alarm["signal"] != "satisfaction" {
        return Err(Error::WrongAlarm { found: format!("{} of {named}", alarm["signal"]), changed });
    }

    screen.title("3 · feedback for the update");
    bar = Screen::bar("feedback", JUDGED as u64);
    while client.updates().await?.len() < now {
        client.serve(&busy(users, kind), now).await?;
        bar.inc(26);
    }
    bar.finish_and_clear();

    screen.title("4 · the update: reward model, then PPO, then the gate; serving goes on");
    let update = until_ended(client, users, screen, (kind, now)).await?;
    if update["outcome"] != "promoted" {
        return Err(Error::NotPromoted(update_outcome(&update)));
    }
    let versions = client.versions().await?;
    screen.swap(&update, &versions);

    screen.title("5 · the same fresh prompts, answered by the new version");
    let after = share(client, kind, now).await?;
    screen.say(&format!("satisfaction with {changed}: {before:.2} before, {after:.2} after"));
    client.serve(&users.rounds(1), now).await?;
    if after <= before {
        return Err(Error::NoBetter { before, after });
    }
    Ok(Mended { kind, before, after })
}

/// Whether the types that were mended before the last one are no worse than they were then, within a 95% interval.
async fn still_mended(client: &Client, screen: &Screen, mended: &[Mended]) -> Result<(), Error> {
    let Some((_, earlier)) = mended.split_last() else { return Ok(()) };
    for Mended { kind, before, after } in earlier {
        let now = share(client, kind, mended.len()).await?;
        let interaction = kind.interaction;
        screen.say(&format!(
            "satisfaction with {interaction}, mended before: {before:.2} at its change, {after:.2} then, {now:.2} now"
        ));
        let variance = (after * (1.0 - after) + now * (1.0 - now)) / FRESH as f64;
        if now + 1.96 * variance.sqrt() < *after {
            return Err(Error::Forgotten { interaction, after: *after, now });
        }
    }
    Ok(())
}

/// The share of answers to fresh prompts that satisfy after so many changes.
async fn share(client: &Client, kind: &Kind, changes: usize) -> Result<f64, Error> {
    Ok(client.satisfied(&Users::fresh(kind, FRESH), changes).await? as f64 / FRESH as f64)
}

/// Traffic that is mostly of one kind.
fn busy(users: &mut Users, kind: &Kind) -> Vec<Asked> {
    let mut asked: Vec<Asked> = (0..24).map(|_| users.one(kind)).collect();
    asked.extend(users.rounds(2));
    asked
}

/// Traffic goes on until a new alarm about one type.
async fn until_alarm(client: &Client, users: &mut Users, changes: usize) -> Result<Value, Error> {
    let seen = client.alarms().await?.len();
    let bar = Screen::bar("traffic", ROUNDS_TO_ALARM as u64);
    for _ in 0..ROUNDS_TO_ALARM / TOGETHER {
        client.serve(&users.rounds(TOGETHER), changes).await?;
        client.ask(&users.harmful()).await?;
        bar.inc(TOGETHER as u64);
        settle().await;
        let alarms = client.alarms().await?;
        let new = alarms.iter().rev().skip(seen).find(|alarm| alarm["interaction"].is_string());
        if let Some(alarm) = new {
            bar.finish_and_clear();
            return Ok(alarm.clone());
        }
    }
    Err(Error::NoAlarm(ROUNDS_TO_ALARM))
}

/// Watches the update while a little traffic goes on.
async fn until_ended(
    client: &Client,
    users: &mut Users,
    screen: &Screen,
    (kind, changes): (&Kind, usize),
) -> Result<Value, Error> {
    let bar = Screen::bar("update", 100);
    let since = Instant::now();
    let mut shown = Value::Null;
    let mut served = 0;
    while since.elapsed() < UPDATE {
        let Some(update) = client.updates().await?.into_iter().next() else { continue };
        bar.set_position((update["progress"].as_f64().unwrap_or(1.0) * 100.0) as u64);
        screen.measures(&mut shown, &update);
        if update["state"] == "ended" {
            bar.finish_and_clear();
            screen.say(&format!("{served} answers were served meanwhile, none failed"));
            screen.verdict(&update);
            return Ok(update);
        }
        if update["stage"] == "canary" {
            let asked = busy(users, kind);
            client.serve(&asked, changes).await?;
            served += asked.len() as u64;
            continue;
        }
        if served < since.elapsed().as_secs() / 10 {
            let round = users.rounds(1);
            client.serve(&round[1..2], changes).await?;
            served += 1;
        }
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    Err(Error::TooSlow(UPDATE))
}

fn update_outcome(update: &Value) -> String {
    let reasons = update["reasons"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let reasons: Vec<&str> = reasons.collect();
    let detail = update["error"].as_str().map_or_else(|| reasons.join("; "), str::to_owned);
    format!("{}: {detail}", update["outcome"].as_str().unwrap_or("unknown"))
}

/// Lets the loop take its turn before the scorecard is shown.
async fn settle() {
    tokio::time::sleep(Duration::from_millis(700)).await;
}

/// The types that the demo's users ask for.
pub fn interactions() -> impl Iterator<Item = &'static str> {
    KINDS.iter().map(|kind| kind.interaction)
}
