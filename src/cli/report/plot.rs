//! The course of one stream as the points of a drawing.

use serde::Serialize;

use crate::completion::{Alarm, Timestamp};

/// The drawing's size in its own units.
const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 120.0;
/// Slices of time; one shows the mean of its readings.
const SLICES: usize = 64;

/// From the first reading to the last.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Span {
    pub(super) from: Timestamp,
    pub(super) to: Timestamp,
}

impl Span {
    pub(super) fn with(self, at: Timestamp) -> Self {
        Self { from: self.from.min(at), to: self.to.max(at) }
    }

    /// 0 at its beginning, 1 at its end.
    fn share(self, at: Timestamp) -> f64 {
        let passed = at.0.saturating_sub(self.from.0) as f64;
        (passed / (self.to.0 - self.from.0).max(1) as f64).min(1.0)
    }
}

/// What the page draws. All places are in the drawing's units, from its upper left.
#[derive(Debug, Serialize)]
pub(super) struct Plot {
    width: f64,
    height: f64,
    /// `x,y x,y …` of the slices' means.
    points: String,
    /// The values at the lower and the upper edge.
    low: f64,
    high: f64,
    alarm: Option<Marks>,
}

/// Where an alarm says that something happened.
#[derive(Debug, Serialize)]
struct Marks {
    baseline: f64,
    change: f64,
    from: f64,
    to: f64,
    at: f64,
}

impl Plot {
    /// `None` where there are too few readings to see a course.
    pub(super) fn of(readings: &[(Timestamp, f64)], span: Span, alarm: Option<&Alarm>) -> Option<Self> {
        let mut slices = [(0.0, 0_u32); SLICES];
        for (at, value) in readings {
            let slice = ((span.share(*at) * SLICES as f64) as usize).min(SLICES - 1);
            slices[slice].0 += value;
            slices[slice].1 += 1;
        }
        let means = || slices.iter().enumerate().filter(|(_, (_, count))| *count > 0);
        if means().count() < 2 {
            return None;
        }
        let values = means().map(|(_, (sum, count))| sum / f64::from(*count));
        let (low, high) = edges(values.chain(alarm.map(|alarm| alarm.baseline)));
        let y = |value: f64| HEIGHT * (1.0 - (value - low) / (high - low));
        let x = |at: Timestamp| WIDTH * span.share(at);
        let points: Vec<String> = means()
            .map(|(slice, (sum, count))| {
                let middle = WIDTH * (slice as f64 + 0.5) / SLICES as f64;
                format!("{middle:.1},{:.1}", y(sum / f64::from(*count)))
            })
            .collect();
        let alarm = alarm.map(|alarm| Marks {
            baseline: y(alarm.baseline),
            change: x(alarm.change_at),
            from: x(alarm.change_from),
            to: x(alarm.change_to),
            at: x(alarm.at),
        });
        Some(Self { width: WIDTH, height: HEIGHT, points: points.join(" "), low, high, alarm })
    }
}

/// Round values that hold all others and some air, within 0 and 1.
fn edges(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values.fold((1.0_f64, 0.0_f64), |(low, high), value| (low.min(value), high.max(value)));
    let air = ((high - low) / 10.0).max(0.01);
    (((low - air) * 100.0).floor().max(0.0) / 100.0, ((high + air) * 100.0).ceil().min(100.0) / 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot(readings: &[(u64, f64)]) -> Option<Plot> {
        let readings: Vec<_> = readings.iter().map(|(at, value)| (Timestamp(*at), *value)).collect();
        let span = Span { from: Timestamp(0), to: Timestamp(1000) };
        Plot::of(&readings, span, None)
    }

    #[test]
    fn a_slice_shows_its_mean() {
        let plot = plot(&[(0, 0.0), (1, 1.0), (1000, 1.0)]).unwrap();
        assert_eq!((plot.low, plot.high), (0.45, 1.0));
        // .5 in the first slice, 1 at the upper edge in the last.
        assert_eq!(plot.points, "5.0,109.1 635.0,0.0");
    }

    #[test]
    fn one_slice_is_no_course() {
        assert!(plot(&[(0, 0.5), (1, 0.5)]).is_none());
        assert!(plot(&[]).is_none());
    }

    #[test]
    fn equal_values_are_a_line_within() {
        assert_eq!(edges([0.0, 0.0].into_iter()), (0.0, 0.01));
        assert_eq!(edges([1.0].into_iter()), (0.99, 1.0));
    }
}
