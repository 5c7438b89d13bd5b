"""What gyrostat records and trains goes on in TRL, and comes back.

    pip install torch transformers peft 'trl==0.29.0' datasets accelerate

Not part of .ci/run: torch is large. A server with a tiny model collects judged answers; TRL reads all four export formats and
trains on them, going on from adapters that `gyrostat train` made; the reward model that transformers loads scores as ours does;
and the adapter that TRL saved is taken in, promoted and served.
"""

import json
import os
import subprocess

import torch
from datasets import load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from harness import BENIGN, Server, arguments, check, main, step, tiny_model, workspace
from peft_check import gyrostat, perplexity


def collect(server):
    """Judged answers, of which some correct others."""
    for n in range(48):
        interaction, prompt = BENIGN[n % len(BENIGN)]
        answer = server.chat(prompt, interaction, seed=n, temperature=1).expect(200).json["id"]
        server.feedback(answer, value="up" if n % 3 else "down", rater=f"r{n % 7}").expect(201)
        if n % 4 == 0:
            server.feedback(answer, kind="demonstration", value=f"A better answer, number {n}.", rater="expert").expect(201)


def export(args, home, name):
    out = home / f"{name}.jsonl"
    env = {**os.environ, "GYROSTAT_STORE__PATH": str(home / "data")}
    done = subprocess.run([args.binary.resolve(), "export", name, "--out", out], env=env, capture_output=True, text=True)
    check(done.returncode == 0, done.stderr[-1000:])
    rows = load_dataset("json", data_files=str(out), split="train", cache_dir=str(home / "cache"))
    check(len(rows) > 0, f"{name} is empty")
    step(f"{name}: {len(rows)} rows with {rows.column_names}")
    return out, rows


def settings(home, name):
    return {
        "output_dir": str(home / name),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }


def continue_policy(folder, tokenizer, adapter, home, preference, sft):
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    trainer = DPOTrainer(model=model, args=DPOConfig(**settings(home, "dpo")), train_dataset=preference, processing_class=tokenizer)
    trainer.train()
    trainer = SFTTrainer(model=trainer.model, args=SFTConfig(**settings(home, "sft")), train_dataset=sft, processing_class=tokenizer)
    trainer.train()
    trainer.model.save_pretrained(home / "continued")
    return trainer.model.eval()


@torch.no_grad()
def reward_scores(folder, adapter, tokenizer, rows):
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    base.config.pad_token_id = tokenizer.pad_token_id
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    scores = []
    for row in rows:
        text = tokenizer.apply_chat_template(row["prompt"] + row["chosen"], tokenize=False).rstrip("\n")
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        scores.append(model.eval()(ids).logits.item())
    return model, sum(scores) / len(scores)


def run(args):
    torch.manual_seed(0)
    folder = tiny_model(args)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Not the end of turn, which is where the reward model reads its score: transformers looks for the last token that pads nothing.
    tokenizer.pad_token = next(token for token in tokenizer.all_special_tokens if token != tokenizer.eos_token)
    with workspace() as home:
        with Server(args.binary, folder, home) as server:
            collect(server)
        preference, pairs = export(args, home, "preference")
        _, sft = export(args, home, "sft")
        export(args, home, "unpaired")
        export(args, home, "prompt")

        gyrostat(args, "train", "dpo", "--data", preference, "--out", home / "ours")
        gyrostat(args, "train", "reward", "--data", preference, "--out", home / "reward", learn__reward__reads="end")
        reward, theirs = reward_scores(folder, home / "reward", tokenizer, pairs)
        ours = json.loads(gyrostat(args, "evaluate", "--data", preference, "--reward", home / "reward"))["reward"]
        check(abs(ours - theirs) < 1e-4, f"mean score of the chosen answers: gyrostat {ours}, transformers {theirs}")
        step(f"reward model in AutoModelForSequenceClassification: mean score {theirs:.6f}, gyrostat {ours:.6f}")
        config = RewardConfig(**settings(home, "rm"))
        RewardTrainer(model=reward.train(), args=config, train_dataset=pairs, processing_class=tokenizer).train()
        step("RewardTrainer goes on from our reward model")

        continued = continue_policy(folder, tokenizer, home / "ours", home, pairs, sft)
        step("DPOTrainer and SFTTrainer go on from our adapter")
        texts = [row["chosen"][0]["content"] + " And so on, as before." for row in pairs][:16]
        data = home / "text.jsonl"
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        ours = json.loads(gyrostat(args, "evaluate", "--data", data, "--adapter", home / "continued"))["perplexity"]
        theirs = perplexity(continued, tokenizer, texts)
        check(abs(ours / theirs - 1) < 1e-3, f"TRL's adapter: gyrostat {ours}, peft {theirs}")
        step(f"TRL's adapter: perplexity {ours:.4f}, peft {theirs:.4f}")

        with Server(args.binary, folder, home) as server:
            before = server.chat(BENIGN[0][1], seed=1, temperature=0).expect(200)
            taken = server.post("/v1/versions", {"adapter": str(home / "continued")}).expect(201).json["version"]
            server.promote(taken).expect(200)
            after = server.chat(BENIGN[0][1], seed=1, temperature=0).expect(200)
            check(after.version == taken and after.json["choices"] != before.json["choices"], "the answer is the old one")
        step(f"taken in as version {taken}, promoted and served")


if __name__ == "__main__":
    main(run, arguments(__doc__).parse_args())
