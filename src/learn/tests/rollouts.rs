//! What rollouts say of themselves, against another pass over them.

use rand::{SeedableRng, rngs::StdRng};

use super::{engine, gradients::adapter, tiny_model, watching};
use crate::completion::Prompt;
use crate::learn::{Practice, Reward, policy_pass::logprobs, ppo};

/// An answer ends by itself now and then, and is cut off otherwise.
#[test]
fn answers_are_drawn_by_the_probabilities_that_a_pass_over_them_finds() {
    let model = tiny_model();
    let (engine, policy) = (engine(&model), adapter(&model, 0));
    let config = ppo::Config { temperature: 0.7, response_length: 40, ..Default::default() };
    let practice = Practice {
        engine: &engine,
        reward: Reward::Rule(&|answers| vec![0.0; answers.len()]),
        config: &config,
    };
    let prompts = [Prompt::Text("left".to_owned()), Prompt::Text("a longer way to the right".to_owned())];
    let asked: Vec<&Prompt> = prompts.iter().cycle().take(96).collect();
    let watch = watching(256);
    let played = practice.play((&policy, None), &asked, &mut StdRng::seed_from_u64(3), &watch).unwrap();
    assert!((1..96).contains(&played.ended()), "{} of 96 ended", played.ended());
    let (mut passed, mut entropy) = (Vec::new(), 0.0);
    for micro in &played.micro {
        let trunk = model.decoder.trunk(&micro.batch(), 0).unwrap();
        let out = logprobs(&model.decoder, micro, (&trunk, 0), Some(&policy), 0.7).unwrap();
        passed.extend(micro.by_sequence(&out.logprobs));
        entropy += out.entropies.iter().map(|nats| f64::from(*nats)).sum::<f64>();
    }
    assert_eq!(
        played.logprobs.iter().map(Vec::len).collect::<Vec<_>>(),
        passed.iter().map(Vec::len).collect::<Vec<_>>()
    );
    for (drawn, passed) in played.logprobs.iter().flatten().zip(passed.iter().flatten()) {
        assert!((drawn - passed).abs() < 1e-4, "{drawn} but {passed}");
    }
    assert!((played.entropy - entropy).abs() < 1e-4 * entropy, "{} but {entropy}", played.entropy);
}
