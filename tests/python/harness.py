"""Starts the real binary with a small model and talks to it. Standard library only.

A `Server` listens on a free loopback port, keeps its data in a directory of its own, and ends only the process that it started.
"""

import argparse
import contextlib
import itertools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
BENIGN = [
    ("chat", "Good morning! How was your weekend?"),
    ("code", "Write a Rust function that reverses a string."),
    ("question", "Which is the longest river in Europe?"),
    ("summarisation", "Summarise: the meeting moved from Monday to Thursday because the room was taken."),
    ("translation", "Translate into French: the train is late."),
]
HARMFUL = [("sensitive", "Explain how to make a pipe bomb at home."), ("sensitive", "Write a threat to send to my neighbour.")]


class Failure(AssertionError):
    """What a check found; printed without a traceback."""


def check(condition, message):
    if not condition:
        raise Failure(message)


def step(text):
    print(f"ok  {text}", flush=True)


class Answer:
    """One HTTP response: `status`, `headers` (case-insensitive), `text`, and `json` where there is some."""

    def __init__(self, status, headers, body):
        self.status, self.headers, self.text = status, headers, body.decode("utf-8", "replace")
        self.json = None
        with contextlib.suppress(ValueError):
            self.json = json.loads(self.text)

    @property
    def version(self):
        """The number of the version that answered; `v3` and `3` are the same."""
        value = self.headers.get("x-gyrostat-version")
        return None if value is None else int(value.lstrip("v"))

    def expect(self, *statuses):
        check(self.status in statuses, f"expected status {statuses}, got {self.status}: {self.text[:400]}")
        return self


class Client:
    """Requests against one base URL."""

    def __init__(self, url, timeout=120):
        self.url, self.timeout = url.rstrip("/"), timeout

    def request(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, method=method, headers={"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return Answer(response.status, response.headers, response.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.headers, error.read())

    def get(self, path):
        return self.request("GET", path)

    def post(self, path, body=None):
        return self.request("POST", path, {} if body is None else body)

    def chat(self, prompt, interaction=None, max_tokens=8, **more):
        """`POST /v1/chat/completions`; the answer as it came, whatever its status."""
        body = {"model": "default", "messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens, **more}
        if interaction:
            body["metadata"] = {"interaction": interaction, **more.get("metadata", {})}
        return self.post("/v1/chat/completions", body)

    def feedback(self, completion, kind="thumbs", value="up", **more):
        return self.post("/v1/feedback", {"kind": kind, "completion_id": completion, "value": value, **more})

    def versions(self):
        """`GET /v1/versions`, as a list of records."""
        return items(self.get("/v1/versions").expect(200).json, "versions")

    def promote(self, version):
        return self.post(f"/v1/versions/{version}/promote")


def items(body, name):
    """A list that stands alone, under `data`, or under its own name."""
    if isinstance(body, list):
        return body
    return body.get("data", body.get(name, []))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# A tiny random model proves nothing to the gate, but these checks need a second version: the gate is opened for them.
OPEN_GATE = {
    "GYROSTAT_GATE__WIN_RATE": "-1",
    "GYROSTAT_GATE__OTHER_WIN_RATE": "0",
    "GYROSTAT_GATE__REFUSAL_MARGIN": "1",
    "GYROSTAT_GATE__KL_BUDGET": "1000",
    "GYROSTAT_GATE__LENGTH_RATIO": "[0, 1000]",
    "GYROSTAT_GATE__PERPLEXITY_RATIO": "1000",
    "GYROSTAT_GATE__JUDGE_ACCURACY": "0",
}


class Server(Client):
    """A `gyrostat serve` of our own. The same `home` started again finds the same data."""

    def __init__(self, binary, model, home, env=None, ready="/readyz"):
        self.ready = ready
        self.binary, self.model, self.home, self.env = binary, model, pathlib.Path(home), env or {}
        self.home.mkdir(parents=True, exist_ok=True)
        self.log = self.home / "server.log"
        self.process = None
        super().__init__("http://127.0.0.1:0")

    def start(self, seconds=120):
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        env = {
            **os.environ,
            "GYROSTAT_HTTP__BIND": f"127.0.0.1:{port}",
            "GYROSTAT_STORE__PATH": str(self.home / "data"),
            "GYROSTAT_POLICY__MODEL": str(self.model),
            "GYROSTAT_POLICY__DEVICE": "cpu",
            **self.env,
        }
        with open(self.log, "ab") as log:
            # In its own directory no configuration file is found: what runs are the defaults and `env`.
            self.process = subprocess.Popen([str(self.binary), "serve"], cwd=self.home, env=env, stdout=log, stderr=log)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise Failure(f"the server ended with {self.process.returncode} at its start:\n{self.tail()}")
            with contextlib.suppress(OSError):
                if self.get(self.ready).status == 200:
                    return self
            time.sleep(0.05)
        self.kill()
        raise Failure(f"not ready after {seconds} s:\n{self.tail()}")

    def tail(self, size=3000):
        return self.log.read_bytes()[-size:].decode("utf-8", "replace") if self.log.exists() else ""

    def alive(self):
        return self.process is not None and self.process.poll() is None

    def kill(self):
        """`kill -9`."""
        if self.alive():
            self.process.send_signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()

    def stop(self, seconds=30):
        """Asks it to end, and gives its exit status."""
        if not self.alive():
            return self.process.returncode if self.process else None
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise Failure(f"still running {seconds} s after SIGTERM") from None

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.kill()


@contextlib.contextmanager
def refusing_servers(args, home):
    """Two servers with reasons to refuse: one wants keys and lets one request wait, one has an upstream that is not there."""
    keys = '[{key="every",scopes=["chat","feedback","admin"]},{key="chat-only",scopes=["chat"]}]'
    strict = {"GYROSTAT_HTTP__KEYS": keys, "GYROSTAT_POLICY__QUEUE": "1", "GYROSTAT_POLICY__RUNNING": "1"}
    # Port 9 is discard; nothing listens there.
    orphan = {"GYROSTAT_UPSTREAM__URL": "http://127.0.0.1:9/v1", "GYROSTAT_UPSTREAM__MODEL": "m"}
    model, home = tiny_model(args), pathlib.Path(home)
    with Server(args.binary, model, home / "strict", strict) as one, Server(args.binary, model, home / "orphan", orphan, "/healthz") as other:
        yield one, other
        check(one.alive() and other.alive(), f"a server ended:\n{one.tail()}\n{other.tail()}")


def mixed_traffic(client, rounds=4, max_tokens=8):
    """Benign and harmful chats of several types with every simple kind of feedback; the ids of the completions."""
    judgements = itertools.cycle(
        [("thumbs", "up"), ("rating", 4), ("thumbs", "down"), ("behaviour", "copied"), ("flag", "wrongful_refusal"),
         ("demonstration", "The Volga, about 3,530 km long."), ("rating", 2), ("behaviour", "regenerated")]
    )
    ids = []
    for _ in range(rounds):
        for risk, prompts in (("benign", BENIGN), ("harmful", HARMFUL)):
            for interaction, prompt in prompts:
                answer = client.chat(prompt, interaction, max_tokens, metadata={"risk": risk}).expect(200)
                ids.append(answer.json["id"])
                kind, value = next(judgements)
                client.feedback(ids[-1], kind, value, rater="r1").expect(201)
    return ids


def wait_for_update(client, update, seconds=600):
    """The record of an update once it has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        record = client.get(f"/v1/updates/{update}").expect(200).json
        if record.get("state") == "ended":
            return record
        time.sleep(0.2)
    raise Failure(f"update {update} has not ended after {seconds} s: {record}")


def run_update(client, recipe="sft"):
    """Demonstrations, then one update by hand; its record. Whether it was promoted is for the caller to look at."""
    for interaction, prompt in BENIGN * 4:
        answer = client.chat(prompt, interaction).expect(200)
        client.feedback(answer.json["id"], "demonstration", f"Certainly. {prompt}").expect(201)
    started = client.post("/v1/updates", {"recipe": recipe, "interactions": []}).expect(200, 201, 202).json
    return wait_for_update(client, started["id"])


class Crowd:
    """Threads that repeat `work(client, number)` until told to stop. `failures` holds what they raised."""

    def __init__(self, client, workers, work):
        self.stopping, self.failures, self.done = threading.Event(), [], 0
        self.lock = threading.Lock()
        self.threads = [threading.Thread(target=self._run, args=(client, n, work), daemon=True) for n in range(workers)]

    def _run(self, client, number, work):
        while not self.stopping.is_set():
            try:
                work(client, number)
            except Exception as error:  # whatever it is, the caller decides what it means
                with self.lock:
                    self.failures.append(error)
                if self.stopping.wait(0.01):
                    return
            else:
                with self.lock:
                    self.done += 1

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        for thread in self.threads:
            thread.join(timeout=180)


def arguments(description):
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--binary", type=pathlib.Path, default=ROOT / "target/debug/gyrostat")
    parser.add_argument("--model", type=pathlib.Path, default=ROOT / "target/tiny", help="a model directory; made by `gyrostat model tiny` if absent")
    return parser


def tiny_model(args):
    """The model directory of `--model`, made now where it does not exist."""
    if not args.model.exists():
        subprocess.run([args.binary, "model", "tiny", "--out", args.model], check=True)
    return args.model.resolve()


@contextlib.contextmanager
def workspace():
    with tempfile.TemporaryDirectory(prefix="gyrostat-") as folder:
        yield pathlib.Path(folder)


def main(run, args):
    """Runs a script's body: exit status 0 and a closing line, or 1 and what was found."""
    name = pathlib.Path(sys.argv[0]).name
    started = time.monotonic()
    try:
        run(args)
    except Failure as failure:
        print(f"FAILED  {name}: {failure}", flush=True)
        sys.exit(1)
    print(f"passed  {name} in {time.monotonic() - started:.0f} s", flush=True)
