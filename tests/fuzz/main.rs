//! Random input against everything that reads foreign bytes: no panic, no hang, no unbounded memory.
//!
//! Each target runs for a moment here. `GYROSTAT_FUZZ_SECONDS=600 cargo test --release --test fuzz NAME` runs one for longer; a
//! round that fails prints its seed, and `GYROSTAT_FUZZ_SEED` begins with it. With `ulimit -v` what asks for too much memory fails.
#![expect(clippy::print_stdout, clippy::unwrap_used, reason = "tests")]

mod models;
mod requests;

use std::time::{Duration, Instant};

use gyrostat::upstream::{
    answer::{Answer, Reading},
    request::Head,
};
use rand::{RngExt, SeedableRng, rngs::StdRng};

#[expect(clippy::disallowed_methods, reason = "a test's own knob")]
fn knob(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Repeats `round` with a fresh generator of random numbers each time, until the time is over.
fn for_a_while(target: &str, mut round: impl FnMut(&mut StdRng)) {
    let until = Duration::from_secs(knob("GYROSTAT_FUZZ_SECONDS").unwrap_or(1));
    let first = knob("GYROSTAT_FUZZ_SEED").unwrap_or(0);
    let (started, mut rounds) = (Instant::now(), 0);
    while started.elapsed() < until {
        let seed = first + rounds;
        let guard = Seed(seed);
        round(&mut StdRng::seed_from_u64(seed));
        std::mem::forget(guard);
        rounds += 1;
    }
    println!("{target}: {rounds} rounds in {:.0} s", started.elapsed().as_secs_f64());
}

/// Dropped only by a panic.
struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        println!("GYROSTAT_FUZZ_SEED={}", self.0);
    }
}

/// Pieces of `fragments` one after another, then some bytes turned, cut out, doubled or thrown in.
fn mangled(rng: &mut StdRng, fragments: &[&[u8]]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..rng.random_range(0..24) {
        bytes.extend_from_slice(fragments[rng.random_range(0..fragments.len())]);
    }
    damage(rng, &mut bytes);
    bytes
}

fn damage(rng: &mut StdRng, bytes: &mut Vec<u8>) {
    for _ in 0..rng.random_range(0..6) {
        let at = rng.random_range(0..=bytes.len());
        let end = (at + rng.random_range(0..16)).min(bytes.len());
        match rng.random_range(0..4) {
            0 if at < bytes.len() => bytes[at] = rng.random(),
            1 => drop(bytes.drain(at..end)),
            2 => {
                let piece = bytes[at..end].to_vec();
                bytes.splice(at..at, piece);
            }
            _ => {
                let noise: Vec<u8> = (0..rng.random_range(0..8)).map(|_| rng.random()).collect();
                bytes.splice(at..at, noise);
            }
        }
    }
}

#[test]
fn an_upstreams_stream_reads_the_same_in_any_pieces() {
    const FRAGMENTS: [&[u8]; 16] = [
        b"data: {\"id\":\"c\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"H\xc3\xa9\"}}]}",
        b"data: {\"choices\":[{\"index\":1,\"delta\":{\"content\":\"\\ud83e\\udd80\"},\"finish_reason\":null}]}",
        b"data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}",
        b"data: {\"choices\":[{\"text\":\"t\",\"finish_reason\":\"length\"}]}",
        b"data: {\"choices\":[],\"usage\":{\"prompt_tokens\":1,\"completion_tokens\":2}}",
        b"data: {\"error\":{\"message\":\"no\"}}",
        b"data: [DONE]",
        b"data:",
        b"data",
        b": comment",
        b"event: x\nid: 1",
        b"\xef\xbb\xbf",
        b"\n",
        b"\n\n",
        b"\r\n\r\n",
        b"\r",
    ];
    for_a_while("sse", |rng| {
        let stream = mangled(rng, &FRAGMENTS);
        let read = |mut next: Box<dyn FnMut(usize) -> usize + '_>| {
            let mut reading = Reading::default();
            let mut rest = stream.as_slice();
            while !rest.is_empty() {
                let (piece, more) = rest.split_at(next(rest.len()).clamp(1, rest.len()));
                reading.feed(piece);
                rest = more;
            }
            reading.finish();
            reading.answer
        };
        let whole = read(Box::new(|length| length));
        assert_eq!(read(Box::new(|_| 1)), whole);
        let pieces: Vec<usize> = (0..8).map(|_| rng.random_range(1..40)).collect();
        let mut nth = 0;
        let random = read(Box::new(|_| {
            nth += 1;
            pieces[nth % pieces.len()]
        }));
        assert_eq!(random, whole);
        let kept: usize = whole.choices.values().map(|choice| choice.text.len()).sum();
        assert!(kept <= stream.len() && whole.choices.len() <= 128);
    });
}

#[test]
fn only_the_models_name_is_replaced() {
    const FRAGMENTS: [&[u8]; 14] = [
        b"{\"model\":\"a\",\"messages\":[]}",
        b"{",
        b"}",
        b"\"model\":",
        b"\"mod\\u0065l\" : ",
        b"\"a\\\"b\"",
        b"\"\xc3\xa9\"",
        b",",
        b"\"n\":2",
        b"\"n\":1e400",
        b"[1,{\"model\":\"x\"}]",
        b"null",
        b" \n",
        b"\"k\":{\"model\":\"inner\"}",
    ];
    for_a_while("request", |rng| {
        let body = mangled(rng, &FRAGMENTS);
        let Some(head) = Head::read(&body) else { return };
        let Some(model) = &head.model else { return };
        // The name that it had leads back to the same request.
        let changed = head.with_model(&body, "another \"name\"");
        let again = Head::read(&changed).unwrap();
        assert_eq!(again.model.as_deref(), Some("another \"name\""));
        let back = Head::read(&again.with_model(&changed, model)).unwrap();
        assert_eq!((back.model.as_ref(), back.n), (head.model.as_ref(), head.n));
        let _whatever = Answer::whole(&body);
    });
}
