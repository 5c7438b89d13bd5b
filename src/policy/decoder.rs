//! The Llama decoder: one forward pass for serving and for training.
//!
//! The rows of all sequences of a step lie one after another (`[rows, hidden]`, no padding). Serving gives each sequence
//! a [`KvCache`] to read and extend; training passes whole sequences and a tape for the backward pass
//! (`policy/backward.rs`). Everything else is the same code, so that the two agree.

use std::{ops::Range, sync::Arc};

use candle_core::{D, Device, Result, Tensor};
use rayon::prelude::*;

use super::{
    architecture::{Architecture, Target},
    attention::{Past, Reach, attend, blocks_of},
    batch::{Adapted, Batch, Span},
    device::{Placement, on_slices, product_rate},
    kv::KvCache,
    layer::Layer,
    linear::Linear,
    ops::{read, rms_norm, sum, swiglu},
    rope::{Angles, Rope},
    tape::{LayerTape, PartTape, Tape},
};

/// The frozen base: one copy of the weights, shared by the policy, the reward and value models and the reference.
#[derive(Debug)]
pub struct Decoder {
    pub architecture: Architecture,
    /// `[vocabulary, hidden]`.
    pub(crate) embedding: Linear,
    pub(crate) layers: Vec<Layer>,
    pub(crate) norm: Tensor,
    /// `[vocabulary, hidden]`; the embedding itself when they are tied.
    pub(crate) head: Linear,
    pub(crate) rope: Rope,
}

/// Where attention finds earlier places, and what is remembered of the pass.
pub(crate) enum Memory<'a, 'b> {
    /// Sequences start at their first row; nothing is kept.
    Nothing,
    /// One cache a span.
    Caches(&'a mut [&'b mut KvCache]),
    /// Sequences start at their first row; activations of the adapter's layers are kept for the backward pass.
    Tape(&'a mut Vec<LayerTape>),
}

/// What all layers of a pass need to know of its rows.
#[derive(Debug)]
pub(crate) struct Places {
    pub(crate) angles: Angles,
    /// Where attention is made of tensor operations.
    pub(crate) reach: Option<Reach>,
    /// The rows that the last layer goes on with after its attention, if not with all.
    wanted: Option<Wanted>,
}

/// Some rows of a batch.
#[derive(Debug)]
pub(crate) struct Wanted {
    /// `[wanted]`.
    rows: Tensor,
    /// Counted among them.
    adapted: Adapted,
}

impl Wanted {
    fn of(batch: &Batch, device: &Device) -> Result<Option<Self>> {
        let Some(rows) = &batch.wanted else { return Ok(None) };
        let adapted = batch.adapted.iter();
        let adapted = adapted.map(|(rows, adapter)| (batch.wanted_of(rows), Arc::clone(adapter)));
        Ok(Some(Self { rows: Tensor::new(rows.as_slice(), device)?, adapted: adapted.collect() }))
    }

    /// Of `[wanted, columns]` what it is in its rows of `[rows, columns]`, zeros elsewhere.
    pub(crate) fn scatter(&self, x: &Tensor, rows: usize) -> Result<Tensor> {
        Tensor::zeros((rows, x.dim(1)?), x.dtype(), x.device())?.index_add(&self.rows, x, 0)
    }
}

impl Decoder {
    /// One step of serving: the hidden states after the last norm, `[wanted, hidden]`. Each span extends its cache.
    pub fn step(&self, batch: &Batch, caches: &mut [&mut KvCache]) -> Result<Tensor> {
        let x = self.embed(&batch.tokens)?;
        let x = self.layers(x, batch, 0..self.layers.len(), &mut Memory::Caches(caches))?;
        for (cache, span) in caches.iter_mut().zip(&batch.spans) {
            cache.advance(span.len);
        }
        self.normed(&x)
    }

    /// The hidden states after the last norm of whole sequences, `[wanted, hidden]`.
    pub fn hidden(&self, batch: &Batch) -> Result<Tensor> {
        let trunk = self.trunk(batch, 0)?;
        self.hidden_from(&trunk, batch, 0)
    }

    /// The input of layer `layer`, by the base alone: what adapters that start there have in common.
    pub fn trunk(&self, batch: &Batch, layer: usize) -> Result<Tensor> {
        self.trunk_from(&self.embed(&batch.tokens)?, batch, 0..layer)
    }

    /// [`Decoder::trunk`] of layer `layers.end` from that of layer `layers.start`.
    pub fn trunk_from(&self, x: &Tensor, batch: &Batch, layers: Range<usize>) -> Result<Tensor> {
        let bare = Batch { adapted: Vec::new(), wanted: None, ..batch.clone() };
        self.whole_sequences(x, &bare, layers)
    }

    /// [`Decoder::hidden`] from the input of layer `layer` on.
    pub fn hidden_from(&self, trunk: &Tensor, batch: &Batch, layer: usize) -> Result<Tensor> {
        self.normed(&self.whole_sequences(trunk, batch, layer..self.layers.len())?)
    }

    /// Whole sequences through some layers. Each thread takes sequences of its own through all of them, so that none waits
    /// for another between two products.
    fn whole_sequences(&self, x: &Tensor, batch: &Batch, layers: Range<usize>) -> Result<Tensor> {
        if layers.is_empty() {
            return Ok(x.clone());
        }
        let parts = batch.parts(self.threads()).into_par_iter().map(|(rows, batch)| {
            let x = x.narrow(0, rows.start, rows.len())?;
            self.layers(x, &batch, layers.clone(), &mut Memory::Nothing)
        });
        Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)
    }

    /// [`Decoder::hidden_from`] that keeps what the backward pass needs. One adapter covers all rows, from `layer` on.
    pub fn hidden_taped(&self, trunk: &Tensor, whole: &Batch, layer: usize) -> Result<(Tensor, Tape)> {
        let parts = whole.parts(self.threads()).into_par_iter().map(|(rows, batch)| {
            let mut layers = Vec::with_capacity(self.layers.len() - layer);
            let x = trunk.narrow(0, rows.start, rows.len())?;
            let last = self.layers(x, &batch, layer..self.layers.len(), &mut Memory::Tape(&mut layers))?;
            Ok((self.normed(&last)?, PartTape { rows: whole.wanted_of(&rows), batch, layers, last }))
        });
        let (hidden, parts): (Vec<_>, Vec<_>) = parts.collect::<Result<Vec<_>>>()?.into_iter().unzip();
        let hidden = Tensor::cat(&hidden, 0)?;
        Ok((hidden.clone(), Tape { first_layer: layer, parts, hidden }))
    }

    /// `[rows, vocabulary]` of hidden states after the last norm.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.head.forward(hidden)
    }

    fn embed(&self, tokens: &[u32]) -> Result<Tensor> {
        self.embedding.select(tokens)
    }

    fn normed(&self, x: &Tensor) -> Result<Tensor> {
        rms_norm(x, &self.norm, self.epsilon())
    }

    pub(crate) fn epsilon(&self) -> f32 {
        self.architecture.rms_epsilon as f32
    }

    /// Where the weights are, and with them everything else.
    pub(crate) fn placement(&self) -> Placement {
        Placement::of(&self.norm)
    }

    /// Whether the weights are on a card.
    pub fn is_on_card(&self) -> bool {
        self.norm.device().is_cuda()
    }

    /// Returns once the device has done what it was given.
    pub fn synchronize(&self) -> Result<()> {
        self.norm.device().synchronize()
    }

    /// Frozen numbers that every token is multiplied with.
    pub fn multiplied(&self) -> usize {
        let linears = self.layers.iter().flat_map(|layer| &layer.linears);
        linears.chain([&self.head]).map(|linear| linear.dims().iter().product::<usize>()).sum()
    }

    /// Operations a second that plain products of large matrices reach on the decoder's device.
    pub fn product_rate(&self) -> Result<f64> {
        const SIZE: usize = 8192;
        const TIMES: usize = 20;
        product_rate(&self.placement(), SIZE, TIMES)
    }

    /// Threads that take sequences through the layers; a card is driven by one.
    fn threads(&self) -> usize {
        if on_slices(&self.norm) { rayon::current_num_threads() } else { 1 }
    }

    /// What all layers of a pass need to know of its rows.
    pub(crate) fn places(&self, batch: &Batch, caches: Option<&[&mut KvCache]>) -> Result<Places> {
        let angles = self.rope.angles(&batch.positions());
        let reach = if on_slices(&self.norm) { None } else { Some(self.reach(batch, caches)?) };
        Ok(Places { angles, reach, wanted: Wanted::of(batch, self.norm.device())? })
    }

    /// The rows that a layer goes on with after its attention, if not with all.
    pub(crate) fn wanted_in<'p>(&self, layer: usize, places: &'p Places) -> Option<&'p Wanted> {
        places.wanted.as_ref().filter(|_| layer + 1 == self.layers.len())
    }

    fn reach(&self, batch: &Batch, caches: Option<&[&mut KvCache]>) -> Result<Reach> {
        let (heads, device) = (self.architecture.attention(), self.norm.device());
        let Some(caches) = caches else { return Reach::fresh(&batch.spans, heads, device) };
        let stored: Option<Vec<_>> = caches.iter().map(|cache| cache.stored()).collect();
        let stored = stored.unwrap_or_default();
        let Some((store, _)) =
            stored.first().filter(|(store, _)| stored.iter().all(|(other, _)| Arc::ptr_eq(store, other)))
        else {
            candle_core::bail!("the caches do not lie in one store on the decoder's device")
        };
        let location = |nth: usize, place: usize| stored[nth].1[place];
        Reach::stored(&batch.spans, heads, store, &location)
    }

    fn layers(
        &self,
        mut x: Tensor,
        batch: &Batch,
        layers: Range<usize>,
        memory: &mut Memory<'_, '_>,
    ) -> Result<Tensor> {
        let caches = match memory {
            Memory::Caches(caches) => Some(&**caches),
            Memory::Nothing | Memory::Tape(_) => None,
        };
        let places = self.places(batch, caches)?;
        for layer in layers {
            x = self.layer(layer, x, batch, &places, memory)?;
        }
        Ok(x)
    }

    fn layer(
        &self,
        index: usize,
        x: Tensor,
        batch: &Batch,
        places: &Places,
        memory: &mut Memory<'_, '_>,
    ) -> Result<Tensor> {
        let layer = &self.layers[index];
        let mut low_rank = Vec::new();
        let wanted = self.wanted_in(index, places);
        let normed = rms_norm(&x, &layer.attention_norm, self.epsilon())?;
        let targets = [Target::Query, Target::Key, Target::Value];
        let [q, k, v] = layer.project(targets, &normed, &batch.adapted, index, &mut low_rank)?;
        let bare = layer.head_norms.is_some().then(|| (q.clone(), k.clone()));
        let (q, k) = match &layer.head_norms {
            Some([of_q, of_k]) => (self.head_norm(&q, of_q)?, self.head_norm(&k, of_k)?),
            None => (q, k),
        };
        let q = places.angles.rotate(&q)?;
        let k = places.angles.rotate(&k)?;
        let attention = match (&places.reach, &mut *memory) {
            (Some(reach), _) => reach.attend(index, (&q, &k, &v), self.architecture.attention())?,
            (None, Memory::Caches(caches)) => self.attend_cached(index, (&q, &k, &v), batch, caches)?,
            (None, Memory::Nothing | Memory::Tape(_)) => self.attend_fresh((&q, &k, &v), batch)?,
        };
        let (attention, residual, adapted) = match wanted {
            Some(Wanted { rows, adapted }) => {
                (attention.index_select(rows, 0)?, &x.index_select(rows, 0)?, adapted)
            }
            None => (attention, &x, &batch.adapted),
        };
        let [attended] = layer.project([Target::Output], &attention, adapted, index, &mut low_rank)?;
        let middle = sum(residual, &attended)?;
        let mlp_normed = rms_norm(&middle, &layer.mlp_norm, self.epsilon())?;
        let [gate, up] =
            layer.project([Target::Gate, Target::Up], &mlp_normed, adapted, index, &mut low_rank)?;
        let activated = swiglu(&gate, &up)?;
        let [down] = layer.project([Target::Down], &activated, adapted, index, &mut low_rank)?;
        let out = sum(&middle, &down)?;
        if let Memory::Tape(tape) = memory {
            tape.push(LayerTape {
                x,
                normed,
                bare,
                q,
                k,
                v,
                attention,
                middle,
                mlp_normed,
                gate,
                up,
                activated,
                low_rank,
            });
        }
        Ok(out)
    }

    /// Every head of every row normed by itself.
    fn head_norm(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        rms_norm(&x.reshape(((), weight.dim(0)?))?, weight, self.epsilon())?.reshape(x.shape())
    }

    fn attend_fresh(&self, (q, k, v): (&Tensor, &Tensor, &Tensor), batch: &Batch) -> Result<Tensor> {
        let (columns, heads) = (k.dim(D::Minus1)?, self.architecture.attention());
        let blocks: Vec<_> = read(k, |k| {
            read(v, |v| {
                let rows = |span: &Span| span.start * columns..(span.start + span.len) * columns;
                let spans = batch.spans.iter();
                spans.map(|span| blocks_of(&k[rows(span)], &v[rows(span)], heads)).collect()
            })
        })??;
        let pasts: Vec<Past<'_>> = blocks
            .iter()
            .map(|blocks: &Vec<(Vec<f32>, Vec<f32>)>| Past {
                blocks: blocks.iter().map(|(keys, values)| (&keys[..], &values[..])).collect(),
            })
            .collect();
        attend(q, &batch.spans, &pasts, heads)
    }

    fn attend_cached(
        &self,
        layer: usize,
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        batch: &Batch,
        caches: &mut [&mut KvCache],
    ) -> Result<Tensor> {
        let (columns, heads) = (k.dim(D::Minus1)?, self.architecture.attention());
        for (cache, span) in caches.iter_mut().zip(&batch.spans) {
            let rows = span.start * columns..(span.start + span.len) * columns;
            read(k, |k| read(v, |v| cache.write(layer, (&k[rows.clone()], &v[rows]), heads)))??;
        }
        let pasts: Vec<Past<'_>> = caches.iter().map(|cache| cache.past(layer, heads)).collect();
        attend(q, &batch.spans, &pasts, heads)
    }
}
