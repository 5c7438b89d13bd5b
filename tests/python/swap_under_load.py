"""Versions promoted back and forth under load: no request fails, and every version answers.

Streams run beside plain requests, because an answer that began under one version has to end under it.
"""

import collections
import json
import random
import threading
import time
import urllib.request

from harness import OPEN_GATE, BENIGN, Crowd, Server, arguments, check, main, run_update, step, tiny_model, workspace


class Tally:
    """Seconds per request, and how often each version answered."""

    def __init__(self):
        self.lock, self.seconds, self.versions = threading.Lock(), [], collections.Counter()

    def add(self, version, seconds):
        with self.lock:
            self.versions[version] += 1
            self.seconds.append(seconds)

    def quantile(self, q):
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def stream(client, prompt):
    """One streamed chat, read to its end; the version that answered."""
    body = {"model": "default", "messages": [{"role": "user", "content": prompt}], "max_tokens": 24, "stream": True}
    request = urllib.request.Request(client.url + "/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=client.timeout) as response:
        lines = [line.decode().strip() for line in response]
        version = int(response.headers["x-gyrostat-version"].lstrip("v"))
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    check(bool(data) and data[-1] == "[DONE]", f"the stream broke off after {data[-1:]}")
    chunks = [json.loads(item) for item in data[:-1]]
    check(not any("error" in chunk for chunk in chunks), f"an error in the stream: {chunks[-1]}")
    check(chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length"), f"no finish reason: {chunks[-1]}")
    return version


def ask(tally):
    def work(client, number):
        interaction, prompt = random.choice(BENIGN)
        started = time.monotonic()
        if number % 2:
            version = stream(client, prompt)
        else:
            answer = client.chat(prompt, interaction, max_tokens=24).expect(200)
            check(answer.json["choices"][0]["finish_reason"] in ("stop", "length"), f"{answer.text[:200]}")
            version = answer.version
        tally.add(version, time.monotonic() - started)

    return work


def run(args):
    with workspace() as home, Server(args.binary, tiny_model(args), home, env=OPEN_GATE) as server:
        outcome = run_update(server)["outcome"]
        versions = sorted(r["version"] for r in server.versions() if r["state"] != "rejected")
        step(f"update: {outcome}; versions {versions}")
        check(len(versions) > 1, "there is no second version to swap with")
        tally, swaps, slowest = Tally(), 0, 0.0
        with Crowd(server, args.clients, ask(tally)) as crowd:
            until = time.monotonic() + args.seconds
            while time.monotonic() < until:
                version = versions[swaps % len(versions)]
                started = time.monotonic()
                server.promote(version).expect(200)
                slowest = max(slowest, time.monotonic() - started)
                swaps += 1
                # A request that arrives after the promotion was acknowledged is answered by the new version.
                seen = server.chat("Which version is this?", max_tokens=1).expect(200).version
                check(seen == version, f"v{version} was promoted, v{seen} answered the next request")
                time.sleep(args.pause)
        check(not crowd.failures, f"{len(crowd.failures)} of {crowd.done + len(crowd.failures)} requests failed, the first: {crowd.failures[:1]}")
        check(set(versions) <= set(tally.versions), f"versions {versions}, answered by {dict(tally.versions)}")
        check(server.alive(), f"the server ended:\n{server.tail()}")
        shares = ", ".join(f"v{version} {count}" for version, count in sorted(tally.versions.items()))
        step(f"{crowd.done} requests, {swaps} swaps, 0 failures ({shares}); p50 {tally.quantile(0.5):.3f} s, p99 {tally.quantile(0.99):.3f} s, slowest swap {slowest:.3f} s")


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--pause", type=float, default=0.1, help="seconds between two swaps")
    main(run, parser.parse_args())
