//! The decoder on tensor operations against the decoder on slices. In f64 on the CPU the two may differ by f32's rounding
//! alone, in bf16 they do coarsely; with the feature `cuda`, the same on a card.

use candle_core::DType;
use tokio::sync::watch;

use super::{
    families::{FAMILIES, of},
    *,
};
use crate::policy::{
    self, Engine, Event, GenerateRequest, Sampling, Served, TokenLogprobs, ops::tensors::tests::gap,
    tiny_family,
};

fn on_cpu(dtype: DType) -> Placement {
    Placement { device: candle_core::Device::Cpu, dtype }
}

/// How far two lists are apart, as a share of the second.
#[track_caller]
fn check_relative(what: &str, found: &[f32], expected: &[f32], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let square = |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>();
    let apart = square(&mut found.iter().zip(expected).map(|(a, b)| a - b)).sqrt();
    let size = square(&mut expected.iter().copied()).sqrt();
    assert!(apart <= tolerance * size + 1e-9, "{what}: {apart} of {size}");
}

/// One pass forward and backward over sequences of which two are of one length and one is alone.
struct Pass {
    hidden: Tensor,
    out: TokenLogprobs,
    gradient: Vec<Vec<f32>>,
}

fn pass(decoder: &Decoder, adapter: &Arc<Adapter>) -> Pass {
    let batch = Batch::of([&TOKENS[..5], &TOKENS[2..], &TOKENS[3..], &TOKENS[..1]], Some(adapter));
    let trunk = decoder.trunk(&batch, adapter.first_layer).unwrap();
    let (hidden, tape) = decoder.hidden_taped(&trunk, &batch, adapter.first_layer).unwrap();
    let targets: Vec<u32> = batch.tokens.iter().map(|token| (token * 7 + 3) % 259).collect();
    let out = decoder.token_logprobs(&hidden, &targets, 0.7, true).unwrap();
    let weights: Vec<f32> = (0..targets.len()).map(|at| ((at * 5) % 3) as f32 - 0.8).collect();
    let mut gradient = AdapterGradient::default();
    decoder.backward(&tape, &out.backward(&weights).unwrap().unwrap(), &mut gradient).unwrap();
    Pass { hidden, out, gradient: gradient.flatten(adapter).unwrap() }
}

#[track_caller]
fn check_passes(placement: &Placement, tolerance: f64) {
    for family in FAMILIES {
        let slices = of(family);
        let tensors = Decoder::random(tiny_family(family).unwrap(), 0, placement).unwrap();
        for first_layer in [0, 1] {
            let adapter = trained(&slices, first_layer);
            let (found, expected) = (pass(&tensors, &adapter), pass(&slices, &adapter));
            assert_eq!(found.hidden.dtype(), placement.dtype);
            let flat =
                |x: &Tensor| policy::device::on_host(x).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            let close = |what: &str, found: &[f32], expected: &[f32]| {
                check_relative(&format!("{family}, {what}"), found, expected, tolerance);
            };
            close("hidden states", &flat(&found.hidden), &flat(&expected.hidden));
            close("log-probabilities", &found.out.logprobs, &expected.out.logprobs);
            close("entropies", &found.out.entropies, &expected.out.entropies);
            let slopes = |pass: &Pass| flat(pass.out.slopes.as_ref().unwrap());
            close("slopes", &slopes(&found), &slopes(&expected));
            close("gradient", &found.gradient.concat(), &expected.gradient.concat());
        }
    }
}

/// Prompts in chunks and tokens one by one, of several sequences at once, against the whole sequences.
#[track_caller]
fn check_steps(placement: &Placement, tolerance: f64) {
    for family in FAMILIES {
        let decoder = Decoder::random(tiny_family(family).unwrap(), 0, placement).unwrap();
        let adapter = trained(&decoder, 0);
        let long: Vec<u32> = (0..70).map(|at| (at * 11 + 5) % 259).collect();
        let sequences = [&long[..], &TOKENS[..], &long[20..60]];
        let expected = sequences.map(|tokens| of_last(&of(family), tokens, &adapter));
        let mut pool = policy::kv::Pool::new(&decoder.architecture, 256, placement).unwrap();
        let mut caches = sequences.map(|tokens| {
            let mut cache = KvCache::default();
            (0..tokens.len().div_ceil(32)).for_each(|_| cache.give(pool.take().unwrap()));
            cache
        });
        let mut found = [const { Vec::new() }; 3];
        for take in [1, 33, 3, 1, 40] {
            let mut batch = Batch::default();
            let mut running: Vec<_> = caches.iter_mut().enumerate().collect();
            running.retain(|(nth, cache)| cache.len() < sequences[*nth].len());
            for (nth, cache) in &running {
                let rest = &sequences[*nth][cache.len()..];
                batch.push(&rest[..take.min(rest.len())], cache.len(), Some(&adapter));
            }
            let ends = batch.last_rows();
            let (nths, mut stepped): (Vec<usize>, Vec<_>) = running.into_iter().unzip();
            let hidden = decoder.step(&batch, &mut stepped).unwrap();
            for (nth, end) in nths.into_iter().zip(ends) {
                let last = hidden.narrow(0, end as usize, 1).unwrap();
                found[nth] = policy::device::on_host(&last).unwrap().squeeze(0).unwrap().to_vec1().unwrap();
            }
        }
        for (found, expected) in found.iter().zip(&expected) {
            check_relative(family, found, expected, tolerance);
        }
    }
}

/// The hidden state of the last token.
fn of_last(decoder: &Decoder, tokens: &[u32], adapter: &Arc<Adapter>) -> Vec<f32> {
    let hidden = decoder.hidden(&Batch::of([tokens], Some(adapter))).unwrap();
    rows(&hidden).pop().unwrap()
}

/// Greedy answers of an engine to prompts that begin alike: first one alone, of which most steps end nothing, then some
/// beside each other.
fn answers(placement: &Placement) -> Vec<Vec<u32>> {
    let folder = tempfile::tempdir().unwrap();
    write_tiny(folder.path(), 0).unwrap();
    let model = Arc::new(Model::load_path(folder.path(), placement).unwrap());
    let adapter = trained(&model.decoder, 0);
    let (_sender, served) = watch::channel(Served { adapter: Some(adapter), ..Served::default() });
    let config = policy::Config { prefill_tokens: 24, cache_tokens: 512, ..policy::Config::default() };
    let metrics = policy::Metrics::register(&prometheus::Registry::new()).unwrap();
    let engine = Engine::start(model, &config, served, metrics).unwrap();
    let ask = |(length, top): (u32, u32)| {
        let prompt = (0..length).map(|at| (at * 13 + if at < 40 { 7 } else { top }) % 256 + 3).collect();
        let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
        let (stop, top_logprobs, pinned) = (Vec::new(), None, None);
        engine
            .submit(GenerateRequest { prompt, sampling, max_tokens: 24, stop, top_logprobs, pinned })
            .unwrap()
    };
    let mut answers = Vec::new();
    for asked in [&[(80, 1)][..], &[(70, 2), (5, 3), (80, 1), (33, 4)]] {
        let asked: Vec<_> = asked.iter().copied().map(ask).collect();
        for mut events in asked {
            answers.push(loop {
                match events.blocking_recv().unwrap() {
                    Event::Done(generated) => break generated.tokens,
                    Event::Failed(why) => panic!("{why}"),
                    Event::Started { .. } | Event::Text { .. } => {}
                }
            });
        }
    }
    answers
}

#[test]
fn passes_on_tensors_are_those_on_slices() {
    check_passes(&on_cpu(DType::F64), 1e-4);
    check_passes(&on_cpu(DType::BF16), 0.08);
}

#[test]
fn steps_on_tensors_are_those_on_slices() {
    check_steps(&on_cpu(DType::F64), 1e-4);
    check_steps(&on_cpu(DType::BF16), 0.08);
}

#[test]
fn an_engine_on_tensors_answers_as_one_on_slices() {
    assert_eq!(answers(&on_cpu(DType::F64)), answers(&Placement::cpu()));
}

#[test]
fn packed_weights_are_dense_beside_the_cpu() {
    use candle_core::quantized::{GgmlDType, QTensor};
    let source = crate::policy::ops::tests::matrix(32, 64, 3);
    let quantised = QTensor::quantize(&source, GgmlDType::Q8_0).unwrap();
    let packed = crate::policy::linear::Linear::from_gguf(&quantised).unwrap();
    let dense = packed.clone().placed(&on_cpu(DType::BF16)).unwrap().dense().unwrap();
    assert_eq!(dense.dtype(), DType::BF16);
    assert!(gap(&dense, &packed.dense().unwrap()) < 4e-3);
}

/// With a card; elsewhere they say so and pass.
#[cfg(feature = "cuda")]
mod card {
    use super::*;

    fn card(dtype: DType) -> Option<Placement> {
        match policy::card::open(0) {
            Ok(device) => Some(Placement { device, dtype }),
            Err(fault) => {
                println!("skipped: no CUDA device answers: {fault}");
                None
            }
        }
    }

    #[test]
    fn passes_on_a_card_are_those_on_the_cpu() {
        for (dtype, tolerance) in [(DType::F32, 1e-3), (DType::BF16, 0.08)] {
            let Some(placement) = card(dtype) else { return };
            check_passes(&placement, tolerance);
        }
    }

    #[test]
    fn steps_on_a_card_are_those_on_the_cpu() {
        for (dtype, tolerance) in [(DType::F32, 1e-3), (DType::BF16, 0.08)] {
            let Some(placement) = card(dtype) else { return };
            check_steps(&placement, tolerance);
        }
    }

    #[test]
    fn answers_on_a_card_are_those_on_the_cpu() {
        let Some(placement) = card(DType::F32) else { return };
        assert_eq!(answers(&placement), answers(&Placement::cpu()));
    }

    #[test]
    fn a_card_is_what_auto_finds() {
        if card(DType::BF16).is_some() {
            assert!(!policy::Device::Auto.open().unwrap().has_slices());
        }
    }
}
