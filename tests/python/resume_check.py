"""A `gyrostat train` run that is killed (SIGKILL) at random moments and resumed ends with the same adapter, bit for bit.

For sft, reward, dpo, kto, ppo, rloo and grpo: one run without interruption, then one that is killed ten times, each time
after a random while, and gone on with `--resume`.

    python3 tests/python/resume_check.py [--binary target/debug/gyrostat] [--model target/tiny] [--kills 10] [--recipes ppo …]
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import time

import harness

RECIPES = ["sft", "reward", "dpo", "kto", "ppo", "rloo", "grpo"]
FILES = ["adapter_model.safetensors", "adapter_config.json", "heads.safetensors"]
SETTINGS = {
    "GYROSTAT_LEARN__PPO__ITERATIONS": "40",
    "GYROSTAT_LEARN__PPO__EPISODES": "8",
    "GYROSTAT_LEARN__PPO__RESPONSE_LENGTH": "12",
    "GYROSTAT_LEARN__PPO__LENGTH_RATIO": "100",
    "GYROSTAT_LEARN__PREFERENCE__EPOCHS": "6",
    "GYROSTAT_LEARN__PREFERENCE__BATCH": "4",
    "GYROSTAT_LEARN__REWARD__EPOCHS": "6",
    "GYROSTAT_LEARN__REWARD__BATCH": "4",
}


def rows(recipe, draw):
    """Sixty-four lines of what a recipe reads."""
    words = ["stone", "river", "seven", "lamp", "north", "paper", "wind", "glass"]
    text = lambda count: " ".join(draw.choice(words) for _ in range(count))
    for nth in range(64):
        prompt = f"{nth} {text(2)}"
        if recipe in ("reward", "dpo"):
            yield {"prompt": prompt, "chosen": text(3), "rejected": text(2)}
        elif recipe == "kto":
            yield {"prompt": prompt, "completion": text(3), "label": draw.random() < 0.5}
        else:
            yield {"prompt": prompt, "completion": text(3)}


class Runs:
    def __init__(self, args, home):
        self.args, self.home = args, home
        self.model = harness.tiny_model(args)
        self.env = {**os.environ, "GYROSTAT_POLICY__MODEL": str(self.model), **SETTINGS}
        self.reward = None

    def start(self, recipe, out, *more):
        data = self.home / f"{recipe}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows(recipe, random.Random(recipe))))
        command = [self.args.binary.resolve(), "train", recipe, "--data", data, "--out", out, "--seed", "7", *more]
        if recipe in ("ppo", "rloo", "grpo"):
            command += ["--reward", self.reward]
        return subprocess.Popen(command, env=self.env, cwd=self.home, stderr=subprocess.PIPE)

    def finish(self, process):
        _, said = process.communicate(timeout=500)
        harness.check(process.returncode == 0, f"the run ended with {process.returncode}: {said.decode()[-2000:]}")

    def uninterrupted(self, recipe, out):
        begun = time.monotonic()
        self.finish(self.start(recipe, out))
        return time.monotonic() - begun

    def interrupted(self, recipe, out, seconds, draw):
        """Killed until it has been killed often enough, then left alone; how often, and how often a checkpoint was there."""
        kills, kept = 0, 0
        while kills < self.args.kills:
            process = self.start(recipe, out, *(["--resume"] if kills else []))
            try:
                process.wait(draw.uniform(0.0, seconds / self.args.kills))
                break  # It was through before its time.
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                kills += 1
            if (out / "checkpoint.safetensors").exists():
                kept += 1
            elif (out / "adapter_config.json").exists():
                return kills, kept  # Killed between its end and the end of its process.
        if kills < self.args.kills:
            harness.check(process.returncode == 0, f"{recipe} failed: {process.stderr.read().decode()[-2000:]}")
        else:
            self.finish(self.start(recipe, out, "--resume"))
        return kills, kept


def digests(out):
    return {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in FILES if (out / name).exists()}


def run(args):
    with harness.workspace() as home:
        runs = Runs(args, home)
        # The policy recipes follow the reward model of the run without interruption.
        runs.reward = home / "reward-whole"
        for recipe in dict.fromkeys(["reward", *args.recipes]):
            draw = random.Random(f"{recipe} {args.seed}")
            whole, cut = home / f"{recipe}-whole", home / f"{recipe}-cut"
            seconds = runs.uninterrupted(recipe, whole)
            if recipe not in args.recipes:
                continue
            kills = 0
            while kills < args.kills:
                kills, kept = runs.interrupted(recipe, cut, seconds, draw)
                expected, found = digests(whole), digests(cut)
                harness.check(expected == found, f"{recipe}: {kills} kills made another adapter: {expected} but {found}")
                harness.check(not (cut / "checkpoint.safetensors").exists(), f"{recipe}: the checkpoint was left behind")
                print(f"{recipe:7} {seconds:6.1f} s, killed {kills} times, {kept} times with a checkpoint: the same adapter", flush=True)
                # It was through before the last kill: once more from the start, killed sooner.
                shutil.rmtree(cut)
                seconds /= 2


if __name__ == "__main__":
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    harness.main(run, parser.parse_args())
