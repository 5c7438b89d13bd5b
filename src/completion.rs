//! The vocabulary that every other module speaks: one noun per arrow of the loop.
//!
//! `ChatRequest → Completion → Feedback → Signal → Alarm → Dataset → Candidate → Scores → Verdict → Version`.
//! Nothing here has behaviour beyond its own invariants, and nothing here does IO.

mod record;
mod story;

use std::{collections::BTreeMap, fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use record::{
    Alarm, Cause, Direction, DriftState, Outcome, ScorecardRow, Share, Trigger, Update, UpdateState,
};
pub use story::{ArmReadings, CanaryCourse, Check, Compared, DataReport, JudgeNote, Proof, RaterNote};

/// Milliseconds since the Unix epoch. The core never reads a clock: `now` is an argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Timestamp(pub u64);

/// Names one answer. A UUID of version 7, so that ids sort by the time of their request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CompletionId(pub Uuid);

/// Names one judgement of one or two answers (UUID version 7).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FeedbackId(pub Uuid);

impl CompletionId {
    pub fn new() -> Self {
        Self(Uuid::now_v7())
    }
}

impl Default for CompletionId {
    fn default() -> Self {
        Self::new()
    }
}

impl FeedbackId {
    pub fn new() -> Self {
        Self(Uuid::now_v7())
    }
}

impl Default for FeedbackId {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for CompletionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for FeedbackId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for CompletionId {
    type Err = uuid::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Uuid::from_str(text).map(Self)
    }
}

/// A served version of the policy. 0 is the base model with no adapter; versions only ever grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Version(pub u32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "v{}", self.0)
    }
}

/// Who speaks in a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    System,
    User,
    Assistant,
}

impl Role {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    pub role: Role,
    pub content: String,
}

impl Message {
    pub fn user(content: impl Into<String>) -> Self {
        Self { role: Role::User, content: content.into() }
    }

    pub fn assistant(content: impl Into<String>) -> Self {
        Self { role: Role::Assistant, content: content.into() }
    }
}

/// What was asked: a conversation, or bare text to be continued (`/v1/completions`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Prompt {
    Chat(Vec<Message>),
    Text(String),
}

impl Prompt {
    /// The words that the answer answers: the last user turn, or the whole text.
    pub fn request(&self) -> &str {
        match self {
            Self::Text(text) => text,
            Self::Chat(messages) => messages
                .iter()
                .rev()
                .find(|message| message.role == Role::User)
                .map_or("", |message| message.content.as_str()),
        }
    }

    /// The prompt as one string, for hashing and for fixed-format exports.
    pub fn canonical(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Chat(messages) => messages
                .iter()
                .map(|message| format!("{}: {}", message.role.as_str(), message.content))
                .collect::<Vec<_>>()
                .join("\n"),
        }
    }
}

/// The kind of request, e.g. `code` or `summarisation`: the unit in which drift is reported.
///
/// At most 40 characters of `a-z`, `0-9`, `_`, `-`, so that it can be a metric label as it is; not [`Self::ALL`].
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct InteractionType(String);

/// The text cannot name an interaction type.
#[derive(Debug, thiserror::Error)]
#[error("an interaction type has 1 to 40 characters of a-z, 0-9, `_` and `-`, and is not `all`")]
pub struct InvalidInteractionType;

impl InteractionType {
    pub const OTHER: &'static str = "other";
    /// The label of the whole traffic, which no single type may take.
    pub const ALL: &'static str = "all";

    /// Where a request belongs that no type fits.
    pub fn other() -> Self {
        Self(Self::OTHER.to_owned())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for InteractionType {
    type Error = InvalidInteractionType;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let fits =
            |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'_' | b'-');
        if (1..=40).contains(&text.len()) && text.bytes().all(fits) && text != Self::ALL {
            Ok(Self(text))
        } else {
            Err(InvalidInteractionType)
        }
    }
}

impl From<InteractionType> for String {
    fn from(interaction: InteractionType) -> Self {
        interaction.0
    }
}

impl fmt::Display for InteractionType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether a request asks for something harmful. With [`Refusal`] it tells over-refusal from rightful refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Risk {
    Benign,
    Harmful,
}

impl Risk {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Benign => "benign",
            Self::Harmful => "harmful",
        }
    }
}

/// How far an answer declines what was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RefusalLabel {
    None,
    Partial,
    Full,
}

/// A refusal with the classifier's probability that the answer declines at all.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Refusal {
    pub label: RefusalLabel,
    pub probability: f64,
    /// It declines, but shows a way forward: what it can do instead, or where help is to be had.
    #[serde(default)]
    pub way_forward: bool,
}

impl Refusal {
    pub fn is_refusal(self) -> bool {
        self.label != RefusalLabel::None
    }
}

/// Why generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// The model ended its turn, or a stop string was met.
    Stop,
    /// `max_tokens` or the context was used up.
    Length,
}

impl FinishReason {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// One answer of one version of the model, with what could be sensed when it was given.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Completion {
    pub id: CompletionId,
    pub at: Timestamp,
    /// The adapter that answered.
    pub version: Version,
    pub interaction: InteractionType,
    pub prompt: Prompt,
    pub answer: String,
    pub finish_reason: FinishReason,
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    pub refusal: Refusal,
    pub risk: Risk,
    /// Helpfulness in `[0, 1]`.
    pub helpfulness: f64,
    /// Mean over the answer's tokens of `log π(token) − log π_ref(token)`, in nats, where it was sampled.
    pub kl: Option<f64>,
    /// Seconds from the request's arrival to the last token.
    pub seconds: f64,
    /// The caller's opaque end-user id (`user`).
    pub user: Option<String>,
    /// The caller's tags (`metadata`).
    pub metadata: BTreeMap<String, String>,
}

/// Who judged: people, or a judge model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    #[default]
    Human,
    Ai,
}

impl Source {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Human => "human",
            Self::Ai => "ai",
        }
    }
}

/// What a rater says is wrong with an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Flag {
    WrongfulRefusal,
    Harmful,
    Incorrect,
    Other,
}

/// What a user did with an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Behaviour {
    Copied,
    Regenerated,
    Edited,
    Abandoned,
}

/// The judgement itself. Completion ids stand beside it in [`Feedback`], except for comparisons, which name two.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Judgement {
    Thumbs {
        up: bool,
    },
    /// 1 (worst) to 5 (best).
    Rating {
        stars: u8,
    },
    /// Two logged answers to one prompt; `tie` leaves the order without meaning.
    Comparison {
        chosen: CompletionId,
        rejected: CompletionId,
    },
    /// Two answers that were not both logged here.
    TextComparison {
        prompt: Prompt,
        chosen: String,
        rejected: String,
    },
    /// The better answer, written by the rater.
    Demonstration {
        answer: String,
    },
    Flag {
        flag: Flag,
    },
    Behaviour {
        behaviour: Behaviour,
    },
}

impl Judgement {
    /// The wire's name of the kind, and the value of the metric label `kind`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Thumbs { .. } => "thumbs",
            Self::Rating { .. } => "rating",
            Self::Comparison { .. } | Self::TextComparison { .. } => "comparison",
            Self::Demonstration { .. } => "demonstration",
            Self::Flag { .. } => "flag",
            Self::Behaviour { .. } => "behaviour",
        }
    }
}

/// What somebody said of an answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Feedback {
    pub id: FeedbackId,
    pub at: Timestamp,
    /// The answer that was judged; for comparisons the chosen one; for comparisons of texts one of the two, if it was
    /// logged.
    pub completion: Option<CompletionId>,
    pub judgement: Judgement,
    pub rater: Option<String>,
    pub source: Source,
    pub comment: Option<String>,
    pub idempotency_key: Option<String>,
    pub tags: BTreeMap<String, String>,
}

/// What is watched for drift.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SignalKind {
    /// A bit: the answer declines.
    Refusal,
    /// `[0, 1]`: what people and their behaviour say.
    Satisfaction,
    /// `[0, 1]`: what the reward model, or the rate of usable answers, says.
    Helpfulness,
    /// `[0, 1]`: nats per token to the reference, clipped at 1.
    Kl,
    /// A bit: the model behaves as a probe expects.
    Probes,
}

impl SignalKind {
    pub const ALL: [Self; 5] = [Self::Refusal, Self::Satisfaction, Self::Helpfulness, Self::Kl, Self::Probes];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Refusal => "refusal",
            Self::Satisfaction => "satisfaction",
            Self::Helpfulness => "helpfulness",
            Self::Kl => "kl",
            Self::Probes => "probes",
        }
    }
}

/// One reading of one signal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Signal {
    pub kind: SignalKind,
    pub interaction: InteractionType,
    /// The version that the reading is about.
    pub version: Version,
    /// The answer that the reading is about.
    pub completion: CompletionId,
    pub value: f64,
}
