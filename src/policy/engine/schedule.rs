//! Who gets how much of a step.

/// Shares `budget` tokens out to sequences with `pending` tokens each: nobody gets more than it can use, and nobody
/// gets less than another that could not do with less either (max-min fairness). A short prompt is thus not kept waiting by
/// a long one, and a long one moves on beside any number of short ones.
pub(super) fn shares(pending: &[usize], budget: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..pending.len()).collect();
    order.sort_by_key(|index| pending[*index]);
    let mut shares = vec![0; pending.len()];
    let mut left = budget;
    for (served, index) in order.into_iter().enumerate() {
        shares[index] = pending[index].min(left.div_ceil(pending.len() - served));
        left -= shares[index];
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_prompts_pass_and_long_ones_move() {
        assert_eq!(shares(&[4000, 10, 300], 256), [123, 10, 123]);
        assert_eq!(shares(&[5, 5], 256), [5, 5]);
        assert_eq!(shares(&[9, 9, 9], 2).iter().sum::<usize>(), 2);
        assert_eq!(shares(&[], 256), [0usize; 0]);
    }
}
