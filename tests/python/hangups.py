"""Clients that hang up leave nothing behind, and cost the others nothing.

Many streamed chats over many connections; a third of the clients close theirs somewhere in the middle. Afterwards no block
of keys and values is in use, nothing waits or runs, no connection is open, memory has not grown beyond the store's cache,
and every answer that was read to its end is complete and the same as alone.
"""

import http.client
import json
import math
import pathlib
import random
import re
import threading
import time
import urllib.parse

from harness import BENIGN, Server, arguments, check, main, step, tiny_model, workspace

MEGABYTE = 1 << 20
# The store's cache of pages fills up to its limit, and what was freed is not always given back to the system.
GROWTH = 128 * MEGABYTE


def body(number):
    prompt = f"{BENIGN[number % len(BENIGN)][1]} Case {number % 12}."
    return {"model": "default", "messages": [{"role": "user", "content": prompt}], "max_tokens": 48, "temperature": 0, "stream": True}


def connect(url, timeout=120):
    address = urllib.parse.urlsplit(url)
    return http.client.HTTPConnection(address.hostname, address.port, timeout=timeout)


def send(connection, number):
    connection.request("POST", "/v1/chat/completions", json.dumps(body(number)), {"content-type": "application/json"})
    response = connection.getresponse()
    check(response.status == 200, f"status {response.status}")
    return response


def whole(connection, number):
    """The text of an answer that is complete."""
    events = [line[6:].strip() for line in send(connection, number).read().splitlines() if line.startswith(b"data: ")]
    check(events and events[-1] == b"[DONE]", f"the stream broke off after {events[-1:]}")
    choices = [json.loads(event)["choices"][0] for event in events[:-1]]
    check(choices[-1]["finish_reason"] in ("stop", "length"), f"no finish reason: {choices[-1]}")
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def figures(server):
    """What the server holds, by its own metrics and the system's."""
    text = server.get("/metrics").expect(200).text
    value = lambda name: int(float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.M).group(1)))
    status = pathlib.Path(f"/proc/{server.process.pid}/status").read_text()
    return {
        "blocks in use": value('gyrostat_engine_cache_blocks{state="used"}'),
        "running": value("gyrostat_engine_running_sequences"),
        "waiting": value('gyrostat_queue_depth{queue="engine"}'),
        "open files": len(list(pathlib.Path(f"/proc/{server.process.pid}/fd").iterdir())),
        "resident MB": int(re.search(r"VmRSS:\s+(\d+)", status).group(1)) * 1024 // MEGABYTE,
    }


def settled(server, files=math.inf, seconds=30):
    """The figures once nothing runs any more and no more than so many files are open."""
    until = time.monotonic() + seconds
    while True:
        now = figures(server)
        if not (now["running"] or now["waiting"] or now["blocks in use"] or now["open files"] > files):
            return now
        check(time.monotonic() < until, f"{seconds} s after the last request: {now}")
        time.sleep(0.1)


def crowd(server, requests, connections):
    """Runs the requests; how many hung up, and the texts of the others by request."""
    numbers, lock, texts, failures, left = iter(range(requests)), threading.Lock(), {}, [], [0]

    def work(seed):
        chance, connection = random.Random(seed), connect(server.url)
        while True:
            with lock:
                number = next(numbers, None)
            if number is None or failures:
                break
            try:
                if number % 3 == 0:
                    response = send(connection, number)
                    for _ in range(chance.randrange(12)):
                        response.readline()
                    # Both halves of the connection, at once.
                    response.close()
                    connection.close()
                    connection = connect(server.url)
                    with lock:
                        left[0] += 1
                else:
                    text = whole(connection, number)
                    with lock:
                        texts[number] = text
            except Exception as error:  # the first is reported below
                with lock:
                    failures.append(f"request {number}: {error!r}")
        connection.close()

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check(not failures, f"{len(failures)} failures, the first: {failures[:1]}")
    return left[0], texts


def run(args):
    env = {"GYROSTAT_POLICY__CACHE_TOKENS": "4096"}
    with workspace() as home, Server(args.binary, tiny_model(args), home, env=env) as server:
        crowd(server, args.requests // 10, args.connections)
        before = settled(server)
        started = time.monotonic()
        left, texts = crowd(server, args.requests, args.connections)
        seconds = time.monotonic() - started
        after = settled(server, files=before["open files"] + 2)
        step(f"{args.requests} requests over {args.connections} connections in {seconds:.1f} s: {left} hung up, {len(texts)} complete")
        step(f"before {before}")
        step(f"after  {after}")
        check((after["resident MB"] - before["resident MB"]) * MEGABYTE < GROWTH, "memory grew")
        connection = connect(server.url)
        alone = {}
        for number, text in texts.items():
            kind = json.dumps(body(number))
            if kind not in alone:
                alone[kind] = whole(connection, number)
            check(text == alone[kind], f"request {number}: {text!r}, but alone {alone[kind]!r}")
        step(f"every complete answer is the one that is given alone ({len(alone)} different requests)")


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--connections", type=int, default=64)
    main(run, parser.parse_args())
