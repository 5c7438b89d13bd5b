//! Keys and values of all blocks where the device is: one matrix of places a layer, taken at the start.

use candle_core::{Device, Result, Tensor};

#[cfg(feature = "cuda")]
use crate::policy::card;
use crate::policy::device::Placement;

/// Keys and values by layer, `[places, kv_heads · head_dim]` each.
#[derive(Debug)]
pub(crate) struct Store {
    layers: Vec<(Tensor, Tensor)>,
    device: Device,
}

impl Store {
    pub(crate) fn new(layers: usize, places: usize, columns: usize, placement: &Placement) -> Result<Self> {
        let Placement { device, dtype } = placement;
        let zeros = || Tensor::zeros((places, columns), *dtype, device);
        let layers = (0..layers).map(|_| Ok((zeros()?, zeros()?))).collect::<Result<_>>()?;
        Ok(Self { layers, device: device.clone() })
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    pub(crate) fn layer(&self, layer: usize) -> (&Tensor, &Tensor) {
        let (keys, values) = &self.layers[layer];
        (keys, values)
    }

    /// Writes rows of keys and values to these places.
    pub(crate) fn write(&self, layer: usize, places: &Tensor, (k, v): (&Tensor, &Tensor)) -> Result<()> {
        let (keys, values) = self.layer(layer);
        #[cfg(feature = "cuda")]
        if card::takes(keys) {
            card::place_rows(keys, k, places)?;
            return card::place_rows(values, v, places);
        }
        let places = places.unsqueeze(1)?.broadcast_as(k.shape())?.contiguous()?;
        keys.scatter_set(&places, &k.contiguous()?, 0)?;
        values.scatter_set(&places, &v.contiguous()?, 0)
    }
}
