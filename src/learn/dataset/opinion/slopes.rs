//! How differently raters agree with an opinion: slopes of agreement, drawn from a mixture. Pure.
//!
//! A rater of slope `s` agrees with an opinion of margin `m` with probability `σ(s·m)`, but for [`LAPSE`]: he follows it the
//! more surely, the surer it is, or says the opposite where `s < 0`. The mixture is the nonparametric maximum likelihood
//! estimate on a grid (Kiefer and Wolfowitz, *Consistency of the maximum likelihood estimator in the presence of infinitely
//! many incidental parameters*, 1956; Laird, *Nonparametric maximum likelihood estimation of a mixing distribution*, 1978),
//! by EM, so that raters who slip more and less often than others, or do not share the common taste, are no contradiction.

/// Slopes over the common one.
const GRID: [f64; 9] = [-4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0];
/// However sure an opinion is, in so many cases anything may be said.
const LAPSE: f64 = 0.05;

/// The logarithms of what a rater's judgements have for likelihoods on the grid.
pub(super) type Likelihoods = [f64; GRID.len()];

/// By rater, of signed margins: above 0 where he agrees.
pub(super) fn likelihoods(tests: &[(usize, f64)], common: f64, raters: usize) -> Vec<Likelihoods> {
    let mut likelihoods = vec![Likelihoods::default(); raters];
    for (rater, margin) in tests {
        for (sum, slope) in likelihoods[*rater].iter_mut().zip(GRID) {
            *sum += (LAPSE + (1.0 - 2.0 * LAPSE) * logistic(slope * common * margin)).ln();
        }
    }
    likelihoods
}

/// The slope that all together have, not below 0, of signed margins with their weights.
pub(super) fn common(margins: &[(f64, f64)]) -> f64 {
    const MOST: f64 = 50.0;
    let mut slope = 0.0;
    for _ in 0..30 {
        let (mut first, mut second) = (0.0, 1e-9);
        for (margin, weight) in margins {
            let agrees = logistic(slope * margin);
            first += weight * margin * (1.0 - agrees);
            second += weight * margin * margin * agrees * (1.0 - agrees);
        }
        // Newton's steps, as far as they may be trusted.
        slope = (slope + (first / second).clamp(-2.0, 2.0)).clamp(0.0, MOST);
    }
    slope
}

/// Twice the logarithm of how much likelier the raters are where some of them may say the opposite, and the mixture then.
pub(super) fn mixture(raters: &[&Likelihoods]) -> (f64, Likelihoods) {
    let (_, alike) = estimate(raters, |slope| slope >= 0.0);
    let (shares, apart) = estimate(raters, |_| true);
    (2.0 * (apart - alike), shares)
}

fn estimate(raters: &[&Likelihoods], allowed: fn(f64) -> bool) -> (Likelihoods, f64) {
    const STEPS: usize = 200;
    let mut shares = GRID.map(|slope| f64::from(u8::from(allowed(slope))));
    let count: f64 = shares.iter().sum();
    shares = shares.map(|share| share / count);
    let scaled: Vec<(f64, Likelihoods)> = raters
        .iter()
        .map(|own| {
            let most = own.iter().copied().fold(f64::MIN, f64::max);
            (most, own.map(|log| (log - most).exp()))
        })
        .collect();
    let mut likelihood = 0.0;
    for _ in 0..STEPS {
        let mut next = Likelihoods::default();
        likelihood = 0.0;
        for (most, own) in &scaled {
            let sum = own.iter().zip(&shares).map(|(own, share)| own * share).sum::<f64>().max(1e-300);
            likelihood += most + sum.ln();
            for ((next, own), share) in next.iter_mut().zip(own).zip(&shares) {
                *next += own * share / sum;
            }
        }
        shares = next.map(|sum| sum / scaled.len().max(1) as f64);
    }
    (shares, likelihood)
}

/// The probability that a rater's slope is below 0.
pub(super) fn against(own: &Likelihoods, shares: &Likelihoods) -> f64 {
    let most = own.iter().copied().fold(f64::MIN, f64::max);
    let posterior = |(log, share): (&f64, &f64)| share * (log - most).exp();
    let all: f64 = own.iter().zip(shares).map(posterior).sum();
    let against = own.iter().zip(shares).zip(GRID).filter(|(_, slope)| *slope < 0.0);
    against.map(|(own, _)| posterior(own)).sum::<f64>() / all.max(1e-300)
}

fn logistic(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}
