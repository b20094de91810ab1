"""Ways of training in processes of their own, which take their steps when they are told to and sleep meanwhile.

The processes are forked from one that has imported everything, so that starting one takes no time and no ways of
training meet in one process. What a process holds is its resident memory above what it held before the model was there.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parents[1]
GIB = 1 << 30
FORK = multiprocessing.get_context("fork")
# Of the model zoo, with changes. All of them LLaMA's layout.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("smollm2_135m", {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 1,
    }),
    "135m": ("smollm2_135m", {}),
    "360m": ("smollm2_135m", {
        "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15,
        "num_key_value_heads": 5,
    }),
    "1b": ("tinyllama_1_1b", {}),
    "3b": ("llama3_8b", {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
        "tie_word_embeddings": True,
    }),
    "7b": ("llama2_7b", {}),
    "7b_recomputed": ("llama2_7b", {}),
}  # fmt: skip


class Steps(Protocol):
    """A way of training, ready."""

    def step(self, batch: dict[str, Any]) -> Any:
        """One optimizer step."""

    def close(self) -> None:
        """Give everything back."""


class Engine:
    """Steps of DeepSpeed's engine, or ours."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def step(self, batch: dict[str, Any]) -> None:
        self.engine.backward(self.engine(**batch).loss)
        self.engine.step()

    def close(self) -> None:
        self.engine.destroy()


def import_all() -> None:
    """What the processes need, once, before the first fork."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import hift_ds.engine.initialize  # noqa: F401
    import model_zoo  # noqa: F401

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


# -- models and batches --------------------------------------------------------------------------------------------


def shape_config(shape: str) -> Any:
    """The transformers config of one of ``SHAPES``."""
    import model_zoo

    size, changes = SHAPES[shape]
    config = model_zoo.config(size, **changes)
    config.use_cache = False
    return config


def build(shape: str, dtype: Any) -> Any:
    """A model with random weights, made where they stay: one draw of a million numbers is repeated, since it is their
    number that costs."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    torch.set_default_dtype(dtype)
    try:
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(shape_config(shape))
    finally:
        torch.set_default_dtype(torch.float32)
    drawn = (torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() == 1:
                param.fill_(1.0)
                continue
            for piece in param.view(-1).split(drawn.numel()):
                piece.copy_(drawn[: piece.numel()])
    model.tie_weights()
    return model.train()


def on_meta(shape: str) -> Any:
    """The model without weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape_config(shape))


def blocks_of(model: Any) -> Any:
    """The model's stack of blocks."""
    from torch import nn

    return max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len)


def spread(num_blocks: int, size: int, count: int) -> list[range]:
    """``count`` groups of ``size`` neighbouring blocks, from the bottom to the top; fewer where there are not so
    many."""
    count = max(min(count, num_blocks // size), 1)
    last = max(num_blocks - size, 0)
    starts = [round(i * last / max(count - 1, 1)) for i in range(count)]
    return [range(start, min(start + size, num_blocks)) for start in starts]


def batch_of(vocab_size: int, rows: int, length: int, number: int = 0) -> dict[str, Any]:
    """Random tokens, which are their own labels."""
    import torch

    ids = torch.randint(0, vocab_size, (rows, length), generator=torch.Generator().manual_seed(number))
    return {"input_ids": ids, "labels": ids}


# -- memory --------------------------------------------------------------------------------------------------------


def reset_peak() -> int:
    """Bytes that this process holds now; its peak begins here."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """Most bytes that this process has held since :func:`reset_peak`."""
    return _status("VmHWM")


def available() -> int:
    """Bytes that processes can still get from this machine."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise OSError("/proc/meminfo has no MemAvailable")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {key}")


# -- processes -----------------------------------------------------------------------------------------------------


class Failed(Exception):
    """A way of training could not be made, or not take its steps; the message is the last line that says why."""


class Worker:
    """The processes of one way of training, a rank each.

    Args:
        make: builds it in the process; its argument is the rank.
        ranks: processes, which meet over gloo.
        limit_bytes: of memory that a process may take; more is its failure, not another's.
    """

    def __init__(self, make: Callable[[int], Steps], ranks: int = 1, limit_bytes: int | None = None) -> None:
        from hift_ds.ranks import free_port, launch_variables

        port = free_port()
        self._pipes, self._jobs = [], []
        for rank in range(ranks):
            ours, theirs = FORK.Pipe()
            environment = launch_variables(rank, ranks, port)
            arguments = (make, rank, theirs, environment, limit_bytes, os.getpid())
            job = FORK.Process(target=_serve, args=arguments)
            job.start()
            theirs.close()
            self._pipes.append(ours)
            self._jobs.append(job)
        try:
            self.ready = self._answers()
        except Failed:
            self.kill()
            raise

    def turn(self, batches: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Take a step with each batch.

        Returns:
            ``seconds`` and ``cpu`` (of all threads) of each step, ``peak_bytes`` since before the model was there
            (the most of all ranks), and ``extra``: what the steps themselves say.

        Raises:
            Failed: a step did.
        """
        for pipe in self._pipes:
            pipe.send(batches)
        try:
            return self._answers()
        except Failed:
            self.kill()
            raise

    def ask(self, question: str) -> Any:
        """What the method of that name of the first rank's steps returns; all ranks call it."""
        for pipe in self._pipes:
            pipe.send(question)
        return self._answers()["value"]

    def end(self) -> None:
        """Let it give everything back."""
        for pipe in self._pipes:
            try:
                pipe.send(None)
            except OSError:
                continue
        for job in self._jobs:
            job.join(60)
        self.kill()

    def kill(self) -> None:
        """End what still lives."""
        for job in self._jobs:
            if job.is_alive():
                job.kill()
            job.join()

    def _answers(self) -> dict[str, Any]:
        answers = []
        for pipe, job in zip(self._pipes, self._jobs, strict=True):
            while not pipe.poll(1):  # another rank waits for ever for one that is gone
                for other, it in zip(self._pipes, self._jobs, strict=True):
                    if not it.is_alive() and not other.poll():
                        raise Failed(f"a process ended with exit code {it.exitcode}")
            try:
                answer = pipe.recv()
            except EOFError:
                job.join(10)
                raise Failed(f"a process ended with exit code {job.exitcode}") from None
            if "failed" in answer:
                raise Failed(answer["failed"])
            answers.append(answer)
        first = answers[0]
        if "peak_bytes" in first:
            first["peak_bytes"] = max(answer["peak_bytes"] for answer in answers)
        return first


def _serve(make: Any, rank: int, pipe: Any, environment: dict[str, str], limit: int | None, parent: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whatever libraries print is not ours
    os.environ.update(environment)
    if limit is not None:
        held = _status("VmData")
        resource.setrlimit(resource.RLIMIT_DATA, (held + limit, held + limit))
    steps = None
    try:
        before = reset_peak()
        started = time.perf_counter()
        steps = make(rank)
        gc.freeze()  # a peer collects garbage in each step: not that of all imports too
        pipe.send({"start_s": time.perf_counter() - started, "peak_bytes": peak() - before})
        while (asked := _next(pipe, parent)) is not None:
            pipe.send(_answer(steps, asked, before))
    except BaseException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        pipe.send({"failed": f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]})
        if os.environ.get("BENCHMARK_TRACEBACKS"):
            sys.excepthook(*sys.exc_info())
    finally:
        if steps is not None:
            steps.close()
        pipe.close()
        os._exit(0)  # no exit handlers of the parent's


def _next(pipe: Any, parent: int) -> Any:
    while not pipe.poll(5):
        if os.getppid() != parent:
            return None
    return pipe.recv()


def _answer(steps: Steps, asked: Any, before: int) -> dict[str, Any]:
    if isinstance(asked, str):
        return {"value": getattr(steps, asked)()}
    seconds, cpu = [], []
    for batch in asked:
        started, busy = time.perf_counter(), time.process_time()
        steps.step(batch)
        seconds.append(time.perf_counter() - started)
        cpu.append(time.process_time() - busy)
    return {"seconds": seconds, "cpu": cpu, "peak_bytes": peak() - before}
