use serde_json::json;

use super::*;
use crate::policy::{
    Device, Sampling, Vocabulary,
    sampler::{Sampler, Scratch},
    tiny,
};

fn grammars() -> Grammars {
    let dir = tempfile::tempdir().unwrap();
    tiny::write_tiny(dir.path(), 0).unwrap();
    Grammars::new(Arc::new(Model::load(dir.path().to_str().unwrap(), Device::Cpu).unwrap()))
}

fn compiled(grammars: &Grammars, schema: &Value) -> Result<Grammar, SchemaError> {
    grammars.grammar(schema.as_object().unwrap())
}

/// What the tiny vocabulary's tokens say, drawn by pure chance within the grammar; `None` if it has not ended by itself.
fn babble(grammars: &Grammars, grammar: &Grammar, seed: u64) -> Result<Option<String>, TooComplex> {
    let end = grammars.model.end_of_turn().unwrap();
    let Model { vocabulary, decoder, .. } = grammars.model.as_ref();
    let logits = vec![0.0; decoder.architecture.vocabulary];
    let mut sampler = Sampler::new(Sampling { grammar: Some(grammar.clone()), seed, ..Sampling::default() });
    let (mut scratch, mut tokens) = (Scratch::default(), Vec::new());
    while tokens.len() < 2000 {
        let token = sampler.sample(&logits, &mut scratch)?;
        if token == end {
            return Ok(Some(said(vocabulary, &tokens)));
        }
        tokens.push(token);
        if sampler.is_complete() {
            return Ok(Some(said(vocabulary, &tokens)));
        }
    }
    Ok(None)
}

fn said(vocabulary: &Vocabulary, tokens: &[u32]) -> String {
    let bytes: Vec<u8> = tokens.iter().flat_map(|token| vocabulary.piece(*token)).copied().collect();
    String::from_utf8(bytes).unwrap()
}

#[test]
fn whatever_ends_by_itself_satisfies_its_schema() {
    let grammars = grammars();
    let schemas = [
        json!({ "type": "object" }),
        json!({ "enum": ["red", "green", 3, null] }),
        json!({ "type": "object", "additionalProperties": false, "required": ["name", "age"],
            "properties": { "name": { "type": "string", "maxLength": 8 }, "age": { "type": "integer", "minimum": 0, "maximum": 120 } } }),
        json!({ "type": "array", "minItems": 1, "maxItems": 3, "items": { "type": "number" } }),
        json!({ "anyOf": [{ "type": "boolean" }, { "type": "string", "pattern": "^[a-c]{2,4}$" }] }),
        json!({ "$ref": "#/$defs/node", "$defs": { "node": { "type": "object", "additionalProperties": false,
            "required": ["children"], "properties": { "children": { "type": "array", "maxItems": 2, "items": { "$ref": "#/$defs/node" } } } } } }),
        json!({ "type": "object", "additionalProperties": false, "required": ["day", "kind"],
            "properties": { "day": { "type": "string", "format": "date" }, "kind": { "const": "a" }, "note": { "type": ["string", "null"], "maxLength": 5 } } }),
    ];
    for schema in schemas {
        let grammar = compiled(&grammars, &schema).unwrap();
        let validator = jsonschema::options().should_validate_formats(true).build(&schema).unwrap();
        let mut ended = 0;
        for seed in 0..60 {
            let Some(text) = babble(&grammars, &grammar, seed).unwrap() else { continue };
            let value: Value = match serde_json::from_str(&text) {
                Ok(value) => value,
                // JSON sets numbers no bound, f64 does.
                Err(error) if error.to_string().starts_with("number out of range") => continue,
                Err(error) => panic!("{text:?}: {error}"),
            };
            assert!(validator.is_valid(&value), "{text} does not satisfy {schema}");
            ended += 1;
        }
        assert!(ended >= 20, "{ended} of 60 ended: {schema}");
    }
}

#[test]
fn what_has_no_grammar_is_refused() {
    let grammars = grammars();
    let refused = |schema: Value| compiled(&grammars, &schema).unwrap_err().to_string();
    for schema in [
        json!({ "type": "dragon" }),
        json!({ "not": { "type": "string" } }),
        json!({ "type": "object", "properties": 7 }),
        json!({ "$ref": "#/$defs/nowhere" }),
        json!({ "$ref": "https://example.com/schema.json" }),
        json!({ "type": "string", "pattern": "(" }),
        json!({ "type": "integer", "minimum": 5, "maximum": 4 }),
        json!({ "oneOf": [{ "type": "object" }, { "type": "object", "properties": { "a": {} } }] }),
    ] {
        let why = refused(schema.clone());
        assert!(why.starts_with("is not supported: ") && why.len() > 20, "{schema}: {why}");
    }
    let large: Vec<String> = (0..20_000).map(|n| format!("value {n}")).collect();
    assert_eq!(refused(json!({ "enum": large })), "is larger than 120000 bytes");
    // Settings of the compiler are ours.
    let loose = json!({ "type": "integer", "x-guidance": { "whitespace_pattern": "[ ]+", "lenient": true } });
    let grammar = compiled(&grammars, &loose).unwrap();
    babble(&grammars, &grammar, 1).unwrap().unwrap().parse::<f64>().unwrap();
}

/// Schemas that ask for much work are refused, given up in the middle, or done: they end.
#[test]
fn work_is_bounded() {
    let grammars = grammars();
    let mut given_up = 0;
    let object =
        |n: usize| json!({ "type": "object", "properties": { format!("a{n}"): { "type": "string" } } });
    let choices: Vec<Value> =
        (0..40).map(|n| json!({ "anyOf": [object(2 * n), object(2 * n + 1)] })).collect();
    let deep = (0..100).fold(
        json!({ "type": "string" }),
        |inner, _| json!({ "type": "object", "properties": { "a": inner } }),
    );
    let wide: Map<String, Value> =
        (0..2000).map(|n| (format!("p{n}"), json!({ "type": "string" }))).collect();
    for schema in [
        json!({ "allOf": choices }),
        json!({ "type": "string", "pattern": "^(a{1,200}b{1,200}){1,200}$" }),
        json!({ "type": "string", "pattern": "^(.*a.{60}){3}$" }),
        json!({ "type": "array", "minItems": 1_000_000, "items": { "type": "string" } }),
        json!({ "type": "string", "minLength": 1_000_000_000 }),
        json!({ "type": "object", "properties": wide }),
        deep,
    ] {
        match compiled(&grammars, &schema) {
            Ok(grammar) => given_up += usize::from(babble(&grammars, &grammar, 1).is_err()),
            Err(SchemaError(_)) => given_up += 1,
        }
    }
    assert!(given_up > 0, "no bound was met");
}

#[test]
fn the_latest_schemas_are_kept() {
    let grammars = grammars();
    let schema = |n: usize| json!({ "const": n });
    let same =
        |n: usize, grammar: &Grammar| Arc::ptr_eq(&compiled(&grammars, &schema(n)).unwrap().0, &grammar.0);
    let first = compiled(&grammars, &schema(0)).unwrap();
    for n in 1..KEPT {
        compiled(&grammars, &schema(n)).unwrap();
    }
    assert!(same(0, &first));
    let second = compiled(&grammars, &schema(1)).unwrap();
    for n in KEPT..2 * KEPT - 1 {
        compiled(&grammars, &schema(n)).unwrap();
    }
    assert_eq!(grammars.kept.lock().unwrap().len(), KEPT);
    assert!(same(1, &second) && !same(0, &first));
}
