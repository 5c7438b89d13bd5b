"""`kill -9` at random moments under load: what was acknowledged is there after the restart, and the promoted version serves.

A key that was acknowledged with 201 answers 200 and the same id when it is sent again; a key that was never sent answers 201,
so that the first is no accident. The detectors are where they were, too.
"""

import random
import threading
import time
import urllib.error
import uuid
import http.client

from harness import OPEN_GATE, BENIGN, Crowd, Failure, Server, arguments, check, main, run_update, step, tiny_model, workspace


class Ledger:
    """What the server acknowledged, by idempotency key: the feedback as it was sent and the id that came back."""

    def __init__(self):
        self.lock, self.kept = threading.Lock(), {}

    def add(self, body, identity):
        with self.lock:
            self.kept[body["idempotency_key"]] = (body, identity)


def judge(ledger, values):
    """Work for the crowd: one chat, then one judgement of it, noted only once it is acknowledged."""

    def work(client, number):
        interaction, prompt = values.choice(BENIGN)
        answer = client.chat(prompt, interaction, max_tokens=3).expect(200)
        kind, value = values.choice([("thumbs", "up"), ("thumbs", "down"), ("rating", 5), ("behaviour", "copied")])
        body = {"kind": kind, "value": value, "completion_id": answer.json["id"], "rater": f"r{number}", "idempotency_key": str(uuid.uuid4())}
        told = client.post("/v1/feedback", body).expect(201)
        ledger.add(body, told.json["id"])

    return work


def audit(server, ledger, keys):
    """Every acknowledged judgement among `keys` is there, once."""
    for key in keys:
        body, identity = ledger.kept[key]
        again = server.post("/v1/feedback", body)
        check(again.status == 200, f"feedback {identity} was acknowledged and is lost: sent again it gives {again.status} {again.text[:200]}")
        check(again.json["id"] == identity, f"key {key} gives {again.json['id']}, it was {identity}")


def control(server, ledger, key):
    body = {**ledger.kept[key][0], "idempotency_key": str(uuid.uuid4())}
    told = server.post("/v1/feedback", body)
    check(told.status == 201, f"a new key on an old completion gives {told.status} {told.text[:200]}")
    ledger.add(body, told.json["id"])


def settled(server):
    """The scorecard once nothing is left to be sensed."""
    seen = None
    while True:
        now = server.get("/v1/alignment").expect(200).json["signals"]
        if now == seen:
            return now
        seen = now
        time.sleep(2.5)


def same_evidence(server):
    """Every stream has the evidence after the kill that it had before, to the last bit."""
    before = settled(server)
    server.kill()
    server.start()
    check(settled(server) == before, "the detectors' evidence is not what it was before the kill")
    return len(before)


def promote_another(server, values, serving):
    """Promotes a version other than the one that serves, where there is one; the version that serves then."""
    others = [record["version"] for record in server.versions() if record["version"] != serving and record["state"] != "rejected"]
    if not others:
        return serving
    version = values.choice(others)
    server.promote(version).expect(200)
    return version


def run(args):
    values = random.Random(args.seed)
    ledger, promoted = Ledger(), 0
    with workspace() as home:
        server = Server(args.binary, tiny_model(args), home, env=OPEN_GATE)
        try:
            server.start()
            outcome = run_update(server)["outcome"] if args.update else "none was asked for"
            serving = server.chat("Hello").expect(200).version
            versions = [record["version"] for record in server.versions()]
            step(f"seed {args.seed}; update: {outcome}; versions {versions}, v{serving} serves")
            for number in range(args.rounds):
                known = set(ledger.kept)
                with Crowd(server, args.clients, judge(ledger, values)) as crowd:
                    time.sleep(values.uniform(0.3, 1.5))
                    if number % 2:
                        before, serving = serving, promote_another(server, values, serving)
                        promoted += before != serving
                        time.sleep(values.choice([0, 0.05]))
                    # What fails from here on fails because of the kill; what failed before is a fault.
                    early = list(crowd.failures)
                    server.kill()
                    crowd.stopping.set()
                check(not early, f"round {number}: {len(early)} requests failed before the kill, the first: {early[:1]}")
                check(all(isinstance(f, (OSError, http.client.HTTPException, urllib.error.URLError)) for f in crowd.failures),
                      f"round {number}: a broken connection was expected: {[f for f in crowd.failures if isinstance(f, Failure)][:1]}")
                server.start()
                fresh = [key for key in ledger.kept if key not in known]
                audit(server, ledger, fresh)
                check(bool(fresh), f"round {number}: nothing was acknowledged before the kill")
                control(server, ledger, fresh[-1])
                answer = server.chat("Hello").expect(200)
                check(answer.version == serving, f"v{serving} was promoted, v{answer.version} serves after the restart")
                active = [r["version"] for r in server.versions() if r["state"] == "active"]
                check(active == [serving], f"v{serving} was promoted, active are {active}")
                step(f"round {number + 1}: {len(fresh)} acknowledged and found, v{serving} serves")
            audit(server, ledger, list(ledger.kept))
            step(f"the evidence of {same_evidence(server)} streams is the same after a kill")
            step(f"after {args.rounds} kills: all {len(ledger.kept)} acknowledged judgements found, {promoted} promotions kept")
            check(promoted > 0 or not args.update, "there was no second version to promote")
        finally:
            server.kill()


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 31), help="of the moments of the kills")
    parser.add_argument("--no-update", dest="update", action="store_false", help="do not train a second version first")
    main(run, parser.parse_args())
