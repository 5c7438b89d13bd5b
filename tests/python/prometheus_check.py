"""The metrics page, the dashboard and the alert rules against a real Prometheus.

    python tests/python/prometheus_check.py                               its own server, with a little traffic
    python tests/python/prometheus_check.py --url http://127.0.0.1:8088   a running one, as it is; nothing is sent to it
    python tests/python/prometheus_check.py --demo --binary target/release/gyrostat   the whole demo, asked over all its time

Every expression of gyrostat.json and alerts.yml is asked; it must be accepted and give data. Alert rules rest silent by nature,
so of those the metrics are asked, and the labels that they are matched and grouped by.
"""

import json
import re
import shutil
import subprocess
import time
import urllib.parse

from harness import ROOT, Client, Failure, Server, arguments, check, free_port, main, mixed_traffic, run_update, step, tiny_model, workspace

DASHBOARDS = ROOT / "dashboards"
METRIC = re.compile(r"\b((?:gyrostat|gen_ai)_\w+|up)\b\s*(\{[^}]*\})?")
GROUPING = re.compile(r"\b(?:by|on|ignoring|group_left)\s*\(([^)]*)\)")
# Silent on a young server that nothing happened to yet: the reason for each. `--strict` lets none pass.
YOUNG = {
    "gyrostat_drift_baseline": "known once a reference window is full",
    "gyrostat_alarms_total": "nothing drifted",
    "gyrostat_policy_kl_nats_per_token": "sampled one answer in N",
    "gyrostat_probes_total": "asked on a schedule",
}


def promtool(*arguments, text=None):
    done = subprocess.run(["promtool", *map(str, arguments)], input=text, capture_output=True, text=True, cwd=DASHBOARDS)
    check(done.returncode == 0, f"promtool {' '.join(map(str, arguments))}: {done.stdout}{done.stderr}")
    return done.stdout + done.stderr


class Prometheus(Client):
    """A Prometheus of our own that scrapes one target."""

    def __init__(self, home, target):
        port = free_port()
        super().__init__(f"http://127.0.0.1:{port}")
        config = (DASHBOARDS / "prometheus.yml").read_text()
        config = config.replace("127.0.0.1:8088", target).replace("15s", "1s").replace("- alerts.yml", f"- {DASHBOARDS}/alerts.yml")
        (home / "prometheus.yml").write_text(config)
        self.log = home / "prometheus.log"
        self.since = None
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                ["prometheus", f"--config.file={home}/prometheus.yml", f"--storage.tsdb.path={home}/tsdb", f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)

    def __enter__(self):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                if self.query('up{job="gyrostat"} == 1'):
                    return self
            except (OSError, Failure):
                pass
            time.sleep(0.2)
        self.__exit__()
        raise Failure(f"Prometheus does not scrape: {self.log.read_text()[-2000:]}")

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def query(self, expression):
        """Its series now or, with `since` set, those that it had at any time from then on."""
        asked = {"query": expression}
        if self.since:
            asked |= {"start": self.since, "end": time.time(), "step": "5s"}
        answer = self.get(f"/api/v1/query{'_range' if self.since else ''}?" + urllib.parse.urlencode(asked))
        check(answer.status == 200, f"Prometheus does not accept {expression!r}: {answer.text}")
        return answer.json["data"]["result"]


def substituted(expression):
    """As Grafana sends it, with every variable at All."""
    for variable, value in (("$interaction", ".*"), ("$version", ".*"), ("$__rate_interval", "1m"), ("$__range", "10m")):
        expression = expression.replace(variable, value)
    check("$" not in expression, f"an unknown variable in {expression}")
    return expression


def panel_queries(dashboard):
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], substituted(target["expr"])


def metrics_of(expression):
    return {name for name, _ in METRIC.findall(expression)}


def runbooks():
    """The runbook of each alert by name. The rules themselves are read by Prometheus, so no YAML parser is needed here."""
    name, rules = None, {}
    for line in (DASHBOARDS / "alerts.yml").read_text().splitlines():
        if found := re.match(r"\s+- alert: (\w+)", line):
            name = found[1]
        elif found := re.match(r'\s+runbook_url: "(.*)"', line):
            rules[name] = found[1]
    return rules


def check_dashboard(dashboard):
    """What Grafana would take without a word and show badly."""
    check(dashboard["uid"] == "gyrostat", "the uid has to stay")
    ids = [panel["id"] for panel in dashboard["panels"]]
    check(len(ids) == len(set(ids)), "two panels share an id")
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            continue
        title, defaults = panel["title"], panel["fieldConfig"]["defaults"]
        check(bool(panel.get("description")), f"{title}: no description")
        check(bool(defaults.get("unit")) and bool(defaults.get("thresholds")), f"{title}: no unit or thresholds")
        check(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24, f"{title}: wider than the page")
        for target in panel["targets"]:
            check(target["datasource"]["uid"] == "${datasource}", f"{title}: a fixed data source")
            check("rate(" not in target["expr"] or "$__rate_interval" in target["expr"], f"{title}: a rate without $__rate_interval")
    step(f"gyrostat.json: {sum(p['type'] != 'row' for p in dashboard['panels'])} panels with description, unit and thresholds")


def check_runbooks(rules):
    headings = {re.sub(r"[^\w -]", "", line.lstrip("#").strip().lower()).replace(" ", "-") for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("#")}
    for name, url in rules.items():
        check(url.partition("#")[2] in headings, f"{name}: README.md has no heading for {url}")
    step(f"alerts.yml: {len(rules)} alerts, each with its runbook in README.md")


def missing_labels(prometheus, expression):
    """Labels that the expression matches or groups by and that its series do not bear: a slip of the pen that Prometheus cannot see.

    A metric without series yet is given the benefit of the doubt.
    """
    borne = {name: {label for row in prometheus.query(name) for label in row["metric"]} for name in metrics_of(expression)}
    absent = set()
    for name, matchers in METRIC.findall(expression):
        if borne[name]:
            absent |= set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)) - borne[name]
    if all(borne.values()):
        grouped = {label.strip() for group in GROUPING.findall(expression) for label in group.split(",")}
        absent |= grouped - set().union(*borne.values()) - {"", "le"}
    return absent


def check_expressions(prometheus, dashboard, strict):
    silent, faults, asked = {}, [], 0

    def judge(place, expression, query):
        nonlocal asked
        asked += 1
        if not prometheus.query(query):
            excuses = [YOUNG[name] for name in metrics_of(expression) if name in YOUNG and not prometheus.query(name)]
            if excuses and not strict:
                silent[place] = excuses[0]
            else:
                faults.append(f"{place}: no data for {query}")
        if absent := missing_labels(prometheus, expression):
            faults.append(f"{place}: no series has {sorted(absent)} in {expression}")

    for title, expression in panel_queries(dashboard):
        judge(f"panel {title!r}", expression, expression)
    for annotation in dashboard["annotations"]["list"]:
        if "expr" in annotation:
            expression = substituted(annotation["expr"])
            prometheus.query(expression)
            for metric in sorted(metrics_of(expression)):
                judge(f"annotation {annotation['name']}", metric, metric)
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"]).groups()
            judge(f"variable ${variable['name']}", f"count by ({label}) ({metric})", metric)
    groups = prometheus.get("/api/v1/rules?type=alert").expect(200).json["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    for rule in rules:
        check(rule["health"] in ("ok", "unknown"), f"{rule['name']}: {rule.get('lastError')}")
        for metric in sorted(metrics_of(rule["query"])):
            judge(f"alert {rule['name']}", metric, metric)
        if absent := missing_labels(prometheus, rule["query"]):
            faults.append(f"alert {rule['name']}: no series has {sorted(absent)}")
    for place, reason in silent.items():
        print(f"--  {place} is silent: {reason}")
    check(not faults, f"{len(faults)} of {asked}:\n  " + "\n  ".join(faults))
    firing = sorted(f"{alert['labels']['alertname']} {alert['labels'].get('signal', '')}".strip() for alert in prometheus.get("/api/v1/alerts").json["data"]["alerts"] if alert["state"] == "firing")
    step(f"Prometheus: {asked} queries of panels, annotations, variables and {len(rules)} alerts accepted, {asked - len(silent)} with data; firing: {', '.join(firing) or 'none'}")


def run(args):
    check(shutil.which("promtool") and shutil.which("prometheus"), "promtool and prometheus are needed (Debian: apt-get install prometheus)")
    dashboard = json.loads((DASHBOARDS / "gyrostat.json").read_text())
    check_dashboard(dashboard)
    check_runbooks(runbooks())
    promtool("check", "rules", "alerts.yml")
    promtool("test", "rules", "alerts_test.yml")
    promtool("check", "config", "prometheus.yml")
    step("promtool: rules, their tests and the scrape configuration")
    with workspace() as home:
        if args.demo:
            watch_demo(home, dashboard, args)
            return
        if args.url:
            watch(Client(args.url), home, dashboard, args, lambda: None)
            return
        with Server(args.binary, tiny_model(args), home / "server") as server:
            def traffic():
                outcome = run_update(server)["outcome"] if args.update else "none"
                for _ in range(6):
                    mixed_traffic(server, rounds=1)
                    # A rate needs increments between two scrapes; they are a second apart.
                    time.sleep(1.2)
                step(f"traffic, feedback and an update ({outcome})")

            watch(server, home, dashboard, args, traffic)


def watch_demo(home, dashboard, args):
    """Scrapes the demo from its first second to its end. A promotion begins new baselines, so the questions are about all that time."""
    port, since = free_port(), time.time()
    with open(home / "demo.log", "wb") as log:
        demo = subprocess.Popen([args.binary, "demo", "--port", str(port), "--seed", str(args.seed)], stdout=log, stderr=log)
    try:
        with Prometheus(home, f"127.0.0.1:{port}") as prometheus:
            page, server = "", Client(f"http://127.0.0.1:{port}")
            while demo.poll() is None:
                time.sleep(2)
                try:
                    page = server.get("/metrics").expect(200).text
                except OSError:
                    pass  # the demo's last second
            print((home / "demo.log").read_text())
            check(demo.returncode == 0, f"the demo exited with {demo.returncode}")
            step(f"the demo with seed {args.seed} in {time.time() - since:.0f} s")
            check_page(page)
            prometheus.since = since
            check_expressions(prometheus, dashboard, args.strict)
    finally:
        demo.kill()
        demo.wait()


def check_page(page):
    promtool("check", "metrics", text=page)
    step(f"promtool check metrics: {sum(line and not line.startswith('#') for line in page.splitlines())} series")


def watch(server, home, dashboard, args, traffic):
    target = server.url.removeprefix("http://")
    with Prometheus(home, target) as prometheus:
        traffic()
        page = server.get("/metrics").expect(200)
        check(page.headers.get("content-type", "").startswith("text/plain"), f"content type {page.headers.get('content-type')}")
        check_page(page.text)
        # Two scrapes give a rate; the rules are read at the next evaluation.
        time.sleep(args.settle)
        check_expressions(prometheus, dashboard, args.strict)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--url", help="a running server, taken as it is; one is started if absent")
    parser.add_argument("--demo", action="store_true", help="scrape a whole demo; the default model is needed")
    parser.add_argument("--seed", type=int, default=1, help="the demo's")
    parser.add_argument("--strict", action="store_true", help="every expression has to give data")
    parser.add_argument("--no-update", dest="update", action="store_false", help="do not start an update")
    parser.add_argument("--settle", type=float, default=4, help="seconds between the last request and the questions")
    main(run, parser.parse_args())
