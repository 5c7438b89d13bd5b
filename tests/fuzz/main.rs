//! Random input against everything that reads foreign bytes: no panic, no hang, no unbounded memory.
//!
//! Each target runs for a moment here. `GYROSTAT_FUZZ_SECONDS=600 cargo test --release --test fuzz NAME` runs one for longer; a
//! round that fails prints its seed, and `GYROSTAT_FUZZ_SEED` begins with it. With `ulimit -v` what asks for too much memory fails.
#![expect(clippy::print_stdout, clippy::unwrap_used, reason = "tests")]

use std::time::{Duration, Instant};

use gyrostat::{
    app::App,
    completion::Message,
    config::Config,
    policy::{self, Model},
    upstream::{
        answer::{Answer, Reading},
        request::Head,
    },
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};

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

/// A tiny model's directory.
fn tiny() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    gyrostat::policy::write_tiny(dir.path(), 0).unwrap();
    dir
}

/// Turns, zeroes or blows up some of the first `header` bytes: lengths, types and offsets are there.
fn spoilt(rng: &mut StdRng, bytes: &[u8], header: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..rng.random_range(1..4) {
        let at = rng.random_range(0..header.min(bytes.len() - 8));
        match rng.random_range(0..4) {
            0 => bytes[at] = rng.random(),
            1 => bytes[at] ^= 1 << rng.random_range(0..8),
            2 => bytes[at..at + 8].copy_from_slice(&rng.random::<u64>().to_le_bytes()),
            _ => bytes.truncate(at),
        }
        if bytes.len() <= 8 {
            break;
        }
    }
    bytes
}

#[test]
fn a_spoilt_safetensors_file_is_refused_or_served() {
    let dir = tiny();
    let path = dir.path().join("model.safetensors");
    let sound = std::fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(sound[..8].try_into().unwrap()) as usize;
    for_a_while("safetensors", |rng| {
        std::fs::write(&path, spoilt(rng, &sound, header)).unwrap();
        let _either = Model::load(dir.path().to_str().unwrap(), policy::Device::Cpu);
    });
}

#[test]
fn a_spoilt_configuration_is_refused_or_served() {
    let dir = tiny();
    let path = dir.path().join("config.json");
    let sound = std::fs::read(&path).unwrap();
    let fragments: Vec<&[u8]> = sound.split_inclusive(|byte| *byte == b'\n').collect();
    for_a_while("config.json", |rng| {
        // All of it with a little damage, or any lines of it.
        let text = if rng.random() { spoilt(rng, &sound, sound.len()) } else { mangled(rng, &fragments) };
        std::fs::write(&path, text).unwrap();
        let _either = Model::load(dir.path().to_str().unwrap(), policy::Device::Cpu);
    });
}

#[test]
fn a_spoilt_gguf_file_is_refused_or_served() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.gguf");
    let header = write_gguf(&path);
    let sound = std::fs::read(&path).unwrap();
    assert!(Model::load(path.to_str().unwrap(), policy::Device::Cpu).is_ok());
    for_a_while("gguf", |rng| {
        std::fs::write(&path, spoilt(rng, &sound, header)).unwrap();
        let _either = Model::load(path.to_str().unwrap(), policy::Device::Cpu);
    });
}

/// The tiny model with the vocabulary of its bytes; returns where the tensors' data begin, about.
fn write_gguf(path: &std::path::Path) -> usize {
    use candle_core::{
        Device,
        quantized::{
            GgmlDType, QTensor,
            gguf_file::{self, Value},
        },
        safetensors,
    };
    let dir = tiny();
    let tensors = safetensors::load(dir.path().join("model.safetensors"), &Device::Cpu).unwrap();
    let names = [
        ("model.layers.", "blk."),
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
    ];
    let tensors: Vec<(String, QTensor)> = tensors
        .into_iter()
        .map(|(name, tensor)| {
            let kind = if tensor.rank() == 2 { GgmlDType::Q4_0 } else { GgmlDType::F32 };
            let name = names.iter().fold(name, |name, (from, to)| name.replace(from, to));
            (name, QTensor::quantize(&tensor, kind).unwrap())
        })
        .collect();
    let text = |text: &str| Value::String(text.to_owned());
    let vocabulary = (0..259).map(|id| text(&format!("t{id}"))).collect();
    let metadata = [
        ("general.architecture", text("llama")),
        ("llama.embedding_length", Value::U32(64)),
        ("llama.feed_forward_length", Value::U32(96)),
        ("llama.block_count", Value::U32(2)),
        ("llama.attention.head_count", Value::U32(4)),
        ("llama.attention.head_count_kv", Value::U32(2)),
        ("llama.context_length", Value::U32(512)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.tokens", Value::Array(vocabulary)),
        ("tokenizer.ggml.merges", Value::Array(Vec::new())),
        ("tokenizer.ggml.eos_token_id", Value::U32(2)),
    ];
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<(&str, &QTensor)> =
        tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let mut file = std::fs::File::create(path).unwrap();
    gguf_file::write(&mut file, &metadata, &tensors).unwrap();
    let data: usize = tensors.iter().map(|(_, tensor)| tensor.storage_size_in_bytes()).sum();
    std::fs::metadata(path).unwrap().len() as usize - data
}

#[test]
fn any_template_ends_and_says_what_is_wrong() {
    const FRAGMENTS: [&[u8]; 22] = [
        b"{% for message in messages %}",
        b"{% endfor %}",
        b"{{ message.role }}",
        b"{{ message.content | trim }}",
        b"{{ message['content'].split('a')[-1] }}",
        b"{% if message.role == 'user' %}",
        b"{% elif loop.first %}",
        b"{% else %}",
        b"{% endif %}",
        b"{% set ns = namespace(a=1) %}",
        b"{% set ns.a = ns.a + 1 %}",
        b"{{ raise_exception('no') }}",
        b"{{ messages | tojson(indent=3) }}",
        b"{% macro m(x) %}{{ m(x + 1) }}{% endmacro %}{{ m(1) }}",
        b"{% for i in range(99999) %}{{ messages }}",
        b"{% break %}",
        b"{{ messages[0]['content'][:5] ~ bos_token }}",
        b"{{ -1 // 0 }}",
        b"{{ 9223372036854775807 + 1 }}",
        b"{{ strftime_now('%d %Q') }}",
        b"<|im_start|>",
        b"\n{%- ",
    ];
    let dir = tiny();
    let path = dir.path().join("chat_template.jinja");
    for_a_while("template", |rng| {
        std::fs::write(&path, mangled(rng, &FRAGMENTS)).unwrap();
        let Ok(model) = Model::load(dir.path().to_str().unwrap(), policy::Device::Cpu) else { return };
        let words = String::from_utf8_lossy(&mangled(rng, &FRAGMENTS)).into_owned();
        let _either = model.vocabulary.encode_chat(&[Message::user(&words), Message::user("b")]);
    });
}

#[test]
fn any_message_is_read_as_text() {
    const FRAGMENTS: [&[u8]; 8] = [
        b"<|im_end|>",
        b"<|im_start|>system\n",
        b"<|im_",
        b"<\xef\xb7\x90|im_end|>",
        b"\xf0\x9f\xa6\x80",
        b"{{ x }}",
        b"\0",
        b"words ",
    ];
    let dir = tiny();
    let model = Model::load(dir.path().to_str().unwrap(), policy::Device::Cpu).unwrap();
    let specials = |tokens: &[u32]| tokens.iter().filter(|token| **token < 3).count();
    let expected = specials(&model.vocabulary.encode_chat(&[Message::user("hi")]).unwrap());
    for_a_while("message", |rng| {
        let words = String::from_utf8_lossy(&mangled(rng, &FRAGMENTS)).into_owned();
        let tokens = model.vocabulary.encode_chat(&[Message::user(&words)]).unwrap();
        assert_eq!(specials(&tokens), expected, "a message spoke a special token");
    });
}

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
