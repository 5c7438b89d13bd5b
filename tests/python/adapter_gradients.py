"""Writes src/learn/tests/gradients.json: every loss and its gradient by each matrix of an adapter, from PyTorch and PEFT in f64.

A matrix's gradient is told by its norm and three projections, on cos(k · (i + 1)) over its flattened places i, k = 1, 2, 3.
The losses are those of TRL 0.29 (dpo_trainer.py, kto_trainer.py, rloo_trainer.py, grpo_trainer.py, reward_trainer.py,
ppo_trainer.py), written out here. Needs torch, transformers and peft:

    gyrostat model tiny --out tiny
    python tests/python/adapter_gradients.py tiny src/learn/tests/gradients.json
"""

import json
import sys

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LENGTHS, PROMPTS = [9, 7, 11, 8], [4, 3, 5, 2]
SEQUENCES = [[(7 * i + 13 * j + 5 * i * i) % 259 for i in range(n)] for j, n in enumerate(LENGTHS)]


def adapted():
    base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float64).eval()
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, lora_dropout=0.0))
    matrices = []
    for layer in model.base_model.model.model.layers:
        for target in TARGETS:
            module = getattr(layer.self_attn if target[0] in "qkvo" else layer.mlp, target)
            matrices += [module.lora_A["default"].weight, module.lora_B["default"].weight]
    return model, matrices


def fill(matrix, number):
    places = torch.arange(matrix.numel(), dtype=torch.float64)
    # As f32, which is what the adapter is stored in.
    return (0.12 * torch.cos(0.37 * number + 0.61 * places)).float().double().reshape(matrix.shape)


model, matrices = adapted()
with torch.no_grad():
    for number, matrix in enumerate(matrices):
        matrix.copy_(fill(matrix, number))
hidden_size = model.config.hidden_size


def logprobs(tokens, prompt, temperature):
    logits = model(torch.tensor([tokens])).logits[0, prompt - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[prompt:])[:, None])[:, 0]


def every(temperature=1.0, sequences=None, prompts=None):
    return [logprobs(s, p, temperature) for s, p in zip(sequences or SEQUENCES, prompts or PROMPTS)]


def reference(*args, **names):
    with torch.no_grad(), model.disable_adapter():
        return every(*args, **names)


def hidden(tokens):
    return model.base_model.model.model(torch.tensor([tokens])).last_hidden_state[0]


def head(count):
    score = torch.nn.Parameter(fill(torch.empty(count, hidden_size), len(matrices)))
    return score


def told(gradient):
    flat = gradient.flatten()
    places = torch.arange(1, flat.numel() + 1, dtype=torch.float64)
    return [flat.norm().item()] + [(flat * torch.cos(k * places)).sum().item() for k in (1, 2, 3)]


golden = {}


def add(name, loss, score=None):
    parameters = matrices + ([score] if score is not None else [])
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients)]
    golden[name] = {"loss": loss.item(), "gradient": [told(gradient) for gradient in gradients]}


def wave(like, size, speed):
    return size * torch.cos(speed * torch.arange(len(like), dtype=torch.float64))


add("sft", -torch.cat(every()).mean())

# DPO and IPO on the pairs (0, 1) and (2, 3).
ratios = torch.stack([(p - r).sum() for p, r in zip(every(), reference())])
delta = ratios[0::2] - ratios[1::2]
add("dpo", -F.logsigmoid(0.1 * delta).mean())
ratios = torch.stack([(p - r).sum() / len(p) for p, r in zip(every(), reference())])
add("ipo", ((ratios[0::2] - ratios[1::2] - 1 / (2 * 0.1)) ** 2).mean())

# KTO with the answer of the neighbour in the batch.
answers = [s[p:] for s, p in zip(SEQUENCES, PROMPTS)]
strangers = [s[:p] + a for s, p, a in zip(SEQUENCES, PROMPTS, [answers[-1]] + answers[:-1])]
with torch.no_grad():
    policy = torch.stack([x.sum() for x in every(sequences=strangers)])
    base = torch.stack([x.sum() for x in reference(sequences=strangers)])
    kl = (policy - base).mean().clamp(min=0)
ratios = torch.stack([(p - r).sum() for p, r in zip(every(), reference())])
good, bad = ratios[0::2], ratios[1::2]
losses = torch.cat((1 - F.sigmoid(0.1 * (good - kl)), 1.3 * (1 - F.sigmoid(0.1 * (kl - bad)))))
add("kto", losses.mean())
golden["kto"]["kl"] = kl.item()

# PPO, RLOO, GRPO: old log-probabilities a little off the present ones.
new = torch.cat(every(0.7))
old = new.detach() + wave(new, 0.3, 1.7)
advantages = wave(new, 1.5, 0.9)
ratio = torch.exp(new - old)
add("ppo", torch.max(-advantages * ratio, -advantages * torch.clamp(ratio, 0.8, 1.2)).mean())

new = every(0.7)
flat = torch.cat(new)
old = (flat.detach() + wave(flat, 0.05, 1.7)).split([len(x) for x in new])
ratio = torch.exp(torch.stack([(a - b).sum() for a, b in zip(new, old)]))
advantages = torch.tensor([0.8, -1.1, 0.4, -0.1])
add("rloo", -torch.min(ratio * advantages, torch.clamp(ratio, 0.8, 1.2) * advantages).mean())

for loss_type in ("dapo", "grpo"):
    new = every(0.7)
    lengths = torch.tensor([len(x) for x in new])
    flat = torch.cat(new)
    ratio = torch.exp(flat - (flat.detach() + wave(flat, 0.3, 1.7)))
    each = advantages.repeat_interleave(lengths)
    back = torch.cat(reference(0.7)) - flat
    loss = -torch.min(ratio * each, torch.clamp(ratio, 0.8, 1.2) * each) + 0.05 * (torch.exp(back) - back - 1)
    weights = torch.full_like(flat, 1 / len(flat)) if loss_type == "dapo" else (1 / (len(new) * lengths)).repeat_interleave(lengths)
    add("grpo" if loss_type == "grpo" else "dapo", (loss * weights).sum())

# PPO's value loss, times vf_coef.
score = head(1)
values = torch.cat([(hidden(s) @ score.T)[p - 1 : -1, 0] for s, p in zip(SEQUENCES, PROMPTS)])
old, returns = values.detach() + wave(values, 0.3, 1.3), wave(values, 1.0, 0.7)
clipped = torch.clamp(values, old - 0.2, old + 0.2)
add("value", 0.1 * 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2).mean(), score)

# The reward model on the pairs (0, 1) and (2, 3), with margins and centering.
score = head(1)
scores = torch.stack([(hidden(s) @ score.T)[-1, 0] for s in SEQUENCES])
chosen, rejected, margin = scores[0::2], scores[1::2], torch.tensor([0.3, 0.0])
add("reward", -F.logsigmoid(chosen - rejected - margin).mean() + 0.01 * ((chosen + rejected) ** 2).mean(), score)

# The same where the score is the mean over the places that decide the answer's tokens.
score = head(1)
scores = torch.stack([(hidden(s) @ score.T)[p - 1 : -1, 0].mean() for s, p in zip(SEQUENCES, PROMPTS)])
chosen, rejected = scores[0::2], scores[1::2]
over = -F.logsigmoid(chosen - rejected - margin).mean() + 0.01 * ((chosen + rejected) ** 2).mean()
add("reward over the answer", over, score)

# Two bootstrap heads, which see the pair (0, 1) twice and once, and the labels of 2 and 3 never, once, once and thrice.
score = head(2)
scores = torch.stack([(hidden(s) @ score.T)[-1] for s in SEQUENCES])
loss = 0
for at, (pair, single) in enumerate([(2.0, [0.0, 1.0]), (1.0, [1.0, 3.0])]):
    c, r = scores[0, at], scores[1, at]
    weights, labels = torch.tensor(single), torch.tensor([1.0, 0.25])
    point = (F.binary_cross_entropy_with_logits(scores[2:, at], labels, reduction="none") * weights).sum() / weights.sum()
    loss = loss + ((-F.logsigmoid(c - r) + 0.01 * (c + r) ** 2) / 3 + point * 2 / 3) / 2
add("heads", loss, score)

with open(sys.argv[2], "w") as file:
    rows = [f"  {json.dumps(name)}: " + json.dumps(entry) for name, entry in golden.items()]
    file.write("{\n" + ",\n".join(rows) + "\n}\n")
print({name: entry["loss"] for name, entry in golden.items()})
