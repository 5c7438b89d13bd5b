use std::{
    process::Command,
    sync::atomic::{AtomicBool, Ordering::SeqCst},
};

use serde_json::json;
use tempfile::TempDir;

use crate::policy::{Architecture, Shape};

use super::*;

/// A Llama too small to say anything.
fn architecture() -> Architecture {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 8,
        "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 4, "vocab_size": 16, "max_position_embeddings": 16, "rope_theta": 10000.0, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": 2,
    });
    Architecture::from_config(&config.to_string(), None).unwrap()
}

fn open(dir: &Path) -> Registry {
    Registry::open(dir, |path| Adapter::load(path, &architecture()).map(Some)).unwrap()
}

fn write(seed: u64) -> impl FnOnce(&Path) -> Result<(), policy::Error> {
    move |dir| {
        let shape = Shape { rank: 2, alpha: 4.0, first_layer: 0, heads: 0 };
        Adapter::new(&architecture(), shape, seed)?.save(dir, "tiny")?;
        fs::create_dir(dir.join("reward"))?;
        fs::write(dir.join("reward/quantiles.json"), "[]")?;
        Ok(())
    }
}

fn stage(registry: &Registry, at: u64) -> Version {
    let origin = Origin { parent: registry.active(), note: format!("at {at}"), ..Origin::default() };
    registry.stage(write(at), origin, Timestamp(at)).unwrap().version
}

fn states(registry: &Registry) -> Vec<(u32, VersionState)> {
    registry.history().unwrap().into_iter().map(|record| (record.version.0, record.state)).collect()
}

fn flip_a_byte(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_trial_lasts_over_a_restart_and_ends_with_a_promotion() {
    use VersionState::{Active, Canary, Rejected, Retired, Staged};
    let dir = TempDir::new().unwrap();
    let registry = open(dir.path());
    let (one, two) = (stage(&registry, 1), stage(&registry, 2));
    registry.begin_trial(one, 0.25, Timestamp(3)).unwrap();
    assert_eq!(states(&registry), [(2, Staged), (1, Canary), (0, Active)]);
    assert!(matches!(registry.reject(one, Timestamp(4)), Err(Error::Active(_))));
    assert!(matches!(registry.begin_trial(Version(0), 0.25, Timestamp(4)), Err(Error::Active(_))));
    drop(registry);

    let registry = open(dir.path());
    let trial = registry.trial().unwrap();
    assert_eq!((trial.served.version, trial.share, registry.active()), (one, 0.25, Version(0)));
    registry.end_trial().unwrap();
    registry.reject(one, Timestamp(5)).unwrap();
    assert!(registry.trial().is_none() && registry.begin_trial(one, 0.25, Timestamp(6)).is_err());
    registry.begin_trial(two, 0.25, Timestamp(7)).unwrap();
    // The version that is served already: whoever promotes it wants the trial to end.
    registry.promote(Version(0), Timestamp(8)).unwrap();
    assert!(registry.trial().is_none());
    registry.begin_trial(two, 0.25, Timestamp(9)).unwrap();
    registry.promote(two, Timestamp(10)).unwrap();
    assert_eq!(states(&registry), [(2, Active), (1, Rejected), (0, Retired)]);
    assert!(open(dir.path()).trial().is_none());

    let three = stage(&registry, 3);
    registry.begin_trial(three, 0.25, Timestamp(11)).unwrap();
    flip_a_byte(&registry.path(three).unwrap().join(WEIGHTS));
    let registry = open(dir.path());
    assert!(registry.trial().is_none() && registry.warnings()[0].contains("was on trial"));
    assert_eq!(registry.active(), two);
}

#[test]
fn stage_promote_roll_back_reopen() {
    use VersionState::{Active, Retired, Staged};
    let dir = TempDir::new().unwrap();
    let registry = open(dir.path());
    let mut served = registry.served();
    assert_eq!(states(&registry), [(0, Active)]);
    let (one, two) = (stage(&registry, 1), stage(&registry, 2));
    assert_eq!(states(&registry), [(2, Staged), (1, Staged), (0, Active)]);
    assert!(!served.has_changed().unwrap());
    registry.promote(one, Timestamp(3)).unwrap();
    assert_eq!(served.borrow_and_update().version, one);
    let record = registry.promote(two, Timestamp(4)).unwrap();
    assert_eq!((record.state, record.promoted_at), (Active, vec![Timestamp(4)]));
    assert_eq!(
        record.files.keys().collect::<Vec<_>>(),
        ["adapter_config.json", "adapter_model.safetensors", "reward/quantiles.json"]
    );
    registry.promote(one, Timestamp(5)).unwrap();
    let before = registry.history().unwrap();
    drop(registry);
    let registry = open(dir.path());
    assert_eq!(states(&registry), [(2, Retired), (1, Active), (0, Retired)]);
    assert_eq!(registry.history().unwrap(), before);
    assert!(registry.warnings().is_empty() && registry.served().borrow().adapter.is_some());
    registry.promote(Version(0), Timestamp(6)).unwrap();
    assert!(registry.served().borrow().adapter.is_none());
    assert_eq!(open(dir.path()).active(), Version(0));
}

#[test]
fn what_is_not_taken_in_is_not_served() {
    let dir = TempDir::new().unwrap();
    let registry = open(dir.path());
    let (one, two) = (stage(&registry, 1), stage(&registry, 2));
    registry.take_in(move |version, sha256, dir| {
        assert!(sha256.len() == 64 && dir.join(WEIGHTS).exists());
        if version == one { Ok(()) } else { Err("it is full".to_owned()) }
    });
    registry.promote(one, Timestamp(3)).unwrap();
    let refused = registry.promote(two, Timestamp(4)).unwrap_err();
    assert_eq!(refused.to_string(), "v2 was not taken in: it is full");
    assert_eq!((registry.active(), open(dir.path()).active()), (one, one));
    // The base model needs nobody's help.
    registry.promote(Version(0), Timestamp(5)).unwrap();
    assert_eq!(registry.active(), Version(0));
}

#[test]
fn a_corrupt_adapter_is_refused_and_the_incumbent_stays() {
    let dir = TempDir::new().unwrap();
    let registry = open(dir.path());
    let (one, two) = (stage(&registry, 1), stage(&registry, 2));
    registry.promote(one, Timestamp(3)).unwrap();
    let weights = registry.path(two).unwrap().join(WEIGHTS);
    flip_a_byte(&weights);
    let refused = registry.promote(two, Timestamp(4)).unwrap_err();
    assert!(matches!(refused, Error::Corrupt { version, ref file, .. } if version == two && file == WEIGHTS));
    fs::remove_file(weights).unwrap();
    let refused = registry.promote(two, Timestamp(4)).unwrap_err();
    assert_eq!(refused.to_string(), "v2 is corrupt: adapter_model.safetensors is missing");
    assert_eq!((registry.active(), open(dir.path()).active()), (one, one));
}

#[test]
fn an_adapter_that_does_not_load_is_refused() {
    let dir = TempDir::new().unwrap();
    let sound = Arc::new(AtomicBool::new(true));
    let asked = Arc::clone(&sound);
    let registry = Registry::open(dir.path(), move |path| {
        let fault = || policy::Error::Adapter("has another shape".to_owned());
        asked.load(SeqCst).then(|| Adapter::load(path, &architecture()).map(Some)).ok_or_else(fault)?
    });
    let registry = registry.unwrap();
    let (one, two) = (stage(&registry, 1), stage(&registry, 2));
    registry.promote(one, Timestamp(3)).unwrap();
    sound.store(false, SeqCst);
    assert!(matches!(registry.promote(two, Timestamp(4)), Err(Error::Load { .. })));
    assert_eq!((registry.active(), open(dir.path()).active()), (one, one));
}

#[test]
fn a_corrupt_active_version_gives_way_to_the_one_before() {
    let dir = TempDir::new().unwrap();
    let registry = open(dir.path());
    let (one, two) = (stage(&registry, 1), stage(&registry, 2));
    stage(&registry, 3);
    registry.promote(one, Timestamp(4)).unwrap();
    registry.promote(two, Timestamp(5)).unwrap();
    flip_a_byte(&registry.path(two).unwrap().join(WEIGHTS));
    let registry = open(dir.path());
    assert_eq!((registry.active(), registry.warnings().len()), (one, 1));
    assert!(registry.warnings()[0].starts_with("v2 was active and is not served: v2 is corrupt"));
    flip_a_byte(&registry.path(one).unwrap().join(WEIGHTS));
    let registry = open(dir.path());
    assert_eq!((registry.active(), registry.warnings().len()), (Version(0), 2));
    flip_a_byte(&registry.path(two).unwrap().join(WEIGHTS));
    assert_eq!(open(dir.path()).active(), two);
    fs::write(dir.path().join(ACTIVE), "not json").unwrap();
    let registry = open(dir.path());
    assert_eq!((registry.active(), registry.warnings().len()), (Version(0), 1));
}

#[test]
fn what_cannot_be_staged_leaves_nothing() {
    let dir = TempDir::new().unwrap();
    let registry = open(dir.path());
    let fails = |_: &Path| Err(io::Error::other("no"));
    assert!(matches!(registry.stage(fails, Origin::default(), Timestamp(1)), Err(Error::Stage(_))));
    let half = |dir: &Path| fs::write(dir.join(WEIGHTS), "w");
    let refused = registry.stage(half, Origin::default(), Timestamp(1)).unwrap_err();
    assert!(matches!(refused, Error::Incomplete { file: "adapter_config.json" }));
    let orphan = Origin { parent: Version(7), ..Origin::default() };
    assert!(matches!(registry.stage(write(1), orphan, Timestamp(1)), Err(Error::UnknownVersion(Version(7)))));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    assert!(matches!(registry.promote(Version(1), Timestamp(1)), Err(Error::UnknownVersion(Version(1)))));
}

#[test]
fn a_rejected_version_is_not_served() {
    let dir = TempDir::new().unwrap();
    let registry = open(dir.path());
    let (one, two) = (stage(&registry, 1), stage(&registry, 2));
    registry.promote(one, Timestamp(3)).unwrap();
    assert!(matches!(registry.reject(one, Timestamp(4)), Err(Error::Active(_))));
    assert!(matches!(registry.reject(Version(0), Timestamp(4)), Err(Error::Active(_))));
    assert_eq!(registry.reject(two, Timestamp(4)).unwrap().state, VersionState::Rejected);
    assert!(matches!(registry.promote(two, Timestamp(5)), Err(Error::Rejected(_))));
    // Nor when the version after it turns out to be corrupt.
    let three = stage(&registry, 5);
    registry.promote(three, Timestamp(5)).unwrap();
    registry.promote(one, Timestamp(6)).unwrap();
    registry.reject(three, Timestamp(7)).unwrap();
    flip_a_byte(&registry.path(one).unwrap().join(WEIGHTS));
    assert_eq!(open(dir.path()).active(), Version(0));
    // Numbers are never used again.
    assert_eq!(stage(&open(dir.path()), 8), Version(4));
}

const CRASH_DIR: &str = "GYROSTAT_TEST_CRASH_DIR";
const CRASH_AT: &str = "GYROSTAT_TEST_CRASH_AT";

/// The process that is killed: not a test of its own.
#[test]
#[expect(clippy::disallowed_methods, reason = "the parent process says where")]
fn crashing_child() {
    let (Ok(dir), Ok(at)) = (std::env::var(CRASH_DIR), std::env::var(CRASH_AT)) else { return };
    let registry = open(Path::new(&dir));
    let one = stage(&registry, 1);
    registry.promote(one, Timestamp(2)).unwrap();
    if at == "write" {
        let _ = registry.stage(
            |dir| {
                write(3)(dir).unwrap();
                std::process::abort();
                #[expect(unreachable_code, reason = "gives the closure its type")]
                Ok::<(), io::Error>(())
            },
            Origin::default(),
            Timestamp(3),
        );
    }
    let two = stage(&registry, 3);
    if at == "staged" {
        std::process::abort();
    }
    registry.promote(two, Timestamp(4)).unwrap();
    std::process::abort();
}

#[track_caller]
fn check_crash(at: &str, expected: &[(u32, VersionState)]) {
    let dir = TempDir::new().unwrap();
    let ended = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "registry::tests::crashing_child"])
        .env(CRASH_DIR, dir.path())
        .env(CRASH_AT, at)
        .output()
        .unwrap();
    assert_eq!(ended.status.code(), None, "killed by a signal");
    let registry = open(dir.path());
    assert_eq!(states(&registry), expected, "{at}");
    assert!(registry.warnings().is_empty());
    let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), expected.len(), "{names:?}");
    // The interrupted version is no obstacle.
    let next = stage(&registry, 9);
    assert_eq!(registry.promote(next, Timestamp(10)).unwrap().state, VersionState::Active);
}

#[test]
fn a_crash_leaves_the_last_promoted_version() {
    use VersionState::{Active, Retired, Staged};
    check_crash("write", &[(1, Active), (0, Retired)]);
    check_crash("staged", &[(2, Staged), (1, Active), (0, Retired)]);
    check_crash("promoted", &[(2, Active), (1, Retired), (0, Retired)]);
}
