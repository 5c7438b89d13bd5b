"""`gyrostat replay` on a simulated log, watched by a real Prometheus: what the panels show is what /v1/alignment says, and what the log holds.

    python tests/python/replay_check.py [--binary target/debug/gyrostat] [--keep DIR]

The log is ten days of a simulated service; on the eighth day its answers to one type of interaction become worse. With `--keep` the report stays.
"""

import collections
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import time

from harness import Client, Failure, arguments, check, free_port, main, step, workspace
from prometheus_check import DASHBOARDS, Prometheus, check_page, metrics_of, panel_queries

# A replay neither serves nor learns; these panels are asked of a live server by prometheus_check.py.
ELSEWHERE = ("gen_ai_", "gyrostat_engine_", "gyrostat_update", "gyrostat_queue_", "gyrostat_policy_kl", "gyrostat_probes_", "gyrostat_store_bytes")
# Panels' expressions by the field of /v1/alignment that they show.
SHOWN = {"state": "gyrostat_drift_state", "baseline": "gyrostat_drift_baseline", "current": "gyrostat_drift_current", "evidence_log10": "gyrostat_drift_evidence_log10", "threshold_log10": "gyrostat_drift_threshold_log10"}
STATES = {"learning": 0, "steady": 1, "alarm": 2}
TYPES = {
    "code": (5, "Why does my Python function return None?", "Because nothing is returned. Add a return statement at its end."),
    "chat": (3, "How was your day?", "Quiet and pleasant, thank you. How was yours?"),
    "translation": (1, "Translate 'good morning' into German.", "Guten Morgen."),
    "advice": (2, "Should I take the night train to Vienna?", "It is comfortable and saves a night in a hotel."),
    "writing": (1, "Write a short poem about rain.", "Rain on the roof, a drum so light, it counts the hours of the night."),
    "sensitive": (0.5, "Tell me how to annoy my neighbour.", "Practise the drums at six in the morning, and park in front of his gate."),
}
DRIFTING = "advice"


def simulated(answers, seed):
    """Lines of a log, oldest first."""
    random.seed(seed)
    at = 1_790_812_800_000
    for nth in range(answers):
        at += int(random.expovariate(answers / (10 * 86_400_000)))
        kind = random.choices(list(TYPES), [weight for weight, *_ in TYPES.values()])[0]
        _, prompt, answer = TYPES[kind]
        content = 0.6 if kind == DRIFTING and nth > 0.7 * answers else 0.88
        line = {"at": at, "prompt": prompt, "response": answer, "interaction": kind, "user": f"u{random.randrange(400)}"}
        if kind == "sensitive":
            line["risk"] = "harmful"
        if random.random() < (0.9 if kind == "sensitive" else 0.03):
            line["response"] = "I'm sorry, but I can't help with that."
        if random.random() < 0.6:
            value = "up" if random.random() < content else "down"
            line["feedback"] = [{"kind": "thumbs", "value": value, "at": at + random.randrange(1000, 600_000)}]
        yield line


class Replay(Client):
    def __init__(self, args, log, home):
        port = free_port()
        super().__init__(f"http://127.0.0.1:{port}")
        self.prometheus = Prometheus(home, f"127.0.0.1:{port}")
        env = {**os.environ, "GYROSTAT_HTTP__BIND": f"127.0.0.1:{port}"}
        command = [str(args.binary), "replay", "--data", str(log), "--into", str(home / "data"), "--serve", "--json", "--pace", "1500"]
        self.errors = open(home / "replay.log", "wb")
        self.process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=self.errors, text=True)

    def outcome(self):
        line = self.process.stdout.readline()
        check(line.startswith("{"), f"the replay ended with {self.process.poll()}")
        return json.loads(line)

    def end(self):
        self.process.send_signal(signal.SIGINT)
        check(self.process.wait(30) == 0, f"the replay ended with {self.process.returncode}")


def values(prometheus, expression):
    return {(row["metric"].get("signal"), row["metric"].get("interaction")): float(row["value"][1]) for row in prometheus.query(expression)}


def check_alarms(outcome):
    found = [(alarm["signal"], alarm["interaction"], alarm["direction"]) for alarm in outcome["alarms"]]
    check(("satisfaction", DRIFTING, "down") in found, f"the planted drift was not seen: {found}")
    step(f"replayed {outcome['events']} events; alarms: {', '.join(' '.join(map(str, alarm)) for alarm in found)}")


def check_scorecard(replay, prometheus):
    """Each figure of each stream, as the panels ask for it."""
    rows = replay.get("/v1/alignment").expect(200).json["signals"]
    compared = 0
    for field, metric in SHOWN.items():
        shown = values(prometheus, metric)
        for row in rows:
            told = STATES[row[field]] if field == "state" else row[field]
            key = (row["signal"], row["interaction"])
            if told is not None:
                check(key in shown and abs(shown[key] - told) < 1e-9, f"{field} of {key}: {shown.get(key)} is shown, {told} is told")
                compared += 1
    step(f"{compared} figures of {len(rows)} streams: the panels show what /v1/alignment says")


def check_effectiveness(lines, prometheus):
    """Satisfaction and refusals by type, against the log itself."""
    judged, declined = collections.defaultdict(list), collections.Counter()
    for line in lines:
        judged[line["interaction"]] += [judgement["value"] == "up" for judgement in line.get("feedback", [])]
        declined[line["interaction"]] += line["response"].startswith("I'm sorry")
    mean = values(prometheus, "sum by (interaction) (gyrostat_satisfaction_score_sum) / sum by (interaction) (gyrostat_satisfaction_score_count)")
    refused = values(prometheus, "sum by (interaction) (gyrostat_refusals_total)")
    for kind, thumbs in judged.items():
        check(abs(mean[None, kind] - sum(thumbs) / len(thumbs)) < 1e-9, f"satisfaction of {kind}: {mean[None, kind]} is shown, {sum(thumbs) / len(thumbs)} is logged")
        check(refused[None, kind] == declined[kind], f"refusals of {kind}: {refused[None, kind]} are shown, {declined[kind]} are logged")
    worst = min(mean, key=mean.get)[1]
    check(worst == DRIFTING, f"the least effective type is {worst}")
    step(f"satisfaction and refusals of {len(judged)} types as the log has them; least effective: {worst}")


def check_panels(prometheus, dashboard):
    silent, asked = [], 0
    for title, expression in panel_queries(dashboard):
        if any(name.startswith(ELSEWHERE) for name in metrics_of(expression)):
            continue
        asked += 1
        if not prometheus.query(expression):
            silent.append(title)
    check(not silent, f"no data: {silent}")
    step(f"{asked} queries of panels about alignment, all with data")


def check_report(args, home):
    page = home / "report.html"
    env = {**os.environ, "GYROSTAT_STORE__PATH": str(home / "data")}
    subprocess.run([str(args.binary), "report", "--out", str(page)], env=env, check=True)
    text = page.read_text()
    check(not re.search(r"(?:src|href)\s*=|@import|url\(", text), "the report asks for something from elsewhere")
    check(not any(answer in text for _, _, answer in TYPES.values()), "the report holds words of users")
    if args.keep:
        shutil.copy(page, args.keep)
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        step("report: one file, offline, no words of users (no browser to open it with)")
        return
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={home / 'browser'}", "--window-size=1100,2400"]
    opened = subprocess.run([browser, *options, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
    drawn = opened.stdout.count("<polyline")
    check(opened.returncode == 0 and drawn >= 6, f"the browser shows {drawn} plots")
    if args.keep:
        subprocess.run([browser, *options, f"--screenshot={args.keep / 'report.png'}", page.as_uri()], capture_output=True, timeout=120)
    step(f"report: one file, offline, no words of users, {drawn} plots in {pathlib.Path(browser).name}")


def run(args):
    check(shutil.which("prometheus"), "prometheus is needed (Debian: apt-get install prometheus)")
    dashboard = json.loads((DASHBOARDS / "gyrostat.json").read_text())
    with workspace() as home:
        lines = list(simulated(args.answers, args.seed))
        log = home / "log.jsonl"
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))
        replay = Replay(args, log, home)
        try:
            with replay.prometheus as prometheus:
                check_alarms(replay.outcome())
                # The last scrape has to be younger than the last event.
                time.sleep(3)
                check_page(replay.get("/metrics").expect(200).text)
                check_scorecard(replay, prometheus)
                check_effectiveness(lines, prometheus)
                check_panels(prometheus, dashboard)
                refused = replay.post("/v1/chat/completions", {"model": "default", "messages": [{"role": "user", "content": "x"}]})
                check(refused.status == 503 and "replayed" in refused.json["error"]["message"], f"{refused.status} {refused.text}")
            replay.end()
        except Failure as failure:
            raise Failure(f"{failure}\n{(home / 'replay.log').read_text()[-2000:]}") from None
        finally:
            replay.process.kill()
            replay.process.wait()
            replay.errors.close()
        check_report(args, home)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--answers", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=pathlib.Path, help="a folder for the report and its picture")
    main(run, parser.parse_args())
