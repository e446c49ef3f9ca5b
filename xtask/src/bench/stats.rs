//! Medians, quantiles, and intervals that assume nothing of how times are distributed.

/// Of one arm and case, over blocks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Summary {
    pub median: f64,
    pub lower_quartile: f64,
    pub upper_quartile: f64,
}

/// A median, and the interval that holds the true one with at least 95 % probability; none of fewer than 6 values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    pub median: f64,
    pub interval: Option<(f64, f64)>,
}

pub fn summary(values: &[f64]) -> Option<Summary> {
    let sorted = sorted(values);
    Some(Summary {
        median: quantile(&sorted, 0.5)?,
        lower_quartile: quantile(&sorted, 0.25)?,
        upper_quartile: quantile(&sorted, 0.75)?,
    })
}

pub fn estimate(values: &[f64]) -> Option<Estimate> {
    let sorted = sorted(values);
    let value = |rank: usize| sorted.get(rank - 1).copied();
    let interval = median_ranks(sorted.len()).and_then(|(low, high)| value(low).zip(value(high)));
    Some(Estimate { median: quantile(&sorted, 0.5)?, interval })
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    sorted
}

/// Linear between the two nearest values; `part` is between 0 and 1.
fn quantile(sorted: &[f64], part: f64) -> Option<f64> {
    let place = part * sorted.len().checked_sub(1)? as f64;
    let (below, above) = (sorted.get(place.floor() as usize)?, sorted.get(place.ceil() as usize)?);
    Some(below + (above - below) * place.fract())
}

/// The ranks, from 1, of the values between which the median lies with at least 95 % probability: how many of n values
/// are below the true median is binomial with 1/2.
fn median_ranks(n: usize) -> Option<(usize, usize)> {
    let mut term = 0.5_f64.powi(i32::try_from(n).ok()?);
    let (mut below, mut rank) = (term, 0);
    while below <= 0.025 && rank < n {
        rank += 1;
        term *= (n - rank + 1) as f64 / rank as f64;
        below += term;
    }
    (rank > 0).then_some((rank, n + 1 - rank))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How probable it is that at most `k` of `n` fair coins show heads, by exact integers.
    fn at_most(k: usize, n: usize) -> f64 {
        let choose = |k: usize| (0..k).fold(1_u128, |sum, i| sum * (n - i) as u128 / (i as u128 + 1));
        (0..=k).map(choose).sum::<u128>() as f64 / 2_f64.powi(n as i32)
    }

    #[test]
    fn the_interval_of_40_values_goes_from_the_14th_to_the_27th() {
        assert_eq!(median_ranks(40), Some((14, 27)));
        assert!(2.0 * at_most(13, 40) <= 0.05);
        assert!(2.0 * at_most(14, 40) > 0.05);
        let values: Vec<f64> = (1..=40).rev().map(f64::from).collect();
        assert_eq!(estimate(&values), Some(Estimate { median: 20.5, interval: Some((14.0, 27.0)) }));
    }

    #[test]
    fn the_interval_is_the_narrowest_that_holds_95_percent() {
        for n in 6..=100 {
            let (low, high) = median_ranks(n).unwrap();
            assert_eq!(low + high, n + 1);
            assert!(2.0 * at_most(low - 1, n) <= 0.05, "{n}");
            assert!(2.0 * at_most(low, n) > 0.05, "{n}");
        }
    }

    #[test]
    fn intervals_agree_with_published_tables() {
        assert_eq!(median_ranks(6), Some((1, 6)));
        assert_eq!(median_ranks(10), Some((2, 9)));
        assert_eq!(median_ranks(30), Some((10, 21)));
        assert_eq!(median_ranks(100), Some((40, 61)));
    }

    #[test]
    fn five_values_have_no_interval() {
        assert_eq!(median_ranks(5), None);
        assert_eq!(median_ranks(0), None);
        assert_eq!(estimate(&[3.0, 1.0]), Some(Estimate { median: 2.0, interval: None }));
    }

    #[test]
    fn quartiles_lie_between_values() {
        let summary = summary(&[4.0, 1.0, 3.0, 2.0]).unwrap();
        assert_eq!(summary, Summary { median: 2.5, lower_quartile: 1.75, upper_quartile: 3.25 });
    }

    #[test]
    fn nothing_has_no_median() {
        assert_eq!(summary(&[]), None);
        assert_eq!(estimate(&[]), None);
    }

    #[test]
    fn one_value_is_its_own_median() {
        assert_eq!(summary(&[7.0]), Some(Summary { median: 7.0, lower_quartile: 7.0, upper_quartile: 7.0 }));
    }
}
