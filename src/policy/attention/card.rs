//! Attention by the card's own kernels: the scores are never written down.

use candle_core::{Device, Result, Tensor};

use crate::policy::card::{self, Sights, TILE};
use crate::policy::{architecture::Heads, batch::Span};

/// Which places the rows of a pass see, and where these lie.
#[derive(Debug)]
pub(super) struct Sight(Sights);

impl Sight {
    pub(super) fn new(
        spans: &[Span],
        heads: Heads,
        device: &Device,
        location: &dyn Fn(usize, usize) -> usize,
    ) -> Result<Self> {
        let (mut locations, mut rows, mut until) = (Vec::new(), Vec::new(), Vec::new());
        let mut tiles = Vec::new();
        for (nth, span) in spans.iter().enumerate() {
            let first = locations.len() as u32;
            locations.extend((0..span.position + span.len).map(|place| location(nth, place) as u32));
            for row in (0..span.len).step_by(TILE) {
                tiles.extend([(span.start + row) as u32, TILE.min(span.len - row) as u32]);
            }
            for row in 0..span.len {
                let seen = heads.seen(span.position + row);
                rows.extend([first, seen.start as u32, seen.end as u32]);
                let seeing = heads.window.map_or(span.len, |window| span.len.min(row + window));
                until.push((span.start + seeing) as u32);
            }
        }
        let count = until.len();
        Ok(Self(Sights {
            locations: Tensor::new(locations, device)?,
            rows: Tensor::from_vec(rows, (count, 3), device)?,
            until: Tensor::new(until, device)?,
            tiles: Tensor::from_vec(tiles, ((), 2), device)?,
        }))
    }

    pub(super) fn attend(&self, qkv: (&Tensor, &Tensor, &Tensor), heads: Heads) -> Result<Tensor> {
        card::attend(qkv, &self.0, heads)
    }

    pub(super) fn backward(
        &self,
        dy: &Tensor,
        qkv: (&Tensor, &Tensor, &Tensor),
        heads: Heads,
    ) -> Result<Tensor> {
        card::attend_backward(dy, qkv, &self.0, heads)
    }
}
