//! The whole story of an update, from an answer to the feedback that shaped it and back, and how a person is forgotten.

use gyrostat::config::Config;
use serde_json::{Value, json};

use super::{
    canary::lenient,
    description::Description,
    harness::{Running, start_with},
};

const JSON: &str = "application/json";

fn straight(config: &mut Config) {
    lenient(config);
    config.canary.share = 0.0;
}

fn ids(value: &Value) -> Vec<&str> {
    value.as_array().unwrap().iter().map(|id| id.as_str().unwrap()).collect()
}

impl Running {
    /// A judgement of a fresh answer; its id.
    async fn said(&self, seed: u64, rater: &str, more: Value) -> String {
        let (completion, _) = self.chat("advice", seed).await;
        let mut body = json!({ "completion_id": completion, "rater": rater });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let (status, body) = self.post("/v1/feedback", &body).await;
        assert_eq!(status, 201, "{body}");
        body["id"].as_str().unwrap().to_owned()
    }

    async fn learned(&self) -> Value {
        let update = self.post("/v1/updates", &json!({ "recipe": "ppo" })).await.1;
        let path = format!("/v1/updates/{}", update["id"].as_str().unwrap());
        self.wait(&path, |body| (body["state"] == "ended").then(|| body.clone())).await
    }

    async fn status(&self, path: &str) -> u16 {
        self.client.get(self.url(path)).send().await.unwrap().status().as_u16()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_leads_to_its_feedback_and_back_until_a_person_is_forgotten() {
    let running = start_with(straight).await;
    let mut about = Description::of(&running).await;
    for seed in 0..30 {
        running.judged("advice", seed, if seed % 3 == 0 { "down" } else { "up" }).await;
    }
    let shown = json!({ "kind": "demonstration", "value": "A secret of mine.", "comment": "mine, too" });
    let mine = running.said(50, "me/and you", shown).await;
    let thumb = json!({ "kind": "thumbs", "value": "down" });
    let again = running.said(51, "me/and you", thumb).await;
    let update = running.learned().await;
    about.check("get", "/v1/updates/{id}", "200", JSON, &update);
    assert_eq!((&update["outcome"], &update["version"]), (&json!("promoted"), &json!(1)), "{update}");
    assert!(
        update["data"]["used"].as_u64().unwrap() >= 30 && update["data"]["raters"].as_u64().unwrap() >= 29,
        "{update}"
    );
    assert!(
        update["proof"]["candidate"]["kl"].is_number() && update["proof"]["incumbent"]["length"].is_number()
    );
    assert!(ids(&update["feedback"]).contains(&mine.as_str()));

    let version = running.described_get_as(&mut about, "/v1/versions/v1", "/v1/versions/{v}").await;
    assert_eq!(
        (&version["lineage"][0]["update"], &version["lineage"][1]["version"]),
        (&update["id"], &json!(0))
    );
    let (completion, _) = running.chat("advice", 3).await;
    let path = format!("/v1/completions/{completion}/lineage");
    let answer = running.described_get_as(&mut about, &path, "/v1/completions/{id}/lineage").await;
    assert_eq!(answer["version"], 1);
    assert!(ids(&answer["lineage"][0]["feedback"]).contains(&mine.as_str()), "{answer}");
    let path = format!("/v1/feedback/{mine}");
    let back = running.described_get_as(&mut about, &path, "/v1/feedback/{id}").await;
    assert_eq!((&back["versions"], &back["updates"][0]), (&json!([1]), &update["id"]));

    let url = running.url("/v1/raters/me%2Fand%20you");
    let forgotten: Value = running.client.delete(url).send().await.unwrap().json().await.unwrap();
    about.check("delete", "/v1/raters/{id}", "200", JSON, &forgotten);
    let mut known = ids(&forgotten["feedback"]);
    known.sort_unstable();
    let mut both = [mine.as_str(), again.as_str()];
    both.sort_unstable();
    assert_eq!((known, &forgotten["versions"]), (both.to_vec(), &json!([1])));
    assert_eq!(running.status(&path).await, 404);
    let running = running.restart_with(straight).await;
    assert_eq!(running.status(&path).await, 404, "it is forgotten for good");
    assert_eq!(running.status("/v1/versions/v9").await, 404);
    assert_eq!(running.status("/v1/completions/none/lineage").await, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_rater_alone_teaches_nothing() {
    let running = start_with(straight).await;
    for seed in 0..12 {
        running.said(seed, "alone", json!({ "kind": "thumbs", "value": "down" })).await;
    }
    let update = running.learned().await;
    assert_eq!(
        (&update["outcome"], &update["raters"], &update["needed"]),
        (&json!("too_few_raters"), &json!(1), &json!(3))
    );
    // Twelve thumbs in a second: two of them nobody can have meant.
    assert_eq!(update["data"]["left_out"]["too fast to be read"], 2, "{update}");
    assert!(update["data"]["warnings"][0].as_str().unwrap().contains("faster"), "{update}");
}
