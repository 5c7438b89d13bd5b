"""Reward models, side by side: gyrostat's and TRL's from the same base, data, epochs and adapter shape.

usage: python reward.py --gyrostat BIN --gguf F --float DIR --work DIR --data F.jsonl [--data …] [--tokens 384] [--pairs N] [--held N] [--seed 0] [--device cuda]

Run by the Python of an environment with torch, transformers<5, peft, accelerate, datasets and trl==0.29.0. `--float` is the GGUF's model
dequantised, as a Hugging Face directory. A third of the prompts of each file of {"prompt","chosen","rejected"} is held out, by a hash of the
prompt; `--pairs` and `--held` take that many of the rest and of the third, spread over the files. Both learn from the same token sequences: what is too long loses the beginning of its prompt. Both adapters are LoRA of rank 16 on all
linears of the upper third of the layers, which is gyrostat's default. On a card ours is in bf16 and TRL's in f32. TRL's adapter is scored by `gyrostat evaluate` too, which reads it as
`transformers` does to 1e-5 (tests/python/peft_check.py).
"""

import argparse
import collections
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import time

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def split(files, pairs, held_out):
    """Rows to learn from, and those held out by the names of their files, in an order that hashes draw."""
    rows = []
    for file in files:
        for line in pathlib.Path(file).read_text().splitlines():
            row = {key: json.loads(line)[key] for key in ("prompt", "chosen", "rejected")}
            digest = hashlib.sha256(row["prompt"].encode()).digest()
            rows.append((hashlib.sha256(line.encode()).digest(), digest[0] % 3 == 0, pathlib.Path(file).stem, row))
    rows.sort(key=lambda row: row[0])
    train = [row for _, out, _, row in rows if not out][:pairs]
    held = collections.defaultdict(list)
    for _, _, name, row in [row for row in rows if row[1]][:held_out]:
        held[name].append(row)
    return train, held


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ours(args, train, environment):
    out, started = args.work / "gyrostat", time.perf_counter()
    command = [args.gyrostat, "train", "reward", "--data", train, "--out", out, "--seed", str(args.seed)]
    # TRL's below; what the environment says already stands.
    same = {"GYROSTAT_LEARN__REWARD__EPOCHS": "1", "GYROSTAT_LEARN__REWARD__BATCH": "32"}
    subprocess.run(command, env={**same, **environment}, check=True)
    return out, time.perf_counter() - started


def theirs(args, rows):
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed
    from trl import RewardConfig, RewardTrainer

    torch.set_num_threads(args.threads)
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.float)
    # The score is read at the last token that pads nothing, which is the end of turn.
    tokenizer.pad_token = next(token for token in tokenizer.all_special_tokens if token != tokenizer.eos_token)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def ids(row, side):
        asked = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True)
        answer = (tokenizer(row[side], add_special_tokens=False).input_ids + [end])[: args.tokens - 1]
        return prompt[len(prompt) - min(len(prompt), args.tokens - len(answer)) :] + answer

    data = Dataset.from_list([{f"{side}_ids": ids(row, side) for side in ("chosen", "rejected")} for row in rows])
    print("tokens of the training data:", sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in data), flush=True)
    model = AutoModelForSequenceClassification.from_pretrained(args.float, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    layers = model.config.num_hidden_layers
    config = RewardConfig(
        output_dir=str(args.work / "trainer"), num_train_epochs=1, per_device_train_batch_size=8, gradient_accumulation_steps=4,
        learning_rate=3e-4, center_rewards_coefficient=0.01, max_length=None, use_cpu=args.device == "cpu", bf16=False, report_to=[],
        gradient_checkpointing=False, save_strategy="no", logging_steps=5, seed=args.seed,
    )
    lora = LoraConfig(
        r=16, lora_alpha=32, target_modules=LINEARS, layers_to_transform=list(range(layers - round(layers / 3), layers)),
        task_type="SEQ_CLS", modules_to_save=["score"],
    )
    trainer = RewardTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=lora)
    started = time.perf_counter()
    trainer.train()
    out = args.work / "trl"
    trainer.model.save_pretrained(out)
    return out, time.perf_counter() - started


def accuracy(args, held, adapter, environment):
    found = {}
    for name, rows in held.items():
        command = [args.gyrostat, "evaluate", "--data", args.work / f"{name}.jsonl", "--reward", adapter]
        out = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[name] = json.loads(out)["preference_accuracy"]
    pairs = sum(len(rows) for rows in held.values())
    found["all"] = sum(found[name] * len(rows) for name, rows in held.items()) / pairs
    return found


def longer(held):
    """Half for two answers of the same length."""
    wins = lambda row: 0.5 * (1 + (len(row["chosen"]) > len(row["rejected"])) - (len(row["chosen"]) < len(row["rejected"])))
    found = {name: sum(map(wins, rows)) / len(rows) for name, rows in held.items()}
    return found | {"all": sum(wins(row) for rows in held.values() for row in rows) / sum(map(len, held.values()))}


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--gyrostat", required=True)
    options.add_argument("--gguf", required=True)
    options.add_argument("--float", required=True)
    options.add_argument("--work", required=True, type=pathlib.Path)
    options.add_argument("--data", required=True, action="append")
    options.add_argument("--tokens", type=int, default=384)
    options.add_argument("--pairs", type=int)
    options.add_argument("--held", type=int)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options.add_argument("--only", choices=["gyrostat", "trl"])
    args = options.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    train, held = split(args.data, args.pairs, args.held)
    environment = {
        **os.environ, "GYROSTAT_POLICY__MODEL": args.gguf, "GYROSTAT_LEARN__PACE__SEQUENCE_TOKENS": str(args.tokens),
        "RAYON_NUM_THREADS": str(args.threads), "GYROSTAT_POLICY__DEVICE": args.device,
    }
    for name, rows in held.items():
        write(args.work / f"{name}.jsonl", rows)
    counts = {name: len(rows) for name, rows in held.items()}
    print(f"{len(train)} pairs to learn from, held out {counts}", flush=True)
    print("longer wins", json.dumps(longer(held)), flush=True)
    runs = {"gyrostat": lambda: ours(args, write(args.work / "train.jsonl", train), environment), "trl": lambda: theirs(args, train)}
    for name, run in runs.items():
        if args.only in (None, name):
            adapter, seconds = run()
            print(name, f"{seconds:.0f} s", json.dumps(accuracy(args, held, adapter, environment)), flush=True)


main()
