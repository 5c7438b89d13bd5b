"""The official clients of TensorZero and Langfuse, unchanged: their feedback lands here.

    pip install tensorzero langfuse
    python tests/python/feedback_clients.py
"""

import json
import logging
import re
import urllib.request
import uuid

from langfuse import Langfuse
from tensorzero import TensorZeroError, TensorZeroGateway

from harness import arguments, check, main, refusing_servers, step, workspace


def fetched(url, body=None):
    headers = {"authorization": "Bearer every", "content-type": "application/json"}
    request = urllib.request.Request(url, body and json.dumps(body).encode(), headers)
    return urllib.request.urlopen(request, timeout=60).read().decode()


def answered(url):
    """The id of an answer."""
    body = {"model": "default", "messages": [{"role": "user", "content": "Name a river."}], "max_tokens": 2}
    return json.loads(fetched(f"{url}/v1/chat/completions", body))["id"]


def counted(url):
    """Judgements by kind, as /metrics has them."""
    found = re.findall(r'^gyrostat_feedback_total\{kind="(\w+)",source="human"\} (\d+)', fetched(f"{url}/metrics"), re.M)
    return {kind: int(count) for kind, count in found}


def tensorzero(url, completion):
    client = TensorZeroGateway.build_http(gateway_url=url, api_key="every")
    before = counted(url)
    for metric, value in (("thumbs_up", True), ("score", 0.75), ("demonstration", "The Danube.")):
        answer = client.feedback(metric_name=metric, inference_id=completion, value=value, tags={"from": "check"})
        check(uuid.UUID(str(answer.feedback_id)).version == 7, f"{answer}")
    after = counted(url)
    for kind in ("thumbs", "rating", "demonstration"):
        check(after.get(kind, 0) == before.get(kind, 0) + 1, f"{kind}: {before} then {after}")
    try:
        client.feedback(metric_name="thumbs_up", inference_id=str(uuid.uuid4()), value=True)
        check(False, "feedback on an unknown answer was taken")
    except TensorZeroError as error:
        check(error.status_code == 404, f"{error}")
    step("TensorZero's client: a boolean, a number, a demonstration, an unknown answer")


class Heard(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def langfuse(url, completion):
    """Its scores go out in batches from a thread of its own; what is refused shows in its log only."""
    heard = Heard()
    logging.getLogger("langfuse").addHandler(heard)
    client = Langfuse(public_key="any", secret_key="every", host=url, tracing_enabled=True)
    before = counted(url)
    client.create_score(name="user_feedback", value=1, trace_id=completion, data_type="BOOLEAN", comment="good", score_id="check-1")
    client.create_score(name="quality", value=0.25, trace_id=completion, data_type="NUMERIC")
    # The same score again counts once.
    client.create_score(name="user_feedback", value=1, trace_id=completion, data_type="BOOLEAN", comment="good", score_id="check-1")
    client.flush()
    after = counted(url)
    for kind in ("thumbs", "rating"):
        check(after.get(kind, 0) == before.get(kind, 0) + 1, f"{kind}: {before} then {after}; {heard.lines}")
    check(not heard.lines, f"{heard.lines}")
    client.create_score(name="quality", value=0.5, trace_id=completion)
    client.create_score(name="quality", value=0.5, trace_id=str(uuid.uuid4()))
    client.flush()
    check(any("accepted 1 and rejected 1" in line for line in heard.lines), f"{heard.lines}")
    step("Langfuse's client: a bit, a number, one score twice, an unknown answer beside a known one")


def run(args):
    with workspace() as home, refusing_servers(args, home) as (server, _):
        completion = answered(server.url)
        tensorzero(server.url, completion)
        langfuse(server.url, completion)


if __name__ == "__main__":
    main(run, arguments(__doc__).parse_args())
