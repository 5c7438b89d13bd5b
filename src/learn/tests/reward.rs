//! What a reward model keeps beside its adapter.

use super::{tiny_model, watching};
use crate::learn::{
    RewardModel, Sequence,
    reward::{Config, Reads},
};

#[test]
fn a_reward_model_is_loaded_as_it_reads() {
    let (model, dir) = (tiny_model(), tempfile::tempdir().unwrap());
    let answers = [Sequence::new(vec![1, 2, 3, 4, 5], 2), Sequence::new(vec![1, 2, 6], 2)];
    let scores = |reward: &RewardModel| reward.score(&model, &answers, &watching(64)).unwrap();
    let new = |reads| RewardModel::new(&model, &Config { reads, ..Config::default() }, 0).unwrap();
    assert_ne!(scores(&new(Reads::End)), scores(&new(Reads::Answer)));
    // The second one takes the first one's place.
    for reads in [Reads::Answer, Reads::End] {
        let reward = new(reads);
        reward.save(dir.path(), "tiny").unwrap();
        let loaded = RewardModel::load(dir.path(), &model.decoder.architecture).unwrap();
        assert_eq!((loaded.reads, scores(&loaded)), (reads, scores(&reward)));
    }
    std::fs::write(dir.path().join("reads.json"), "\"middle\"").unwrap();
    let fault = RewardModel::load(dir.path(), &model.decoder.architecture).unwrap_err().to_string();
    assert!(fault.contains("reads.json: unknown variant `middle`, expected `end` or `answer`"), "{fault}");
    std::fs::remove_file(dir.path().join("reads.json")).unwrap();
    assert_eq!(RewardModel::load(dir.path(), &model.decoder.architecture).unwrap().reads, Reads::End);
}
