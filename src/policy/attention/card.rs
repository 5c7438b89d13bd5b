//! Attention by the card's own kernels: the scores are never written down.

use std::sync::Arc;

use candle_core::{Device, Result, Tensor};

use super::{Heads, Span, Stored};
use crate::policy::{
    card::{self, Sights},
    kv::Store,
};

/// Which places the rows of a pass see, and where these lie.
#[derive(Debug)]
pub(crate) struct Reach {
    sights: Sights,
    stored: Option<Stored>,
}

impl Reach {
    /// As [`super::Reach::fresh`].
    pub(super) fn fresh(spans: &[Span], heads: Heads, device: &Device) -> Result<Self> {
        Self::new(spans, heads, device, &|nth, place| spans[nth].start + place, None)
    }

    /// As [`super::Reach::stored`].
    pub(super) fn stored(
        spans: &[Span],
        heads: Heads,
        store: &Arc<Store>,
        location: &dyn Fn(usize, usize) -> usize,
    ) -> Result<Self> {
        let stored = Stored::new(spans, store, location)?;
        Self::new(spans, heads, store.device(), location, Some(stored))
    }

    fn new(
        spans: &[Span],
        heads: Heads,
        device: &Device,
        location: &dyn Fn(usize, usize) -> usize,
        stored: Option<Stored>,
    ) -> Result<Self> {
        let (mut locations, mut rows, mut until) = (Vec::new(), Vec::new(), Vec::new());
        for (nth, span) in spans.iter().enumerate() {
            let first = locations.len() as u32;
            locations.extend((0..span.position + span.len).map(|place| location(nth, place) as u32));
            for row in 0..span.len {
                let seen = heads.seen(span.position + row);
                rows.extend([first, seen.start as u32, seen.end as u32]);
                let seeing = heads.window.map_or(span.len, |window| span.len.min(row + window));
                until.push((span.start + seeing) as u32);
            }
        }
        let count = until.len();
        let sights = Sights {
            locations: Tensor::new(locations, device)?,
            rows: Tensor::from_vec(rows, (count, 3), device)?,
            until: Tensor::new(until, device)?,
        };
        Ok(Self { sights, stored })
    }

    pub(super) fn attend(
        &self,
        layer: usize,
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        heads: Heads,
    ) -> Result<Tensor> {
        let (k, v) = match &self.stored {
            Some(stored) => stored.write(layer, (k, v))?,
            None => (k, v),
        };
        card::attend((q, k, v), &self.sights, heads)
    }

    pub(super) fn backward(
        &self,
        dy: &Tensor,
        qkv: (&Tensor, &Tensor, &Tensor),
        heads: Heads,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        card::attend_backward(dy, qkv, &self.sights, heads)
    }
}
