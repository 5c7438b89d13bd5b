//! The reward model against old judgements that no update learns from: a judge that was taught the wrong way round would
//! find every candidate good that was taught by it.

use crate::completion::{Completion, Feedback, Source, Timestamp};
use crate::learn::{
    Dataset, RewardModel, Scores, Watch,
    dataset::{self, Split},
};
use crate::policy::Adapter;
use crate::signals;

use super::{Error, REWARD, Run, Stopped, examples, learn};

/// Old answers that are looked through, the newest first, and examples of each kind that are taken.
const LOOKED_AT: usize = 50_000;
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
        let old = examples(model, &self.old_judgements()?, Split::Gate, TAKEN, watch)?;
        candidate.judge = reward.ordered(model, &old, config, watch)?;
        if let Some(dir) = self.version_dir().map(|dir| dir.join(REWARD)).filter(|dir| dir.exists()) {
            let adapter = Adapter::load(&dir, &model.decoder.architecture).map_err(learn::Error::from)?;
            incumbent.judge = RewardModel { adapter }.ordered(model, &old, config, watch)?;
        }
        Ok(())
    }

    /// Judgements of the prompts that are the gate's, of any version; of the types to be mended since the change only:
    /// what was wanted of them before is what the update is to unlearn.
    fn old_judgements(&self) -> Result<Dataset, Error> {
        let since: Timestamp = self.change_at()?;
        let wanted = &self.update.interactions;
        let mut records: Vec<(Completion, Vec<Feedback>)> = Vec::new();
        for record in self.parts.store.judged(..).rev().take(LOOKED_AT) {
            let (completion, mut feedback) = record?;
            // What people want is what people said, not what a judge model believes that they want.
            feedback.retain(|said| said.source == Source::Human);
            let outdated = wanted.contains(&completion.interaction) && completion.at < since;
            if !feedback.is_empty() && !outdated && dataset::split(&completion.prompt) == Split::Gate {
                records.push((completion, feedback));
            }
            if records.len() == 2 * TAKEN {
                break;
            }
        }
        records.reverse();
        Ok(Dataset::build(records, &self.parts.learn.dataset, &signals::satisfaction))
    }
}
