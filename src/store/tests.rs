mod crash;
mod model;

use std::{collections::BTreeMap, time::Instant};

use tempfile::TempDir;

use crate::completion::{
    FinishReason, InteractionType, Judgement, Message, Prompt, Refusal, RefusalLabel, Risk, Source, Trigger,
    Update, UpdateState, Version,
};

use super::*;

const DAY_MS: u64 = 86_400_000;

/// The id of a time, which stays the same from run to run.
fn id(at: u64, random: u64) -> Uuid {
    let mut bytes = [0; 10];
    bytes[2..].copy_from_slice(&random.to_be_bytes());
    uuid::Builder::from_unix_timestamp_millis(at, &bytes).into_uuid()
}

fn completion(at: u64, n: u64, prompt: &str) -> Completion {
    Completion {
        id: CompletionId(id(at, n)),
        at: Timestamp(at),
        version: Version(0),
        interaction: InteractionType::other(),
        prompt: Prompt::Chat(vec![Message::user(prompt)]),
        answer: format!("answer {n}"),
        finish_reason: FinishReason::Stop,
        prompt_tokens: 3,
        completion_tokens: 5,
        refusal: Refusal { label: RefusalLabel::None, probability: 0.25, way_forward: false },
        risk: Risk::Benign,
        helpfulness: 0.5,
        kl: Some(0.125),
        seconds: 1.5,
        user: Some("u".to_owned()),
        metadata: BTreeMap::from([("app".to_owned(), "desk".to_owned())]),
    }
}

fn feedback(at: u64, n: u64, judgement: Judgement, of: Option<CompletionId>, key: Option<&str>) -> Feedback {
    Feedback {
        id: FeedbackId(id(at, n)),
        at: Timestamp(at),
        completion: of,
        judgement,
        rater: Some("ann".to_owned()),
        source: Source::Human,
        comment: Some("well".to_owned()),
        idempotency_key: key.map(str::to_owned),
        tags: BTreeMap::new(),
    }
}

fn thumbs(at: u64, n: u64, of: CompletionId, key: Option<&str>) -> Feedback {
    feedback(at, n, Judgement::Thumbs { up: n.is_multiple_of(2) }, Some(of), key)
}

fn comparison(at: u64, n: u64, chosen: CompletionId, rejected: CompletionId) -> Feedback {
    feedback(at, n, Judgement::Comparison { chosen, rejected }, Some(chosen), None)
}

fn config(dir: &TempDir) -> Config {
    Config { path: dir.path().to_owned(), retention_bytes: 0, reserve_bytes: 0, ..Config::default() }
}

fn fresh() -> (TempDir, Arc<Store>) {
    let dir = TempDir::new().unwrap();
    let store = Store::open(&config(&dir)).unwrap();
    (dir, store)
}

fn seqs(store: &Store) -> Vec<u64> {
    store.events_since(0, usize::MAX).unwrap().into_iter().map(|(seq, _)| seq).collect()
}

#[test]
fn what_is_written_is_read() {
    let (dir, store) = fresh();
    let (a, b) = (completion(10, 1, "p"), completion(20, 2, "p"));
    for completion in [&a, &b] {
        store.append_blocking(completion).unwrap();
    }
    let up = thumbs(30, 3, a.id, Some("k"));
    let pair = comparison(40, 4, b.id, a.id);
    assert_eq!(store.attach_blocking(&up).unwrap(), Attached::Stored);
    assert_eq!(store.attach_blocking(&pair).unwrap(), Attached::Stored);
    let look = |store: &Store| {
        assert_eq!(store.completion(a.id).unwrap(), Some(a.clone()));
        assert_eq!(store.feedback_of(a.id).unwrap(), [up.clone(), pair.clone()]);
        assert_eq!(store.feedback_of(b.id).unwrap(), std::slice::from_ref(&pair));
        let events = [
            (0, Event::Completion(a.clone())),
            (1, Event::Completion(b.clone())),
            (2, Event::Feedback(up.clone())),
            (3, Event::Feedback(pair.clone())),
        ];
        assert_eq!(store.events_since(0, 9).unwrap(), events);
        assert_eq!(store.events_since(1, 2).unwrap(), events[1..3]);
        assert_eq!(store.events_since(4, 2).unwrap(), []);
        let all: Result<Vec<_>, _> = store.judged(..).rev().collect();
        let both = [(b.clone(), vec![pair.clone()]), (a.clone(), vec![up.clone(), pair.clone()])];
        assert_eq!(all.unwrap(), both);
        let counts = store.counts();
        assert_eq!((counts.completions, counts.feedback, counts.next_seq), (2, 2, 4));
    };
    look(&store);
    drop(store);
    look(&Store::open(&config(&dir)).unwrap());
}

#[test]
fn completions_by_time() {
    use std::ops::Bound::{self, Excluded, Included, Unbounded};
    let (_dir, store) = fresh();
    for at in [10, 20, 30] {
        store.append_blocking(&completion(at, at, "p")).unwrap();
    }
    let times = |range: (Bound<u64>, Bound<u64>)| -> Vec<u64> {
        let range = (range.0.map(Timestamp), range.1.map(Timestamp));
        store.completions(range).map(|found| found.unwrap().at.0).collect()
    };
    assert_eq!(times((Unbounded, Unbounded)), [10, 20, 30]);
    assert_eq!(times((Included(20), Unbounded)), [20, 30]);
    assert_eq!(times((Excluded(20), Included(30))), [30]);
    assert_eq!(times((Included(10), Excluded(20))), [10]);
    assert_eq!(times((Included(30), Excluded(10))), [0; 0]);
    assert_eq!(times((Included(u64::MAX), Included(u64::MAX))), [0; 0]);
}

#[test]
fn what_cannot_be_attached() {
    let (_dir, store) = fresh();
    let (a, b) = (completion(1, 1, "p"), completion(2, 2, "q"));
    store.append_blocking(&a).unwrap();
    store.append_blocking(&b).unwrap();
    let unknown = CompletionId(id(3, 3));
    let refused = |feedback: Feedback| store.attach_blocking(&feedback).unwrap_err();
    assert!(matches!(refused(thumbs(4, 4, unknown, None)), Error::UnknownCompletion { id } if id == unknown));
    assert!(
        matches!(refused(comparison(4, 4, a.id, unknown)), Error::UnknownCompletion { id } if id == unknown)
    );
    assert!(matches!(refused(comparison(4, 4, a.id, b.id)), Error::DifferentPrompts { .. }));
    assert!(matches!(refused(comparison(4, 4, a.id, a.id)), Error::Invalid { field: "rejected", .. }));
    let stars = Judgement::Rating { stars: 6 };
    assert!(matches!(
        refused(feedback(4, 4, stars, Some(a.id), None)),
        Error::Invalid { field: "value", .. }
    ));
    let nothing = feedback(4, 4, Judgement::Thumbs { up: true }, None, None);
    assert!(matches!(refused(nothing), Error::Invalid { field: "completion_id", .. }));
    assert!(matches!(store.append_blocking(&a), Err(Error::Duplicate { .. })));
    let not_finite = Completion { helpfulness: f64::NAN, ..completion(5, 5, "p") };
    assert!(matches!(store.append_blocking(&not_finite), Err(Error::Invalid { field: "helpfulness", .. })));
    assert_eq!(seqs(&store), [0, 1]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn one_of_many_with_the_same_key_is_stored() {
    let (_dir, store) = fresh();
    let answer = completion(1, 1, "p");
    store.append(&answer).await.unwrap();
    let tasks: Vec<_> = (0..64)
        .map(|n| {
            let (store, of) = (Arc::clone(&store), answer.id);
            tokio::spawn(async move { store.attach(&thumbs(2, n, of, Some("once"))).await.unwrap() })
        })
        .collect();
    let mut stored = 0;
    for task in tasks {
        match task.await.unwrap() {
            Attached::Stored => stored += 1,
            Attached::Seen(first) => assert!(store.feedback_by_id(first).unwrap().is_some()),
        }
    }
    assert_eq!((stored, store.feedback_of(answer.id).unwrap().len()), (1, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn writers_share_flushes() {
    let (_dir, store) = fresh();
    let answer = completion(1, 1, "p");
    store.append(&answer).await.unwrap();
    let before = store.flushes();
    let tasks: Vec<_> = (0..500)
        .map(|n| {
            let (store, of) = (Arc::clone(&store), answer.id);
            tokio::spawn(async move { store.attach(&thumbs(2, n, of, None)).await.unwrap() })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert!(store.flushes() - before < 250, "{} flushes", store.flushes() - before);
}

/// `cargo test --release store::tests::grouping -- --ignored --nocapture`
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn grouping() {
    for writers in [1_u64, 8, 64, 512] {
        let (_dir, store) = fresh();
        let answer = completion(1, 1, "p");
        store.append(&answer).await.unwrap();
        let (each, before, start) =
            (if writers == 1 { 500 } else { 20_000 / writers }, store.flushes(), Instant::now());
        let tasks: Vec<_> = (0..writers)
            .map(|writer| {
                let (store, of) = (Arc::clone(&store), answer.id);
                tokio::spawn(async move {
                    for n in 0..each {
                        let key = format!("{writer}-{n}");
                        store.attach(&thumbs(2, writer << 32 | n, of, Some(&key))).await.unwrap();
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        let (all, flushes) = (writers * each, store.flushes() - before);
        let rate = all as f64 / start.elapsed().as_secs_f64();
        let (records, files) = (store.counts().bytes, store.size_bytes().unwrap());
        println!("{writers} writers: {rate:.0}/s, {flushes} flushes for {all}, {records} bytes in {files}");
    }
}

#[test]
fn retention_by_age_takes_the_feedback_along() {
    let dir = TempDir::new().unwrap();
    let config = Config { retention_days: 1.0, ..config(&dir) };
    let store = Store::open(&config).unwrap();
    let (old, young) = (completion(1, 1, "p"), completion(DAY_MS, 2, "p"));
    store.append_blocking(&old).unwrap();
    store.append_blocking(&young).unwrap();
    let texts = Judgement::TextComparison {
        prompt: Prompt::Text("p".to_owned()),
        chosen: "x".to_owned(),
        rejected: "y".to_owned(),
    };
    let pair = comparison(DAY_MS, 3, young.id, old.id);
    let kept = thumbs(DAY_MS, 4, young.id, None);
    for feedback in [thumbs(2, 5, old.id, Some("k")), feedback(3, 6, texts, None, None), pair, kept.clone()] {
        assert_eq!(store.attach_blocking(&feedback).unwrap(), Attached::Stored);
    }
    let removed = store.retain(Timestamp(DAY_MS + 2)).unwrap();
    assert_eq!((removed.completions, removed.feedback), (1, 2));
    assert_eq!(store.completion(old.id).unwrap(), None);
    assert_eq!(store.feedback_of(young.id).unwrap(), std::slice::from_ref(&kept));
    assert_eq!(seqs(&store), [1, 3, 5]);
    // The text comparison's journal line comes behind the younger completion, and goes with it.
    let removed = store.retain(Timestamp(3 * DAY_MS)).unwrap();
    assert_eq!((removed.completions, removed.feedback), (1, 2));
    assert_eq!(store.counts(), Counts { next_seq: 6, ..Counts::default() });
    // Nothing is left but the three keys of the store itself.
    assert_eq!(store.db.len(), 3);
    let again = completion(4 * DAY_MS, 9, "p");
    store.append_blocking(&again).unwrap();
    assert_eq!(seqs(&store), [6]);
    // The key is free again.
    assert_eq!(
        store.attach_blocking(&thumbs(4 * DAY_MS, 10, again.id, Some("k"))).unwrap(),
        Attached::Stored
    );
}

#[tokio::test]
async fn an_upstreams_name_leads_to_the_answer_as_long_as_it_is_there() {
    let (_dir, store) = fresh();
    let (a, b, c) = (completion(1, 1, "p"), completion(2, 2, "p"), completion(2 * DAY_MS, 3, "p"));
    store.append_named(&a, Some("chatcmpl-1")).await.unwrap();
    store.append_named(&b, Some("chatcmpl-1#1")).await.unwrap();
    let named = |name: &str| store.named(name).unwrap();
    assert_eq!(
        (named("chatcmpl-1"), named("chatcmpl-1#1"), named("chatcmpl-2")),
        (Some(a.id), Some(b.id), None)
    );
    // A service that says the same name again means its newer answer.
    store.append_named(&c, Some("chatcmpl-1#1")).await.unwrap();
    assert_eq!(named("chatcmpl-1#1"), Some(c.id));
    let keys = || store.db.iter().keys().filter(|key| b"no".contains(&key.as_ref().unwrap()[0])).count();
    // Two names and three conversations, and where each completion's are.
    assert_eq!(keys(), 8);
    assert_eq!(store.retain(Timestamp(91 * DAY_MS)).unwrap().completions, 2);
    assert_eq!((named("chatcmpl-1"), named("chatcmpl-1#1")), (None, Some(c.id)));
    assert_eq!(keys(), 3);
}

#[test]
fn a_conversation_leads_to_the_answer_that_ended_it() {
    let (_dir, store) = fresh();
    let told = |role, content: &str| Message { role, content: content.to_owned() };
    let mut a = completion(1, 1, "p");
    a.prompt = Prompt::Chat(vec![told(Role::System, "Be brief."), told(Role::User, "A river?")]);
    a.answer = " The Danube.\n".to_owned();
    store.append_blocking(&a).unwrap();
    let mut turns = vec![told(Role::System, "Be brief."), told(Role::User, "A river?")];
    assert_eq!(store.answered(&turns).unwrap(), None);
    // Clients trim.
    turns.push(told(Role::Assistant, "The Danube."));
    assert_eq!(store.answered(&turns).unwrap(), Some(a.id));
    assert_eq!(store.answered(&turns[1..]).unwrap(), None);
    turns[2].content = "The Rhine.".to_owned();
    assert_eq!(store.answered(&turns).unwrap(), None);
}

#[test]
fn retention_by_size_takes_the_oldest() {
    let dir = TempDir::new().unwrap();
    let store = Store::open(&config(&dir)).unwrap();
    let sends: Vec<_> = (1..=600)
        .map(|n| {
            let (answer, rx) = mpsc::channel();
            let draft = codec::completion(&completion(n, n, "p"), &store.salt, false).unwrap();
            let reply = move |done: Result<Done, Error>| answer.send(done.is_ok()).unwrap();
            store.writer.send(Change::Append { draft, names: Vec::new() }, Box::new(reply)).unwrap();
            rx
        })
        .collect();
    assert!(sends.into_iter().all(|rx| rx.recv().unwrap()));
    let bytes = store.counts().bytes;
    drop(store);
    let store = Store::open(&Config { retention_bytes: bytes / 10, ..config(&dir) }).unwrap();
    let removed = store.retain(Timestamp(1)).unwrap();
    let left = store.counts();
    assert_eq!(removed.completions + left.completions, 600);
    assert!(left.bytes <= bytes / 10 && left.completions >= 55, "{left:?}");
    assert_eq!(store.completions(..).next().unwrap().unwrap().at.0, removed.completions + 1);
}

#[test]
fn a_rater_is_forgotten() {
    let (_dir, store) = fresh();
    let answer = completion(1, 1, "p");
    store.append_blocking(&answer).unwrap();
    let other = Feedback { rater: Some("bob".to_owned()), ..thumbs(3, 3, answer.id, None) };
    store.attach_blocking(&thumbs(2, 2, answer.id, Some("k"))).unwrap();
    store.attach_blocking(&other).unwrap();
    assert_eq!(store.forget("ann").unwrap(), [FeedbackId(id(2, 2))]);
    assert_eq!(store.feedback_of(answer.id).unwrap(), [other]);
    assert_eq!(store.forget("ann").unwrap(), []);
}

#[test]
fn redacted_records_keep_numbers_and_no_words() {
    let dir = TempDir::new().unwrap();
    let store = Store::open(&Config { redact: true, ..config(&dir) }).unwrap();
    let (a, b, c) =
        (completion(1, 1, "secret"), completion(2, 2, "secret"), completion(3, 3, "other secret"));
    for completion in [&a, &b, &c] {
        store.append_blocking(completion).unwrap();
    }
    store.attach_blocking(&comparison(4, 4, a.id, b.id)).unwrap();
    let error = store.attach_blocking(&comparison(5, 5, a.id, c.id)).unwrap_err();
    assert!(matches!(error, Error::DifferentPrompts { .. }));
    let kept = store.completion(a.id).unwrap().unwrap();
    assert_eq!(kept.prompt, Prompt::Chat(vec![Message::user("")]));
    assert_eq!((kept.answer.as_str(), kept.helpfulness, kept.completion_tokens), ("", 0.5, 5));
    for item in store.db.iter() {
        let (_, value) = item.unwrap();
        let text = String::from_utf8_lossy(&value).into_owned();
        assert!(!text.contains("secret") && !text.contains("answer 1") && !text.contains("well"), "{text}");
    }
}

#[test]
fn long_records_are_cut_and_joined() {
    let (dir, store) = fresh();
    let long = Completion { answer: "ä".repeat(200_000), ..completion(1, 1, "p") };
    store.append_blocking(&long).unwrap();
    store.append_blocking(&completion(2, 2, "p")).unwrap();
    store.save_monitor(&vec![7; 100_000], 5).unwrap();
    store.save_monitor(&vec![8; 7_000], 6).unwrap();
    assert_eq!(store.load_monitor().unwrap(), Some((vec![8; 7_000], 6)));
    drop(store);
    let store = Store::open(&config(&dir)).unwrap();
    assert_eq!(store.completion(long.id).unwrap(), Some(long));
    assert_eq!(store.load_monitor().unwrap(), Some((vec![8; 7_000], 6)));
    assert_eq!(store.completions(..).rev().map(|found| found.unwrap().at.0).collect::<Vec<_>>(), [2, 1]);
    assert_eq!(fs::read_dir(dir.path().join("store/blobs")).unwrap().count(), 0);
}

#[test]
fn updates_newest_first() {
    let (_dir, store) = fresh();
    let update = |n| Update {
        id: id(n, n),
        at: Timestamp(n),
        trigger: Trigger::Hand,
        recipe: "ppo".to_owned(),
        interactions: vec![],
        base: Version(0),
        state: UpdateState::Running { stage: "ppo".to_owned(), progress: 0.5 },
        feedback: vec![],
        measures: BTreeMap::from([("nan".to_owned(), f64::NAN), ("kl".to_owned(), 1.0)]),
        data: None,
        proof: None,
        canary: None,
    };
    for n in [2, 1, 3] {
        store.put_update(&update(n)).unwrap();
    }
    let found: Vec<_> = store.updates(2).unwrap().into_iter().map(|update| update.at.0).collect();
    assert_eq!(found, [3, 2]);
    assert_eq!(store.update(id(1, 1)).unwrap().unwrap().measures, BTreeMap::from([("kl".to_owned(), 1.0)]));
    assert_eq!(store.update(id(9, 9)).unwrap(), None);
    store.put_blob("x", b"y").unwrap();
    assert_eq!((store.blob("x").unwrap(), store.blob("z").unwrap()), (Some(b"y".to_vec()), None));
}

#[test]
fn a_full_disk_refuses_writes_and_keeps_reading() {
    let (dir, store) = fresh();
    let answer = completion(1, 1, "p");
    store.append_blocking(&answer).unwrap();
    drop(store);
    let store = Store::open(&Config { reserve_bytes: u64::MAX, ..config(&dir) }).unwrap();
    assert!(matches!(store.attach_blocking(&thumbs(2, 2, answer.id, None)), Err(Error::Full { .. })));
    assert!(matches!(store.check(), Err(Error::Full { .. })));
    assert_eq!(store.completion(answer.id).unwrap(), Some(answer));
    assert!(matches!(store.retain(Timestamp(1000 * DAY_MS)), Err(Error::Full { .. })));
    drop(store);
    let free = fs2::available_space(dir.path()).unwrap();
    let store = Store::open(&Config { reserve_bytes: free + free / 2, ..config(&dir) }).unwrap();
    assert!(matches!(store.append_blocking(&completion(3, 3, "p")), Err(Error::Full { .. })));
    assert_eq!(store.retain(Timestamp(1000 * DAY_MS)).unwrap().completions, 1);
    let full = Error::from(sled::Error::Io(io::Error::from_raw_os_error(28)).clone());
    assert!(matches!(full, Error::Full { .. }));
}

#[test]
fn a_newer_schema_and_a_held_lock_are_refused() {
    let (dir, store) = fresh();
    assert!(matches!(Store::open(&config(&dir)), Err(Error::Locked { .. })));
    store.db.insert(key::SCHEMA, &2_u64.to_be_bytes()).unwrap();
    drop(store);
    assert!(matches!(Store::open(&config(&dir)), Err(Error::Schema { found: 2, supported: 1 })));
}

#[test]
fn records_of_format_1_can_be_read() {
    let mut record = vec![1];
    record.extend_from_slice(&[0; 32]);
    record.extend_from_slice(
        br#"{"id":"00000000-0001-7000-8000-000000000001","at":1,"version":2,"interaction":"code","prompt":[{"role":"user",
        "content":"p"}],"answer":"a","finish_reason":"length","prompt_tokens":3,"completion_tokens":5,"refusal":{"label":
        "partial","probability":0.5},"risk":"harmful","helpfulness":0.5,"kl":null,"seconds":1.5,"user":null,"metadata":{}}"#,
    );
    let completion: Completion = codec::decode(&record).unwrap();
    assert_eq!((completion.version, completion.finish_reason), (Version(2), FinishReason::Length));
    record.truncate(33);
    record.extend_from_slice(
        br#"{"id":"00000000-0001-7000-8000-000000000002","at":1,"completion":"00000000-0001-7000-8000-000000000001",
        "judgement":{"kind":"rating","stars":4},"rater":"ann","source":"ai","comment":null,"idempotency_key":"k","tags":{}}"#,
    );
    let feedback: Feedback = codec::decode(&record).unwrap();
    assert_eq!((feedback.judgement, feedback.source), (Judgement::Rating { stars: 4 }, Source::Ai));
    record[0] = 9;
    assert!(matches!(codec::decode::<Feedback>(&record), Err(Error::Corrupt(_))));
}

/// What the counts, the journal and the indexes say of each other.
#[track_caller]
fn consistent(store: &Store) {
    let counts = store.counts();
    let completions: Vec<_> = store.completions(..).map(Result::unwrap).collect();
    let feedback: Vec<_> = store.feedback().map(Result::unwrap).collect();
    assert_eq!((counts.completions, counts.feedback), (completions.len() as u64, feedback.len() as u64));
    let events = store.events_since(0, usize::MAX).unwrap();
    assert_eq!(events.len(), completions.len() + feedback.len());
    assert_eq!(store.db.scan_prefix([key::JOURNAL]).count(), events.len());
    assert!(events.last().is_none_or(|(seq, _)| *seq < counts.next_seq));
    let indexed: usize = completions.iter().map(|found| store.feedback_of(found.id).unwrap().len()).sum();
    let subjects: usize = feedback.iter().map(|found| Subjects::of(found).unwrap().ids().count()).sum();
    assert_eq!((indexed, store.db.scan_prefix([key::FEEDBACK_OF]).count()), (subjects, subjects));
}
