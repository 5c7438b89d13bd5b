//! Pairs for people and for judge models, over HTTP.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use axum::{body::Body, http::Response};
use gyrostat::{
    comparisons::Judge,
    completion::{Feedback, Judgement, Source},
    config::Config,
    learn::dataset,
    signals,
};
use serde_json::{Value, json};

use super::{
    description::Description,
    harness::{Running, start, start_with},
    stub::{Seen, Stub, json_answer, said, upstream},
};

const NEXT: &str = "/v1/comparisons/next";
const JSON: &str = "application/json";

impl Running {
    /// Two answers to each of so many questions.
    async fn twice(&self, questions: u64) {
        for seed in 0..questions {
            self.chat("chat", seed).await;
            self.chat("chat", seed + 40).await;
        }
    }

    async fn next_for(&self, rater: &str) -> (u16, Value) {
        let answer = self.client.get(self.url(&format!("{NEXT}?rater={rater}"))).send().await.unwrap();
        (answer.status().as_u16(), answer.json().await.unwrap())
    }

    async fn choose(&self, id: &Value, body: Value) -> (u16, Value) {
        self.post(&format!("/v1/comparisons/{}", id.as_str().unwrap()), &body).await
    }

    /// Compares so many pairs as `better` has it, of the answers that are shown.
    async fn compare(&self, pairs: usize, rater: &str, better: impl Fn(&str, &str) -> bool) {
        for _ in 0..pairs {
            let (status, pair) = self.next_for(rater).await;
            assert_eq!(status, 200, "{pair}");
            let text = |side: &str| pair[side].as_str().unwrap().to_owned();
            let choice = if better(&text("a"), &text("b")) { "a" } else { "b" };
            let (status, body) = self.choose(&pair["id"], json!({ "choice": choice, "rater": rater })).await;
            assert_eq!(status, 201, "{body}");
        }
    }

    fn preferences(&self) -> Vec<Feedback> {
        self.app.state.store.feedback().collect::<Result<_, _>>().unwrap()
    }

    fn trust(&self) -> dataset::trust::Trust {
        let records: Vec<_> = self.app.state.store.judged(..).collect::<Result<_, _>>().unwrap();
        dataset::trusted(&records, &dataset::Config::default(), &signals::satisfaction)
    }

    async fn asked(&self, outcome: &str) -> u64 {
        self.metric(&format!(r#"gyrostat_ai_comparisons_total{{outcome="{outcome}"}}"#)).await
    }

    async fn until(&self, outcomes: &[&str], count: u64) {
        for _ in 0..600 {
            let mut sum = 0;
            for outcome in outcomes {
                sum += self.asked(outcome).await;
            }
            if sum >= count {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        panic!("{outcomes:?} never came to {count}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pair_is_compared_once_by_each_rater_and_learned_from() {
    let running = start().await;
    let mut about = Description::of(&running).await;
    running.twice(2).await;
    let (status, pair) = running.next_for("ann").await;
    assert_eq!(status, 200, "{pair}");
    about.check("get", NEXT, "200", JSON, &pair);
    assert_eq!(running.next_for("ann").await.1, pair, "it is shown until it is answered");
    assert_ne!(pair["a"], pair["b"]);
    let body = json!({ "choice": "b", "rater": "ann", "comment": "shorter" });
    let (status, chosen) = running.choose(&pair["id"], body.clone()).await;
    assert_eq!(status, 201, "{chosen}");
    about.check("post", "/v1/comparisons/{id}", "201", JSON, &chosen);
    assert_eq!(running.choose(&pair["id"], body).await, (200, chosen.clone()));

    let [kept] = running.preferences().try_into().unwrap();
    let Judgement::TextComparison { prompt, chosen: better, rejected } = &kept.judgement else {
        panic!("{kept:?}")
    };
    assert_eq!((json!(better), json!(rejected)), (pair["b"].clone(), pair["a"].clone()));
    assert_eq!(json!(prompt), pair["prompt"]);
    assert_eq!((kept.rater.as_deref(), kept.source), (Some("ann"), Source::Human));
    assert_eq!(running.metric(r#"gyrostat_feedback_total{kind="comparison",source="human"}"#).await, 1);

    let (_, other) = running.next_for("ann").await;
    assert_ne!(other["prompt"], pair["prompt"]);
    let tie = running.choose(&other["id"], json!({ "choice": "tie" })).await;
    assert_eq!(tie, (200, json!({ "id": null })));
    // Bob gets what Ann has compared, so that there is something to agree on.
    let (_, bobs) = running.next_for("bob").await;
    assert_eq!(bobs["prompt"], pair["prompt"]);
    assert_eq!(running.choose(&bobs["id"], json!({ "choice": "a", "rater": "bob" })).await.0, 201);

    let records: Vec<_> = running.app.state.store.judged(..).collect::<Result<_, _>>().unwrap();
    let learned = dataset::Dataset::build(records, &dataset::Config::default(), &signals::satisfaction);
    assert_eq!(learned.comparisons.len(), 2);
    // Of two answers one is always better: that is no reading of satisfaction.
    let satisfied = running.get("/v1/alignment").await["signals"]
        .as_array()
        .unwrap()
        .iter()
        .any(|row| row["signal"] == "satisfaction");
    assert!(!satisfied);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_answer_is_sampled_where_a_prompt_has_one() {
    let running = start().await;
    let (status, none) = running.next_for("ann").await;
    assert_eq!((status, &none["error"]["code"]), (404, &json!("no_pair")));
    let (_, text) = running.chat("chat", 1).await;
    let (status, pair) = running.next_for("ann").await;
    assert_eq!(status, 200, "{pair}");
    assert!([&pair["a"], &pair["b"]].contains(&&json!(text)), "{pair}");
    assert_eq!(running.choose(&pair["id"], json!({ "choice": "a", "rater": "ann" })).await.0, 201);
    // Nobody was given the second answer, so that it is no traffic.
    assert_eq!(running.app.state.store.counts().completions, 1);
    assert_eq!(running.next_for("bob").await.1["prompt"], pair["prompt"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fault_names_its_field() {
    let running = start().await;
    running.twice(1).await;
    let (_, pair) = running.next_for("ann").await;
    for (body, field) in [
        (json!({}), "choice"),
        (json!({ "choice": "c" }), "choice"),
        (json!({ "choice": 1 }), "choice"),
        (json!({ "choice": "a", "rater": "" }), "rater"),
        (json!({ "choice": "a", "rater": 7 }), "rater"),
        (json!({ "choice": "a", "comment": [] }), "comment"),
        (json!({ "choice": "a", "preferred": "a" }), "preferred"),
    ] {
        let (status, answer) = running.choose(&pair["id"], body).await;
        assert_eq!((status, &answer["error"]["param"]), (422, &json!(field)), "{answer}");
    }
    assert!(running.preferences().is_empty());
    let unknown = json!("0190a0b0-0000-7000-8000-000000000001");
    for id in [&unknown, &json!("none")] {
        let (status, answer) = running.choose(id, json!({ "choice": "a" })).await;
        assert_eq!((status, &answer["error"]["param"]), (404, &json!("id")), "{answer}");
    }
    let long = format!("rater={}", "x".repeat(300));
    for (query, field) in [("rater=", "rater"), ("colour=red", "colour"), (&long, "rater")] {
        let answer = running.client.get(running.url(&format!("{NEXT}?{query}"))).send().await.unwrap();
        assert_eq!(answer.status(), 400, "{query}");
        let body: Value = answer.json().await.unwrap();
        assert_eq!(body["error"]["param"], field, "{body}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_needs_the_scope_of_feedback_and_nothing_from_elsewhere() {
    let keys = r#"[{"key":"f","scopes":["feedback"]},{"key":"c","scopes":["chat"]}]"#;
    let running = start_with(|config| config.http.keys = serde_json::from_str(keys).unwrap()).await;
    let page = async |key: Option<&str>| {
        let request = running.client.get(running.url("/label"));
        // A browser sends what its user types as a password.
        let request = if let Some(key) = key { request.basic_auth("me", Some(key)) } else { request };
        request.send().await.unwrap()
    };
    let refused = page(None).await;
    assert_eq!(refused.status(), 401);
    assert!(refused.headers()["www-authenticate"].to_str().unwrap().starts_with("Basic"));
    assert_eq!(page(Some("c")).await.status(), 403);
    let shown = page(Some("f")).await;
    assert_eq!(shown.status(), 200);
    assert!(shown.headers()["content-security-policy"].to_str().unwrap().contains("default-src 'none'"));
    let text = shown.text().await.unwrap();
    assert!(text.contains("v1/comparisons/next"));
    assert!(!text.contains("http://") && !text.contains("https://") && !text.contains("innerHTML"));
    let next = running.client.get(running.url(NEXT)).bearer_auth("c").send().await.unwrap();
    assert_eq!(next.status(), 403);
}

/// What a judge is shown as A and as B.
fn shown(seen: &Seen) -> [String; 2] {
    let body: Value = serde_json::from_slice(&seen.body).unwrap();
    let question = body["messages"][0]["content"].as_str().unwrap().to_owned();
    assert_eq!(body["temperature"], 0.0);
    ["answer_a", "answer_b"].map(|tag| {
        let (_, rest) = question.split_once(&format!("<{tag}>\n")).unwrap();
        rest.split_once(&format!("\n</{tag}>")).unwrap().0.to_owned()
    })
}

/// A sidecar over the same data, whose judge is the stub and compares so many pairs.
async fn judged_by(stub: &Stub, pairs: usize, running: Running) -> Running {
    let url = stub.url();
    let changed = running.restart_with(move |config| {
        config.ai_feedback.judge = Judge::Service(url);
        config.ai_feedback.per_update = pairs;
        config.ai_feedback.every_seconds = 0.01;
    });
    changed.await
}

fn shorter(a: &str, b: &str) -> bool {
    (a.len(), a) < (b.len(), b)
}

async fn judge_that_prefers_the_shorter() -> Stub {
    upstream(|seen: Seen| async move {
        let [a, b] = shown(&seen);
        let letter = if shorter(&a, &b) { "Answer A is better." } else { "**B**" };
        json_answer(200, &said("j", letter))
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_judge_who_always_says_a_teaches_nothing() {
    let stub = upstream(|_| async { json_answer(200, &said("j", "A")) }).await;
    let running = start().await;
    running.twice(4).await;
    let running = judged_by(&stub, 4, running).await;
    running.until(&["tie_by_order"], 4).await;
    assert_eq!(stub.seen().len(), 8, "each pair is asked twice");
    assert_eq!((running.asked("preferred").await, running.asked("failed").await), (0, 0));
    assert!(running.preferences().is_empty());
    assert!(running.trust().weights.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_judge_counts_as_far_as_people_agree() {
    let stub = judge_that_prefers_the_shorter().await;
    let running = start().await;
    for seed in 20..28 {
        running.judged("chat", seed, "up").await;
    }
    running.twice(6).await;
    let running = judged_by(&stub, 6, running).await;
    running.until(&["preferred"], 6).await;
    let said = running.preferences().into_iter().filter(|said| said.source == Source::Ai);
    for said in said {
        assert_eq!(said.rater.as_deref(), Some("ai:base"));
        let Judgement::TextComparison { chosen, rejected, .. } = &said.judgement else { panic!("{said:?}") };
        assert!(shorter(chosen, rejected), "{chosen:?} over {rejected:?}");
    }
    let before = running.trust();
    assert_eq!((before.judges[0].judgements, before.judges[0].shared), (6, 0));
    assert_eq!(before.judges[0].weight, 0.25, "nobody has compared the same yet");
    running.compare(6, "ann", shorter).await;
    let after = running.trust();
    assert_eq!((after.judges[0].shared, after.judges[0].agreement), (6, Some(1.0)));
    assert!(after.judges[0].weight > 0.3, "{:?}", after.judges);
    assert_eq!((before.raters, after.raters), (8, 9), "a judge is no person");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_judge_whom_people_contradict_counts_for_nothing() {
    let stub = judge_that_prefers_the_shorter().await;
    let running = start().await;
    running.twice(6).await;
    running.compare(6, "ann", |a, b| !shorter(a, b)).await;
    let running = judged_by(&stub, 6, running).await;
    running.wait_metric("gyrostat_ai_shared_comparisons", 6).await;
    let judge = running.trust().judges[0].clone();
    assert_eq!((judge.agreement, judge.weight), (Some(0.0), 0.0));
    assert_eq!(running.metric("gyrostat_ai_agreement_ratio").await, 0);
    assert_eq!(running.metric("gyrostat_ai_weight_ratio").await, 0);
    assert_eq!(running.metric(r#"gyrostat_feedback_total{kind="comparison",source="ai"}"#).await, 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_judge_that_fails_is_an_outcome() {
    let failures = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&failures);
    let stub = upstream(move |_| {
        let nth = counted.fetch_add(1, Ordering::Relaxed);
        async move {
            match nth {
                0 | 1 => json_answer(500, &json!({ "error": { "message": "no" } })),
                2 | 3 => Response::new(Body::from("no JSON")),
                _ => json_answer(200, &said("j", "I cannot compare these.")),
            }
        }
    })
    .await;
    let running = start().await;
    running.twice(5).await;
    let running = judged_by(&stub, 1, running).await;
    running.until(&["unreadable"], 1).await;
    assert_eq!(running.asked("failed").await, 2);
    assert!(running.preferences().is_empty());
    assert!(!running.chat("chat", 3).await.1.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_policy_judges_behind_clients() {
    let running = start().await;
    running.twice(3).await;
    // The tiny model has a context of 512 bytes.
    let rules = running.dir.path().join("rules.md");
    std::fs::write(&rules, "Be brief.").unwrap();
    let policy = |config: &mut Config| {
        config.ai_feedback.judge = Judge::Policy;
        config.ai_feedback.constitution = Some(rules);
        config.ai_feedback.per_update = 3;
        config.ai_feedback.every_seconds = 0.01;
    };
    let running = running.restart_with(policy).await;
    running.until(&["preferred", "tie_by_order"], 3).await;
    assert_eq!((running.asked("failed").await, running.asked("unreadable").await), (0, 0));
    let said = running.preferences();
    assert_eq!(said.len() as u64, running.asked("preferred").await);
    assert!(said.iter().all(|said| said.rater.as_deref().unwrap().ends_with("/v0")));
}
