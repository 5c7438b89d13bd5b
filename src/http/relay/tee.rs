//! An answer on its way through: every byte goes on at once, and is read beside.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Instant,
};

use axum::{
    body::Bytes,
    http::{HeaderMap, StatusCode, header},
};
use http_body::{Body, Frame, SizeHint};

use crate::completion::CompletionId;
use crate::upstream::{Lease, answer::Reading};

use super::{
    is_stream,
    recorder::{Heard, Job, Recorder},
};

/// A request whose answer has not ended. Where it is dropped before, its client has hung up.
#[derive(Debug)]
pub(super) struct Call {
    recorder: Recorder,
    job: Option<Job>,
    started: Instant,
    _lease: Option<Lease>,
}

impl Call {
    pub(super) fn new(recorder: Recorder, job: Job, lease: Option<Lease>, started: Instant) -> Self {
        Self { recorder, job: Some(job), started, _lease: lease }
    }

    pub(super) fn ids(&self) -> &[CompletionId] {
        self.job.as_ref().map_or(&[], |job| &job.ids)
    }

    /// Hands the answer over to be recorded; only the first word counts.
    pub(super) fn end(&mut self, heard: Heard) {
        if let Some(mut job) = self.job.take() {
            job.seconds = self.started.elapsed().as_secs_f64();
            job.heard = heard;
            self.recorder.submit(job);
        }
    }

    fn first_token(&mut self) {
        let seconds = self.started.elapsed().as_secs_f64();
        if let Some(job) = &mut self.job {
            job.first_token_seconds.get_or_insert(seconds);
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.end(Heard::Nothing("cancelled"));
    }
}

/// How far the answer has been read.
#[derive(Debug)]
enum Ear {
    Whole(Vec<u8>),
    Stream(Reading),
    /// It is no answer, or too long to be kept.
    Deaf(&'static str),
}

/// Bytes of a whole answer that are kept to be read, at most.
const LONGEST: usize = 16 << 20;

/// The upstream's body, byte for byte.
pub(super) struct Tee {
    body: reqwest::Body,
    ear: Ear,
    /// Bytes that are still to come, where the upstream has said how many there are.
    left: Option<u64>,
    call: Call,
}

impl Tee {
    pub(super) fn new(body: reqwest::Body, status: StatusCode, headers: &HeaderMap, call: Call) -> Self {
        let length =
            headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
        let ear = if status.is_server_error() {
            Ear::Deaf("failed")
        } else if !status.is_success() {
            Ear::Deaf("rejected")
        } else if headers.contains_key(header::CONTENT_ENCODING) {
            Ear::Deaf("unrecorded")
        } else if is_stream(headers) {
            Ear::Stream(Reading::default())
        } else {
            Ear::Whole(Vec::new())
        };
        Self { body, ear, left: length, call }
    }

    /// Reads what passes. What completes the answer is handed over before the client can have seen it, so that feedback
    /// which follows at once finds its completion under way.
    fn hear(&mut self, bytes: &[u8]) {
        self.left = self.left.map(|left| left.saturating_sub(bytes.len() as u64));
        match &mut self.ear {
            Ear::Deaf(_) => {}
            Ear::Whole(kept) if kept.len() + bytes.len() > LONGEST => self.ear = Ear::Deaf("unrecorded"),
            Ear::Whole(kept) => kept.extend_from_slice(bytes),
            Ear::Stream(reading) => {
                reading.feed(bytes);
                if reading.answer.choices.values().any(|choice| choice.pieces > 0) {
                    self.call.first_token();
                }
                if reading.answer.done {
                    self.close();
                }
            }
        }
        if self.left == Some(0) {
            self.close();
        }
    }

    /// The upstream has said all that it has to say.
    fn close(&mut self) {
        let heard = match std::mem::replace(&mut self.ear, Ear::Deaf("cancelled")) {
            Ear::Deaf(outcome) => Heard::Nothing(outcome),
            Ear::Whole(body) => Heard::Whole(body),
            Ear::Stream(mut reading) => {
                reading.finish();
                Heard::Streamed(reading.answer)
            }
        };
        self.call.end(heard);
    }
}

impl Drop for Tee {
    fn drop(&mut self) {
        // A client may close once it has its last choice, without waiting for the stream's end.
        if matches!(&self.ear, Ear::Stream(reading) if reading.answer.is_complete()) {
            self.close();
        }
    }
}

impl Body for Tee {
    type Data = Bytes;
    type Error = reqwest::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, reqwest::Error>>> {
        let this = self.get_mut();
        let frame = ready!(Pin::new(&mut this.body).poll_frame(context));
        match &frame {
            Some(Ok(frame)) => {
                if let Some(bytes) = frame.data_ref() {
                    this.hear(bytes);
                }
            }
            Some(Err(_)) => this.call.end(Heard::Nothing("failed")),
            None => this.close(),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
