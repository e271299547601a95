"""The process around the recipe: logging, the accelerator, Ctrl-C, and exit codes."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import diffusers
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration

from ..errors import Diverged, InputError, Interrupted, NotPublished, NotWritten
from ..text import forgive_streams
from .environment import take_environment
from .settings import Settings

logger = logging.getLogger("train_dreambooth_s2ft")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
CHATTY = ("httpx", "httpx2", "torch.distributed", "accelerate", "s2ft_diffusion.tuner.model")
PER_LAYER = ("bitsandbytes.autograd._functions",)  # a warning in every forward pass of every layer


def set_up_logging() -> None:
    """The recipe's own lines on standard output; libraries speak up for warnings only."""
    forgive_streams()
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout)
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in PER_LAYER:
        logging.getLogger(name).setLevel(logging.ERROR)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def make_accelerator(settings: Settings) -> Accelerator:
    """The accelerator that a run asks for; in all processes but the first, only warnings are logged from here on.

    Raises InputError where accelerate's environment or configuration asks for what the run would not do, or not say.
    """
    output_dir, compute, logs = settings.output_dir, settings.compute, settings.logs
    take_environment(settings.length.accumulation, settings.optimizer.max_grad_norm)
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=settings.length.accumulation,
            mixed_precision=compute.mixed_precision,
            log_with=None if logs.report_to == "none" else logs.report_to,
            project_config=ProjectConfiguration(str(output_dir), str(output_dir / logs.folder)),
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        torch.empty(1, device=accelerator.device).cpu()  # a device that its environment names may not be there
    # What accelerate and torch raise for a flag, a backend or a device of the environment that they do not have.
    except (ValueError, ImportError, RuntimeError, AssertionError, KeyError, NotImplementedError) as error:
        raise InputError(f"accelerate cannot set up the run: {' '.join(str(error).split())}") from None
    if compute.mixed_precision != "no":
        logger.info("Mixed precision is %s.", compute.mixed_precision)
    logging.getLogger().setLevel(logging.INFO if accelerator.is_main_process else logging.WARNING)
    if compute.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def weight_dtype(accelerator: Accelerator) -> torch.dtype:
    """The type that frozen weights are kept in under the run's mixed precision."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


class deferred_interrupt:
    """Within the block, Ctrl-C and SIGTERM wait for whoever asks: what `with` gives says whether one came.

    The first says what will happen, in the words of `meaning`; the third Ctrl-C is one as ever.
    """

    def __init__(self, meaning: str) -> None:
        self.meaning = meaning

    def __enter__(self) -> Callable[[], bool]:
        self.came = 0
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return lambda: self.came > 0

    def _note(self, number: int, frame: object) -> None:
        self.came += 1
        if self.came == 1:  # not by print: it may be in the middle of one
            os.write(sys.stderr.fileno(), f"\n{self.meaning}\n".encode())
        elif self.came > 2 and number == signal.SIGINT:
            raise KeyboardInterrupt

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


@contextmanager
def exit_codes(program: str) -> Iterator[None]:
    """Turn the ways a run can end early into one line on standard error and an exit code.

    2 for bad input, 1 for a loss that is not finite, an upload that failed and a disk that takes no more, 130 for
    Ctrl-C, as shells have it.
    """
    try:
        yield
    except InputError as error:
        message, code = f"error: {error}", 2
    except (Diverged, NotPublished, NotWritten) as error:
        message, code = str(error), 1
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        message = f"{error.strerror}: {error.filename or 'the output folder'}. Complete checkpoints are still there: "
        message, code = f"{message}make room, and go on with --resume_from_checkpoint latest.", 1
    except Interrupted as error:
        message, code = f"{error} Go on with --resume_from_checkpoint latest.", 130
    except KeyboardInterrupt:
        message, code = "stopped; what was written so far is complete.", 130
    else:
        return
    print(f"{program}: {message}", file=sys.stderr)
    sys.exit(code)
