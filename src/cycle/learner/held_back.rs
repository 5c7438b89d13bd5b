//! The reward model against old judgements that no update learns from: a judge that was taught the wrong way round would
//! find every candidate good that was taught by it.

use crate::learn::{RewardModel, Scores, Watch, dataset::Split};

use super::{REWARD, Run, Stopped, examples, learn};

/// Examples of each kind that are taken.
const TAKEN: usize = 256;

impl Run {
    /// Notes how the candidate's reward model orders them, and that of the version before.
    pub(super) fn hold_back(
        &self,
        reward: &RewardModel,
        (incumbent, candidate): (&mut Scores, &mut Scores),
        watch: &Watch<'_>,
    ) -> Result<(), Stopped> {
        let (model, config) = (self.engine.model(), &self.parts.learn.reward);
        let old = examples(model, &self.old_judgements(2 * TAKEN)?, Split::Gate, TAKEN, watch)?;
        candidate.judge = reward.ordered(model, &old, config, watch)?;
        if let Some(dir) = self.version_dir().map(|dir| dir.join(REWARD)).filter(|dir| dir.exists()) {
            let before = RewardModel::load(&dir, &model.decoder.architecture).map_err(learn::Error::from)?;
            incumbent.judge = before.ordered(model, &old, config, watch)?;
        }
        Ok(())
    }
}
