use super::*;
use crate::completion::{Behaviour, Flag, Role};

const NAMELESS: About<'static> = About { now: Timestamp(5), store: None };
const ID: &str = "0190a0b0-0000-7000-8000-000000000001";
const OTHER: &str = "0190a0b0-0000-7000-8000-000000000002";

fn native(body: &str) -> Result<Feedback> {
    let body = body.replace("OTHER", OTHER).replace("ID", ID);
    read(body.as_bytes(), &NAMELESS, judged)
}

#[track_caller]
fn check(body: &str, expected: &Judgement) {
    assert_eq!(native(body).unwrap().judgement, *expected);
}

#[track_caller]
fn refused(error: &ApiError, status: u16, param: &str, body: &str) {
    assert_eq!(error.status().as_u16(), status, "{body}: {error:?}");
    assert_eq!(error.body()["error"]["param"], param, "{body}");
}

#[track_caller]
fn check_refused(body: &str, param: &str) {
    refused(&native(body).unwrap_err(), 422, param, body);
}

#[test]
fn every_kind_is_read() {
    check(r#"{"kind":"thumbs","value":"up","completion_id":"ID"}"#, &Judgement::Thumbs { up: true });
    check(r#"{"kind":"rating","value":4,"completion_id":"ID"}"#, &Judgement::Rating { stars: 4 });
    let better = Judgement::Demonstration { answer: "The Volga.".to_owned() };
    check(r#"{"kind":"demonstration","value":"The Volga.","completion_id":"ID"}"#, &better);
    let flag = Judgement::Flag { flag: Flag::WrongfulRefusal };
    check(r#"{"kind":"flag","value":"wrongful_refusal","completion_id":"ID"}"#, &flag);
    let copied = Judgement::Behaviour { behaviour: Behaviour::Copied };
    check(r#"{"kind":"behaviour","value":"copied","completion_id":"ID"}"#, &copied);
    let pair = Judgement::Comparison { chosen: ID.parse().unwrap(), rejected: OTHER.parse().unwrap() };
    check(r#"{"kind":"comparison","chosen":"ID","rejected":"OTHER"}"#, &pair);
    check(r#"{"kind":"comparison","chosen":"ID","rejected":"OTHER","completion_id":"OTHER"}"#, &pair);
}

#[test]
fn comparisons_of_texts_carry_their_prompt() {
    #[track_caller]
    fn check_prompt(prompt: &str, expected: &[(Role, &str)]) {
        let message =
            |(role, content): &(Role, &str)| Message { role: *role, content: (*content).to_owned() };
        let judgement = Judgement::TextComparison {
            prompt: Prompt::Chat(expected.iter().map(message).collect()),
            chosen: "a".to_owned(),
            rejected: "b".to_owned(),
        };
        let body = format!(r#"{{"kind":"comparison","prompt":{prompt},"chosen":"a","rejected":"b"}}"#);
        check(&body, &judgement);
        assert_eq!(native(&body).unwrap().completion, None);
    }
    check_prompt(r#""Which?""#, &[(Role::User, "Which?")]);
    let messages =
        r#"[{"role":"system","content":"s"},{"role":"user","content":[{"type":"text","text":"u"}]}]"#;
    check_prompt(messages, &[(Role::System, "s"), (Role::User, "u")]);
}

#[test]
fn what_stands_beside_it_is_kept() {
    let body = r#"{"kind":"thumbs","value":"down","completion_id":"ID","rater":"ann","source":"ai",
        "comment":"too long","idempotency_key":"k1","tags":{"team":"support"}}"#;
    let feedback = native(body).unwrap();
    assert_eq!((feedback.at, feedback.source), (Timestamp(5), Source::Ai));
    assert_eq!(feedback.rater.as_deref(), Some("ann"));
    assert_eq!(feedback.comment.as_deref(), Some("too long"));
    assert_eq!(feedback.idempotency_key.as_deref(), Some("k1"));
    assert_eq!(feedback.tags["team"], "support");
    let least = native(r#"{"kind":"thumbs","value":"up","completion_id":"ID","rater":null}"#).unwrap();
    assert_eq!((least.source, least.rater), (Source::Human, None));
}

#[test]
fn the_field_at_fault_is_named() {
    check_refused(r#"{"value":"up","completion_id":"ID"}"#, "kind");
    check_refused(r#"{"kind":"praise","value":"x","completion_id":"ID"}"#, "kind");
    check_refused(r#"{"kind":7,"value":"x","completion_id":"ID"}"#, "kind");
    check_refused(r#"{"kind":"thumbs","completion_id":"ID"}"#, "value");
    check_refused(r#"{"kind":"thumbs","value":true,"completion_id":"ID"}"#, "value");
    check_refused(r#"{"kind":"thumbs","value":"sideways","completion_id":"ID"}"#, "value");
    for rating in ["0", "6", "-1", "3.5", "NaN", "Infinity", "1e999", "\"4\"", "null", "[4]"] {
        check_refused(&format!(r#"{{"kind":"rating","value":{rating},"completion_id":"ID"}}"#), "value");
    }
    check_refused(r#"{"kind":"flag","value":"bad","completion_id":"ID"}"#, "value");
    check_refused(r#"{"kind":"behaviour","value":"slept","completion_id":"ID"}"#, "value");
    check_refused(r#"{"kind":"demonstration","value":"  ","completion_id":"ID"}"#, "value");
    check_refused(r#"{"kind":"thumbs","value":"up"}"#, "completion_id");
    check_refused(r#"{"kind":"thumbs","value":"up","completion_id":5}"#, "completion_id");
}

#[test]
fn nothing_beside_it_is_ignored() {
    #[track_caller]
    fn check_beside(extra: &str, param: &str) {
        check_refused(&format!(r#"{{"kind":"thumbs","value":"up","completion_id":"ID",{extra}}}"#), param);
    }
    check_beside(r#""colour":1"#, "colour");
    check_beside(r#""source":"dog""#, "source");
    check_beside(r#""rater":7"#, "rater");
    check_beside(r#""idempotency_key":"""#, "idempotency_key");
    check_beside(r#""tags":{"a":1}"#, "tags.a");
    check_beside(r#""tags":["a"]"#, "tags");
    check_beside(r#""chosen":"ID""#, "chosen");
    let with = |field: &str, length: usize| format!(r#""{field}":"{}""#, "x".repeat(length));
    for (field, most) in [("rater", 256), ("idempotency_key", 256), ("comment", LONG)] {
        let body = format!(r#"{{"kind":"thumbs","value":"up","completion_id":"ID",{}}}"#, with(field, most));
        native(&body).unwrap();
        check_beside(&with(field, most + 1), field);
    }
}

#[test]
fn faulty_comparisons_are_refused() {
    #[track_caller]
    fn check_pair(rest: &str, param: &str) {
        check_refused(&format!(r#"{{"kind":"comparison",{rest}}}"#), param);
    }
    check_pair(r#""chosen":"ID""#, "rejected");
    check_pair(r#""chosen":"ID","rejected":5"#, "rejected");
    check_pair(r#""chosen":"ID","rejected":"ID""#, "rejected");
    let third = "0190a0b0-0000-7000-8000-000000000003";
    check_pair(&format!(r#""chosen":"ID","rejected":"OTHER","completion_id":"{third}""#), "completion_id");
    check_pair(r#""prompt":5,"chosen":"a","rejected":"b""#, "prompt");
    check_pair(r#""prompt":"","chosen":"a","rejected":"b""#, "prompt");
    check_pair(r#""prompt":[],"chosen":"a","rejected":"b""#, "prompt");
    check_pair(r#""prompt":[{"content":"x"}],"chosen":"a","rejected":"b""#, "prompt[0].role");
    check_pair(r#""prompt":"p","chosen":"","rejected":"b""#, "chosen");
    check_pair(r#""prompt":"p","chosen":"a","rejected":"b","completion_id":"ID""#, "completion_id");
}

#[test]
fn malformed_is_400_and_unknown_404() {
    for body in ["", "{", "[]", "\"up\"", "{\"kind\":\"thumbs\""] {
        assert_eq!(native(body).unwrap_err().status(), StatusCode::BAD_REQUEST, "{body}");
    }
    let body = r#"{"kind":"thumbs","value":"up","completion_id":"chatcmpl-5"}"#;
    refused(&native(body).unwrap_err(), 404, "completion_id", body);
}

/// `Err` is the field at fault.
#[track_caller]
fn check_alias(
    shape: impl FnOnce(Fields, &About<'_>) -> Result<Feedback>,
    body: &str,
    expected: std::result::Result<Judgement, &str>,
) {
    let body = body.replace("ID", ID);
    match (read(body.as_bytes(), &NAMELESS, shape), expected) {
        (Ok(feedback), Ok(judgement)) => {
            assert_eq!(feedback.judgement, judgement);
            assert_eq!(feedback.completion.unwrap().to_string(), ID);
        }
        (Err(error), Err(param)) => refused(&error, 422, param, &body),
        (got, expected) => panic!("{body}: {got:?}, not {expected:?}"),
    }
}

#[test]
fn tensorzero_sends_metrics() {
    let check = |rest: &str, expected| {
        check_alias(alias::tensorzero, &format!(r#"{{"metric_name":{rest}}}"#), expected);
    };
    check(r#""ok","inference_id":"ID","value":true"#, Ok(Judgement::Thumbs { up: true }));
    check(r#""score","inference_id":"ID","value":0.5"#, Ok(Judgement::Rating { stars: 3 }));
    let better = Judgement::Demonstration { answer: "Better.".to_owned() };
    let demonstration =
        r#""demonstration","inference_id":"ID","value":"Better.","tags":{"a":"b"},"dryrun":false"#;
    check(demonstration, Ok(better));
    check(r#""demonstration","inference_id":"ID","value":true"#, Err("value"));
    check(r#""score","inference_id":"ID","value":7"#, Err("value"));
    check(r#""comment","inference_id":"ID","value":"hm""#, Err("value"));
    check(r#""","inference_id":"ID","value":true"#, Err("metric_name"));
    check(r#""ok","value":true"#, Err("inference_id"));
    let official =
        r#""ok","inference_id":"ID","episode_id":null,"value":true,"internal":false,"dryrun":null"#;
    check(official, Ok(Judgement::Thumbs { up: true }));
    check(r#""ok","inference_id":"ID","value":true,"internal":true"#, Err("internal"));
    check(r#""ok","inference_id":"ID","value":true,"dryrun":true"#, Err("dryrun"));
    check(r#""ok","inference_id":"ID","value":true,"episode_id":"ID""#, Err("episode_id"));
}

#[test]
fn langfuse_sends_scores() {
    let check =
        |rest: &str, expected| check_alias(alias::langfuse, &format!(r#"{{"name":{rest}}}"#), expected);
    let bit = r#""n","traceId":"ID","value":1,"dataType":"BOOLEAN","environment":"default""#;
    check(bit, Ok(Judgement::Thumbs { up: true }));
    check(r#""n","observationId":"ID","traceId":"t","value":1"#, Ok(Judgement::Rating { stars: 5 }));
    check(r#""n","traceId":"ID","value":0.5,"dataType":"BOOLEAN""#, Err("value"));
    check(r#""n","traceId":"ID","value":2"#, Err("value"));
    check(r#""n","traceId":"ID","value":"good","dataType":"CATEGORICAL""#, Err("value"));
    check(r#""n","traceId":"ID","dataType":"TEXT""#, Err("dataType"));
    check(r#""n","value":1"#, Err("traceId"));
    check(r#"null,"traceId":"ID","value":1"#, Err("name"));
    check(r#""n","traceId":"ID","value":1,"nonsense":1"#, Err("nonsense"));
}

#[test]
fn helicone_sends_thumbs() {
    let check = |body, expected| {
        check_alias(|fields, about: &About<'_>| alias::helicone(fields, ID, about), body, expected)
    };
    check(r#"{"rating":false}"#, Ok(Judgement::Thumbs { up: false }));
    check(r#"{"rating":1}"#, Err("rating"));
    check(r#"{"rating":true,"more":1}"#, Err("more"));
}
