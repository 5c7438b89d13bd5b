"""Runs `tests/node/openai_client.mjs` against a server of its own. The script lies beside its `node_modules`."""

import pathlib
import subprocess

from harness import Server, arguments, check, main, refusing_servers, tiny_model, workspace


def run(args):
    with workspace() as home, refusing_servers(args, home) as refusing, Server(args.binary, tiny_model(args), home) as server:
        urls = [server.url, *(other.url for other in refusing)]
        done = subprocess.run(["node", str(args.script), *urls], timeout=300)
        check(done.returncode == 0, f"node ended with {done.returncode}")
        check(server.alive(), f"the server ended:\n{server.tail()}")


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--script", type=pathlib.Path, required=True)
    main(run, parser.parse_args())
