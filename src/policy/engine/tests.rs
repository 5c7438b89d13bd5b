//! What a request gets does not depend on what runs beside it.

use std::{sync::Arc, time::Duration};

use prometheus::Registry;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::sync::{mpsc, watch};

use super::*;
use crate::policy::{Adapter, Device, Generated, Sampling, Shape, TokenLogprob, tiny, write_tiny};

struct Started {
    engine: Engine,
    metrics: Metrics,
    versions: watch::Sender<Served>,
}

fn start(config: Config) -> Started {
    let folder = tempfile::tempdir().unwrap();
    write_tiny(folder.path(), 0).unwrap();
    let model = Arc::new(Model::load(folder.path().to_str().unwrap(), Device::Cpu).unwrap());
    let metrics = Metrics::register(&Registry::new()).unwrap();
    let (versions, served) = watch::channel(Served::default());
    let config = Config { kl_one_in: 0, ..config };
    let engine = Engine::start(model, &config, served, metrics.clone()).unwrap();
    Started { engine, metrics, versions }
}

fn request(salt: u32, prompt: u32, max_tokens: usize) -> GenerateRequest {
    GenerateRequest {
        prompt: (0..prompt).map(|at| 3 + (at * 7 + salt * 31) % 200).collect(),
        sampling: Sampling { temperature: 0.0, seed: u64::from(salt), ..Sampling::default() },
        max_tokens,
        stop: Vec::new(),
        top_logprobs: Some(0),
        pinned: None,
    }
}

fn finish(mut events: mpsc::Receiver<Event>) -> (Generated, Vec<TokenLogprob>) {
    let mut seen = Vec::new();
    while let Some(event) = events.blocking_recv() {
        match event {
            Event::Text { logprobs, .. } => seen.extend(logprobs),
            Event::Done(end) => return (end, seen),
            Event::Started { .. } | Event::Failed(_) => {}
        }
    }
    panic!("no end")
}

fn ask(engine: &Engine, request: GenerateRequest) -> (Generated, Vec<TokenLogprob>) {
    finish(engine.submit(request).unwrap())
}

/// The same tokens, and their log-probabilities to the rounding of another order of additions.
#[track_caller]
fn check_same(a: &(Generated, Vec<TokenLogprob>), b: &(Generated, Vec<TokenLogprob>)) {
    assert_eq!(a.0.tokens, b.0.tokens);
    assert_eq!(a.1.len(), b.1.len());
    for (a, b) in a.1.iter().zip(&b.1) {
        assert!((a.logprob - b.logprob).abs() < 1e-4, "{} but {}", a.logprob, b.logprob);
    }
}

#[test]
fn the_last_handle_waits_for_the_thread_and_what_it_holds() {
    let Started { engine, .. } = start(Config::default());
    let model = Arc::clone(engine.model());
    let other = engine.clone();
    let answer = other.submit(request(1, 20, 200)).unwrap();
    drop(engine);
    assert_eq!(finish(answer).0.tokens.len(), 200);
    // What still runs is given up.
    let _unread = other.submit(request(2, 20, 200)).unwrap();
    drop(other);
    assert_eq!(Arc::strong_count(&model), 1);
}

/// Waits until nothing runs, and returns the blocks in use then.
fn used_at_rest(metrics: &Metrics) -> i64 {
    let waiting = || metrics.queue_depth.with_label_values(&["engine"]).get();
    for _ in 0..1000 {
        std::thread::sleep(Duration::from_millis(5));
        if metrics.running.get() == 0 && waiting() == 0 {
            break;
        }
    }
    assert_eq!((metrics.running.get(), waiting()), (0, 0));
    metrics.cache_blocks.with_label_values(&["used"]).get()
}

#[test]
fn company_changes_no_answer() {
    let Started { engine, metrics, .. } = start(Config { prefill_tokens: 24, ..Config::default() });
    let alone: Vec<_> = (0..6).map(|salt| ask(&engine, request(salt, 20 + 15 * salt, 40))).collect();
    let fresh = start(Config { prefill_tokens: 24, ..Config::default() });
    let streams: Vec<_> =
        (0..6).map(|salt| fresh.engine.submit(request(salt, 20 + 15 * salt, 40)).unwrap()).collect();
    for (stream, alone) in streams.into_iter().zip(&alone) {
        check_same(&finish(stream), alone);
    }
    assert_eq!(used_at_rest(&metrics), 0);
}

#[test]
fn whoever_gives_way_ends_with_the_same_answer() {
    let roomy = start(Config::default());
    let tight = start(Config { cache_tokens: 6 * BLOCK, ..Config::default() });
    let streams: Vec<_> = (0..7).map(|salt| tight.engine.submit(request(salt, 50, 70)).unwrap()).collect();
    for (salt, stream) in streams.into_iter().enumerate() {
        check_same(&finish(stream), &ask(&roomy.engine, request(salt as u32, 50, 70)));
    }
    assert!(tight.metrics.preemptions.get() > 0, "the pool was never too small");
    assert_eq!(used_at_rest(&tight.metrics), 0);
}

#[test]
fn a_known_beginning_is_not_computed_again() {
    let Started { engine, versions, .. } = start(Config::default());
    let first = ask(&engine, request(1, 70, 30));
    let again = ask(&engine, request(1, 70, 30));
    assert_eq!((first.0.cached_tokens, again.0.cached_tokens), (0, 64));
    check_same(&first, &again);
    // The next turn begins with the answer.
    let mut next = request(1, 70, 30);
    next.prompt.extend(&first.0.tokens);
    next.prompt.extend([5, 6, 7]);
    let turn = ask(&engine, next.clone());
    assert_eq!(turn.0.cached_tokens, (70 + first.0.tokens.len() - 1) / BLOCK * BLOCK);
    check_same(&turn, &ask(&start(Config::default()).engine, next));

    let architecture = &engine.model().decoder.architecture;
    let shape = Shape { rank: 4, alpha: 8.0, first_layer: 0, heads: 0 };
    let adapter = Adapter::new(architecture, shape, 3).unwrap();
    let mut rng = StdRng::seed_from_u64(4);
    let mut parameters = adapter.parameters().unwrap();
    for parameter in parameters.iter_mut().flatten() {
        *parameter += rng.random::<f32>() - 0.5;
    }
    let adapter = adapter.with_parameters(&parameters).unwrap();
    let served = Served { version: Version(1), adapter: Some(Arc::new(adapter)) };
    versions.send(served.clone()).unwrap();
    let changed = ask(&engine, request(1, 70, 30));
    assert_eq!(changed.0.cached_tokens, 0, "another version's keys and values were taken");
    assert_ne!(changed.0.tokens, first.0.tokens);
    let rollout = ask(&engine, GenerateRequest { pinned: Some(served), ..request(1, 70, 30) });
    assert_eq!(rollout.0.cached_tokens, 0, "a rollout's adapter may have changed");
    check_same(&changed, &rollout);
}

#[test]
fn beside_training_answers_are_the_same_and_a_training_ends_with_its_panic() {
    let Started { engine, .. } = start(Config::default());
    let alone = ask(&engine, request(1, 40, 30));
    check_same(&alone, &engine.beside(|| ask(&engine, request(1, 40, 30))));
    let trainings = &engine.inner.load.trainings;
    assert_eq!(engine.beside(|| trainings.load(Ordering::Relaxed)), 1);
    let panics = || engine.beside(|| panic!("a training that fails"));
    assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(panics)).is_err());
    assert_eq!(trainings.load(Ordering::Relaxed), 0);
}

#[test]
fn choices_share_their_prompt() {
    let Started { engine, .. } = start(Config::default());
    let streams: Vec<_> = (0..3)
        .map(|seed| {
            let mut choice = request(1, 100, 8);
            choice.sampling = Sampling { seed, ..Sampling::default() };
            engine.submit(choice).unwrap()
        })
        .collect();
    let cached: Vec<_> = streams.into_iter().map(|stream| finish(stream).0.cached_tokens).collect();
    assert!(cached.iter().filter(|cached| **cached == 96).count() >= 2, "{cached:?}");
}

#[test]
fn who_hangs_up_leaves_nothing_behind() {
    let Started { engine, metrics, .. } =
        start(Config { running: 4, cache_tokens: 16 * BLOCK, ..Config::default() });
    for salt in 0..40 {
        let mut events = engine.submit(request(salt, 40, 200)).unwrap();
        if salt % 3 == 0 {
            let _first = events.blocking_recv();
        }
    }
    assert_eq!(used_at_rest(&metrics), 0);
    assert_eq!(engine.inner.load.clients.load(Ordering::Relaxed), 0);
}

#[test]
fn a_full_queue_says_when_to_come_back() {
    let Started { engine, .. } = start(Config { running: 1, queue: 2, ..Config::default() });
    let mut streams = Vec::new();
    let refused = (0..50).find_map(|salt| match engine.submit(request(salt, 60, 400)) {
        Ok(stream) => {
            streams.push(stream);
            None
        }
        Err(error) => Some(error),
    });
    let Some(SubmitError::QueueFull { limit: 2, retry_after_seconds }) = refused else {
        panic!("{refused:?}")
    };
    assert!((1..=60).contains(&retry_after_seconds));
    let long = engine.submit(request(0, tiny::architecture().context as u32, 1));
    assert!(matches!(long, Err(SubmitError::TooLong { .. })));
}
