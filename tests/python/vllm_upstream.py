"""gyrostat before a real vLLM: streams pass unchanged and are recorded, adapters are pushed and swapped under load.

Not part of the CI: it needs an installed vLLM with LoRA support and a Llama model as a Hugging Face directory, both named
on the command line. Without them it says so and ends well. On a CPU it takes about ten minutes.

    python3 tests/python/vllm_upstream.py --vllm VENV/bin/vllm --model HF_DIR [--binary target/release/gyrostat]
"""

import argparse
import array
import collections
import contextlib
import hashlib
import json
import os
import pathlib
import random
import signal
import struct
import subprocess
import sys
import threading
import time
import urllib.request

from harness import ROOT, Client, Crowd, Failure, Server, check, free_port, main, step, workspace

NAME = "smol"
RANK = 8
TOPICS = ["rivers", "bread", "clocks", "bees", "bridges", "snow", "chess", "tea", "stars", "maps"]
ASKS = ["Tell me one fact about {}.", "Why do people like {}?", "Write a short line on {}.", "What are {} good for?", "Name three words for {}.",
        "Explain {} to a child.", "Is there anything odd about {}?", "Give me a tip about {}.", "Who first thought of {}?", "Describe {} in one sentence."]
PROMPTS = [ask.format(topic) for topic in TOPICS for ask in ASKS]


def chat(prompt, model, tokens=24, **more):
    return {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "temperature": 0, **more}


def streamed(client, body):
    """One streamed chat read to its end: headers, id and text."""
    data = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    request = urllib.request.Request(client.url + "/v1/chat/completions", data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=client.timeout) as response:
        lines = [line.decode().strip() for line in response]
        headers = response.headers
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    check(bool(events) and events[-1] == "[DONE]", f"the stream broke off: {events[-1:]}")
    chunks = [json.loads(event) for event in events[:-1]]
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    return headers, chunks[0]["id"], text


def adapter(model, seed, folder):
    """A seeded random LoRA on every query and value projection, as PEFT writes it."""
    config = json.loads((model / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    out = {"q_proj": hidden, "v_proj": hidden // heads * config["num_key_value_heads"]}
    draw, tensors, blob = random.Random(seed), {}, bytearray()

    def tensor(name, rows, columns, scale):
        values = array.array("f", (draw.gauss(0, scale) for _ in range(rows * columns)))
        tensors[name] = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [len(blob), len(blob) + 4 * len(values)]}
        blob.extend(values.tobytes())

    for layer in range(config["num_hidden_layers"]):
        for projection, rows in out.items():
            place = f"base_model.model.model.layers.{layer}.self_attn.{projection}"
            tensor(f"{place}.lora_A.weight", RANK, hidden, hidden**-0.5)
            tensor(f"{place}.lora_B.weight", rows, RANK, 0.05)
    head = json.dumps(tensors).encode()
    head += b" " * (-len(head) % 8)
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + blob)
    peft = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(model), "r": RANK, "lora_alpha": 2 * RANK,
            "lora_dropout": 0.0, "bias": "none", "target_modules": list(out), "fan_in_fan_out": False, "inference_mode": True,
            "use_rslora": False, "use_dora": False, "modules_to_save": None}
    (folder / "adapter_config.json").write_text(json.dumps(peft))


def stage(model, home, version):
    """A version as the registry keeps it on disk, waiting for its promotion."""
    folder = home / "data" / "versions" / f"v{version:04}"
    adapter(model, version, folder)
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    record = {"format": 1, "version": version, "created_at": int(time.time() * 1000), "parent": 0, "update": None, "note": "random",
              "files": files, "gate": None, "rejected_at": None}
    (folder / "version.json").write_text(json.dumps(record))


@contextlib.contextmanager
def vllm(args, home):
    port = free_port()
    env = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [str(args.vllm), "serve", str(args.model), "--served-model-name", NAME, "--enable-lora", "--max-loras", "2",
               "--max-cpu-loras", "4", "--max-lora-rank", str(RANK), "--max-model-len", "1024", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    with open(home / "vllm.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=home, start_new_session=True)
    client = Client(f"http://127.0.0.1:{port}", timeout=600)
    try:
        until = time.monotonic() + args.patience
        while time.monotonic() < until:
            check(process.poll() is None, f"vLLM ended:\n{(home / 'vllm.log').read_text(errors='replace')[-3000:]}")
            with contextlib.suppress(OSError):
                if client.get("/health").status == 200:
                    break
            time.sleep(1)
        else:
            raise Failure(f"vLLM is not ready after {args.patience} s")
        yield client
    finally:
        # The server and the workers that it has started.
        for signal_of_end in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal_of_end)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)


def streams(direct, server):
    """100 streamed chats: the same text as directly, each one recorded and open to feedback by vLLM's own id."""
    texts = {}
    for prompt in PROMPTS:
        _, _, wanted = streamed(direct, chat(prompt, NAME))
        headers, answer, text = streamed(server, chat(prompt, NAME))
        check(text == wanted, f"{prompt!r}: {text!r} is not {wanted!r}")
        check(headers["x-gyrostat-version"] == "v0" and headers["x-gyrostat-completion"], f"{headers}")
        server.feedback(answer, value="up").expect(201)
        texts[prompt] = text
    step(f"{len(texts)} streamed chats have the text of a direct call, and take feedback by vLLM's id")
    return texts


def load(server, seen, lock):
    def work(client, number):
        prompt = random.choice(PROMPTS[:20])
        if number % 2:
            headers, _, text = streamed(client, chat(prompt, random.choice([NAME, "default"]), tokens=12))
            version = headers["x-gyrostat-version"]
        else:
            answer = client.post("/v1/chat/completions", chat(prompt, NAME, tokens=12)).expect(200)
            version, text = answer.headers["x-gyrostat-version"], answer.json["choices"][0]["message"]["content"]
        with lock:
            seen.append((version, prompt, text))

    return work


def swaps(args, direct, server):
    """Two versions pushed, used, and swapped under load; every answer is the one of the version that it names."""
    for version in (1, 2):
        server.promote(version).expect(200)
    names = {"v0": NAME}
    for card in direct.get("/v1/models").expect(200).json["data"]:
        if card.get("parent"):
            names[card["id"].split("-")[1]] = card["id"]
    check(set(names) == {"v0", "v1", "v2"}, f"vLLM has {names}")
    expected = {version: {prompt: streamed(direct, chat(prompt, name, tokens=12))[2] for prompt in PROMPTS[:20]} for version, name in names.items()}
    pairs = [("v0", "v1"), ("v1", "v2"), ("v0", "v2")]
    differ = {pair: sum(expected[pair[0]][p] != expected[pair[1]][p] for p in PROMPTS[:20]) for pair in pairs}
    check(all(differ.values()), f"the versions answer alike: {differ}")
    step(f"pushed as {names['v1']} and {names['v2']}; of 20 greedy answers {list(differ.values())} differ between {pairs}")
    # The base model is left out while there is load: in a batch that holds rows of an adapter too, vLLM 0.32 on a CPU indexes the
    # adapters' weights by -1 for the base model's rows (its torch_ops), and their answers are sometimes others.
    seen, lock, flips = [], threading.Lock(), 0
    with Crowd(server, args.clients, load(server, seen, lock)) as crowd:
        until = time.monotonic() + args.seconds
        while time.monotonic() < until:
            version = (1, 2)[flips % 2]
            server.promote(version).expect(200)
            flips += 1
            time.sleep(args.pause)
    check(not crowd.failures, f"{len(crowd.failures)} requests failed, the first: {crowd.failures[:1]}")
    wrong = [(v, p, t, expected[v][p]) for v, p, t in seen if t != expected[v][p]]
    mixed = [entry for entry in wrong if any(entry[2] == expected[v][entry[1]] for v in expected)]
    counts = collections.Counter(version for version, _, _ in seen)
    check(not wrong, f"{len(wrong)} of {len(seen)} answers are not their version's, {len(mixed)} are another's: {wrong[:3]}")
    check(set(counts) == {"v1", "v2"}, f"not every version answered: {counts}")
    server.promote(0).expect(200)
    for prompt in PROMPTS[:20]:
        text = streamed(server, chat(prompt, NAME, tokens=12))[2]
        check(text == expected["v0"][prompt], f"back at the base model: {text!r} is not {expected['v0'][prompt]!r}")
    step(f"{len(seen)} answers under {flips} flips: {dict(counts)}; none failed, none mixed; the base model answers as before")
    return len(seen) + 20


def wait_recorded(server, given):
    """No answer waits for being recorded, so that the last ones may be on their way."""
    until = time.monotonic() + 10
    while True:
        page = server.get("/metrics").expect(200).text
        counts = [line for line in page.splitlines() if line.startswith("gyrostat_completions_total{") and ("stop" in line or "length" in line)]
        total = sum(float(line.split()[-1]) for line in counts)
        if total == given:
            return
        check(total < given and time.monotonic() < until, f"{total} answers were recorded, {given} given")
        time.sleep(0.05)


def recorded(args, home, texts, more):
    """What the store has, by the program's own export."""
    out = home / "unpaired.jsonl"
    env = {**os.environ, "GYROSTAT_STORE__PATH": str(home / "data")}
    subprocess.run([str(args.binary.resolve()), "export", "unpaired", "--out", str(out)], check=True, env=env, cwd=home)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    kept = {row["prompt"][-1]["content"]: row["completion"][0]["content"] for row in rows}
    check(kept == texts, f"{len(kept)} of {len(texts)} judged chats are in the store as they were")
    step(f"all {len(kept)} are in the store with their text, {more} more answers were recorded")


def run(args):
    if not (args.vllm and args.vllm.exists() and args.model and (args.model / "config.json").exists()):
        print("skipped: --vllm and --model have to name a vLLM executable and a Hugging Face directory")
        return
    args.model = args.model.resolve()
    with workspace() as home, vllm(args, home) as direct:
        step("vLLM answers")
        for version in (1, 2):
            stage(args.model, home, version)
        # No local copy of the weights: serving, sensing and swapping do without.
        server = Server(args.binary, "default", home, env={"GYROSTAT_UPSTREAM__URL": direct.url + "/v1"})
        server.timeout = 600
        with server:
            texts = streams(direct, server)
            swapped = swaps(args, direct, server)
            wait_recorded(server, len(texts) + swapped)
            check(server.stop() == 0, "the server did not end well")
        recorded(args, home, texts, swapped)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binary", type=pathlib.Path, default=ROOT / "target/debug/gyrostat")
    parser.add_argument("--vllm", type=pathlib.Path)
    parser.add_argument("--model", type=pathlib.Path)
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--pause", type=float, default=3, help="seconds between two flips")
    parser.add_argument("--patience", type=float, default=600, help="seconds that vLLM may take to start")
    arguments = parser.parse_args()
    sys.exit(main(run, arguments))
