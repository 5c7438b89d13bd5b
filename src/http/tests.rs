use std::collections::BTreeSet;

use serde_json::Value;

use super::*;

fn keys() -> Vec<Key> {
    let key = |key: &str, scopes: &[Scope]| Key { key: key.to_owned(), scopes: scopes.to_vec() };
    vec![
        key("app", &[Scope::Chat, Scope::Feedback]),
        key("root", &[Scope::Admin]),
        key("none", &[]),
        key("", &[Scope::Chat]),
    ]
}

#[track_caller]
fn check_admitted(authorization: &str, scope: Scope, status: Option<u16>) {
    let refused = admit(&keys(), &token(authorization), scope).err();
    assert_eq!(refused.map(|error| error.status().as_u16()), status, "{authorization}");
}

#[test]
fn a_key_opens_its_scopes() {
    check_admitted("Bearer app", Scope::Chat, None);
    check_admitted("bearer  app", Scope::Feedback, None);
    check_admitted("Bearer app", Scope::Admin, Some(403));
    check_admitted("Bearer none", Scope::Chat, Some(403));
    check_admitted("Bearer root", Scope::Admin, None);
    check_admitted("Bearer ap", Scope::Chat, Some(401));
    check_admitted("Bearer apps", Scope::Chat, Some(401));
    check_admitted("Basic app", Scope::Chat, Some(401));
    // `pk:app`, `pk:ap` and no pair at all.
    check_admitted("Basic cGs6YXBw", Scope::Feedback, None);
    check_admitted("Basic cGs6YXA=", Scope::Feedback, Some(401));
    check_admitted("Basic YXBw", Scope::Feedback, Some(401));
    check_admitted("app", Scope::Chat, Some(401));
    // A key that was left empty opens nothing.
    check_admitted("", Scope::Chat, Some(401));
    check_admitted("Bearer ", Scope::Chat, Some(401));
}

#[test]
fn a_key_is_not_printed() {
    assert!(!format!("{:?}", keys()).contains("root"));
}

#[tokio::test]
async fn a_body_ends_at_the_limit() {
    assert_eq!(read(Body::from("12345"), 5).await.unwrap(), "12345");
    assert_eq!(read(Body::from("123456"), 5).await.unwrap_err().status().as_u16(), 413);
    let broken = futures_util::stream::iter([Ok(Bytes::from("12")), Err(std::io::Error::other("gone"))]);
    assert_eq!(read(Body::from_stream(broken), 5).await.unwrap_err().status().as_u16(), 400);
}

/// All values of `$ref` in a document.
fn references(value: &Value, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                match value.as_str() {
                    Some(reference) if name == "$ref" => drop(found.insert(reference.to_owned())),
                    _ => references(value, found),
                }
            }
        }
        Value::Array(values) => values.iter().for_each(|value| references(value, found)),
        _ => {}
    }
}

#[test]
fn the_description_is_whole() {
    let document = ops::description();
    for route in ROUTES {
        let operation = &document["paths"][route.path][route.method];
        assert_eq!(operation["summary"], route.summary, "{} {}", route.method, route.path);
        let parameters = operation["parameters"].as_array().unwrap();
        let in_path = parameters.iter().filter(|parameter| parameter["in"] == "path").count();
        assert_eq!(in_path, route.path.matches('{').count(), "{}", route.path);
    }
    let mut found = BTreeSet::new();
    references(&document, &mut found);
    assert!(found.len() > 5, "{found:?}");
    for reference in found {
        let target = document.pointer(reference.trim_start_matches('#'));
        assert!(target.is_some_and(Value::is_object), "{reference} leads nowhere");
    }
}

#[test]
fn what_is_described_is_what_is_read() {
    let schemas = &ops::description()["components"]["schemas"];
    for (schema, parse) in [("ChatRequest", wire::chat as fn(&[u8]) -> _), ("TextRequest", wire::text)] {
        for part in schemas[schema]["allOf"].as_array().unwrap() {
            let name = part["$ref"].as_str().and_then(|reference| reference.rsplit('/').next());
            let part = name.map_or(part, |name| &schemas[name]);
            for field in part["properties"].as_object().unwrap().keys() {
                // Alone in a body it is never the field that is not supported.
                let error = parse(format!(r#"{{"{field}":{{}}}}"#).as_bytes()).unwrap_err().body();
                let unknown = error["error"]["message"] == format!("`{field}` is not supported");
                assert!(!unknown, "{schema} describes {field}");
            }
        }
    }
}
