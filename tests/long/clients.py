"""Sixteen clients of one app for ten minutes: every image is the one made alone, and memory stays where it was.

    python -m tests.long.clients --clients 16 --minutes 10

They generate, cancel, upload, list, inspect and load the page; trainings run beside them, and are killed; half way the
app itself is killed and started again. A client that finds no server, or a full queue, comes back later.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import psutil
from gradio_client import Client, handle_file
from PIL import Image

from app.engine import Engine, Settings
from app.library import Library
from s2ft_diffusion.adapters.file import read_adapter, write_adapter
from s2ft_diffusion.toybox.subjects import write_photos
from tests.training_process import ENVIRONMENT, ROOT

ADAPTERS = ROOT / "app" / "adapters"
PROMPTS = ("a photo of sks cat", "a red dog in the snow", "a photo of a blue cat")


class Server:
    """The app in a process of its own, started again after it was killed."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        command = [sys.executable, "-m", "app", "--adapters", str(ADAPTERS), "--outputs", str(folder), "--port", port]
        self.command, self.address = [*command, "--concurrency", "2", "--max_queue", "64"], f"http://127.0.0.1:{port}"
        self.log = folder.with_suffix(".log")

    def start(self) -> None:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, stdout=log, stderr=log
            )
        while self.process.poll() is None:
            try:
                httpx.get(self.address)
                return
            except httpx.HTTPError:
                time.sleep(0.2)
        raise RuntimeError(self.log.read_text()[-3000:])

    def resident(self) -> int:
        return psutil.Process(self.process.pid).memory_info().rss

    def trainers(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if any("train_dreambooth" in word for word in child.cmdline())]


class Crowd:
    def __init__(self, server: Server, folder: Path, seed: int) -> None:
        self.server, self.folder, self.seed = server, folder, seed
        self.counts, self.wrong, self.made = Counter(), [], {}
        self.lock, self.over = threading.Lock(), threading.Event()

    def visit(self, number: int) -> None:
        """One client, until the time is over."""
        draw = random.Random(f"{self.seed}-{number}")
        actions = [self.generate] * 6 + [self.cancel, self.upload, self.look, self.inspect]
        actions += [self.train] if number == 0 else []
        client = None
        while not self.over.is_set():
            action = draw.choice(actions)
            try:
                client = client or Client(self.server.address, verbose=False)
                action(client, draw)
                self.counts[action.__name__] += 1
            except AssertionError as error:
                self.wrong.append(f"{action.__name__}: {error}")
            except Exception as error:  # no server, or a full queue: what tells them from faults is the count
                self.counts[f"{action.__name__}: {type(error).__name__}"] += 1
                client = None
                self.over.wait(1.0)

    def ids(self, client: Client) -> list[str]:
        listed = client.predict(api_name="/list_adapters")
        return sorted(a["id"] for a in listed if a["usable"] and a["date"] != "2026-05-05")

    def generate(self, client: Client, draw: random.Random) -> None:
        wish = {
            "prompt": draw.choice(PROMPTS), "adapter": draw.choice(["", *self.ids(client)]),
            "strength": draw.choice((0.5, 1.0)), "steps": draw.randint(2, 4), "seed": draw.randrange(5),
            "guidance": 4.0, "scheduler": "DDIM",
        }  # fmt: skip
        result = client.predict(**wish, api_name="/generate")
        assert result[2] == "done", result[2]
        pixels = np.asarray(Image.open(result[1][0]["image"]).convert("RGB"))
        with self.lock:
            before = self.made.setdefault(tuple(wish.items()), pixels)
        assert np.array_equal(before, pixels), wish

    def cancel(self, client: Client, draw: random.Random) -> None:
        job = client.submit(prompt="x", steps=100, images=8, api_name="/generate")
        while not job.outputs() and not job.done():
            time.sleep(0.05)
        said = client.predict(api_name="/cancel")
        assert said in ("cancelled", "nothing to cancel"), said
        ended = job.result(timeout=600)[2]
        assert ended.startswith("cancelled") or said == "nothing to cancel", ended

    def upload(self, client: Client, draw: random.Random) -> None:
        source = draw.choice(sorted(ADAPTERS.glob("*.safetensors")))
        adapter = read_adapter(source)
        own = self.folder / f"{threading.get_ident()}-{draw.getrandbits(32)}.safetensors"
        write_adapter(own, replace(adapter, info=replace(adapter.info, date="2026-05-05", subject=own.stem)))
        record = client.predict(handle_file(str(own)), api_name="/upload_adapter")
        assert record["name"] == own.stem, record
        back = Path(client.predict(record["id"], api_name="/download_adapter"))
        assert back.read_bytes() == own.read_bytes()
        assert client.predict(record["id"], api_name="/delete_adapter") == "deleted"
        own.unlink()

    def look(self, client: Client, draw: random.Random) -> None:
        assert httpx.get(self.server.address, timeout=60).status_code == 200

    def inspect(self, client: Client, draw: random.Random) -> None:
        client.predict(adapter=draw.choice(self.ids(client)), layer="", api_name="/inspect")

    def train(self, client: Client, draw: random.Random) -> None:
        photos = [handle_file(str(path)) for path in sorted((self.folder / "photos").iterdir())]
        wish = {"subject": "rex", "class_name": "cat", "steps": 20, "n_frequency": 100}
        client.predict(photos=photos, **wish, api_name="/train")

    def compare_with_those_made_alone(self) -> None:
        engine = Engine("toybox")
        library = Library([str(ADAPTERS)], self.folder / "own", engine.components)
        for wish, pixels in self.made.items():
            wanted = dict(wish)
            adapters = ((wanted.pop("adapter"), wanted.pop("strength")),)
            alone = Settings.checked(adapters=adapters, negative_prompt="", images=1, **wanted)
            image = engine.threads.submit(engine.generate, alone, library).result()[0]
            if not np.array_equal(np.asarray(image.convert("RGB")), pixels):
                self.wrong.append(f"made alone: {wish}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":  # as the app is given; torch looks at it when it is imported
        os.execve(sys.executable, [sys.executable, "-m", "tests.long.clients", *sys.argv[1:]], os.environ | ENVIRONMENT)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_photos("mittens", folder / "photos")
        server = Server(folder / "outputs")
        server.start()
        crowd = Crowd(server, folder, args.seed)
        threads = [threading.Thread(target=crowd.visit, args=(n,)) for n in range(args.clients)]
        for thread in threads:
            thread.start()
        begun, killed, memory = time.monotonic(), False, []
        try:
            while (passed := time.monotonic() - begun) < 60 * args.minutes:
                time.sleep(5)
                memory.append(server.resident())
                for trainer in server.trainers():
                    if random.random() < 0.2:
                        trainer.kill()
                        crowd.counts["trainers killed"] += 1
                if not killed and passed > 30 * args.minutes:
                    server.process.kill()
                    server.process.wait()
                    killed = True
                    first, memory = memory, []
                    server.start()
                    begun = time.monotonic() - 30 * args.minutes  # half of the time is the second one's
        finally:
            crowd.over.set()
            for thread in threads:
                thread.join()
            server.process.send_signal(signal.SIGINT)
            server.process.wait()
        print(dict(crowd.counts))
        crowd.compare_with_those_made_alone()
        print(f"{len(crowd.made)} different images, compared with those made alone; wrong: {crowd.wrong[:10]}")
        for life in (first, memory):
            third = len(life) // 3
            middle, last = (statistics.median(part) / 2**20 for part in (life[third:-third], life[-third:]))
            print(f"resident memory, MiB: {middle:.0f} in the middle third, {last:.0f} in the last")
            assert last < 1.1 * middle
        assert "Traceback" not in server.log.read_text(), server.log.read_text()[-3000:]
        assert not crowd.wrong


if __name__ == "__main__":
    main()
