//! One sequence while it is being generated.

use std::{sync::Arc, time::Instant};

use candle_core::Result;
use tokio::sync::mpsc;

use crate::completion::{FinishReason, Version};
use crate::policy::{
    Adapter, Batch, Decoder, KvCache, Model,
    attention::BLOCK,
    head::{drawn, log_softmax},
    kv::{Name, Pool, name},
    prompt::Detokenizer,
    request::{Drawn, Event, GenerateRequest, Generated, Served, TokenLogprob},
    sampler::{Sampler, Scratch},
};

#[derive(Debug)]
pub(super) struct Sequence {
    request: GenerateRequest,
    is_client: bool,
    /// Set when generation begins.
    served: Option<Served>,
    events: mpsc::Sender<Event>,
    submitted: Instant,
    first_token_seconds: f64,
    sampler: Sampler,
    detokenizer: Detokenizer,
    pub(super) cache: KvCache,
    /// The prompt, then the answer.
    tokens: Vec<u32>,
    /// Of the full blocks of `tokens`, under which their keys and values are shared.
    names: Vec<Name>,
    /// Tokens of the prompt whose keys and values somebody else had computed.
    cached_tokens: usize,
    /// Of what the learner had drawn.
    drawn: Vec<Drawn>,
    finish_reason: Option<FinishReason>,
    /// Its grammar has given up.
    failed: bool,
}

impl Sequence {
    pub(super) fn new(
        request: GenerateRequest,
        is_client: bool,
        events: mpsc::Sender<Event>,
        submitted: Instant,
    ) -> Self {
        Self {
            sampler: Sampler::new(request.sampling.clone()),
            detokenizer: Detokenizer::new(request.stop.clone()),
            cache: KvCache::default(),
            tokens: request.prompt.clone(),
            names: Vec::new(),
            cached_tokens: 0,
            drawn: Vec::new(),
            finish_reason: None,
            failed: false,
            first_token_seconds: 0.0,
            served: None,
            is_client,
            request,
            events,
            submitted,
        }
    }

    /// Generation begins, by the version that is served now or the one that the request names; a sequence that has
    /// begun before stays with its version.
    pub(super) fn begin(&mut self, now_served: impl FnOnce() -> Served) {
        if self.served.is_none() {
            let served = self.request.pinned.clone().unwrap_or_else(now_served);
            self.send(Event::Started { version: served.version });
            self.served = Some(served);
            self.name_blocks();
        }
    }

    pub(super) fn is_client(&self) -> bool {
        self.is_client
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.events.is_closed()
    }

    pub(super) fn is_done(&self) -> bool {
        self.finish_reason.is_some() || self.failed
    }

    /// Clients before rollouts, and who came first before who came later.
    pub(super) fn priority(&self) -> (bool, Instant) {
        (!self.is_client(), self.submitted)
    }

    /// Sequences with the same adapter have the same key.
    pub(super) fn adapter_key(&self) -> usize {
        self.adapter().map_or(0, |adapter| Arc::as_ptr(adapter) as usize)
    }

    fn adapter(&self) -> Option<&Arc<Adapter>> {
        self.served.as_ref().and_then(|served| served.adapter.as_ref())
    }

    fn answer(&self) -> &[u32] {
        &self.tokens[self.request.prompt.len()..]
    }

    /// Tokens that the decoder has not seen yet: one while the answer grows, more while the prompt is taken in.
    pub(super) fn pending(&self) -> usize {
        self.tokens.len() - self.cache.len()
    }

    /// Blocks that it still needs for the tokens that it has and the next one.
    pub(super) fn blocks_wanted(&self) -> usize {
        (self.tokens.len() + 1).div_ceil(BLOCK).saturating_sub(self.cache.blocks())
    }

    /// Names the full blocks. Rollouts share nothing: their adapter changes while it keeps its version.
    fn name_blocks(&mut self) {
        let Some(version) = self.served.as_ref().map(|served| served.version) else { return };
        let full = if self.is_client() { self.tokens.len() / BLOCK } else { 0 };
        for block in self.names.len()..full {
            let tokens = &self.tokens[block * BLOCK..(block + 1) * BLOCK];
            self.names.push(name(self.names.last(), version, tokens));
        }
    }

    /// Takes over what others have computed of the same beginning; returns how many tokens that was. The last token is
    /// always left: its logits are wanted.
    pub(super) fn adopt(&mut self, pool: &mut Pool) -> usize {
        let before = self.cache.len();
        while self.cache.room() == self.cache.len() && self.cache.len() + BLOCK < self.tokens.len() {
            let Some(block) = self.next_name().and_then(|name| pool.find(&name)) else { break };
            self.cache.adopt(block);
        }
        let adopted = self.cache.len() - before;
        if self.answer().is_empty() {
            self.cached_tokens += adopted;
        }
        adopted
    }

    /// The name of the block that it is about to fill.
    pub(super) fn next_name(&self) -> Option<Name> {
        self.names.get(self.cache.len() / BLOCK).copied()
    }

    /// Puts the next `take` tokens into the batch; `true` if its last row decides the next token.
    pub(super) fn advance(&self, take: usize, batch: &mut Batch) -> bool {
        let seen = self.cache.len();
        batch.push(&self.tokens[seen..seen + take], seen, self.adapter());
        take == self.pending()
    }

    /// Shares the blocks that are full now.
    pub(super) fn keep(&mut self, pool: &mut Pool) {
        self.name_blocks();
        pool.keep(&mut self.cache, &self.names);
    }

    /// Draws the next token from its logits and sends what it adds to the answer.
    pub(super) fn take_token(&mut self, logits: &[f32], model: &Model, scratch: &mut Scratch) {
        let Ok(token) = self.sampler.sample(logits, scratch) else {
            self.failed = true;
            return;
        };
        if self.answer().is_empty() {
            self.first_token_seconds = self.submitted.elapsed().as_secs_f64();
        }
        let ends = model.decoder.architecture.end_of_turn.contains(&token);
        if !self.is_client && self.request.sampling.temperature > 0.0 {
            let learned = model.end_of_turn().filter(|_| ends).unwrap_or(token);
            self.drawn.push(drawn(learned, logits, self.request.sampling.temperature));
        }
        if ends {
            self.finish_reason = Some(FinishReason::Stop);
            return;
        }
        self.tokens.push(token);
        let piece = self.detokenizer.push(model.vocabulary.piece(token));
        let logprobs = self.logprobs(token, logits, model);
        if !piece.text.is_empty() || !logprobs.is_empty() {
            self.send(Event::Text { text: piece.text, logprobs });
        }
        if piece.stopped || self.sampler.is_complete() {
            self.finish_reason = Some(FinishReason::Stop);
        } else if self.answer().len() >= self.request.max_tokens {
            self.finish_reason = Some(FinishReason::Length);
        }
    }

    fn logprobs(&self, token: u32, logits: &[f32], model: &Model) -> Vec<TokenLogprob> {
        let Some(top) = self.request.top_logprobs else { return Vec::new() };
        let logprobs = log_softmax(logits);
        let bytes = |token: u32| model.vocabulary.piece(token).to_vec();
        let mut likeliest: Vec<u32> = (0..logprobs.len() as u32).collect();
        let by_logprob = |a: &u32, b: &u32| logprobs[*b as usize].total_cmp(&logprobs[*a as usize]);
        if top > 0 && top < likeliest.len() {
            likeliest.select_nth_unstable_by(top - 1, by_logprob);
        }
        likeliest.truncate(top);
        likeliest.sort_by(by_logprob);
        vec![TokenLogprob {
            token,
            bytes: bytes(token),
            logprob: logprobs[token as usize],
            top: likeliest.into_iter().map(|token| (token, bytes(token), logprobs[token as usize])).collect(),
        }]
    }

    /// Sends the end of the answer.
    pub(super) fn finish(&mut self, model: &Model, measure: bool) -> Result<()> {
        if self.failed {
            self.fail("the grammar is too complex");
            return Ok(());
        }
        let rest = self.detokenizer.finish();
        if !rest.is_empty() {
            self.send(Event::Text { text: rest, logprobs: Vec::new() });
        }
        let kl = if measure && self.is_client() { self.kl(&model.decoder)? } else { None };
        let tokens = self.tokens.split_off(self.request.prompt.len());
        let drawn = std::mem::take(&mut self.drawn);
        self.send(Event::Done(Generated {
            drawn,
            finish_reason: self.finish_reason.unwrap_or(FinishReason::Length),
            kl,
            version: self.served.as_ref().map_or_else(Version::default, |served| served.version),
            first_token_seconds: self.first_token_seconds,
            cached_tokens: self.cached_tokens,
            tokens,
        }));
        Ok(())
    }

    /// Mean of `log π − log π_ref` over the answer, from two passes over the whole sequence.
    fn kl(&self, decoder: &Decoder) -> Result<Option<f64>> {
        let (tokens, answer) = (&self.tokens, self.answer());
        if answer.is_empty() {
            return Ok(None);
        }
        let Some(adapter) = self.adapter() else { return Ok(Some(0.0)) };
        let first = self.request.prompt.len() as u32 - 1;
        let answered = first..first + answer.len() as u32;
        let mean = |adapter: Option<&Arc<_>>| {
            let batch = Batch::of([&tokens[..tokens.len() - 1]], adapter).wanting(answered.clone().collect());
            let logprobs = decoder.token_logprobs(&decoder.hidden(&batch)?, answer, 1.0, false)?.logprobs;
            Ok::<f64, candle_core::Error>(
                logprobs.iter().map(|logprob| f64::from(*logprob)).sum::<f64>() / logprobs.len() as f64,
            )
        };
        Ok(Some(mean(Some(adapter))? - mean(None)?))
    }

    pub(super) fn fail(&self, why: &str) {
        self.send(Event::Failed(why.to_owned()));
    }

    /// The channel holds an event for every token, so only a client that is gone makes this fail.
    fn send(&self, event: Event) {
        let _gone = self.events.try_send(event);
    }
}
