//! `gyrostat bench judge`: how far people agree with a judge model, and how often it has no opinion but the order's.

use std::time::Instant;

use serde_json::json;

use crate::app::JudgeModel;
use crate::cli::{Error, jsonl, serve};
use crate::comparisons::{
    Judge, Pair, Side,
    judge::{Letter, Outcome},
};
use crate::completion::{CompletionId, Message, Prompt};
use crate::config::Config;
use crate::policy::Served;
use crate::upstream;

use super::{
    drift::{Line, line, rounded},
    serve as engines,
};

/// One line a file, and one for all: the first answer of a pair is the one that people chose.
pub(super) fn study(files: &[String], pairs: usize, config: &Config) -> Result<Vec<Line>, Error> {
    if files.is_empty() {
        return Err("`--data` names no file of {\"prompt\",\"chosen\",\"rejected\"}".into());
    }
    let (judge, _serving) = match &config.ai_feedback.judge {
        Judge::Service(url) => {
            let metrics = upstream::Metrics::register(&prometheus::Registry::new())?;
            (JudgeModel::service(&config.ai_feedback, url, metrics)?, None)
        }
        Judge::Off | Judge::Policy | Judge::Upstream => {
            let (engine, serving) = engines::start(config)?;
            (JudgeModel::policy(&config.ai_feedback, engine, Served::default())?, Some(serving))
        }
    };
    serve::runtime()?.block_on(compared(judge, files, pairs))
}

async fn compared(mut judge: JudgeModel, files: &[String], pairs: usize) -> Result<Vec<Line>, Error> {
    // A service says what it is called, which its questions need.
    let name = judge.rater().await?;
    let bar = jsonl::bar(pairs as u64, &name);
    let (mut lines, mut all) = (Vec::new(), Tally::default());
    for (nth, file) in files.iter().enumerate() {
        let share = pairs * (nth + 1) / files.len() - pairs * nth / files.len();
        let mut tally = Tally::default();
        for pair in spread(&read(file)?, share) {
            tally.add(&judge, pair).await;
            bar.inc(1);
        }
        let stem = std::path::Path::new(file)
            .file_stem()
            .map_or_else(String::new, |stem| stem.to_string_lossy().into());
        lines.push(tally.line(&stem));
        all.merge(&tally);
    }
    bar.finish_and_clear();
    lines.push(all.line("all"));
    Ok(lines)
}

fn read(file: &str) -> Result<Vec<Pair>, Error> {
    let pair = |(number, object)| {
        let text = |field: &str| jsonl::text(number, &object, field).map(str::to_owned);
        let prompt = Prompt::Chat(vec![Message::user(text("prompt")?)]);
        Ok(Pair { about: CompletionId::default(), prompt, answers: [text("chosen")?, text("rejected")?] })
    };
    jsonl::read(file)?.into_iter().map(pair).collect()
}

/// So many of them, evenly over the file.
fn spread(pairs: &[Pair], most: usize) -> impl Iterator<Item = &Pair> {
    let most = most.min(pairs.len());
    (0..most).filter_map(move |nth| pairs.get(nth * pairs.len() / most))
}

#[derive(Default)]
struct Tally {
    pairs: usize,
    right: usize,
    wrong: usize,
    by_order: usize,
    other: usize,
    /// Letters that were read, and those that are A.
    letters: usize,
    a: usize,
    longer: usize,
    seconds: f64,
}

impl Tally {
    async fn add(&mut self, judge: &JudgeModel, pair: &Pair) {
        let started = Instant::now();
        let (outcome, letters) = judge.compare(pair).await;
        self.seconds += started.elapsed().as_secs_f64();
        self.pairs += 1;
        match outcome {
            Outcome::Preferred(Side::First) => self.right += 1,
            Outcome::Preferred(Side::Second) => self.wrong += 1,
            Outcome::TieByOrder => self.by_order += 1,
            Outcome::Tie | Outcome::Unreadable | Outcome::Failed => self.other += 1,
        }
        for letter in letters.into_iter().flatten() {
            self.letters += 1;
            self.a += usize::from(letter == Letter::A);
        }
        self.longer += usize::from(pair.answer(Side::First).len() > pair.answer(Side::Second).len());
    }

    fn merge(&mut self, other: &Self) {
        self.pairs += other.pairs;
        self.right += other.right;
        self.wrong += other.wrong;
        self.by_order += other.by_order;
        self.other += other.other;
        self.letters += other.letters;
        self.a += other.a;
        self.longer += other.longer;
        self.seconds += other.seconds;
    }

    fn line(&self, name: &str) -> Line {
        let share = |part: usize, whole: usize| {
            if whole == 0 { json!(null) } else { rounded(part as f64 / whole as f64, 3) }
        };
        let decided = self.right + self.wrong;
        line([
            ("data", json!(name)),
            ("pairs", json!(self.pairs)),
            ("ties by order", share(self.by_order, self.pairs)),
            ("other ties and failures", share(self.other, self.pairs)),
            ("decided", json!(decided)),
            ("people agree", share(self.right, decided)),
            ("says A", share(self.a, self.letters)),
            ("the longer is the chosen one", share(self.longer, self.pairs)),
            ("seconds a pair", rounded(self.seconds / self.pairs.max(1) as f64, 2)),
        ])
    }
}
