//! One sequence while it is being generated.

use std::{sync::Arc, time::Instant};

use candle_core::Result;
use tokio::sync::mpsc;

use crate::completion::FinishReason;
use crate::policy::{
    Batch, Decoder, KvCache, Model,
    head::log_softmax,
    prompt::Detokenizer,
    request::{Event, GenerateRequest, Generated, Served, TokenLogprob},
    sampler::Sampler,
};

#[derive(Debug)]
pub(super) struct Sequence {
    request: GenerateRequest,
    served: Served,
    events: mpsc::Sender<Event>,
    submitted: Instant,
    first_token_seconds: f64,
    sampler: Sampler,
    detokenizer: Detokenizer,
    cache: KvCache,
    /// Tokens of the prompt that the decoder has seen.
    prefilled: usize,
    answer: Vec<u32>,
    finish_reason: Option<FinishReason>,
}

impl Sequence {
    pub(super) fn new(
        request: GenerateRequest,
        served: Served,
        events: mpsc::Sender<Event>,
        submitted: Instant,
        layers: usize,
    ) -> Self {
        Self {
            sampler: Sampler::new(request.sampling),
            detokenizer: Detokenizer::new(request.stop.clone()),
            cache: KvCache::new(layers),
            prefilled: 0,
            answer: Vec::new(),
            finish_reason: None,
            first_token_seconds: 0.0,
            request,
            served,
            events,
            submitted,
        }
    }

    pub(super) fn is_client(&self) -> bool {
        self.request.pinned.is_none()
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.events.is_closed()
    }

    pub(super) fn is_prefilling(&self) -> bool {
        self.prefilled < self.request.prompt.len()
    }

    pub(super) fn is_done(&self) -> bool {
        self.finish_reason.is_some()
    }

    /// Tokens for which it may need keys and values.
    pub(super) fn reserved(&self) -> usize {
        self.request.prompt.len() + self.request.max_tokens
    }

    /// Sequences with the same adapter have the same key.
    pub(super) fn adapter_key(&self) -> usize {
        self.served.adapter.as_ref().map_or(0, |adapter| Arc::as_ptr(adapter) as usize)
    }

    /// Tokens that the decoder has not seen yet.
    pub(super) fn pending(&self) -> usize {
        if self.is_prefilling() { self.request.prompt.len() - self.prefilled } else { 1 }
    }

    /// Puts the next `take` tokens into the batch; `true` if its last row decides the next token.
    pub(super) fn advance(&mut self, take: usize, batch: &mut Batch) -> (&mut KvCache, bool) {
        let adapter = self.served.adapter.as_ref();
        if self.is_prefilling() {
            if self.prefilled == 0 {
                self.send(Event::Started { version: self.served.version });
            }
            let tokens = &self.request.prompt[self.prefilled..self.prefilled + take];
            batch.push(tokens, self.prefilled, adapter);
            self.prefilled += take;
            let whole = !self.is_prefilling();
            return (&mut self.cache, whole);
        }
        let last = self.answer.last().copied().into_iter().collect::<Vec<_>>();
        batch.push(&last, self.cache.len(), adapter);
        (&mut self.cache, true)
    }

    /// Draws the next token from its logits and sends what it adds to the answer.
    pub(super) fn take_token(&mut self, logits: &[f32], model: &Model) -> Result<()> {
        let token = self.sampler.sample(logits)?;
        if self.answer.is_empty() {
            self.first_token_seconds = self.submitted.elapsed().as_secs_f64();
        }
        if model.decoder.architecture.end_of_turn.contains(&token) {
            self.finish_reason = Some(FinishReason::Stop);
            return Ok(());
        }
        self.answer.push(token);
        let piece = self.detokenizer.push(model.vocabulary.piece(token));
        let logprobs = self.logprobs(token, logits, model);
        if !piece.text.is_empty() || !logprobs.is_empty() {
            self.send(Event::Text { text: piece.text, logprobs });
        }
        if piece.stopped {
            self.finish_reason = Some(FinishReason::Stop);
        } else if self.answer.len() >= self.request.max_tokens {
            self.finish_reason = Some(FinishReason::Length);
        }
        Ok(())
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
    pub(super) fn finish(mut self, model: &Model, measure: bool) -> Result<()> {
        let rest = self.detokenizer.finish();
        if !rest.is_empty() {
            self.send(Event::Text { text: rest, logprobs: Vec::new() });
        }
        let kl = if measure && self.is_client() { self.kl(&model.decoder)? } else { None };
        let tokens = std::mem::take(&mut self.answer);
        self.send(Event::Done(Generated {
            finish_reason: self.finish_reason.unwrap_or(FinishReason::Length),
            kl,
            version: self.served.version,
            first_token_seconds: self.first_token_seconds,
            tokens,
        }));
        Ok(())
    }

    /// Mean of `log π − log π_ref` over the answer, from two passes over the whole sequence.
    fn kl(&self, decoder: &Decoder) -> Result<Option<f64>> {
        if self.answer.is_empty() {
            return Ok(None);
        }
        let Some(adapter) = &self.served.adapter else { return Ok(Some(0.0)) };
        let tokens: Vec<u32> = self.request.prompt.iter().chain(&self.answer).copied().collect();
        let mean = |adapter: Option<&Arc<_>>| {
            let batch = Batch::of([&tokens[..tokens.len() - 1]], adapter);
            let hidden = decoder.hidden(&batch)?;
            let answered = hidden.narrow(0, self.request.prompt.len() - 1, self.answer.len())?;
            let logprobs = decoder.token_logprobs(&answered, &self.answer, 1.0, false)?.logprobs;
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
