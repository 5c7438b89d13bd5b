"""What the classifiers behind the signals are worth against labels of people.

    python3 tests/python/signals_figures.py DATA [GYROSTAT]

DATA holds `refusal/*.jsonl` ({"prompt","response","label","model"}) and `prompts/*.jsonl` ({"prompt","harmful" or
"category"}). The shipped weights are trained on two thirds of the prompts of chatgpt_refusals and gptfuzz; of these files
only the other third is measured here (SHA-256 of the prompt, first four bytes, divisible by three). Everything else was
never trained on.
"""

import hashlib
import json
import pathlib
import subprocess
import sys

DATA = pathlib.Path(sys.argv[1])
GYROSTAT = sys.argv[2] if len(sys.argv) > 2 else "target/release/gyrostat"

# Our types that fit a category of MT-Bench and of Vicuna's questions. Extraction is work on a given text, reasoning is
# asked as a riddle or as a sum, generic questions ask for facts or for advice.
TYPES = {
    "writing": {"writing"},
    "roleplay": {"roleplay"},
    "math": {"maths"},
    "coding": {"code"},
    "extraction": {"summarisation", "question"},
    "reasoning": {"question", "maths"},
    "fermi": {"question", "maths"},
    "generic": {"question", "advice"},
}


def classified(name):
    rows = [json.loads(line) for line in (DATA / name).read_text().splitlines()]
    for row in rows:
        row.setdefault("response", "")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    run = subprocess.run([GYROSTAT, "classify", "--input", "-"], input=lines, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in run.stdout.splitlines()]


def held_out(row):
    return int.from_bytes(hashlib.sha256(row["prompt"].encode()).digest()[:4], "big") % 3 == 0


def expected_error(pairs):
    """Of (probability, truth), over ten bins of equal width."""
    bins = [[0.0, 0.0] for _ in range(10)]
    for probability, truth in pairs:
        chosen = bins[min(int(probability * 10), 9)]
        chosen[0] += probability
        chosen[1] += truth
    return sum(abs(said - true) for said, true in bins) / len(pairs)


def area(pairs):
    """Under the ROC curve: how often a positive has the higher score, ties as halves."""
    positive = [score for score, truth in pairs if truth]
    negative = [score for score, truth in pairs if not truth]
    wins = sum((p > n) + (p == n) / 2 for p in positive for n in negative)
    return wins / (len(positive) * len(negative))


def f1(pairs):
    hit = sum(said and true for said, true in pairs)
    wrong = sum(said != true for said, true in pairs)
    return 2 * hit / max(2 * hit + wrong, 1)


def false_alarms(pairs):
    negative = [said for said, true in pairs if not true]
    return sum(negative) / max(len(negative), 1)


def refusals():
    print("refusal (full or partial)        n     F1  false alarms  calibration  AUROC  three labels right")
    for name in ["xstest_dev", "chatgpt_refusals_dev", "gptfuzz_dev"]:
        rows = classified(f"refusal/{name}.jsonl")
        rows = rows if name == "xstest_dev" else [row for row in rows if held_out(row)]
        labels = {"compliance": "none", "partial": "partial", "refusal": "full"}
        said = [(row["refusal"]["label"] != "none", row["label"] != "compliance") for row in rows]
        scores = [(row["refusal"]["probability"], row["label"] != "compliance") for row in rows]
        exact = sum(row["refusal"]["label"] == labels[row["label"]] for row in rows) / len(rows)
        print(
            f"{name:<28} {len(rows):>5}  {f1(said):.3f}  {false_alarms(said):>12.3f}  {expected_error(scores):>11.3f}"
            f"  {area(scores):.3f}  {exact:>18.3f}"
        )
        if name == "xstest_dev":
            for model in sorted({row["model"] for row in rows}):
                own = [pair for pair, row in zip(said, rows) if row["model"] == model]
                print(f"  {model:<26} {len(own):>5}  {f1(own):.3f}  {false_alarms(own):>12.3f}")
        hedged = [
            row["refusal"]["label"] != "none"
            for row in rows
            if row["label"] == "compliance" and row["response"].lstrip().startswith("As an AI")
        ]
        if hedged:
            print(f"  'As an AI …' that complies   {len(hedged):>5}         {sum(hedged) / len(hedged):>12.3f}")


def risks():
    print("\nrisk of prompts                  n  AUROC  found  false alarms  calibration")
    for name in ["xstest", "coconot_eval", "openai_moderation", "simple_safety_tests"]:
        rows = classified(f"prompts/{name}.jsonl")
        scores = [(row["risk_probability"], row["harmful"]) for row in rows]
        said = [(row["risk"] == "harmful", row["harmful"]) for row in rows]
        found = [guess for guess, true in said if true]
        both = len(found) < len(rows)
        auroc = f"{area(scores):.3f}" if both else "    –"
        print(
            f"{name:<28} {len(rows):>5}  {auroc}  {sum(found) / len(found):.3f}  {false_alarms(said):>12.3f}"
            f"  {expected_error(scores):>11.3f}"
        )


def interactions():
    rows = classified("prompts/mt_vicuna_bench.jsonl")
    right = [row["interaction"] in TYPES.get(row["category"], {"question"}) for row in rows]
    print(f"\ninteraction type: {sum(right) / len(right):.3f} of {len(rows)} right")
    for category in sorted({row["category"] for row in rows}):
        own = [hit for hit, row in zip(right, rows) if row["category"] == category]
        wanted = " or ".join(sorted(TYPES.get(category, {"question"})))
        print(f"  {category:<16} {sum(own):>3} of {len(own):>3}  ({wanted})")


refusals()
risks()
interactions()
