use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
};

use super::*;

const CRASH_DIR: &str = "GYROSTAT_TEST_CRASH_DIR";
const CRASH_ROUND: &str = "GYROSTAT_TEST_CRASH_ROUND";

/// The process that is killed: not a test of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[expect(clippy::disallowed_methods, reason = "the parent process says where")]
async fn crashing_child() {
    let (Ok(dir), Ok(round)) = (std::env::var(CRASH_DIR), std::env::var(CRASH_ROUND)) else { return };
    let round: u64 = round.parse().unwrap();
    let store =
        Store::open(&Config { path: PathBuf::from(dir), reserve_bytes: 0, ..Config::default() }).unwrap();
    let answer = Completion { answer: "long ".repeat(3000), ..completion(1 + round, round, "p") };
    store.append(&answer).await.unwrap();
    println!("C {}", answer.id);
    let writers = (0..8).map(|writer| {
        let (store, of) = (Arc::clone(&store), answer.id);
        tokio::spawn(async move {
            for n in 0.. {
                let feedback =
                    thumbs(100 + round, writer << 32 | n, of, Some(&format!("{round}-{writer}-{n}")));
                store.attach(&feedback).await.unwrap();
                println!("F {}", feedback.id);
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
}

#[test]
fn what_was_acknowledged_survives_kill_9() {
    let dir = TempDir::new().unwrap();
    let mut acknowledged = Vec::new();
    for round in 0..5_usize {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "store::tests::crash::crashing_child", "--nocapture"])
            .env(CRASH_DIR, dir.path())
            .env(CRASH_ROUND, round.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        let mut note = |line: String| {
            // The harness may have begun the line; a torn last line was not acknowledged to anyone.
            let words: Vec<_> = line.split_whitespace().collect();
            if let [.., kind @ ("C" | "F"), id] = words.as_slice()
                && let Ok(id) = Uuid::parse_str(id)
            {
                acknowledged.push(((*kind).to_owned(), id));
            }
        };
        lines.by_ref().take(3 + 37 * (round + 1)).for_each(&mut note);
        child.kill().unwrap();
        lines.for_each(&mut note);
        child.wait().unwrap();
        let store = Store::open(&config(&dir)).unwrap();
        for (kind, id) in &acknowledged {
            if kind == "C" {
                assert!(store.completion(CompletionId(*id)).unwrap().is_some(), "{id} of round {round}");
            } else {
                let feedback = store.feedback_by_id(FeedbackId(*id)).unwrap().unwrap();
                let again = Feedback { id: FeedbackId::new(), ..feedback };
                assert_eq!(store.attach_blocking(&again).unwrap(), Attached::Seen(FeedbackId(*id)));
            }
        }
        consistent(&store);
    }
    assert!(acknowledged.len() > 500, "{}", acknowledged.len());
}
