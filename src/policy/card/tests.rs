//! The card's kernels against the CPU's, where there is a card.

use candle_core::{DType, Device, Tensor};

use super::*;
use crate::policy::{
    RopeScaling,
    attention::{Reach, Store},
    batch::Span,
    device::{Placement, on_host},
    ops::{self, Onto, tests::matrix},
    rope::Rope,
};

/// As in the tests beside: without a card they say so and pass.
fn card() -> Option<Device> {
    open(0).inspect_err(|fault| println!("skipped: no CUDA device answers: {fault}")).ok()
}

/// The widest gap, as a share of the greatest number.
#[track_caller]
fn check(what: &str, found: &Tensor, expected: &Tensor, tolerance: f32) {
    let flat = |x: &Tensor| on_host(x).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let (found, expected) = (flat(found), flat(expected));
    assert_eq!(found.len(), expected.len(), "{what}");
    let most = expected.iter().fold(0f32, |most, value| most.max(value.abs()));
    let gap = found.iter().zip(&expected).fold(0f32, |gap, (a, b)| gap.max((a - b).abs()));
    assert!(gap <= tolerance * most, "{what}: {gap} of {most}");
}

/// What a kernel makes of the same numbers on the CPU, in f32, and on the card in both types.
#[track_caller]
fn both(what: &str, card: &Device, inputs: &[&Tensor], kernel: impl Fn(&[Tensor]) -> Tensor) {
    for (dtype, tolerance) in [(DType::F32, 1e-4), (DType::BF16, 2e-2)] {
        // Rounded first, so that both begin with the same numbers.
        let rounded: Vec<Tensor> = inputs.iter().map(|x| x.to_dtype(dtype).unwrap()).collect();
        let here: Vec<Tensor> = rounded.iter().map(|x| x.to_dtype(DType::F32).unwrap()).collect();
        let there: Vec<Tensor> = rounded.iter().map(|x| x.to_device(card).unwrap()).collect();
        check(what, &kernel(&there), &kernel(&here), tolerance);
    }
}

#[test]
fn norms_activations_and_turns_are_those_of_the_cpu() {
    let Some(card) = card() else { return };
    for (rows, columns) in [(1, 576), (37, 576), (5, 40), (130, 1536)] {
        let [x, dy, up, onto] = [1, 2, 3, 4].map(|seed| matrix(rows, columns, seed));
        let weight = matrix(1, columns, 5).squeeze(0).unwrap();
        both("norm", &card, &[&x, &weight], |t| ops::rms_norm(&t[0], &t[1], 1e-5).unwrap());
        both("norm back", &card, &[&dy, &x, &weight], |t| {
            ops::rms_norm_backward(&t[0], &t[1], &t[2], 1e-5, None).unwrap()
        });
        both("norm back, added", &card, &[&dy, &x, &weight, &onto], |t| {
            ops::rms_norm_backward(&t[0], &t[1], &t[2], 1e-5, Some(&t[3])).unwrap()
        });
        both("swiglu", &card, &[&x, &up], |t| ops::swiglu(&t[0], &t[1]).unwrap());
        both("swiglu back", &card, &[&dy, &x, &up], |t| ops::swiglu_backward(&t[0], &t[1], &t[2]).unwrap());
    }
    let places = [0, 1, 31, 500, 7];
    let angles = || Rope::new(64, 10_000.0, &RopeScaling::None).angles(&places);
    let x = matrix(places.len(), 9 * 64, 6);
    both("turn", &card, &[&x], |t| angles().rotate(&t[0]).unwrap());
    both("turn back", &card, &[&x], |t| angles().rotate_backward(t[0].copy().unwrap()).unwrap());
}

/// Transposed operands, columns of wider ones, a factor, and onto columns that hold something.
#[test]
fn products_are_those_of_the_cpu() {
    let Some(card) = card() else { return };
    for (rows, inner, columns) in [(37, 64, 40), (1, 16, 8), (130, 24, 16), (8, 1000, 16)] {
        let (a, b) = (matrix(rows, inner + 8, 1), matrix(columns, inner, 2));
        let (turned, held) = (matrix(inner, rows, 3), matrix(rows, columns + 8, 4));
        both("product", &card, &[&a, &b], |t| {
            let a = t[0].narrow(1, 8, inner).unwrap();
            ops::product(&a, &t[1].t().unwrap(), 0.5, Onto::New(DType::F32)).unwrap()
        });
        both("product, turned", &card, &[&turned, &b], |t| {
            let a = t[0].t().unwrap();
            ops::product(&a, &t[1].t().unwrap(), 1.0, Onto::New(t[0].dtype())).unwrap()
        });
        both("product, added", &card, &[&turned, &b, &held], |t| {
            let onto = t[2].copy().unwrap().narrow(1, 4, columns).unwrap();
            let a = t[0].t().unwrap();
            let onto = if t[0].device().is_cpu() { onto.contiguous().unwrap() } else { onto };
            ops::product(&a, &t[1].t().unwrap(), -2.0, Onto::This(onto)).unwrap().contiguous().unwrap()
        });
    }
}

const HEADS: [(usize, usize, usize); 5] = [(9, 3, 64), (4, 4, 128), (2, 1, 6), (6, 2, 16), (2, 2, 256)];

/// Forward and backward; few rows, which the warps of a block share, and many.
#[test]
fn whole_sequences_attend_as_on_the_cpu() {
    let Some(card) = card() else { return };
    let sequences: [&[usize]; 2] = [&[1, 40, 33], &[300, 7, 1, 129, 64]];
    for (queries, keys, dim) in HEADS {
        for (window, lens) in [(None, sequences[0]), (Some(20), sequences[1]), (None, sequences[1])] {
            let heads = Heads { queries, keys, dim, window };
            let mut spans: Vec<Span> = Vec::new();
            for len in lens {
                let start = spans.last().map_or(0, |span| span.start + span.len);
                spans.push(Span { start, len: *len, position: 0 });
            }
            let rows = lens.iter().sum();
            let q = matrix(rows, queries * dim, 1);
            let (k, v) = (matrix(rows, keys * dim, 2), matrix(rows, keys * dim, 3));
            let dy = matrix(rows, queries * dim, 4);
            let what = format!("{heads:?}");
            let reach = |x: &Tensor| Reach::fresh(&spans, heads, x.device()).unwrap();
            both(&what, &card, &[&q, &k, &v], |t| {
                reach(&t[0]).attend(0, (&t[0], &t[1], &t[2]), heads).unwrap()
            });
            for of in 0..3 {
                both(&format!("{what}, gradient {of}"), &card, &[&dy, &q, &k, &v], |t| {
                    let out = reach(&t[0]).backward(&t[0], (&t[1], &t[2], &t[3]), heads).unwrap();
                    [out.q, out.k, out.v][of].contiguous().unwrap()
                });
            }
        }
    }
}

/// Sequences that go on from what a store holds, in any order.
#[test]
fn stored_places_are_seen_as_on_the_cpu() {
    let Some(card) = card() else { return };
    let spans = [
        Span { start: 0, len: 1, position: 40 },
        Span { start: 1, len: 5, position: 133 },
        Span { start: 6, len: 1, position: 700 },
        Span { start: 7, len: 9, position: 0 },
    ];
    for (queries, keys, dim) in HEADS {
        for window in [None, Some(30)] {
            let heads = Heads { queries, keys, dim, window };
            let location = |nth: usize, place: usize| (nth * 1024 + place) * 37 % 4096;
            let [keys_before, values_before] = [7, 8].map(|seed| matrix(4096, keys * dim, seed));
            let (q, k, v) =
                (matrix(16, queries * dim, 5), matrix(16, keys * dim, 9), matrix(16, keys * dim, 10));
            both(&format!("{heads:?}"), &card, &[&q, &k, &v, &keys_before, &values_before], |t| {
                let placement = Placement::of(&t[0]);
                let store = Arc::new(Store::new(1, 4096, keys * dim, &placement).unwrap());
                let all = Tensor::arange(0u32, 4096, &placement.device).unwrap();
                store.write(0, &all, (&t[3], &t[4])).unwrap();
                let reach = Reach::stored(&spans, heads, &store, &location).unwrap();
                reach.attend(0, (&t[0], &t[1], &t[2]), heads).unwrap()
            });
        }
    }
}

#[test]
fn probabilities_are_those_of_the_cpu() {
    let Some(card) = card() else { return };
    let (rows, columns) = (6, 49_152);
    let logits = (matrix(rows, columns, 11) * 8.0).unwrap();
    let targets: Vec<u32> = (0..rows as u32).map(|row| row * 8_000 + 3).collect();
    for of in 0..3 {
        for temperature in [1.0, 0.7] {
            both("probabilities", &card, &[&logits], |t| {
                let wanted = Tensor::new(&targets[..], t[0].device()).unwrap();
                if t[0].device().is_cuda() {
                    let own = t[0].copy().unwrap();
                    let (chosen, entropies) = logprobs(&own, &wanted, temperature, true).unwrap();
                    return [chosen, entropies, own][of].clone();
                }
                let logits = (&t[0] / temperature).unwrap();
                let log_p = candle_core::Tensor::log(&{
                    let weights =
                        logits.broadcast_sub(&logits.max_keepdim(1).unwrap()).unwrap().exp().unwrap();
                    weights.broadcast_div(&weights.sum_keepdim(1).unwrap()).unwrap()
                })
                .unwrap();
                let p = log_p.exp().unwrap();
                let chosen = log_p.gather(&wanted.unsqueeze(1).unwrap(), 1).unwrap();
                let entropies = (&p * &log_p).unwrap().sum(1).unwrap().neg().unwrap();
                [chosen, entropies, p][of].clone()
            });
        }
    }
}
