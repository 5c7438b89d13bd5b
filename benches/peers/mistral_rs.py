"""mistral.rs (PyPI: mistralrs): a round of speeds for each line on stdin, as one JSON object a line; tokens a second.

usage: python mistral_rs.py GGUF
"""

import json
import os
import sys
import threading
import time

from mistralrs import CompletionRequest, Runner, Which

folder, file = os.path.split(sys.argv[1])
runner = Runner(which=Which.GGUF(tok_model_id=None, quantized_model_id=folder, quantized_filename=file))


def completed(words, tokens, salt):
    """Tokens of the prompt and of the answer. Some answers end before their bound."""
    prompt = " ".join(f"word{(at * 7 + salt) % 100}" for at in range(words))
    request = CompletionRequest(model="d", prompt=prompt, max_tokens=tokens, temperature=0.0)
    usage = runner.send_completion_request(request).usage
    return usage.prompt_tokens, usage.completion_tokens


for round, _ in enumerate(sys.stdin):
    salt = 1 + 10 * round
    started = time.time()
    read, _ = completed(85, 1, salt)
    first = time.time() - started
    started = time.time()
    _, written = completed(85, 65, salt + 3)
    rest = time.time() - started - first
    answers = [0] * 8

    def stream(nth):
        answers[nth] = completed(11, 48, salt + 31 * nth)[1]

    threads = [threading.Thread(target=stream, args=(nth,)) for nth in range(8)]
    started = time.time()
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    eight = sum(answers) / (time.time() - started)
    print(json.dumps({"prefill": read / first, "one": (written - 1) / rest, "eight": eight}), flush=True)
