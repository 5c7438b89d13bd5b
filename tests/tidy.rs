//! The architecture as a test: who may import whom, and how large a file may grow.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::{
    fs,
    path::{Path, PathBuf},
};

/// `(module, what it may import)`, in the order in which data flows. A module may always import itself.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("completion", &[]),
    ("drift", &[]),
    ("policy", &["completion"]),
    ("upstream", &["completion"]),
    ("signals", &["completion"]),
    ("store", &["completion"]),
    ("learn", &["completion", "policy"]),
    // Only the noun `Scores` and what it is made of.
    ("gate", &["completion", "learn"]),
    ("canary", &["completion"]),
    // Of the latter the type of a key that is not printed.
    ("comparisons", &["completion", "upstream"]),
    ("registry", &["completion", "policy"]),
    ("cycle", &["completion", "policy", "signals", "store", "drift", "learn", "gate", "canary", "registry"]),
    (
        "http",
        &[
            "completion",
            "policy",
            "upstream",
            "signals",
            "store",
            "canary",
            "comparisons",
            "registry",
            "cycle",
        ],
    ),
    (
        "config",
        &[
            "policy",
            "upstream",
            "signals",
            "store",
            "drift",
            "learn",
            "gate",
            "canary",
            "comparisons",
            "cycle",
            "http",
        ],
    ),
    (
        "app",
        &[
            "completion",
            "config",
            "policy",
            "upstream",
            "signals",
            "store",
            "learn",
            "comparisons",
            "registry",
            "cycle",
            "http",
        ],
    ),
    ("demo", &["app", "canary", "config"]),
    (
        "cli",
        &[
            "completion",
            "config",
            "app",
            "demo",
            "policy",
            "upstream",
            "signals",
            "store",
            "drift",
            "learn",
            "gate",
            "canary",
            "comparisons",
            "registry",
            "cycle",
            "http",
        ],
    ),
    ("lib", &[]),
    ("main", &[]),
];

/// Lines of a file without its tests.
const LINES_MOST: usize = 560;

fn sources(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found
}

/// What is wrong with one file's imports.
fn import_faults(path: &str, text: &str) -> Vec<String> {
    let module = path.split(['/', '.']).next().unwrap_or_default();
    let Some((_, allowed)) = MAY_IMPORT.iter().find(|(name, _)| *name == module) else {
        return vec![format!("src/{path}: the module `{module}` is not in the table of tests/tidy.rs")];
    };
    let mut faults = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let at = format!("src/{path}:{}", index + 1);
        if line.contains("use crate::{") || line.contains("super::super") {
            faults.push(format!("{at}: groups of modules and `super::super` hide imports from this test"));
        }
        for (start, hit) in line.match_indices("crate::") {
            let rest = &line[start + hit.len()..];
            let target: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            if target != module && !target.is_empty() && !allowed.contains(&target.as_str()) {
                faults.push(format!("{at}: `{module}` may not import `{target}`"));
            }
        }
    }
    faults
}

#[test]
fn modules_import_only_what_the_table_allows() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut faults = Vec::new();
    for path in sources(&root) {
        let name = path.strip_prefix(&root).unwrap().to_string_lossy().replace('\\', "/");
        faults.extend(import_faults(&name, &fs::read_to_string(&path).unwrap()));
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn an_import_against_the_table_is_found() {
    let faults = import_faults("store/key.rs", "//! Keys.\nuse crate::policy::Engine;\n");
    assert_eq!(faults, ["src/store/key.rs:2: `store` may not import `policy`"]);
    assert_eq!(import_faults("attic.rs", "").len(), 1);
    assert_eq!(import_faults("cycle.rs", "use crate::{gate, learn};\n").len(), 1);
}

#[test]
fn files_stay_short() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for path in sources(&root) {
        let text = fs::read_to_string(&path).unwrap();
        let lines = text.lines().take_while(|line| line.trim() != "mod tests {").count();
        assert!(path.ends_with("tests.rs") || lines <= LINES_MOST, "{} has {lines} lines", path.display());
    }
}
