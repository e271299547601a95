"""Every endpoint of the app, called with values of all kinds: each call ends, in a result or in an error that says why.

    python -m tests.long.endpoints --examples 200

Values are what a form may send, and what it may not: other types, huge and odd numbers, text of all kinds, files that
are nobody's business. Afterwards the app makes the image that it made before, bit for bit, in as many threads.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from gradio_client import Client
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.arguments import parse_arguments
from app.server import close, launch

SESSION = "fuzz"
FILES = st.sampled_from(["/etc/passwd", "../../app.lock", "", "\0", "http://127.0.0.1:9/x", "x" * 5000]).map(
    lambda path: {"path": path, "orig_name": path, "meta": {"_type": "gradio.FileData"}}
)
NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 101, 2**31, 2**63, 10**400, -0.5, 0.1, 1e308, "3", "NaN", True])
WORDS = st.sampled_from(["a photo of sks cat", "DDIM", "Euler", "../x", "<script>alert(1)</script>", "\U0001f63a" * 50])
SCALARS = st.none() | NUMBERS | WORDS | FILES | st.text() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=5
)


def ends_in(address: str, endpoint: str, values: list[Any]) -> tuple[str, str]:
    """How a call ended: "complete", "error" or "refused", and what was said."""
    body = json.dumps({"data": values, "session_hash": SESSION})
    kind = {"Content-Type": "application/json"}
    begun = httpx.post(f"{address}gradio_api/call{endpoint}", content=body, headers=kind, timeout=600)
    if begun.status_code != 200:
        assert begun.status_code < 500, (endpoint, values, begun.text)
        return "refused", begun.text
    event = ""
    with httpx.stream("GET", f"{address}gradio_api/call{endpoint}/{begun.json()['event_id']}", timeout=600) as lines:
        for line in lines.iter_lines():
            if line.startswith("event: "):
                event = line.removeprefix("event: ")
            elif event in ("complete", "error") and line.startswith("data: "):
                return event, line.removeprefix("data: ")
    raise AssertionError(f"{endpoint} ended without a result: {values}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=200, help="calls of every endpoint")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        blocks, app, address = launch(parse_arguments(["--outputs", folder, "--port", "0"]), block=False)
        try:
            client = Client(address, verbose=False)
            known = client.view_api(return_format="dict", print_info=False)["named_endpoints"]

            def picture() -> bytes:
                made = client.predict(prompt="a photo of sks cat", seed=3, steps=3, api_name="/generate")
                return Path(made[1][0]["image"]).read_bytes()

            before, threads, ends, unclear = picture(), 0, Counter(), []
            for endpoint, described in known.items():
                usual = [parameter.get("parameter_default") for parameter in described["parameters"]]

                @settings(max_examples=args.examples, deadline=None, suppress_health_check=list(HealthCheck))
                @given(
                    endpoint=st.just(endpoint),
                    values=st.tuples(*(st.just(value) | VALUES for value in usual)).map(list) | st.lists(VALUES),
                )
                def calls(endpoint: str, values: list[Any]) -> None:
                    end, said = ends_in(address, endpoint, values)
                    ends[end] += 1
                    if said == "null" or "Something went wrong" in said:  # an exception that nobody foresaw
                        unclear.append((endpoint, values))

                calls()
                threads = threads or threading.active_count()
                print(endpoint, dict(ends), f"{len(unclear)} unclear", flush=True)
            for endpoint, values in unclear[:20]:
                print("unclear:", endpoint, json.dumps(values)[:300])
            assert {"complete", "error"} <= ends.keys(), ends
            assert picture() == before
            assert threading.active_count() <= threads + 8, (threads, threading.active_count())
        finally:
            close(blocks, app)
    raise SystemExit(bool(unclear))


if __name__ == "__main__":
    main()
