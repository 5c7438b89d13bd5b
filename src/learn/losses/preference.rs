//! Losses on log-ratios `log π − log π_ref` of whole answers: DPO, IPO, KTO.

use super::{sigmoid, softplus};

/// DPO's or IPO's loss over pairs.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct DpoLoss {
    pub loss: f64,
    /// Share of the pairs whose chosen answer has the higher implicit reward, `β · log-ratio`.
    pub accuracy: f64,
    /// Mean implicit reward of the chosen and of the rejected answers.
    pub chosen: f64,
    pub rejected: f64,
    /// By each answer's log-ratio.
    pub dchosen: Vec<f32>,
    pub drejected: Vec<f32>,
}

impl DpoLoss {
    /// What both losses have in common; `of` gives a pair's loss and its slope by either log-ratio.
    fn mean(
        chosen: &[f64],
        rejected: &[f64],
        beta: f64,
        mut of: impl FnMut(usize, f64, f64) -> (f64, f64, f64),
    ) -> Self {
        let count = chosen.len().max(1) as f64;
        let mut out = Self::default();
        for (at, (chosen, rejected)) in chosen.iter().zip(rejected).enumerate() {
            let (loss, dchosen, drejected) = of(at, *chosen, *rejected);
            out.loss += loss / count;
            out.accuracy += f64::from(u8::from(chosen > rejected)) / count;
            out.chosen += beta * chosen / count;
            out.rejected += beta * rejected / count;
            out.dchosen.push((dchosen / count) as f32);
            out.drejected.push((drejected / count) as f32);
        }
        out
    }
}

/// Mean of `−log σ(β (c − r))` over the log-ratios of the chosen and rejected answers (Rafailov et al., *Direct Preference
/// Optimization*, 2023).
pub fn dpo(chosen: &[f64], rejected: &[f64], beta: f64) -> DpoLoss {
    DpoLoss::mean(chosen, rejected, beta, |_, chosen, rejected| {
        let margin = beta * (chosen - rejected);
        let pull = beta * sigmoid(-margin);
        (softplus(-margin), -pull, pull)
    })
}

/// Mean of `(c / |c| − r / |r| − 1 / 2β)²`, the log-ratios taken a token (Azar et al., *A General Theoretical Paradigm to
/// Understand Learning from Human Preferences*, 2023, with TRL's mean over tokens). `tokens` are the answers' lengths.
pub fn ipo(chosen: &[f64], rejected: &[f64], tokens: &[(usize, usize)], beta: f64) -> DpoLoss {
    DpoLoss::mean(chosen, rejected, beta, |at, chosen, rejected| {
        let (of_chosen, of_rejected) = tokens[at];
        let (of_chosen, of_rejected) = (of_chosen.max(1) as f64, of_rejected.max(1) as f64);
        let short = chosen / of_chosen - rejected / of_rejected - 0.5 / beta;
        (short * short, 2.0 * short / of_chosen, -2.0 * short / of_rejected)
    })
}

/// KTO's loss over single answers.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct KtoLoss {
    pub loss: f64,
    /// Mean implicit reward of the desirable and of the undesirable answers.
    pub chosen: f64,
    pub rejected: f64,
    /// By each answer's log-ratio.
    pub dratios: Vec<f32>,
}

/// What good and bad examples count in KTO, to balance unequal numbers of them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KtoWeights {
    pub desirable: f64,
    pub undesirable: f64,
}

/// Mean of `λ (1 − σ(± β (ratio − z)))`, plus for desirable answers (Ethayarajh et al., *KTO*, 2024), each weighed by
/// `weights`. `z` is the mean log-ratio of mismatched prompts and answers, at least 0, and has no gradient.
pub fn kto(
    ratios: &[f64],
    desirable: &[bool],
    weights: &[f64],
    z: f64,
    beta: f64,
    lambda: KtoWeights,
) -> KtoLoss {
    let total = weights.iter().sum::<f64>().max(1e-12);
    let counts = |wanted: bool| desirable.iter().filter(|is| **is == wanted).count().max(1) as f64;
    let (good, bad) = (counts(true), counts(false));
    let mut out = KtoLoss::default();
    for ((ratio, desirable), weight) in ratios.iter().zip(desirable).zip(weights) {
        let (sign, lambda) = if *desirable { (1.0, lambda.desirable) } else { (-1.0, lambda.undesirable) };
        let share = weight / total * lambda;
        let value = sigmoid(sign * beta * (ratio - z.max(0.0)));
        out.loss += share * (1.0 - value);
        out.dratios.push((-share * sign * beta * value * (1.0 - value)) as f32);
        if *desirable {
            out.chosen += beta * ratio / good;
        } else {
            out.rejected += beta * ratio / bad;
        }
    }
    out
}
