//! Which kind of request is it? The change of a mean, divided among the segments of the traffic.

/// One segment before and after the change: how many readings, and their mean.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Segment<S> {
    pub segment: S,
    pub n_before: u64,
    pub mean_before: f64,
    pub n_after: u64,
    pub mean_after: f64,
}

/// The share of the change that each segment accounts for, in the order given; not negative, in sum 1.
///
/// A segment contributes the change of its own mean, times its part of the traffic (the average of before and
/// after); what moved against the whole counts 0. Where no segment's mean moved, the shares are those of the
/// traffic after the change.
pub fn shares<S: Clone>(segments: &[Segment<S>]) -> Vec<(S, f64)> {
    let total = |n: fn(&Segment<S>) -> u64| (segments.iter().map(n).sum::<u64>() as f64).max(1.0);
    let (before, after) = (total(|s| s.n_before), total(|s| s.n_after));
    let moved: Vec<f64> = segments
        .iter()
        .map(|s| {
            let traffic = (s.n_before as f64 / before + s.n_after as f64 / after) / 2.0;
            let seen = s.n_before > 0 && s.n_after > 0;
            if seen { traffic * (s.mean_after - s.mean_before) } else { 0.0 }
        })
        .collect();
    let sign = if moved.iter().sum::<f64>() < 0.0 { -1.0 } else { 1.0 };
    let mut parts: Vec<f64> = moved.iter().map(|change| (sign * change).max(0.0)).collect();
    if !parts.iter().any(|&part| part > 0.0) {
        parts = segments.iter().map(|s| s.n_after as f64).collect();
    }
    let whole = parts.iter().sum::<f64>();
    let even = 1.0 / segments.len() as f64;
    let share = |part: f64| if whole > 0.0 { part / whole } else { even };
    segments.iter().zip(parts).map(|(s, part)| (s.segment.clone(), share(part))).collect()
}

/// The change of the whole mean in two parts: what the segments' own means moved, and what their shares did.
pub fn parts<S>(segments: &[Segment<S>]) -> (f64, f64) {
    let total = |n: fn(&Segment<S>) -> u64| (segments.iter().map(n).sum::<u64>() as f64).max(1.0);
    let (before, after) = (total(|s| s.n_before), total(|s| s.n_after));
    let mut parts = (0.0, 0.0);
    for s in segments {
        let (was, is) = (s.n_before as f64 / before, s.n_after as f64 / after);
        // A segment that is only on one side can have moved nothing but the shares.
        let mean_before = if s.n_before > 0 { s.mean_before } else { s.mean_after };
        let mean_after = if s.n_after > 0 { s.mean_after } else { mean_before };
        parts.0 += is * (mean_after - mean_before);
        parts.1 += (is - was) * mean_before;
    }
    parts
}

/// Whether only some of the segments moved: without the one that moved most, what the others show is less than a
/// third of the change. `false` where fewer than three segments, or fewer than 20 readings, are on both sides.
pub fn few_moved<S>(segments: &[Segment<S>], change: f64) -> bool {
    const SEEN: u64 = 5;
    let seen = segments.iter().filter(|s| s.n_before >= SEEN && s.n_after >= SEEN);
    let mut moved: Vec<(f64, f64)> = seen
        .map(|s| (s.n_after as f64 * (s.mean_after - s.mean_before) * change.signum(), s.n_after as f64))
        .collect();
    moved.sort_by(|a, b| a.0.total_cmp(&b.0));
    moved.pop();
    let (shift, n) = moved.iter().fold((0.0, 0.0), |(shift, n), one| (shift + one.0, n + one.1));
    moved.len() >= 2 && n >= 20.0 && shift / n < change.abs() / 3.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(segments: &[(u64, f64, u64, f64)], expected: &[f64]) {
        let segments: Vec<_> = (0..)
            .zip(segments)
            .map(|(segment, &(n_before, mean_before, n_after, mean_after))| Segment {
                segment,
                n_before,
                mean_before,
                n_after,
                mean_after,
            })
            .collect();
        let shares = shares(&segments);
        assert_eq!(shares.len(), expected.len());
        for (at, ((segment, share), expected)) in shares.iter().zip(expected).enumerate() {
            assert_eq!(*segment, at);
            assert!((share - expected).abs() < 1e-12, "{shares:?}");
        }
    }

    #[test]
    fn a_change_is_shared_by_traffic_and_size() {
        check(&[(100, 0.1, 100, 0.3), (300, 0.1, 300, 0.2)], &[0.4, 0.6]);
        check(&[(100, 0.1, 100, 0.3), (300, 0.1, 300, 0.1)], &[1.0, 0.0]);
    }

    #[test]
    fn what_moved_the_other_way_has_no_share() {
        check(&[(100, 0.5, 100, 0.1), (100, 0.5, 100, 0.6)], &[1.0, 0.0]);
    }

    #[test]
    fn without_a_change_within_a_segment_traffic_decides() {
        check(&[(100, 0.1, 300, 0.1), (300, 0.9, 100, 0.9)], &[0.75, 0.25]);
        check(&[(0, 0.0, 10, 0.9), (10, 0.1, 30, 0.1)], &[0.25, 0.75]);
        check(&[(0, 0.0, 0, 0.0), (0, 0.0, 0, 0.0)], &[0.5, 0.5]);
        check(&[], &[]);
    }

    fn segment(n_before: u64, mean_before: f64, n_after: u64, mean_after: f64) -> Segment<()> {
        Segment { segment: (), n_before, mean_before, n_after, mean_after }
    }

    #[test]
    fn a_change_has_two_parts() {
        let (within, between) = parts(&[segment(100, 0.1, 300, 0.1), segment(300, 0.5, 100, 0.5)]);
        assert!(within.abs() < 1e-12 && (between + 0.2).abs() < 1e-12);
        let (within, between) =
            parts(&[segment(100, 0.1, 100, 0.3), segment(300, 0.5, 300, 0.5), segment(0, 0.0, 0, 0.0)]);
        assert!((within - 0.05).abs() < 1e-12 && between.abs() < 1e-12);
    }

    #[test]
    fn one_rater_among_many_is_told_from_all() {
        let same = segment(50, 0.2, 20, 0.2);
        let moved = segment(50, 0.2, 20, 0.8);
        assert!(few_moved(&[same, same, moved, same], 0.3));
        assert!(!few_moved(&[moved, moved, moved, same], 0.4));
        assert!(!few_moved(&[same, moved], 0.3), "two raters do not tell");
    }
}
