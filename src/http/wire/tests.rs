use super::*;

/// A chat request with more fields, each with a comma before it.
fn with(extra: &str) -> String {
    format!(r#"{{"model":"m","messages":[{{"role":"user","content":"hi"}}]{extra}}}"#)
}

#[track_caller]
fn refused(error: &ApiError, param: &str, body: &str) {
    let error = &error.body()["error"];
    assert_eq!(error["param"], param, "{body}");
    assert_eq!(error["type"], "invalid_request_error", "{body}");
    assert!(error["message"].as_str().unwrap().contains(param), "{body}: {error}");
}

#[track_caller]
fn check_refused(body: &str, param: &str) {
    refused(&chat(body.as_bytes()).unwrap_err(), param, body);
}

#[track_caller]
fn check_field(extra: &str, param: &str) {
    check_refused(&with(&format!(",{extra}")), param);
    // What both routes take is read by the same rules.
    if !matches!(extra.split('"').nth(1), Some("logprobs" | "top_logprobs" | "messages")) {
        let body = format!(r#"{{"model":"m","prompt":"hi",{extra}}}"#);
        refused(&text(body.as_bytes()).unwrap_err(), param, &body);
    }
}

#[track_caller]
fn asked(extra: &str) -> Asked {
    chat(with(extra).as_bytes()).unwrap()
}

#[track_caller]
fn check_text_refused(extra: &str, param: &str) {
    let body = format!(r#"{{"model":"m",{extra}}}"#);
    refused(&text(body.as_bytes()).unwrap_err(), param, &body);
}

#[test]
fn numbers_out_of_range_are_refused() {
    check_field(r#""temperature":2.01"#, "temperature");
    check_field(r#""temperature":-0.1"#, "temperature");
    check_field(r#""temperature":NaN"#, "temperature");
    check_field(r#""top_p":0"#, "top_p");
    check_field(r#""top_p":1.1"#, "top_p");
    check_field(r#""top_k":-1"#, "top_k");
    check_field(r#""n":0"#, "n");
    check_field(r#""n":17"#, "n");
    check_field(r#""n":1.5"#, "n");
    check_field(r#""max_tokens":0"#, "max_tokens");
    check_field(r#""max_tokens":99999999999"#, "max_tokens");
    check_field(r#""seed":0.5"#, "seed");
    check_field(r#""seed":99999999999999999999"#, "seed");
}

#[test]
fn types_are_checked() {
    check_field(r#""temperature":"hot""#, "temperature");
    check_field(r#""top_p":[]"#, "top_p");
    check_field(r#""n":"2""#, "n");
    check_field(r#""seed":"one""#, "seed");
    check_field(r#""stream":"yes""#, "stream");
    check_field(r#""stream":1"#, "stream");
    check_field(r#""user":5"#, "user");
    check_field(r#""metadata":[]"#, "metadata");
    check_field(r#""metadata":{"a":1}"#, "metadata.a");
    check_field(r#""metadata":{"a":null}"#, "metadata.a");
    check_field(r#""stream":true,"stream_options":5"#, "stream_options");
    check_field(r#""stream":true,"stream_options":{"include_usage":1}"#, "stream_options.include_usage");
    check_field(r#""logprobs":{}"#, "logprobs");
    check_refused(r#"{"model":7,"messages":[{"role":"user","content":"x"}]}"#, "model");
    check_refused(r#"{"messages":[{"role":"user","content":"x"}]}"#, "model");
}

#[test]
fn what_is_not_supported_is_never_ignored() {
    check_field(r#""nonsense":1"#, "nonsense");
    check_field(r#""logit_bias":{"5":1}"#, "logit_bias");
    check_field(r#""frequency_penalty":0.5"#, "frequency_penalty");
    check_field(r#""presence_penalty":"0""#, "presence_penalty");
    check_field(r#""service_tier":"flex""#, "service_tier");
    check_field(r#""stream_options":{"include_usage":true}"#, "stream_options");
    check_field(r#""stream":true,"stream_options":{"other":true}"#, "stream_options.other");
    check_refused(&with(r#","response_format":{"type":"json_object"}"#), "response_format");
    check_refused(&with(r#","tools":[{"type":"function"}]"#), "tools");
    check_refused(&with(r#","tool_choice":"auto""#), "tool_choice");
    check_refused(&with(r#","prompt":"x""#), "prompt");
    check_refused(&with(r#","best_of":1"#), "best_of");
    check_refused(&with(r#","max_tokens":1,"max_completion_tokens":2"#), "max_tokens");
    check_text_refused(r#""prompt":"x","echo":true"#, "echo");
    check_text_refused(r#""prompt":"x","best_of":2"#, "best_of");
    check_text_refused(r#""prompt":"x","suffix":"y""#, "suffix");
    check_text_refused(r#""prompt":"x","messages":[]"#, "messages");
    check_text_refused(r#""prompt":"x","max_completion_tokens":5"#, "max_completion_tokens");
}

#[test]
fn metadata_is_bounded() {
    let pairs = |count: usize| (0..count).map(|n| format!(r#""k{n}":"v""#)).collect::<Vec<_>>().join(",");
    assert_eq!(asked(&format!(r#","metadata":{{{}}}"#, pairs(16))).metadata.len(), 16);
    check_field(&format!(r#""metadata":{{{}}}"#, pairs(17)), "metadata");
    let long = |length| "x".repeat(length);
    assert_eq!(asked(&format!(r#","metadata":{{"{}":"{}"}}"#, long(64), long(512))).metadata.len(), 1);
    check_field(&format!(r#""metadata":{{"{}":""}}"#, long(65)), &format!("metadata.{}", long(65)));
    check_field(&format!(r#""metadata":{{"a":"{}"}}"#, long(513)), "metadata.a");
    check_field(r#""metadata":{"risk":"high"}"#, "metadata.risk");
    assert_eq!(asked(r#","metadata":{"risk":"harmful"}"#).risk, Some(Risk::Harmful));
}

#[test]
fn stop_is_a_string_or_four() {
    assert_eq!(asked(r#","stop":"END""#).stop, ["END"]);
    assert_eq!(asked(r#","stop":["a","b","c","d"]"#).stop.len(), 4);
    for stop in [r#""""#, r#"["a",""]"#, r#"["a","b","c","d","e"]"#, "5", "[5]", "{}"] {
        check_field(&format!(r#""stop":{stop}"#), "stop");
    }
}

#[test]
fn messages_are_checked_one_by_one() {
    #[track_caller]
    fn check(messages: &str, param: &str) {
        check_refused(&format!(r#"{{"model":"m","messages":{messages}}}"#), param);
    }
    check("[]", "messages");
    check("\"hello\"", "messages");
    check("{}", "messages");
    check("null", "messages");
    check("[5]", "messages[0]");
    check(r#"[{"content":"x"}]"#, "messages[0].role");
    check(r#"[{"role":"user","content":"x"},{"role":"wizard","content":"x"}]"#, "messages[1].role");
    check(r#"[{"role":"tool","content":"x"}]"#, "messages[0].role");
    check(r#"[{"role":5,"content":"x"}]"#, "messages[0].role");
    check(r#"[{"role":"user"}]"#, "messages[0].content");
    check(r#"[{"role":"user","content":null}]"#, "messages[0].content");
    check(r#"[{"role":"user","content":5}]"#, "messages[0].content");
    check(r#"[{"role":"user","content":[]}]"#, "messages[0].content");
    check(r#"[{"role":"user","content":["x"]}]"#, "messages[0].content[0]");
    check(r#"[{"role":"user","content":[{"type":"image_url"}]}]"#, "messages[0].content[0].type");
    check(r#"[{"role":"user","content":[{"type":"text"}]}]"#, "messages[0].content[0].text");
    check(r#"[{"role":"user","content":"x","name":"ann"}]"#, "messages[0].name");
    check(r#"[{"role":"assistant","content":"x","tool_calls":[{}]}]"#, "messages[0].tool_calls");
}

#[test]
fn roles_and_parts_are_read() {
    let body = r#"{"model":"m","messages":[{"role":"developer","content":"be brief"},
        {"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]},
        {"role":"assistant","content":"c","refusal":null,"tool_calls":null}]}"#;
    let expected = [(Role::System, "be brief"), (Role::User, "ab"), (Role::Assistant, "c")];
    let messages = expected.map(|(role, content)| Message { role, content: content.to_owned() });
    assert_eq!(chat(body.as_bytes()).unwrap().prompt, Prompt::Chat(messages.to_vec()));
}

#[test]
fn neutral_values_and_nulls_are_taken() {
    let neutral = r#","presence_penalty":0,"frequency_penalty":0.0,"logit_bias":{},"tools":[],"tool_choice":"none",
        "response_format":{"type":"text"},"parallel_tool_calls":true,"store":false,"service_tier":"auto",
        "stop":null,"temperature":null,"metadata":null,"stream_options":null,"top_logprobs":null"#;
    let plain = asked("");
    assert_eq!(asked(neutral), plain);
    assert_eq!((plain.n, plain.temperature, plain.top_p, plain.top_k), (1, 1.0, 1.0, 0));
    assert_eq!((plain.max_tokens, plain.seed, plain.top_logprobs, plain.stream), (None, None, None, false));
    assert_eq!(asked(r#","seed":-1"#).seed, Some(u64::MAX));
    assert_eq!(asked(r#","max_completion_tokens":7"#).max_tokens, Some(7));
}

#[test]
fn logprobs_follow_the_route() {
    assert_eq!(asked(r#","logprobs":true"#).top_logprobs, Some(0));
    assert_eq!(asked(r#","logprobs":true,"top_logprobs":20"#).top_logprobs, Some(20));
    check_refused(&with(r#","logprobs":true,"top_logprobs":21"#), "top_logprobs");
    check_refused(&with(r#","top_logprobs":2"#), "top_logprobs");
    check_refused(&with(r#","logprobs":5"#), "logprobs");
    let text_asked =
        |extra: &str| text(format!(r#"{{"model":"m","prompt":"x"{extra}}}"#).as_bytes()).unwrap();
    assert_eq!(text_asked(r#","logprobs":0"#).top_logprobs, Some(0));
    assert_eq!(text_asked("").top_logprobs, None);
    check_text_refused(r#""prompt":"x","logprobs":6"#, "logprobs");
    check_text_refused(r#""prompt":"x","logprobs":true"#, "logprobs");
}

#[test]
fn a_text_prompt_is_one_string() {
    check_text_refused(r#""stream":false"#, "prompt");
    check_text_refused(r#""prompt":"""#, "prompt");
    check_text_refused(r#""prompt":[]"#, "prompt");
    check_text_refused(r#""prompt":["a","b"]"#, "prompt");
    check_text_refused(r#""prompt":[1,2,3]"#, "prompt");
    let asked = text(br#"{"model":"m","prompt":["once"]}"#).unwrap();
    assert_eq!(asked.prompt, Prompt::Text("once".to_owned()));
}
