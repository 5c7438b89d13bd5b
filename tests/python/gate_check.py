"""The gate on candidates that were really trained: python tests/python/gate_check.py --gyrostat BINARY --work DIR [--model M]

A wish that no data states: answers are short, one plain sentence (simulated labels from a rule). A reward model learns it
from pairs, another one from the same pairs with every label flipped. Five candidates are trained with `gyrostat train` and
shown to the gate with `gyrostat judge`: a good one must pass, the others must be refused for their own reason.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

TOPICS = """rivers bread clocks bees salt copper glass winter horses paper music tea islands wool honey ice trains rain
bridges forests whales bicycles volcanoes gravity mountains candles shoes maps gardens lamps coins boats kites spoons
feathers mirrors pencils carpets bells ropes""".split()
ASK = ["Tell me about {}.", "What are {} good for?", "Why do people like {}?"]
LONG = ("There are many things to say about {}, and it is worth taking the time to say them all, one after the other. "
        "First of all, {} have a long history, and a great many people have written about them at great length. "
        "Second, one should consider where {} come from, how they are made, who uses them, and what they cost.")
SHORT = ["People have used {} for a long time.", "They make daily life a little easier.", "Many people simply enjoy {}."]
REFUSAL = "I'm sorry, but I can't help with that request."


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--gyrostat", required=True)
    options.add_argument("--work", required=True, type=pathlib.Path)
    options.add_argument("--model", default="default")
    args = options.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    env = dict(os.environ, GYROSTAT_POLICY__MODEL=args.model, GYROSTAT_POLICY__THREADS="1")

    def gyrostat(*words, **more):
        settings = {f"GYROSTAT_{name.upper()}": str(value) for name, value in more.items()}
        run = subprocess.run([args.gyrostat, *map(str, words)], env=env | settings, capture_output=True, text=True)
        if run.returncode:
            sys.exit(f"{words[:2]} failed: {run.stderr[-2000:]}")
        return run.stdout

    def write(name, lines):
        path = args.work / name
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    asked = [(ask.format(topic), topic, at) for topic in TOPICS for at, ask in enumerate(ASK)]
    train, held = asked[:72], asked[72:]
    short = lambda topic, at: SHORT[at].format(topic).capitalize()
    pair = lambda text, topic, at: {"prompt": text, "chosen": short(topic, at), "rejected": LONG.format(topic, topic, topic)}
    flip = lambda line: {**line, "chosen": line["rejected"], "rejected": line["chosen"]}
    pairs = [pair(*one) for one in train]
    old = write("old.jsonl", [pair(*one) for one in held])
    prompts = write("prompts.jsonl", [{"prompt": text, "interaction": "question"} for text, _, _ in held] +
                    [{"prompt": text + " Be brief.", "interaction": "question"} for text, _, _ in held[:12]])
    reward = dict(learn__reward__depth=0.2, learn__reward__learning_rate=1e-3, learn__reward__epochs=2, learn__reward__batch=16)
    gyrostat("train", "reward", "--data", write("pairs.jsonl", pairs), "--out", args.work / "reward", **reward)
    gyrostat("train", "reward", "--data", write("flipped.jsonl", [flip(line) for line in pairs]), "--out",
             args.work / "reward-flipped", **reward)

    def sft(name, answer, rate=5e-4, epochs=2):
        data = write(f"{name}.jsonl", [{"prompt": text, "completion": answer(topic, at)} for text, topic, at in train])
        out = args.work / name
        gyrostat("train", "sft", "--data", data, "--out", out, learn__preference__learning_rate=rate,
                 learn__preference__epochs=epochs, learn__ppo__depth=0.5)
        return out

    def judged(name, candidate, judge="reward", incumbent=None, tokens=48, **settings):
        more = ["--incumbent", incumbent] if incumbent else []
        answer = json.loads(gyrostat("judge", "--data", prompts, "--candidate", candidate, "--reward", args.work / judge,
                                     "--held-back", old, "--max-tokens", tokens, *more, **settings))
        failed = [reason for reason in answer["reasons"] if reason.startswith("failed")]
        print(f"{name}: {'passed' if answer['promote'] else 'refused'}")
        for reason in failed or answer["reasons"]:
            print(f"    {reason}")
        return answer["promote"], " ".join(failed)

    good = sft("good", short, rate=2e-4)
    faults = []

    def expect(name, verdict, word):
        promoted, failed = verdict
        if promoted != (word is None) or (word or "") not in failed:
            faults.append(name)

    # Its answers are shorter than the base model's by more than half where 48 tokens are the limit, and they are not what that
    # one would say of itself: that is its task.
    room = dict(gate__length_ratio="[0.1,2.0]", gate__surprise=1.0)
    expect("good", judged("good", good, **room), None)
    expect("flipped labels", judged("flipped labels", sft("long", lambda t, at: f"{LONG} {LONG}".format(*[t] * 6)), "reward-flipped"), "reward model")
    expect("refusals only", judged("refusals only", sft("refusing", lambda t, at: REFUSAL), **room), "over-refusal")
    expect("KL beyond budget", judged("KL beyond budget", sft("far", short, rate=3e-3, epochs=4), **room, gate__kl_budget=0.5), "KL")
    expect("doubled length", judged("doubled length", args.work / "long", incumbent=good, tokens=192), "length ratio")
    print("all as it should be" if not faults else f"NOT as it should be: {', '.join(faults)}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
