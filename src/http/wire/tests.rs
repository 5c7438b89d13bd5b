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
    check_field(r#""top_p":-0.1"#, "top_p");
    check_field(r#""top_p":1.1"#, "top_p");
    check_field(r#""top_k":-1"#, "top_k");
    check_field(r#""min_p":1.1"#, "min_p");
    check_field(r#""presence_penalty":2.1"#, "presence_penalty");
    check_field(r#""frequency_penalty":-2.1"#, "frequency_penalty");
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
    check_field(r#""presence_penalty":"0""#, "presence_penalty");
    check_field(r#""repetition_penalty":1.1"#, "repetition_penalty");
    check_field(r#""service_tier":"flex""#, "service_tier");
    check_field(r#""stream_options":{"include_usage":true}"#, "stream_options");
    check_field(r#""stream":true,"stream_options":{"other":true}"#, "stream_options.other");
    check_field(
        r#""stream":true,"stream_options":{"include_obfuscation":true}"#,
        "stream_options.include_obfuscation",
    );
    check_refused(&with(r#","tools":[{"type":"function"}]"#), "tools");
    check_refused(&with(r#","functions":[{"name":"f"}]"#), "functions");
    check_refused(&with(r#","modalities":["text","audio"]"#), "modalities");
    check_refused(&with(r#","audio":{"voice":"alloy","format":"wav"}"#), "audio");
    check_refused(&with(r#","prediction":{"type":"content","content":"x"}"#), "prediction");
    check_refused(&with(r#","web_search_options":{}"#), "web_search_options");
    check_refused(&with(r#","reasoning_effort":"low""#), "reasoning_effort");
    check_refused(&with(r#","tool_choice":"auto""#), "tool_choice");
    check_refused(&with(r#","prompt":"x""#), "prompt");
    check_refused(&with(r#","best_of":1"#), "best_of");
    check_refused(&with(r#","max_tokens":1,"max_completion_tokens":2"#), "max_tokens");
    check_text_refused(r#""prompt":"x","echo":true"#, "echo");
    check_text_refused(r#""prompt":"x","best_of":2"#, "best_of");
    check_text_refused(r#""prompt":"x","best_of":3,"n":2"#, "best_of");
    check_text_refused(r#""prompt":"x","suffix":"y""#, "suffix");
    check_text_refused(r#""prompt":"x","messages":[]"#, "messages");
    check_text_refused(r#""prompt":"x","max_completion_tokens":5"#, "max_completion_tokens");
}

#[test]
fn a_bias_names_its_bad_keys() {
    assert_eq!(asked(r#","logit_bias":{"5":1.5,"70":-100}"#).logit_bias, [(5, 1.5), (70, -100.0)]);
    check_field(r#""logit_bias":[]"#, "logit_bias");
    check_field(r#""logit_bias":{"river":1}"#, "logit_bias.river");
    check_field(r#""logit_bias":{"-1":1}"#, "logit_bias.-1");
    check_field(r#""logit_bias":{"99999999999":1}"#, "logit_bias.99999999999");
    check_field(r#""logit_bias":{"5":101}"#, "logit_bias.5");
    check_field(r#""logit_bias":{"5":"1"}"#, "logit_bias.5");
    check_field(r#""logit_bias":{"5":NaN}"#, "logit_bias.5");
    let pairs: Vec<String> = (0..1025).map(|token| format!(r#""{token}":1"#)).collect();
    check_field(&format!(r#""logit_bias":{{{}}}"#, pairs.join(",")), "logit_bias");
}

#[test]
fn the_form_of_the_answer_is_a_schema() {
    let form = |format: &str| asked(&format!(r#","response_format":{format}"#)).form.map(Value::Object);
    let any_object = Some(json!({ "type": "object" }));
    assert_eq!(form(r#"{"type":"text"}"#), None);
    assert_eq!(form(r#"{"type":"json_object"}"#), any_object);
    assert_eq!(form(r#"{"type":"json_schema","json_schema":{"name":"n","schema":null}}"#), any_object);
    let whole = r#"{"type":"json_schema","json_schema":{"name":"a-b_1","description":"d","strict":true,"schema":{"type":"array"}}}"#;
    assert_eq!(form(whole), Some(json!({ "type": "array" })));
    let check = |format: &str, param: &str| {
        check_refused(&with(&format!(r#","response_format":{format}"#)), &format!("response_format{param}"));
    };
    check("\"json\"", "");
    check("{}", ".type");
    check(r#"{"type":"xml"}"#, ".type");
    check(r#"{"type":"json_object","schema":{}}"#, ".schema");
    check(r#"{"type":"json_schema"}"#, ".json_schema");
    check(r#"{"type":"json_schema","json_schema":7}"#, ".json_schema");
    check(r#"{"type":"json_schema","json_schema":{"schema":{}}}"#, ".json_schema.name");
    check(r#"{"type":"json_schema","json_schema":{"name":"a b","schema":{}}}"#, ".json_schema.name");
    check(r#"{"type":"json_schema","json_schema":{"name":"a","schema":true}}"#, ".json_schema.schema");
    check(r#"{"type":"json_schema","json_schema":{"name":"a","strict":1}}"#, ".json_schema.strict");
    check(r#"{"type":"json_schema","json_schema":{"name":"a","more":1}}"#, ".json_schema.more");
    check_text_refused(r#""prompt":"x","response_format":{"type":"text"}"#, "response_format");
}

#[test]
fn penalties_and_other_settings_are_read() {
    let all = asked(r#","presence_penalty":0.5,"frequency_penalty":-2,"min_p":0.1,"top_k":7,"top_p":0"#);
    assert_eq!((all.presence_penalty, all.frequency_penalty, all.min_p), (0.5, -2.0, 0.1));
    assert_eq!((all.top_k, all.top_p), (7, 0.0));
    assert_eq!(asked(r#","safety_identifier":"ann""#).user.as_deref(), Some("ann"));
    assert_eq!(asked(r#","safety_identifier":"ann","user":"bob""#).user.as_deref(), Some("bob"));
    let both = text(br#"{"model":"m","prompt":"x","n":2,"best_of":2}"#).unwrap();
    assert_eq!(both.n, 2);
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
        "response_format":{"type":"text"},"parallel_tool_calls":true,"store":false,"service_tier":"auto","modalities":["text"],"verbosity":"medium","prompt_cache_key":"k",
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
