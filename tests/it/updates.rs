//! The loop's second half: alarms, updates, versions, swaps under load.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use gyrostat::{
    completion::{Timestamp, Version},
    policy::{Adapter, Device, Model, Shape},
    registry::Origin,
};
use serde_json::json;

use super::harness::{Running, start, start_with};

/// Puts an adapter that changes the answers on disk, as an update would.
pub(crate) fn stage(running: &Running, seed: u64) -> Version {
    let model = Model::load(running.dir.path().join("tiny").to_str().unwrap(), Device::Cpu).unwrap();
    let architecture = &model.decoder.architecture;
    let shape = Shape { rank: 2, alpha: 64.0, first_layer: 0, heads: 0 };
    let fresh = Adapter::new(architecture, shape, seed).unwrap();
    let moved: Vec<Vec<f32>> =
        fresh.parameters().unwrap().into_iter().map(|p| p.into_iter().map(|p| p + 0.05).collect()).collect();
    let adapter = fresh.with_parameters(&moved).unwrap();
    let reward = Adapter::new(architecture, Shape { heads: 1, ..shape }, seed).unwrap();
    let write = |dir: &std::path::Path| {
        adapter.save(dir, "tiny")?;
        std::fs::create_dir(dir.join("reward"))?;
        reward.save(&dir.join("reward"), "tiny")
    };
    running.app.state.registry.stage(write, Origin::default(), Timestamp(1)).unwrap().version
}

pub(crate) async fn promote(running: &Running, version: Version) -> u16 {
    running.post(&format!("/v1/versions/{version}/promote"), &json!({})).await.0
}

#[tokio::test(flavor = "multi_thread")]
async fn no_request_fails_while_versions_are_swapped() {
    let running = Arc::new(start().await);
    let before = running.chat("chat", 4).await.1;
    let version = stage(&running, 1);
    let stop = Arc::new(AtomicBool::new(false));
    let load: Vec<_> = (0..8)
        .map(|worker| {
            let (running, stop) = (Arc::clone(&running), Arc::clone(&stop));
            tokio::spawn(async move {
                let mut answered = 0;
                while !stop.load(Ordering::Relaxed) {
                    running.chat("chat", worker * 1000 + answered).await;
                    answered += 1;
                }
                answered
            })
        })
        .collect();
    for round in 0..20 {
        let version = if round % 2 == 0 { version } else { Version(0) };
        assert_eq!(promote(&running, version).await, 200);
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    stop.store(true, Ordering::Relaxed);
    for worker in load {
        assert!(worker.await.unwrap() > 0);
    }
    // After an even number of swaps the base serves again, and answers as before.
    assert_eq!(running.chat("chat", 4).await.1, before);
    assert_eq!(promote(&running, version).await, 200);
    assert_ne!(running.chat("chat", 4).await.1, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_from_elsewhere_is_taken_in_and_served_when_promoted() {
    let running = start().await;
    let before = running.chat("chat", 4).await.1;
    let trained = stage(&running, 1);
    let dir = running.app.state.registry.path(trained).unwrap();
    let (status, taken) =
        running.post("/v1/versions", &json!({ "adapter": dir, "note": "continued elsewhere" })).await;
    assert_eq!(
        (status, &taken["version"], &taken["state"]),
        (201, &json!(trained.0 + 1), &json!("staged")),
        "{taken}"
    );
    assert_eq!(running.chat("chat", 4).await.1, before, "nothing is served before it is promoted");
    assert_eq!(promote(&running, Version(trained.0 + 1)).await, 200);
    assert_ne!(running.chat("chat", 4).await.1, before);
    for wrong in ["/nowhere", running.dir.path().join("tiny").to_str().unwrap()] {
        let (status, refused) = running.post("/v1/versions", &json!({ "adapter": wrong })).await;
        assert_eq!((status, &refused["error"]["param"]), (400, &json!("adapter")), "{refused}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_promoted_version_serves_after_a_restart() {
    let running = start().await;
    let version = stage(&running, 1);
    assert_eq!(promote(&running, version).await, 200);
    let answer = running.chat("chat", 4).await.1;
    let running = running.restart().await;
    assert_eq!(running.chat("chat", 4).await.1, answer);
    assert_eq!(running.get("/v1/versions").await["active"], 1);

    let weights = running.dir.path().join("data/versions/v0001/adapter_model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&weights, bytes).unwrap();
    assert_eq!(promote(&running, Version(0)).await, 200);
    assert_eq!(promote(&running, version).await, 409, "a corrupt adapter is refused");
    assert_eq!(running.get("/v1/versions").await["active"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn unhappy_users_of_one_type_raise_its_alarm() {
    let running = start_with(|config| config.cycle.learn_on_alarm = false).await;
    for seed in 0..36 {
        assert_eq!(running.judged("advice", seed, if seed % 9 == 0 { "down" } else { "up" }).await, 201);
        assert_eq!(running.judged("code", seed, if seed % 9 == 4 { "down" } else { "up" }).await, 201);
    }
    for seed in 100..140 {
        running.judged("advice", seed, "down").await;
    }
    let alarm = running
        .wait("/v1/alarms", |body| {
            let found = body["data"].as_array()?.iter().find(|alarm| alarm["interaction"].is_string());
            found.cloned()
        })
        .await;
    assert_eq!(
        (&alarm["signal"], &alarm["interaction"], &alarm["direction"]),
        (&json!("satisfaction"), &json!("advice"), &json!("down"))
    );
    assert_eq!(alarm["examples"].as_array().unwrap().len(), 10);
    let (status, seen) =
        running.post(&format!("/v1/alarms/{}/acknowledge", alarm["id"].as_str().unwrap()), &json!({})).await;
    assert_eq!((status, &seen["acknowledged"]), (200, &json!(true)));

    // Over a restart the alarm, the state and the place in the journal are kept.
    let n = |body: &serde_json::Value| {
        let rows = body["signals"].as_array().unwrap();
        rows.iter().map(|row| row["n"].as_u64().unwrap()).sum::<u64>()
    };
    // Each judged answer is a refusal, a helpfulness and a satisfaction reading of its type and of the whole.
    running.wait("/v1/alignment", |body| (n(body) >= 112 * 6).then_some(())).await;
    let before = n(&running.get("/v1/alignment").await);
    let running = running.restart().await;
    assert_eq!(n(&running.get("/v1/alignment").await), before);
    let (_, reset) =
        running.post("/v1/baseline", &json!({ "signal": "satisfaction", "interaction": "advice" })).await;
    assert_eq!(reset["reset"], 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_by_hand_learns_and_meets_the_gate() {
    let running = start().await;
    for seed in 0..60 {
        running.judged("advice", seed, if seed % 3 == 0 { "down" } else { "up" }).await;
    }
    let (status, update) =
        running.post("/v1/updates", &json!({ "recipe": "ppo", "interactions": ["advice"] })).await;
    assert_eq!(status, 202, "{update}");
    assert_eq!(running.post("/v1/updates", &json!({})).await.0, 409);
    let path = format!("/v1/updates/{}", update["id"].as_str().unwrap());
    let ended = running.wait(&path, |body| (body["state"] == "ended").then(|| body.clone())).await;
    // One iteration on a random model proves nothing, so that the gate has to say no, with its reasons.
    assert_eq!(ended["outcome"], "rejected", "{ended}");
    assert!(ended["reasons"][0].as_str().unwrap().starts_with("failed"), "{ended}");
    assert!(ended["measures"]["val/ratio"].as_f64().is_some(), "{ended}");
    assert!(ended["feedback"].as_array().unwrap().len() >= 55, "{ended}");
    assert_eq!(running.get("/v1/versions").await["active"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_learns_again_from_a_share_of_what_was_said_of_earlier_versions() {
    let running = start().await;
    for seed in 0..40 {
        running.judged("advice", seed, if seed % 3 == 0 { "down" } else { "up" }).await;
    }
    let version = stage(&running, 5);
    assert_eq!(promote(&running, version).await, 200);
    for seed in 100..120 {
        running.judged("advice", seed, if seed % 3 == 0 { "down" } else { "up" }).await;
    }
    let (_, update) = running.post("/v1/updates", &json!({ "recipe": "kto" })).await;
    let path = format!("/v1/updates/{}", update["id"].as_str().unwrap());
    let ended = running.wait(&path, |body| (body["state"] == "ended").then(|| body.clone())).await;
    let data = &ended["data"];
    assert_eq!(data["rehearsed"], 10, "{ended}");
    assert_eq!(data["left_out"]["about other versions"], 30, "{ended}");
    assert_eq!(data["found"], 30, "{ended}");
}
