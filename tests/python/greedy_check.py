"""What is served is what the file's weights say: greedy answers and perplexity against `transformers`.

    pip install torch transformers
    python greedy_check.py --gguf model.gguf --float DIR    # DIR: the GGUF's weights, dequantised, as transformers loads them

Not part of .ci/run: torch and the model are large. Two answers to a prompt may part where the two likeliest tokens are
nearly as likely: the first place where they do is looked up in transformers' own logits.
"""

import argparse
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TOKENS = 64
NEAR_TIE = 1e-3
PROMPTS = [
    "What is the capital of Portugal, and what is it known for?",
    "Explain to a child why the sky is blue.",
    "Write a short poem about a lighthouse.",
    "How do I reverse a linked list in Python?",
    "Summarise the plot of Romeo and Juliet in three sentences.",
    "Translate 'Good morning, how are you?' into French and Spanish.",
    "What is 17 times 24? Show the steps.",
    "Give me a recipe for pancakes without eggs.",
    "What are the differences between TCP and UDP?",
    "List five ways to save water at home.",
    "Write an email that asks my landlord to repair the heating.",
    "Who was Ada Lovelace?",
    "What should I pack for a weekend in the mountains?",
    "Describe the water cycle.",
    "Name three prime numbers greater than 50 and explain why they are prime.",
    "Write a haiku about autumn rain.",
    "How does a refrigerator work?",
    "What is the difference between a virus and a bacterium?",
    "Suggest a name for a bakery that sells only bread.",
    "Tell me a fact about octopuses that most people do not know.",
]


def gyrostat(args, model, *words):
    env = {**os.environ, "GYROSTAT_POLICY__MODEL": str(model)}
    done = subprocess.run([str(args.binary), *map(str, words)], env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"gyrostat {' '.join(map(str, words))} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


@torch.no_grad()
def greedy(model, tokenizer, prompt):
    """The answer's texts after each token, and the gap between the two largest logits at each place."""
    chat = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True).input_ids
    start, texts, gaps = ids.shape[1], [], []
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    for _ in range(TOKENS):
        logits = model(ids).logits[0, -1]
        first, second = logits.topk(2).values.tolist()
        gaps.append(first - second)
        token = logits.argmax()
        if token.item() in ends:
            break
        ids = torch.cat([ids, token.view(1, 1)], dim=1)
        texts.append(tokenizer.decode(ids[0, start:], skip_special_tokens=False))
    return texts, gaps


@torch.no_grad()
def perplexity(model, tokenizer, texts):
    total, count = 0.0, 0
    for text in texts:
        # A GGUF's tokenizer puts no token before a text; a copy's may.
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        logprobs = model(ids).logits[0, :-1].double().log_softmax(-1)
        total -= logprobs.gather(1, ids[0, 1:, None]).sum().item()
        count += ids.shape[1] - 1
    return math.exp(total / count)


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--gguf", type=pathlib.Path, required=True)
    arguments.add_argument("--float", type=pathlib.Path, required=True)
    arguments.add_argument("--binary", type=pathlib.Path, default=pathlib.Path("target/release/gyrostat"))
    args = arguments.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.float, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.float)
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        data = pathlib.Path(folder) / "prompts.jsonl"
        data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
        lines = gyrostat(args, args.gguf, "generate", "--data", data, "--max-tokens", TOKENS).splitlines()
        answers = [json.loads(line)["completion"] for line in lines]
        same = 0
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            texts, gaps = greedy(model, tokenizer, prompt)
            if texts and answer == texts[-1]:
                same += 1
                continue
            at = next((n for n, text in enumerate(texts) if not answer.startswith(text.rstrip("\ufffd"))), len(texts))
            gap = gaps[min(at, len(gaps) - 1)]
            bad += gap >= NEAR_TIE
            print(f"parts at token {at}, where the two likeliest logits differ by {gap:.5f}: {prompt}")
        print(f"{same} of {len(PROMPTS)} answers of up to {TOKENS} tokens are equal")

        texts = pathlib.Path(__file__).resolve().parents[2].joinpath("ARCHITECTURE.md").read_text().split("\n\n")
        texts = [text for text in texts if len(text) > 200][:24]
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        served = json.loads(gyrostat(args, args.gguf, "evaluate", "--data", data))["perplexity"]
        theirs = perplexity(model, tokenizer, texts)
        print(f"perplexity: as served {served:.5f}, of the dequantised weights in transformers {theirs:.5f}")
        bad += abs(served / theirs - 1) > 0.005
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
