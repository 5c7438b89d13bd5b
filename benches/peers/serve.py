"""Serving, side by side: gyrostat and its peers by turns in one run, medians.

usage: python serve.py --gyrostat BIN --gguf F [--llama DIR] [--mistral PYTHON] [--vllm PYTHON --float DIR] [--turns 3]

`--llama` is a folder with node-llama-cpp installed, `--mistral` and `--vllm` are the Pythons of environments with those packages, `--float` is the
same model dequantised. The same token ids go to gyrostat, llama.cpp and vLLM; mistral.rs takes text only, about as long.
"""

import argparse
import json
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import threading
import time
import urllib.request

HERE = pathlib.Path(__file__).parent


class Child:
    """A peer in a process of its own, which measures a round for each line that it reads."""

    def __init__(self, command, folder=None):
        self.process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            start_new_session=True,
        )

    def measure(self, _):
        self.process.stdin.write("round\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.process.args[0]} ended")

    def end(self):
        self.process.stdin.close()
        self.process.wait(60)


class Gyrostat:
    """A fresh process a turn: its peak is its own."""

    def __init__(self, binary, model):
        self.process = None
        self.command, self.model = [binary, "bench", "serve", "--rounds", "1", "--json"], model

    def measure(self, _):
        child = subprocess.Popen(
            self.command, stdout=subprocess.PIPE, env={**os.environ, "GYROSTAT_POLICY__MODEL": self.model}
        )
        out = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        figures = json.loads(out)
        speeds = {"prefill": "prefill_256", "one": "decode_1_stream", "eight": "decode_8_streams"}
        return {key: figures[f"{name}_tokens_per_second"] for key, name in speeds.items()} | {
            "peak": usage.ru_maxrss / 1024
        }

    def end(self):
        pass


class Vllm:
    def __init__(self, python, folder, port=8137):
        self.url = f"http://127.0.0.1:{port}"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--served-model-name", "m"]
        command += ["--max-model-len", "1024", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        for _ in range(300):
            try:
                urllib.request.urlopen(self.url + "/health", timeout=2)
                break
            except OSError:
                time.sleep(1)
        self.measure(90)

    def completed(self, length, tokens, salt):
        ids = [100 + (at * 7 + salt * 131) % 3000 for at in range(length)]
        body = {"model": "m", "prompt": ids, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            self.url + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        return json.load(urllib.request.urlopen(request, timeout=300))["usage"]["completion_tokens"]

    def measure(self, round):
        salt = 1 + 10 * round
        started = time.time()
        self.completed(256, 1, salt)
        first = time.time() - started
        started = time.time()
        self.completed(256, 129, salt + 9)
        rest = time.time() - started - first
        threads = [threading.Thread(target=self.completed, args=(32, 96, salt + nth)) for nth in range(1, 9)]
        started = time.time()
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        return {"prefill": 256 / first, "one": 128 / rest, "eight": 8 * 96 / (time.time() - started)}

    def end(self):
        self.process.terminate()
        self.process.wait(60)


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--gyrostat", required=True)
    options.add_argument("--gguf", required=True)
    for peer in ("llama", "mistral", "vllm", "float"):
        options.add_argument(f"--{peer}")
    options.add_argument("--turns", type=int, default=3)
    given = options.parse_args()
    runners = {"gyrostat": Gyrostat(given.gyrostat, given.gguf)}
    if given.llama:
        script = shutil.copy(HERE / "llama_cpp.mjs", given.llama)
        runners["llama.cpp"] = Child(["node", os.path.basename(script), given.gguf], given.llama)
    if given.mistral:
        runners["mistral.rs"] = Child([given.mistral, str(HERE / "mistral_rs.py"), given.gguf])
    if given.vllm:
        runners["vLLM f32"] = Vllm(given.vllm, given.float)
    for runner in runners.values():
        wake(runner.process, False)
    measured = {name: [] for name in runners}
    try:
        for round in range(given.turns):
            for name, runner in runners.items():
                wake(runner.process, True)
                figures = runner.measure(round)
                wake(runner.process, False)
                measured[name].append(figures)
                print(round, name, {key: round_(value) for key, value in figures.items()}, flush=True)
    finally:
        for runner in runners.values():
            wake(runner.process, True)
            runner.end()
    print(f"\n{'median':12}{'prefill':>10}{'one':>10}{'eight':>10}{'peak MiB':>10}")
    for name, rounds in measured.items():
        middle = {key: statistics.median(figures[key] for figures in rounds) for key in rounds[0]}
        cells = [f"{middle[key]:10.1f}" if key in middle else f"{'-':>10}" for key in ("prefill", "one", "eight", "peak")]
        print(f"{name:12}" + "".join(cells))


def wake(process, awake):
    """Whose turn it is not, is stopped: some peers spin while they wait."""
    if process:
        os.killpg(process.pid, signal.SIGCONT if awake else signal.SIGSTOP)


def round_(value):
    return round(value, 1)


if __name__ == "__main__":
    main()
