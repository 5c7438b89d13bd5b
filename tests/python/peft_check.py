"""`peft` and `transformers` load what gyrostat trains, and agree with it on every number that both can give.

    pip install torch transformers peft

Not part of .ci/run: torch is large. An adapter is trained by `gyrostat train sft` on a tiny model; then the perplexity that
`gyrostat evaluate` prints, with the adapter and without, is computed again from the same files in PyTorch. A reward model
is trained too, with several heads, and must score the same as `AutoModelForSequenceClassification` with one label; one that
reads whole answers, the same as the mean of that class's scores over the places that decided them.
"""

import json
import math
import os
import subprocess

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from harness import BENIGN, arguments, check, main, step, tiny_model, workspace


def gyrostat(args, *words, **settings):
    env = {**os.environ, "GYROSTAT_POLICY__MODEL": str(tiny_model(args)), "GYROSTAT_POLICY__DEVICE": "cpu"}
    env |= {f"GYROSTAT_{name.upper()}": value for name, value in settings.items()}
    done = subprocess.run([str(args.binary.resolve()), *map(str, words)], env=env, capture_output=True, text=True)
    check(done.returncode == 0, f"gyrostat {' '.join(map(str, words))} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


@torch.no_grad()
def perplexity(model, tokenizer, texts):
    """Over all tokens that have a predecessor in their text."""
    total, count = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        logprobs = model(ids).logits[0, :-1].double().log_softmax(-1)
        total -= logprobs.gather(1, ids[0, 1:, None]).sum().item()
        count += ids.shape[1] - 1
    return math.exp(total / count)


@torch.no_grad()
def check_reward(args, home, tokenizer, reads):
    pairs = [{"prompt": prompt, "chosen": f"Certainly, number {n}.", "rejected": "No."} for n, (_, prompt) in enumerate(BENIGN * 4)]
    data, adapter = home / "pairs.jsonl", home / f"reward-{reads}"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    gyrostat(args, "train", "reward", "--data", data, "--out", adapter, learn__reward__reads=reads)
    found = json.loads(gyrostat(args, "evaluate", "--data", data, "--reward", adapter))
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model(args), num_labels=1, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter).eval()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def score(pair, side):
        asked = [{"role": "user", "content": pair["prompt"]}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        before = tokenizer(prompt).input_ids
        ids = torch.tensor([before + tokenizer(pair[side]).input_ids + [end]])
        if reads == "end":
            return model(ids).logits[0, 0].item()
        classifier = model.base_model.model
        return classifier.score(classifier.model(ids).last_hidden_state)[0, len(before) - 1 : -1].mean().item()

    chosen = [score(pair, "chosen") for pair in pairs]
    rejected = [score(pair, "rejected") for pair in pairs]
    theirs, accuracy = sum(chosen) / len(chosen), sum(c > r for c, r in zip(chosen, rejected)) / len(pairs)
    check(abs(found["reward"] - theirs) < args.tolerance, f"reward: gyrostat {found['reward']}, transformers {theirs}")
    check(abs(found["preference_accuracy"] - accuracy) < 1e-9, f"accuracy: gyrostat {found['preference_accuracy']}, transformers {accuracy}")
    heads = load_file(adapter / "heads.safetensors")["heads"]
    score = load_file(adapter / "adapter_model.safetensors")["base_model.model.score.weight"]
    check(torch.allclose(heads.mean(0, keepdim=True), score, atol=1e-7), "the score is not the mean of the heads")
    step(f"reward, reads {reads}: {len(heads)} heads, mean score {found['reward']:.5f}, transformers {theirs:.5f}; accuracy {accuracy:.3f} in both")


def run(args):
    torch.manual_seed(0)
    folder = tiny_model(args)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = [f"{prompt} Certainly, number {n}." for n, (_, prompt) in enumerate(BENIGN * 8)]
    with workspace() as home:
        data, adapter = home / "data.jsonl", home / "adapter"
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        gyrostat(args, "train", "sft", "--data", data, "--out", adapter)
        config = json.loads((adapter / "adapter_config.json").read_text())
        check(config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM", f"{config}")

        ours = json.loads(gyrostat(args, "evaluate", "--data", data))["perplexity"]
        theirs = perplexity(base, tokenizer, texts)
        check(abs(ours / theirs - 1) < args.tolerance, f"base: gyrostat {ours}, transformers {theirs}")
        step(f"base: perplexity {ours:.4f}, transformers {theirs:.4f}")

        ours_tuned = json.loads(gyrostat(args, "evaluate", "--data", data, "--adapter", adapter))["perplexity"]
        tuned = PeftModel.from_pretrained(base, adapter).eval()
        theirs_tuned = perplexity(tuned, tokenizer, texts)
        check(abs(ours_tuned / theirs_tuned - 1) < args.tolerance, f"adapter: gyrostat {ours_tuned}, peft {theirs_tuned}")
        check(theirs_tuned < theirs, f"training did not lower the perplexity: {theirs} before, {theirs_tuned} after")
        step(f"adapter: perplexity {ours_tuned:.4f}, peft {theirs_tuned:.4f}")
        for reads in ("end", "answer"):
            check_reward(args, home, tokenizer, reads)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--tolerance", type=float, default=1e-3, help="relative")
    main(run, parser.parse_args())
