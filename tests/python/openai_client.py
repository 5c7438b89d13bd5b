"""The official `openai` client, unchanged, against `gyrostat serve`.

    pip install openai
    python tests/python/openai_client.py [--url http://127.0.0.1:8088]
"""

import concurrent.futures
import json
import math
import time
import urllib.request

import openai

from harness import Server, arguments, check, main, refusing_servers, step, tiny_model, workspace

USER = [{"role": "user", "content": "Name three rivers of Europe."}]


def expect_error(kind, call, param=None, code=None, mentions=None):
    """`call` raises exactly `kind`, with OpenAI's fields filled in."""
    try:
        call()
    except openai.APIStatusError as error:
        check(type(error) is kind, f"expected {kind.__name__}, got {type(error).__name__}: {error}")
        check(bool(error.body and error.body.get("message")), f"no message in {error.body}")
        check(bool(error.type), f"no type in {error.body}")
        check(param is None or error.param == param, f"expected param {param!r}, got {error.param!r}: {error}")
        check(code is None or error.code == code, f"expected code {code!r}, got {error.code!r}: {error}")
        check(mentions is None or mentions in str(error), f"{mentions!r} is not in {error}")
        return error
    check(False, f"expected {kind.__name__}, nothing was raised")


def models(client, model):
    listed = client.models.list().data
    check(any(entry.id == model for entry in listed), f"{model} is not among {listed}")
    check(all(entry.object == "model" and entry.created >= 0 for entry in listed), f"{listed}")
    step("models.list")


def chat(client, model):
    answer = client.chat.completions.create(model=model, messages=USER, max_tokens=12)
    choice = answer.choices[0]
    check(answer.object == "chat.completion" and answer.id and answer.created > 0, f"{answer}")
    check(choice.index == 0 and choice.message.role == "assistant" and choice.message.content is not None, f"{choice}")
    check(choice.finish_reason in ("stop", "length"), f"{choice}")
    usage = answer.usage
    check(usage.prompt_tokens > 0 and 0 < usage.completion_tokens <= 12, f"{usage}")
    check(usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, f"{usage}")
    if choice.finish_reason == "length":
        check(usage.completion_tokens == 12, f"cut off by length at {usage.completion_tokens} tokens of 12")
    raw = client.chat.completions.with_raw_response.create(model="default", messages=USER, max_tokens=2)
    check(raw.headers.get("x-gyrostat-version") is not None, "no x-gyrostat-version header")
    newer = client.chat.completions.create(model=model, messages=USER, max_completion_tokens=3)
    check(newer.usage.completion_tokens <= 3, f"max_completion_tokens is not kept: {newer.usage}")
    conversation = [{"role": "system", "content": "Be brief."}, *USER, {"role": "assistant", "content": "Rhine."}, {"role": "user", "content": [{"type": "text", "text": "And two more?"}]}]
    parts = client.chat.completions.create(model=model, messages=conversation, max_tokens=2)
    check(parts.usage.prompt_tokens > usage.prompt_tokens, "a longer conversation has no more tokens")
    step("chat: shape, usage, limits, model alias, version header, content parts")


def greedy(client, model):
    texts = {client.chat.completions.create(model=model, messages=USER, max_tokens=12, temperature=0).choices[0].message.content for _ in range(3)}
    check(len(texts) == 1, f"temperature 0 gave {len(texts)} answers")
    step("temperature 0 is deterministic")


def streams(client, model):
    settings = dict(model=model, messages=USER, max_tokens=12, temperature=0)
    whole = client.chat.completions.create(**settings)
    chunks = list(client.chat.completions.create(**settings, stream=True))
    check(len({(c.id, c.created, c.model) for c in chunks}) == 1, "id, created or model differ between chunks")
    check(all(c.object == "chat.completion.chunk" for c in chunks), "wrong object")
    check(chunks[0].choices[0].delta.role == "assistant", f"first delta: {chunks[0]}")
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    check(text == whole.choices[0].message.content, f"stream {text!r} is not {whole.choices[0].message.content!r}")
    finish = [c.choices[0].finish_reason for c in chunks if c.choices]
    check(finish[-1] == whole.choices[0].finish_reason and not any(finish[:-1]), f"finish reasons {finish}")
    check(all(c.usage is None for c in chunks), "usage came unasked")

    counted = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    check(counted[-1].choices == [] and counted[-1].usage == whole.usage, f"last chunk {counted[-1]}, usage {whole.usage}")
    check(all(c.usage is None for c in counted[:-1]), "usage before the last chunk")

    with client.chat.completions.create(**settings | {"max_tokens": 200}, stream=True) as stream:
        next(iter(stream))
    check(client.chat.completions.create(**settings).choices[0].message.content == text, "a stream that was hung up changed the next answer")
    step("streams: chunks, include_usage, the same text as without, a client that hangs up")


def check_logprobs(content, usage, top):
    check(len(content) == usage.completion_tokens, f"{len(content)} log-probs for {usage.completion_tokens} tokens")
    for entry in content:
        check(entry.logprob <= 1e-4 and not math.isnan(entry.logprob), f"{entry}")
        check(len(entry.top_logprobs) == top, f"{len(entry.top_logprobs)} alternatives, {top} asked for")
        values = [t.logprob for t in entry.top_logprobs]
        check(values == sorted(values, reverse=True), f"alternatives out of order: {values}")
        check(sum(math.exp(v) for v in values) <= 1.001, f"probabilities sum to more than 1: {values}")
        if top:
            check(abs(values[0] - entry.logprob) < 1e-3, f"at temperature 0 the likeliest token is taken: {entry}")


def logprobs(client, model):
    settings = dict(model=model, messages=USER, max_tokens=8, temperature=0, logprobs=True)
    answer = client.chat.completions.create(**settings, top_logprobs=5)
    check_logprobs(answer.choices[0].logprobs.content, answer.usage, 5)
    bare = client.chat.completions.create(**settings)
    check_logprobs(bare.choices[0].logprobs.content, bare.usage, 0)
    chunks = list(client.chat.completions.create(**settings, top_logprobs=5, stream=True))
    streamed = [e for c in chunks if c.choices and c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    pairs = [(e.token, round(e.logprob, 3)) for e in streamed], [(e.token, round(e.logprob, 3)) for e in answer.choices[0].logprobs.content]
    check(pairs[0] == pairs[1], f"streamed {pairs[0]}, whole {pairs[1]}")
    check(client.chat.completions.create(model=model, messages=USER, max_tokens=2).choices[0].logprobs is None, "log-probs came unasked")
    step("logprobs and top_logprobs, streamed as well")


def several(client, model):
    answer = client.chat.completions.create(model=model, messages=USER, max_tokens=10, n=3, temperature=1, seed=11)
    check([c.index for c in answer.choices] == [0, 1, 2], f"{answer.choices}")
    check(len({c.message.content for c in answer.choices}) == 3, "answers of n=3 are the same")
    check(10 <= answer.usage.completion_tokens <= 30 or any(c.finish_reason == "stop" for c in answer.choices), f"{answer.usage}")
    chunks = list(client.chat.completions.create(model=model, messages=USER, max_tokens=10, n=3, temperature=1, seed=11, stream=True))
    for index, choice in enumerate(answer.choices):
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices and c.choices[0].index == index)
        check(text == choice.message.content, f"choice {index}: stream {text!r} is not {choice.message.content!r}")
    step("n=3, streamed as well")


def seeds(client, model):
    def sample(seed):
        return client.chat.completions.create(model=model, messages=USER, max_tokens=16, temperature=1, top_p=0.95, seed=seed).choices[0].message.content

    check(sample(7) == sample(7), "one seed gave two answers")
    check(len({sample(seed) for seed in range(5)}) > 1, "five seeds gave one answer")
    step("seed")


def stops(client, model):
    settings = dict(model=model, messages=USER, max_tokens=16, temperature=0)
    text = client.chat.completions.create(**settings).choices[0].message.content
    # Any piece of the answer will do, but not its very beginning.
    stop = next((text[i : i + 2] for i in range(2, len(text) - 2) if text[i : i + 2].isascii() and text.find(text[i : i + 2]) >= 1), None)
    check(stop is not None, f"nothing to stop at in {text!r}")
    cut = client.chat.completions.create(**settings, stop=[stop]).choices[0]
    check(cut.message.content == text[: text.find(stop)], f"stop {stop!r}: {cut.message.content!r} of {text!r}")
    check(cut.finish_reason == "stop", f"{cut.finish_reason}")
    step("stop")


def text_completions(client, model):
    answer = client.completions.create(model=model, prompt="The longest river of Europe", max_tokens=8, temperature=0)
    choice = answer.choices[0]
    check(answer.object == "text_completion" and isinstance(choice.text, str), f"{answer}")
    check(answer.usage.completion_tokens <= 8 and choice.finish_reason in ("stop", "length"), f"{answer}")
    streamed = "".join(c.choices[0].text for c in client.completions.create(model=model, prompt="The longest river of Europe", max_tokens=8, temperature=0, stream=True) if c.choices)
    check(streamed == choice.text, f"stream {streamed!r} is not {choice.text!r}")
    step("text completions")


def errors(client, model):
    def create(**changes):
        return lambda: client.chat.completions.create(**{"model": model, "messages": USER, "max_tokens": 4} | changes)

    expect_error(openai.NotFoundError, create(model="no-such-model"), code="model_not_found", mentions="no-such-model")
    bad = openai.BadRequestError
    for param, value in [("temperature", 3), ("temperature", -0.1), ("temperature", "warm"), ("top_p", 1.5), ("n", 0), ("max_tokens", -1), ("messages", []), ("messages", "hello"),
                         ("top_logprobs", 21), ("stop", ["a"] * 5), ("stream", "yes"), ("seed", "one")]:
        more = {"logprobs": True} if param == "top_logprobs" else {}
        expect_error(bad, create(**{param: value}, **more), param=param)
    expect_error(bad, create(top_logprobs=3), param="top_logprobs")
    expect_error(bad, create(messages=[{"role": "wizard", "content": "x"}]))
    expect_error(bad, create(messages=[{"role": "user"}]))
    expect_error(bad, create(extra_body={"metadata": {"interaction": 5}}))
    expect_error(bad, create(max_tokens=10_000_000), code="context_length_exceeded")
    expect_error(bad, create(messages=[{"role": "user", "content": "river " * 100_000}]), code="context_length_exceeded")
    expect_error(bad, create(stream=True, temperature=9), param="temperature")
    check(client.chat.completions.create(model=model, messages=USER, max_tokens=2).choices, "no answer after all these errors")
    step("typed errors with param and code")


def refusals(strict, orphan):
    """Every class of error that the client has: `strict` wants keys and queues one request, `orphan` has an upstream that is not there."""
    def client(url, key, **more):
        return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, **{"timeout": 60} | more)

    every, chat_only = client(strict, "every"), client(strict, "chat-only")
    model = every.models.list().data[0].id
    ask = lambda who, **more: who.chat.completions.create(**{"model": model, "messages": USER, "max_tokens": 2} | more)
    expect_error(openai.AuthenticationError, lambda: ask(client(strict, "wrong")), code="invalid_api_key")
    expect_error(openai.PermissionDeniedError, lambda: chat_only.get("/updates", cast_to=object), code="insufficient_scope", mentions="admin")
    expect_error(openai.NotFoundError, lambda: every.get("/nowhere", cast_to=object), code="unknown_url")
    about = {"completion_id": ask(every).id, "kind": "rating"}
    expect_error(openai.UnprocessableEntityError, lambda: every.post("/feedback", body=about | {"value": 6}, cast_to=object), param="value")
    every.post("/updates", body={"recipe": "sft"}, cast_to=object)
    expect_error(openai.ConflictError, lambda: [every.post("/updates", body={"recipe": "sft"}, cast_to=object) for _ in range(2)], code="conflict")
    large = expect_error(openai.APIStatusError, lambda: ask(every, messages=[{"role": "user", "content": "x" * 2_000_000}]), code="request_too_large")
    check(large.status_code == 413, f"{large}")

    never = {"max_tokens": 400, "logit_bias": {"2": -100}, "stream": True}
    with concurrent.futures.ThreadPoolExecutor(6) as crowd:
        held = [crowd.submit(lambda: [*ask(every, **never)]) for _ in range(6)]
        limited = [task.exception() for task in held if task.exception()]
    check(limited and all(type(error) is openai.RateLimitError for error in limited), f"{limited}")
    check(all(int(error.response.headers["retry-after"]) >= 1 for error in limited), "no Retry-After")

    expect_error(openai.InternalServerError, lambda: ask(client(orphan, "unused")), code="upstream_unreachable")
    for kind, call in [
        (openai.APITimeoutError, lambda: ask(client(strict, "every", timeout=0.001))),
        (openai.APIConnectionError, lambda: ask(client("http://127.0.0.1:9", "unused"))),
    ]:
        try:
            call()
        except openai.APIConnectionError as error:
            check(type(error) is kind, f"expected {kind.__name__}, got {type(error).__name__}")
        else:
            check(False, f"no {kind.__name__}")
    step(f"errors of every class: 400 401 403 404 409 413 422 429 ({len(limited)} of 6) 502, timeout, no connection")


def run(args):
    with workspace() as home:
        if args.url:
            everything(args.url)
        else:
            with refusing_servers(args, home) as (strict, orphan):
                refusals(strict.url, orphan.url)
            with Server(args.binary, tiny_model(args), home) as server:
                everything(server.url)
                check(server.alive(), f"the server ended:\n{server.tail()}")


def json_answers(client, model):
    """Random weights babble, so what has the form has it from the mask."""
    schema = {
        "type": "object", "additionalProperties": False, "required": ["colour", "count"],
        "properties": {"colour": {"enum": ["red", "green"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    }
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    ended = 0
    for seed in range(12):
        choice = client.chat.completions.create(model=model, messages=USER, max_tokens=200, seed=seed, response_format=form).choices[0]
        if choice.finish_reason == "stop":
            value = json.loads(choice.message.content)
            check(set(value) == {"colour", "count"} and value["colour"] in ("red", "green") and 0 <= value["count"] <= 99, f"{value}")
            ended += 1
    check(ended > 0, "no answer ended by itself")
    choice = client.chat.completions.create(model=model, messages=USER, max_tokens=40, seed=1, response_format={"type": "json_object"}).choices[0]
    check(choice.message.content.lstrip().startswith("{"), f"{choice}")
    bad = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "dragon"}}}
    expect_error(openai.BadRequestError, lambda: client.chat.completions.create(model=model, messages=USER, response_format=bad), mentions="schema")
    step(f"json_schema and json_object: {ended} of 12 answers ended by themselves, all of the form")


def seeds_in_company(client, model):
    """A seed gives the same answer alone and amid other requests."""
    def sample(seed):
        return client.chat.completions.create(model=model, messages=USER, max_tokens=24, seed=seed).choices[0].message.content

    alone = sample(7)
    with concurrent.futures.ThreadPoolExecutor(8) as crowd:
        others = [crowd.submit(sample, seed) for seed in range(100, 120)]
        amid = crowd.submit(sample, 7).result()
        for other in others:
            other.result()
    check(amid == alone, f"alone {alone!r}, in company {amid!r}")
    step("a seed amid twenty other requests")


def cancellation(client, model):
    """A stream that its client closes ends at the server, too."""
    root = str(client.base_url).removesuffix("v1/")
    cancelled = lambda: sum(
        float(line.rsplit(" ", 1)[1])
        for line in urllib.request.urlopen(root + "metrics").read().decode().splitlines()
        if line.startswith("gyrostat_completions_total") and 'outcome="cancelled"' in line
    )
    before = cancelled()
    stream = client.chat.completions.create(model=model, messages=USER, max_tokens=400, stream=True, extra_body={"logit_bias": {"2": -100}})
    next(iter(stream))
    stream.close()
    until = time.monotonic() + 20
    while cancelled() == before:
        check(time.monotonic() < until, "the cancelled stream was never counted")
        time.sleep(0.05)
    step("a cancelled stream is counted as cancelled")


def everything(url):
    # Retries would hide a failure.
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=300)
    model = client.models.list().data[0].id
    for part in (models, chat, greedy, streams, logprobs, several, seeds, stops, text_completions, json_answers, seeds_in_company, cancellation, errors):
        part(client, model)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--url", help="a running server; one is started if absent")
    main(run, parser.parse_args())
