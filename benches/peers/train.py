"""Training, side by side: gyrostat and its peers by turns in one run, medians.

usage: python train.py --gyrostat BIN --gguf F --float DIR [--turns 3] [--only lora|ppo] [--device cuda]

Run by the Python of an environment with torch, transformers<5, peft, accelerate and trl==0.29.0, the last TRL with PPO. `--float` is the GGUF's
model dequantised, as a Hugging Face directory. Each turn is a process of its own, two threads, so that its peak memory is its own. On a card both hold the
base in bf16 and the adapters in f32, and the peak is that of the host's memory.

lora  forward and backward of a LoRA of rank 16 on all linears over 4 × 256 tokens, log-probabilities of every token; the median of four rounds
ppo   an iteration of PPO: 16 answers of 64 tokens to prompts of 64, four epochs, LoRA of rank 16; the last of a process's iterations
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

THREADS = 2
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def dtype(device):
    import torch

    return torch.bfloat16 if device == "cuda" else torch.float32


def lora(folder, device):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype(device)).to(device)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS))
    ids = (100 + torch.arange(4 * 256) * 7 % 3000).view(4, 256).to(device)
    seconds = []
    for _ in range(9 if device == "cuda" else 5):
        started = time.perf_counter()
        logits = model(ids).logits
        logprobs = torch.log_softmax(logits.view(-1, logits.shape[-1]).float(), -1)
        (-logprobs.gather(1, ids.view(-1, 1)).mean()).backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        model.zero_grad()
    # Without the first, which allocates.
    return {"speed": ids.numel() / statistics.median(seconds[1:])}


def ppo(folder, device, iterations=2):
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    torch.set_num_threads(THREADS)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prompt, answer, episodes = 64, 64, 16
    ids = [[100 + (i * 37 + j * 7) % 3000 for j in range(prompt)] for i in range(episodes * (iterations + 1))]
    data = Dataset.from_dict({"input_ids": ids})

    def scorer():
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=dtype(device))
        model.config.pad_token_id = tokenizer.pad_token_id
        return model

    config = PPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=4, gradient_accumulation_steps=4, num_ppo_epochs=4,
        num_mini_batches=1, total_episodes=episodes * iterations, response_length=answer, local_rollout_forward_batch_size=8,
        num_sample_generations=0, use_cpu=device == "cpu", report_to=[], bf16=device == "cuda", fp16=False, save_strategy="no", eval_strategy="no",
        logging_steps=1, gradient_checkpointing=False, disable_tqdm=True,
    )
    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, model=AutoModelForCausalLM.from_pretrained(folder, dtype=dtype(device)),
        ref_model=None, reward_model=scorer(), value_model=scorer(), train_dataset=data, eval_dataset=data.select(range(4)),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS, task_type="CAUSAL_LM"),
    )
    ends = [time.perf_counter()]
    trainer.log = lambda *_, **__: ends.append(time.perf_counter())
    trainer.train()
    # The last iteration, which pays for no start.
    steps = [after - before for before, after in zip(ends, ends[1:])]
    return {"seconds": steps[iterations - 1], "all": steps}


def child(what, folder, device):
    figures = {"lora": lora, "ppo": ppo}[what](folder, device)
    figures["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("FIGURES", json.dumps(figures))


def peer(what, folder, device):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OPENBLAS_")} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, __file__, "--child", what, "--float", folder, "--device", device], env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FIGURES")]
    if not lines:
        sys.exit(done.stderr[-3000:])
    return json.loads(lines[-1].removeprefix("FIGURES"))


def gyrostat(binary, model, what, rounds, device):
    command = [binary, "bench", what, "--rounds", str(rounds), "--json"]
    environment = {**os.environ, "GYROSTAT_POLICY__MODEL": model, "GYROSTAT_POLICY__THREADS": str(THREADS), "GYROSTAT_POLICY__DEVICE": device}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command} ended with {os.waitstatus_to_exitcode(status)}")
    return json.loads(out) | {"peak": usage.ru_maxrss / 1024}


def row(name, ours, theirs):
    ours, theirs = statistics.median(ours), statistics.median(theirs)
    print(f"{name:45} gyrostat {ours:9.1f}  peer {theirs:9.1f}  ratio {ours / theirs:.3f}", flush=True)


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--gyrostat")
    options.add_argument("--gguf")
    options.add_argument("--float", required=True)
    options.add_argument("--turns", type=int, default=3)
    options.add_argument("--only", choices=["lora", "ppo"])
    options.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options.add_argument("--child", choices=["lora", "ppo"], help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.child:
        return child(args.child, args.float, args.device)
    for what, bench, rounds in [("lora", "train", 4), ("ppo", "ppo", 1)]:
        if args.only not in (None, what):
            continue
        ours, theirs = [], []
        for turn in range(args.turns):
            ours.append(gyrostat(args.gyrostat, args.gguf, bench, rounds, args.device))
            theirs.append(peer(what, args.float, args.device))
            print(turn, json.dumps([ours[-1], theirs[-1]]), flush=True)
        of = lambda figures, name: [each[name] for each in figures]
        if what == "lora":
            row("LoRA forward + backward, tokens a second", of(ours, "train_lora_tokens_per_second"), of(theirs, "speed"))
        else:
            for depth in ["all_layers", "configured_depths"]:
                row(f"PPO iteration, {depth}, seconds", of(ours, f"ppo_iteration_{depth}_seconds"), of(theirs, "seconds"))
        row("peak memory of the process, MiB", of(ours, "peak"), of(theirs, "peak"))


main()
