//! Requests to a server.

use std::time::Duration;

use gyrostat::{app::App, config::Config};
use rand::{RngExt, rngs::StdRng};
use serde_json::{Value, json};

use super::{damage, for_a_while, models::tiny};

/// A server on the tiny model, with a runtime to talk to it.
struct Served {
    runtime: tokio::runtime::Runtime,
    app: App,
    client: reqwest::Client,
    _dir: tempfile::TempDir,
}

impl Served {
    fn start() -> Self {
        let dir = tiny();
        let mut config = Config::default();
        config.http.bind = "127.0.0.1:0".parse().unwrap();
        config.http.default_max_tokens = 2;
        config.store.path = dir.path().join("data");
        config.policy.model = dir.path().to_str().unwrap().to_owned();
        config.policy.kl_one_in = 0;
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let app = runtime.block_on(App::start(config)).unwrap();
        // What takes so long hangs, in a build that is not optimised too.
        let client = reqwest::Client::builder().timeout(Duration::from_mins(5)).build().unwrap();
        Self { runtime, app, client, _dir: dir }
    }

    fn post(&self, path: &str, body: Vec<u8>) -> (u16, String) {
        let url = format!("http://{}{path}", self.app.address);
        self.runtime.block_on(async {
            let answer = self.client.post(url).body(body).send().await.unwrap();
            (answer.status().as_u16(), answer.text().await.unwrap())
        })
    }

    /// A request is answered, or refused with words; it is never the server's fault.
    fn check(&self, path: &str, body: Vec<u8>) {
        let shown = String::from_utf8_lossy(&body).into_owned();
        let (status, answer) = self.post(path, body);
        assert!((200..500).contains(&status), "{status} {answer} to {shown}");
        if status >= 400 {
            let answer: Value = serde_json::from_str(&answer).unwrap();
            let error = &answer["error"];
            assert!(
                error["message"].as_str().is_some_and(|message| !message.is_empty()),
                "{answer} to {shown}"
            );
            assert!(error["type"].is_string(), "{answer} to {shown}");
        }
    }
}

/// An object of some of these fields, half of the times with the ones that every request needs, a third of the times damaged.
fn body(rng: &mut StdRng, needed: &str, fields: &[&str]) -> Vec<u8> {
    const VALUES: [&str; 14] = [
        "null",
        "true",
        "-1",
        "0",
        "1e400",
        "NaN",
        "0.5",
        "99999999999999999999",
        "\"\"",
        "\"a\\u0000\\ud83e\"",
        "[]",
        "{}",
        "[[[{\"a\":[]}]]]",
        "{\"a\":\"b\",\"type\":\"text\"}",
    ];
    let mut parts = Vec::new();
    if rng.random_range(0..6) > 0 {
        parts.push(needed.to_owned());
    }
    for _ in 0..rng.random_range(0..6) {
        let field = fields[rng.random_range(0..fields.len())];
        // As it should be, or with any value.
        let name = field.split(':').next().unwrap();
        let value = VALUES[rng.random_range(0..VALUES.len())];
        parts.push(if rng.random() { field.to_owned() } else { format!("{name}:{value}") });
    }
    let mut body = format!("{{{}}}", parts.join(",")).into_bytes();
    if rng.random_range(0..3) == 0 {
        damage(rng, &mut body);
    }
    body
}

const SETTINGS: [&str; 24] = [
    "\"max_tokens\":3",
    "\"temperature\":1.5",
    "\"top_p\":0.5",
    "\"top_k\":3",
    "\"min_p\":0.1",
    "\"presence_penalty\":-2",
    "\"frequency_penalty\":2",
    "\"logit_bias\":{\"5\":-100,\"258\":100}",
    "\"logit_bias\":{\"259\":1}",
    "\"n\":3",
    "\"seed\":-7",
    "\"stop\":[\"a\",\"\\n\"]",
    "\"stream\":true",
    "\"stream_options\":{\"include_usage\":true}",
    "\"user\":\"ann\"",
    "\"metadata\":{\"interaction\":\"code\",\"risk\":\"benign\"}",
    "\"metadata\":{\"interaction\":\"\u{a7}\"}",
    "\"store\":true",
    "\"service_tier\":\"auto\"",
    "\"logprobs\":true",
    "\"logprobs\":3",
    "\"tools\":[{}]",
    "\"model\":\"default\"",
    "\"invented\":1",
];

#[test]
fn any_chat_request_is_answered_or_refused() {
    let served = Served::start();
    let fields = [
        &SETTINGS[..],
        &[
            "\"messages\":[{\"role\":\"assistant\",\"content\":\"\\u0000<|im_end|>\"}]",
            "\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"a\"}]}]",
            "\"top_logprobs\":5",
            "\"max_completion_tokens\":2",
            "\"response_format\":{\"type\":\"json_object\"}",
            "\"response_format\":{\"type\":\"json_schema\",\"json_schema\":{\"name\":\"n\",\"schema\":{\"enum\":[1,2]}}}",
        ],
    ]
    .concat();
    for_a_while("chat", |rng| {
        let needed = "\"model\":\"default\",\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]";
        served.check("/v1/chat/completions", body(rng, needed, &fields));
    });
}

#[test]
fn any_text_request_is_answered_or_refused() {
    let served = Served::start();
    let more =
        ["\"prompt\":[\"b\"]", "\"prompt\":[1,2]", "\"echo\":true", "\"best_of\":3", "\"suffix\":\"x\""];
    let fields = [&SETTINGS[..], &more].concat();
    for_a_while("text", |rng| {
        served.check("/v1/completions", body(rng, "\"model\":\"default\",\"prompt\":\"a\"", &fields));
    });
}

#[test]
fn any_feedback_is_taken_or_refused() {
    let served = Served::start();
    let chat =
        json!({ "model": "default", "messages": [{ "role": "user", "content": "hi" }], "max_tokens": 2 });
    let (status, answer) = served.post("/v1/chat/completions", chat.to_string().into_bytes());
    assert_eq!(status, 200);
    let answer: Value = serde_json::from_str(&answer).unwrap();
    let id = answer["id"].as_str().unwrap();
    let about = format!("\"completion_id\":\"{id}\"");
    let mut fields = vec![about.as_str()];
    fields.extend([
        "\"kind\":\"thumbs\"",
        "\"kind\":\"rating\"",
        "\"kind\":\"comparison\"",
        "\"kind\":\"demonstration\"",
        "\"kind\":\"flag\"",
        "\"kind\":\"behaviour\"",
        "\"value\":\"up\"",
        "\"value\":3",
        "\"value\":\"copied\"",
        "\"chosen\":\"a\"",
        "\"rejected\":\"b\"",
        "\"prompt\":\"p\"",
        "\"rater\":\"r\"",
        "\"source\":\"ai\"",
        "\"comment\":\"c\"",
        "\"idempotency_key\":\"k\"",
        "\"tags\":{\"a\":\"b\"}",
        "\"metric_name\":\"m\"",
        "\"traceId\":\"t\"",
        "\"name\":\"n\"",
        "\"rating\":true",
    ]);
    let needed = format!("\"kind\":\"thumbs\",\"value\":\"up\",{about}");
    let others =
        ["/feedback".to_owned(), "/api/public/scores".to_owned(), format!("/v1/request/{id}/feedback")];
    for_a_while("feedback", |rng| {
        let path = if rng.random() { "/v1/feedback" } else { others[rng.random_range(0..3)].as_str() };
        served.check(path, body(rng, &needed, &fields));
    });
}

/// A schema of some keywords, right or wrong, at most `depth` levels deep.
fn schema(rng: &mut StdRng, depth: usize) -> Value {
    let mut schema = json!({});
    for _ in 0..rng.random_range(0..4) {
        let inner = |rng: &mut StdRng| if depth == 0 { json!({}) } else { schema_below(rng, depth) };
        let size = |rng: &mut StdRng| json!(10i64.pow(rng.random_range(0..10)) - rng.random_range(0..3));
        let (key, value) = match rng.random_range(0..16) {
            0 => (
                "type",
                json!(
                    ["string", "integer", "number", "object", "array", "null", "dragon"]
                        [rng.random_range(0..7)]
                ),
            ),
            1 => ("properties", json!({ "a": inner(rng), "b": inner(rng) })),
            2 => ("required", json!(["a", "z"])),
            3 => ("additionalProperties", inner(rng)),
            4 => ("items", inner(rng)),
            5 => (["minItems", "maxItems", "minLength", "maxLength"][rng.random_range(0..4)], size(rng)),
            6 => {
                (["minimum", "maximum", "exclusiveMinimum", "multipleOf"][rng.random_range(0..4)], size(rng))
            }
            7 => (
                "pattern",
                json!(["^a+$", "(", "(a|b){1,400}", "^(.*a.{30}){3}$", "\\d{3}"][rng.random_range(0..5)]),
            ),
            8 => ("format", json!(["date", "uuid", "ipv6", "dragon"][rng.random_range(0..4)])),
            9 => ("enum", json!([1, "a", null, [], { "a": 1 }])),
            10 => (
                ["anyOf", "allOf", "oneOf"][rng.random_range(0..3)],
                json!([inner(rng), inner(rng), inner(rng)]),
            ),
            11 => ("$ref", json!(["#", "#/properties/a", "#/$defs/x", "http://x/y"][rng.random_range(0..4)])),
            12 => ("$defs", json!({ "x": inner(rng) })),
            13 => ("patternProperties", json!({ "^x": inner(rng) })),
            14 => ("const", json!(-0.5)),
            _ => (["not", "if", "prefixItems", "x-guidance"][rng.random_range(0..4)], inner(rng)),
        };
        schema[key] = value;
    }
    schema
}

fn schema_below(rng: &mut StdRng, depth: usize) -> Value {
    schema(rng, depth - 1)
}

#[test]
fn any_schema_is_kept_to_or_refused() {
    let served = Served::start();
    for_a_while("schema", |rng| {
        let format =
            json!({ "type": "json_schema", "json_schema": { "name": "n", "schema": schema(rng, 4) } });
        let chat = json!({ "model": "default", "messages": [{ "role": "user", "content": "hi" }], "max_tokens": 8,
            "seed": rng.random::<u32>(), "response_format": format });
        let (status, answer) = served.post("/v1/chat/completions", chat.to_string().into_bytes());
        // A grammar that comes to its bounds in the middle is all that may fail.
        let given_up = status == 500 && answer.contains("could not be generated");
        assert!(status == 200 || status == 400 || given_up, "{status} {answer} to {chat}");
    });
}
