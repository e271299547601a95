"""A training by several processes is one process's: by accelerate's configuration, and on two machines.

    python -m tests.long.processes

Two processes with a batch of one, on CPUs, beside one process with a batch of two. The machines are two network
namespaces (`nodes.sh`, as root). FSDP 2 shares out the base; in ZeRO-2 there is nothing to share out.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from s2ft_diffusion.adapters.file import WEIGHTS_NAME, read_adapter
from tests.conftest import assert_trained_alike
from tests.long.killing import prepare
from tests.training_process import ENVIRONMENT, ROOT, train

SHARED = """
compute_environment: LOCAL_MACHINE
num_processes: 2
num_machines: 1
machine_rank: 0
mixed_precision: 'no'
"""
CONFIGS = {
    "DDP": "distributed_type: MULTI_GPU",
    "FSDP2": "distributed_type: FSDP\nfsdp_config:\n  fsdp_version: 2\n  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP",
    "DeepSpeed ZeRO-2": "distributed_type: DEEPSPEED\ndeepspeed_config:\n  zero_stage: 2",
}


def run(*command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, **ENVIRONMENT, "ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[*CONFIGS, "machines"], default=[*CONFIGS, "machines"])
    only = parser.parse_args().only
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder)

        def arguments(output: str, batch: int, estimate: str = "full") -> list[str]:
            return [
                "--pretrained_model_name_or_path", str(folder / "base"), "--instance_dir", str(folder / "photos"),
                "--output_dir", str(folder / output), "--max_train_steps", "4", "--learning_rate", "1e-3", "--targets",
                "qv", "--n_frequency", "200", "--estimate", estimate, "--estimate_draws", "1", "--train_batch_size",
                str(batch), "--report_to", "none",
            ]  # fmt: skip

        wanted = {}
        for estimate in ("full", "scaled"):
            train(arguments(f"one-{estimate}", 2, estimate), folder / "log")
            wanted[estimate] = read_adapter(folder / f"one-{estimate}" / WEIGHTS_NAME)
        for name, text in CONFIGS.items():
            if name not in only:
                continue
            if name.startswith("DeepSpeed"):
                try:
                    import deepspeed  # noqa: F401
                except ImportError:
                    print(f"{name}: it is not installed")
                    continue
            config = folder / "config.yaml"
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                config.write_text(f"{SHARED}main_process_port: {free.getsockname()[1]}\n{text}\n")
            command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
            estimate = "scaled" if name == "FSDP2" else "full"  # shared out, weights are not trained for the estimate
            done = run(*command, "train_dreambooth_s2ft.py", *arguments(name, 1, estimate))
            assert done.returncode == 0, done.stderr[-3000:]
            assert_trained_alike(read_adapter(folder / name / WEIGHTS_NAME), wanted[estimate])
            print(f"{name}: as one process", flush=True)
        if "machines" in only and os.geteuid() == 0:
            command = [str(ROOT / "tests" / "long" / "nodes.sh"), sys.executable, "train_dreambooth_s2ft.py"]
            done = run(*command, *arguments("nodes", 1))
            assert done.returncode == 0, done.stderr[-3000:]
            assert_trained_alike(read_adapter(folder / "nodes" / WEIGHTS_NAME), wanted["full"])
            print("two machines: as one process", flush=True)


if __name__ == "__main__":
    main()
