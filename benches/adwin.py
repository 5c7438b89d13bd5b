"""ADWIN (river) on the streams of `gyrostat bench drift --study delay --write DIR`: its delay at the budget that ours has.

    pip install river
    gyrostat bench drift --study delay --write /tmp/streams
    python benches/adwin.py /tmp/streams

`delta` has no rule that gives a time to a false alarm, so for each law it is tuned to one false alarm in 10,000 readings
on streams without a change (the first of which are not used for the rest), with a look at every reading (clock 1).
"""

import json
import pathlib
import sys

from river.drift import ADWIN

BUDGET, CHANGE, CAP = 10_000, 2_000, 4_000
DELTAS = [0.002, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
TUNED_ON = 150


def first_alarm(data, delta):
    detector = ADWIN(delta=delta, clock=1)
    for at, reading in enumerate(data):
        detector.update(reading)
        if detector.drift_detected:
            return at
    return None


def budget(streams, delta):
    """Readings to a false alarm: all readings up to the first alarms, over the number of those."""
    alarms = [first_alarm(stream, delta) for stream in streams]
    found = sum(alarm is not None for alarm in alarms)
    readings = sum(len(stream) if alarm is None else alarm + 1 for stream, alarm in zip(streams, alarms))
    return readings / max(found, 1)


def tuned(streams):
    """The largest delta of the grid that keeps the budget: what is larger is faster and alarms more."""
    best = DELTAS[0]
    low, high = 0, len(DELTAS) - 1
    while low <= high:
        middle = (low + high) // 2
        if budget(streams, DELTAS[middle]) >= BUDGET:
            best, low = DELTAS[middle], middle + 1
        else:
            high = middle - 1
    return best


def streams(path):
    with open(path) as lines:
        return [json.loads(line)["data"] for line in lines]


def main(directory):
    print("| change | delta | readings to a false alarm | delay | ± | streams |\n|---|---|---|---|---|---|")
    for path in sorted(pathlib.Path(directory).glob("*.change.jsonl")):
        same = streams(str(path).replace(".change.", ".same."))
        delta = tuned(same[:TUNED_ON])
        shown = budget(same[TUNED_ON:], delta)
        alarms = [first_alarm(stream, delta) for stream in streams(path)]
        delays = [CAP if at is None else at + 1 - CHANGE for at in alarms if at is None or at >= CHANGE]
        mean = sum(delays) / len(delays)
        error = (sum((delay - mean) ** 2 for delay in delays) / (len(delays) - 1) / len(delays)) ** 0.5
        name = path.name.removesuffix(".change.jsonl").replace("_", " ")
        print(f"| {name} | {delta} | {shown:,.0f} | {mean:.1f} | {error:.1f} | {len(delays)} |", flush=True)


main(sys.argv[1])
