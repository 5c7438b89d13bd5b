//! Has a judge model compare answers, again and again, behind clients.

use std::{collections::HashSet, fs, time::Duration};

use prometheus::{GaugeVec, IntCounterVec, Opts, Registry as Prometheus};
use tracing::{debug, warn};

use crate::comparisons::{
    self, Judge, Pair, Side,
    judge::{CONSTITUTION, Letter, Outcome, letter, next, outcome, question},
};
use crate::completion::{Message, Source, Version};
use crate::http::{self, comparisons::for_judge};
use crate::learn::dataset;
use crate::policy::{Engine, Event, GenerateRequest, Sampling, Served};
use crate::signals;
use crate::upstream::{self, Upstream};

use super::Error;

/// A judge model with its rules.
#[derive(Debug, Clone)]
pub struct JudgeModel {
    asked: Asked,
    constitution: String,
    timeout: Duration,
    max_tokens: usize,
}

/// Who is asked.
#[derive(Debug, Clone)]
enum Asked {
    Policy(Engine, Served),
    /// With the model's name, once it is known.
    Service(Upstream, Option<String>),
}

impl JudgeModel {
    /// A version of the policy on the embedded engine.
    ///
    /// # Errors
    /// The constitution cannot be read.
    pub fn policy(config: &comparisons::Config, engine: Engine, served: Served) -> Result<Self, Error> {
        Self::new(config, Asked::Policy(engine, served))
    }

    /// A service that speaks OpenAI's protocol.
    ///
    /// # Errors
    /// The URL is none, or the constitution cannot be read.
    pub fn service(
        config: &comparisons::Config,
        url: &str,
        metrics: upstream::Metrics,
    ) -> Result<Self, Error> {
        let settings = upstream::Config {
            url: Some(url.to_owned()),
            api_key: config.api_key.clone(),
            model: config.model.clone(),
            ..upstream::Config::default()
        };
        let fault = |fault: upstream::Error| Error::AiFeedback(format!("judge: {fault}"));
        let service = Upstream::new(&settings, metrics).map_err(fault)?;
        let service = service.ok_or_else(|| Error::AiFeedback("judge has no URL".to_owned()))?;
        Self::new(config, Asked::Service(service, config.model.clone()))
    }

    fn new(config: &comparisons::Config, asked: Asked) -> Result<Self, Error> {
        let constitution = match &config.constitution {
            None => CONSTITUTION.to_owned(),
            Some(file) => fs::read_to_string(file)
                .map_err(|fault| Error::AiFeedback(format!("constitution: {}: {fault}", file.display())))?,
        };
        let timeout = Duration::try_from_secs_f64(config.timeout_seconds)
            .map_err(|fault| Error::AiFeedback(format!("timeout_seconds: {fault}")))?;
        Ok(Self { asked, constitution, timeout, max_tokens: config.max_tokens })
    }

    /// The rater that its feedback is known by. Another version of the policy is another judge.
    ///
    /// # Errors
    /// Its service does not say what it serves.
    pub async fn rater(&mut self) -> Result<String, String> {
        match &mut self.asked {
            Asked::Policy(engine, served) => Ok(format!("ai:{}/{}", engine.model_name(), served.version)),
            Asked::Service(_, Some(model)) => Ok(format!("ai:{model}")),
            Asked::Service(service, model) => {
                if service.model().is_none() {
                    let asked = tokio::time::timeout(self.timeout, service.models()).await;
                    asked.map_err(|_| LATE.to_owned())?.map_err(|fault| fault.to_string())?;
                }
                *model = service.model().map(str::to_owned);
                let name =
                    model.as_deref().ok_or("it serves several models, and ai_feedback.model names none")?;
                Ok(format!("ai:{name}"))
            }
        }
    }

    /// What it says of a pair, asked in both orders; with the two letters, where there were two.
    pub async fn compare(&self, pair: &Pair) -> (Outcome, [Option<Letter>; 2]) {
        let ask = |a| self.ask(question(&self.constitution, pair, a));
        match futures_util::future::join(ask(Side::First), ask(Side::Second)).await {
            (Ok(forth), Ok(back)) => {
                let letters = [letter(&forth), letter(&back)];
                (outcome(letters[0], letters[1]), letters)
            }
            (Err(fault), _) | (_, Err(fault)) => {
                warn!(%fault, "the judge did not compare two answers");
                (Outcome::Failed, [None; 2])
            }
        }
    }

    async fn ask(&self, question: String) -> Result<String, String> {
        let asked = async {
            match &self.asked {
                Asked::Policy(engine, served) => generate(engine, served, question).await,
                Asked::Service(service, model) => {
                    let asked = service.ask(model.as_deref(), &question, self.max_tokens, Some(0.0)).await;
                    asked.map_err(|fault| fault.to_string())
                }
            }
        };
        tokio::time::timeout(self.timeout, asked).await.unwrap_or_else(|_| Err(LATE.to_owned()))
    }
}

const LATE: &str = "it took too long";

/// The likelier of the two letters, whatever else the policy would like to say.
async fn generate(engine: &Engine, served: &Served, question: String) -> Result<String, String> {
    let words = |fault: &dyn std::fmt::Display| fault.to_string();
    let prompt = engine.encode_chat(&[Message::user(question)]).map_err(|fault| words(&fault))?;
    let mut letters = Vec::new();
    for letter in ["A", "B"] {
        let tokens = engine.encode_text(letter).map_err(|fault| words(&fault))?;
        letters.extend(tokens.last().map(|token| (*token, 100.0)));
    }
    let request = GenerateRequest {
        prompt,
        sampling: Sampling { temperature: 0.0, logit_bias: letters, ..Sampling::default() },
        max_tokens: 1,
        stop: Vec::new(),
        top_logprobs: None,
        pinned: Some(served.clone()),
    };
    let mut events = engine.submit(request).map_err(|fault| words(&fault))?;
    let mut answer = String::new();
    while let Some(event) = events.recv().await {
        match event {
            Event::Started { .. } => {}
            Event::Text { text, .. } => answer.push_str(&text),
            Event::Done(_) => return Ok(answer),
            Event::Failed(why) => return Err(why),
        }
    }
    Err("the engine has stopped".to_owned())
}

/// What judge models did.
#[derive(Debug, Clone)]
struct Metrics {
    comparisons: IntCounterVec,
    /// Without a value until people and the judge have compared the same.
    agreement: GaugeVec,
    shared: GaugeVec,
    weight: GaugeVec,
}

impl Metrics {
    fn register(registry: &Prometheus) -> Result<Self, prometheus::Error> {
        let gauge = |name: &str, help: &str| {
            let gauge = GaugeVec::new(Opts::new(name, help), &[])?;
            registry.register(Box::new(gauge.clone()))?;
            Ok::<_, prometheus::Error>(gauge)
        };
        let opts = Opts::new("gyrostat_ai_comparisons_total", "Pairs that a judge model was asked about.");
        let metrics = Self {
            comparisons: IntCounterVec::new(opts, &["outcome"])?,
            agreement: gauge(
                "gyrostat_ai_agreement_ratio",
                "Share of the pairs that people compared, too, on which they agree with the judge model.",
            )?,
            shared: gauge(
                "gyrostat_ai_shared_comparisons",
                "Pairs that the judge model and people compared.",
            )?,
            weight: gauge("gyrostat_ai_weight_ratio", "What a word of the judge model counts in learning.")?,
        };
        registry.register(Box::new(metrics.comparisons.clone()))?;
        for outcome in Outcome::NAMES {
            metrics.comparisons.with_label_values(&[outcome]);
        }
        Ok(metrics)
    }
}

/// A judge model that compares what the served version answers.
pub(super) struct Judging {
    state: http::State,
    judge: JudgeModel,
    config: comparisons::Config,
    trust: dataset::Config,
    metrics: Metrics,
}

/// What has been asked about the served version.
#[derive(Default)]
struct Asking {
    version: Version,
    keys: HashSet<u64>,
    answered: usize,
}

impl Judging {
    /// `None` if there is no judge.
    pub(super) fn new(
        state: &http::State,
        (config, trust): (comparisons::Config, dataset::Config),
        metrics: &upstream::Metrics,
    ) -> Result<Option<Self>, Error> {
        let served = || state.registry.served().borrow().clone();
        let judge = match (&config.judge, &state.backend) {
            (Judge::Off, _) => return Ok(None),
            (Judge::Policy, http::Backend::Embedded(engine)) => {
                JudgeModel::policy(&config, engine.clone(), served())?
            }
            (Judge::Policy, _) => {
                return Err(Error::AiFeedback("judge = \"policy\" needs the embedded engine".to_owned()));
            }
            (Judge::Upstream, http::Backend::Upstream(relay)) => {
                JudgeModel::new(&config, Asked::Service(relay.upstream.clone(), config.model.clone()))?
            }
            (Judge::Upstream, _) => {
                return Err(Error::AiFeedback("judge = \"upstream\" needs upstream.url".to_owned()));
            }
            (Judge::Service(url), _) => JudgeModel::service(&config, url, metrics.clone())?,
        };
        let metrics = Metrics::register(&state.prometheus)?;
        Ok(Some(Self { state: state.clone(), judge, config, trust, metrics }))
    }

    /// Goes on until it is aborted. Where the judge fails it is asked less and less often.
    pub(super) async fn follow(mut self) {
        const SLOWEST: u32 = 64;
        let every = Duration::from_secs_f64(self.config.every_seconds);
        let (mut asking, mut slower) = (Asking::default(), 1);
        loop {
            tokio::time::sleep(every.saturating_mul(slower)).await;
            let fault = match self.turn(&mut asking).await {
                Ok(Some(Outcome::Failed)) => true,
                Ok(_) => false,
                Err(fault) => {
                    warn!(%fault, "no pair was compared");
                    true
                }
            };
            slower = if fault { (2 * slower).min(SLOWEST) } else { 1 };
        }
    }

    /// Has one pair compared, if there is one and the version's are not used up.
    async fn turn(&mut self, asking: &mut Asking) -> Result<Option<Outcome>, String> {
        let version = self.state.registry.active();
        if asking.version != version {
            *asking = Asking { version, ..Asking::default() };
        }
        if asking.answered >= self.config.per_update {
            return Ok(None);
        }
        if let Asked::Policy(_, served) = &mut self.judge.asked {
            *served = self.state.registry.served().borrow().clone();
        }
        let rater = self.judge.rater().await?;
        let pick = |candidates| next(candidates, &rater, |key| asking.keys.contains(&key), asking.answered);
        let Some(pair) = for_judge(&self.state, pick).await? else { return Ok(None) };
        asking.keys.insert(pair.key());
        let (outcome, _) = self.judge.compare(&pair).await;
        self.metrics.comparisons.with_label_values(&[outcome.as_str()]).inc();
        asking.answered += usize::from(outcome != Outcome::Failed);
        debug!(rater, outcome = outcome.as_str(), "a judge model compared two answers");
        if let Outcome::Preferred(better) = outcome {
            let mut said = http::comparisons::said(&pair, better, &self.state);
            (said.rater, said.source) = (Some(rater.clone()), Source::Ai);
            self.state.store.attach(&said).await.map_err(|fault| fault.to_string())?;
            self.state.metrics.feedback(&said);
        }
        self.measure(rater).await?;
        Ok(Some(outcome))
    }

    /// How far people agree with it, over the newest answers.
    async fn measure(&self, rater: String) -> Result<(), String> {
        let (state, trust) = (self.state.clone(), self.trust.clone());
        let read = move || {
            let records = http::comparisons::newest(&state)?;
            Ok(dataset::trusted(&records, &trust, &signals::satisfaction).judges)
        };
        let judges = tokio::task::spawn_blocking(read).await.map_err(|fault| fault.to_string())?;
        let judges = judges.map_err(|fault: crate::store::Error| fault.to_string())?;
        if let Some(note) = judges.into_iter().find(|note| note.rater == rater) {
            let none: [&str; 0] = [];
            self.metrics.shared.with_label_values(&none).set(note.shared as f64);
            self.metrics.weight.with_label_values(&none).set(note.weight);
            if let Some(agreement) = note.agreement {
                self.metrics.agreement.with_label_values(&none).set(agreement);
            }
        }
        Ok(())
    }
}
