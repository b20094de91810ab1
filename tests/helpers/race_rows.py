"""The real engine on the checked device of :mod:`tests.helpers.stream_clocks`, in processes of its own.

    python -m tests.helpers.race_rows < rows.json > outcomes.json

imports once and forks for each row: the fake device changes its process for good. A process that dies or hangs is an
error of its row, and costs the others nothing.
"""

from __future__ import annotations

import inspect
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

ROW_SECONDS = 300.0  # the slowest takes about 20

NO_RECORD = "gathered weights are given back early"  # ``record_stream`` says nothing
# What a mutation takes out: (module, class, function, the text, what stands there instead).
MUTATIONS = {
    "copies do not wait for the computation": (
        "hift_ds.store.movers", "StreamMover", "submit",
        "side.wait_stream(self._streams.current_stream(self._device))", "pass",
    ),
    "the computation does not wait for copies": (
        "hift_ds.store.movers", "StreamMover", "wait", "compute.wait_event(ticket.end)", "pass",
    ),
    "copies do not wait for each other": (
        "hift_ds.store.movers", "StreamMover", "submit", "side.wait_event(ticket.end)", "pass",
    ),
    "the host's update does not wait for its copies": (
        "hift_ds.store.movers", "StreamMover", "settle", "ticket.end.synchronize()", "pass",
    ),
    "copies of the disk do not wait for the computation": (
        "hift_ds.store.movers", "InlineMover", "submit",
        "self._streams.current_stream(self._device).synchronize()\n    started", "pass\n    started",
    ),
    "threads do not wait for the computation": (
        "hift_ds.store.movers", "ThreadMover", "_run", "computed.synchronize()", "pass",
    ),
    "gathers do not wait for updates": (
        "hift_ds.engine.zero3.seam", "WeightShards", "_choose_coordinator",
        "self._wait_for_updates()", "pass",
    ),
    "gathers do not wait for new weights on their way to host memory": (
        "hift_ds.engine.zero3.host_shards", "WriteBack", "finish", "self._mover.wait(ticket)", "pass",
    ),
    "new weights are written over others that still travel": (
        "hift_ds.engine.zero3.host_shards", "WriteBack", "send", "self._mover.wait(self._sent[at])", "pass",
    ),
    "memory of gathered shards is used again early": (
        "hift_ds.engine.zero3.host_shards", "Gathered", "wait",
        "self._copies.wait_stream(get_accelerator().current_stream())", "pass",
    ),
    "gradients are sent before they are there": (
        "hift_ds.optim.early_reduction", "EarlyReduction", "_start",
        "self._side.wait_stream(self._streams.current_stream(self._device))", "pass",
    ),
    "the norm does not wait for gradients of other ranks": (
        "hift_ds.optim.early_reduction", "EarlyReduction", "finish",
        "self._streams.current_stream(self._device).wait_stream(self._side)", "pass",
    ),
    "gradients are freed before their copies have ended": (
        "hift_ds.optim.host_gradients", "HostGradients", "_let_go", "self._mover.wait(ticket)", "pass",
    ),
    "gradients are used before they are back": (
        "hift_ds.optim.host_gradients", "HostGradients", "take", "self._mover.wait(ticket)", "pass",
    ),
    NO_RECORD: (),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One configuration.

    Attributes:
        hift: the ``"hift"`` block.
        more: of the DeepSpeed config.
        mutation: the name of what is taken out of the code first.
    """

    hift: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    stage: int = 0
    world_size: int = 1
    gas: int = 1
    steps: int = 9
    timer: bool = False
    optimizer: str = "AdamW"
    clip: float = 1.0
    checkpointing: bool = False
    mutation: str = ""
    readme: bool = False  # run the README's loop instead
    forwards: int = 1  # before each backward
    undoes: bool = False  # every update that may be taken back is (norms have no values here)
    guarded: bool = False  # asks after each step whether the loss is finite and a signal has come, as ``hift-ds train``


@dataclass
class Outcome:
    """What the checker said.

    Attributes:
        hazards: the number, and ``shown`` the first few in words.
        syncs: by kind and place, how often the host waited, in that step of the last cycle in which it did so most.
    """

    hazards: int
    shown: list[str]
    syncs: dict[str, int]
    page_locked: list[int] = field(default_factory=list)  # bytes of each page-locked block
    reduced_in_backward: int = 0  # collectives of gradients that were launched before backward's last product
    copies_ahead: int = 0  # that were under way out behind one for which the host waited, at most
    error: str = ""
    waits: list[str] = field(default_factory=list)  # for what the last step says that it waited
    num_streams: int = 0  # made by anybody
    hooks_left: int = 0  # on the model, when the engine was destroyed

    @property
    def num_syncs(self) -> int:
        return sum(self.syncs.values())


def run_rows(rows: Sequence[Row]) -> list[Outcome]:
    """Step the engine under each of ``rows``.

    Raises:
        AssertionError: a row failed; has its traceback.
    """
    job = subprocess.run(
        [sys.executable, "-m", "tests.helpers.race_rows"],
        input=json.dumps([asdict(row) for row in rows]),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert job.returncode == 0, job.stderr[-3000:]
    outcomes = [Outcome(**data) for data in json.loads(job.stdout.splitlines()[-1])]
    for row, outcome in zip(rows, outcomes, strict=True):
        assert not outcome.error, f"{row}: {outcome.error}"
    return outcomes


def run_row(row: Row) -> Outcome:
    """In this process, which is the fake device's from then on."""
    import torch

    from hift_ds.engine.engine import HiFTEngine
    from hift_ds.simulation.device import fake_device
    from hift_ds.store.machine import HostBytes
    from hift_ds.store.machine import Machine as FakeMachine
    from tests.helpers.stream_clocks import Machine, installed

    if row.mutation and row.mutation != NO_RECORD:
        _take_out(*MUTATIONS[row.mutation])
    with fake_device() as name, tempfile.TemporaryDirectory() as folder:
        _join(row.world_size)
        HiFTEngine.machine = FakeMachine(HostBytes(1 << 40, 1 << 40))  # which no rank has to be asked for
        with installed(Machine(name)) as machine:
            if row.mutation == NO_RECORD:
                torch.Tensor.record_stream = lambda tensor, stream: None
            engine = (run_readme if row.readme else step)(row, name, machine, folder)
            last_cycle = [_syncs_of(machine, f"step {row.steps - 1 - back}") for back in range(4)]
            most = max(last_cycle, key=lambda syncs: sum(syncs.values()))
            shown = [str(hazard) for hazard in machine.hazards[:8]]
            return Outcome(
                len(machine.hazards),
                shown,
                most,
                machine.page_locked,
                _reduced_in_backward(machine.log),
                _copies_ahead(machine.log),
                waits=sorted(engine.last_report.waits) if engine is not None else [],
                num_streams=len(machine.streams),
                hooks_left=_hooks_left(engine) if engine is not None else 0,
            )


def _hooks_left(engine: Any) -> int:
    model = engine.module
    engine.destroy()
    tables = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks")
    return sum(len(getattr(module, name)) for module in model.modules() for name in tables)


def _syncs_of(machine: Any, mark: str) -> dict[str, int]:
    return dict(Counter(f"{what} at {place}" for when, what, place in machine.syncs if when == mark))


def _reduced_in_backward(log: Sequence[Any]) -> int:
    found = 0
    for at, entry in enumerate(log):
        if entry.name in ("_reduce_scatter_base_", "reduce_"):
            then = next(e.name for e in log[at + 1 :] if e.name in ("mm", "allreduce_"))
            found += then == "mm"
    return found


def _copies_ahead(log: Sequence[Any]) -> int:
    most = 0
    for at, entry in enumerate(log):
        if entry.kind == "sync" and entry.after and log[max(entry.after)].link == "out":
            behind = log[max(entry.after) + 1 : at]
            most = max(most, sum(other.link == "out" for other in behind))
    return most


def step(row: Row, device: str, machine: Any, folder: str, model: Any = None, batch: Any = None) -> Any:
    """Build an engine and take the steps, each under a mark of its own."""
    import hift_ds
    from hift_ds.forecast.setting import make_batch
    from hift_ds.optim.in_backward import InBackwardOptimizer
    from hift_ds.simulation.step import make_real

    if row.undoes:
        InBackwardOptimizer._stands = staticmethod(lambda factor: False)  # type: ignore[method-assign]
    if model is None:
        model = tiny_llama()
        make_real(model, __import__("torch").bfloat16, device)
    engine, *_ = hift_ds.initialize(
        model=model.train(), model_parameters=list(model.parameters()), config=config_of(row, folder)
    )
    batch_shape = batch or (2, 16)
    stop = _guards(engine) if row.guarded else None
    for number in range(row.steps):
        machine.mark(f"step {number}")
        for _ in range(row.gas):
            inputs = make_batch(engine.module, *batch_shape, device)
            loss = sum(engine(**inputs).loss for _ in range(row.forwards))
            engine.backward(loss)
            del loss
            engine.step()
        if stop is not None:
            stop.agreed()
    machine.mark("end")
    return engine


def _guards(engine: Any) -> Any:
    from hift_ds.train.preemption import StopRequest
    from hift_ds.train.watchdog import DivergenceGuard

    guard = DivergenceGuard(engine, max_norm_ratio=0.0)
    judge = guard._reason
    guard._reason = lambda *args: (judge(*args), None)[1]  # there are no values to find a reason in
    return StopRequest(engine.device, engine).__enter__()


def run_readme(row: Row, device: str, machine: Any, folder: str) -> None:
    """The code of README's "your own loop", with batches in host memory as a data loader gives them."""
    import torch
    import transformers

    from hift_ds.engine.engine import HiFTEngine
    from hift_ds.forecast.setting import make_batch
    from hift_ds.simulation.step import make_real

    _, _, rest = (ROOT / "README.md").read_text().partition("**A DeepSpeed JSON and your own loop.**")
    code = rest.partition("```python\n")[2].partition("```")[0]
    assert "hift_ds.initialize" in code and "engine.step()" in code
    model = tiny_llama()
    make_real(model, torch.bfloat16, device)  # where the engine puts it; fake weights do not move
    batches = [make_batch(model, 4, 16, "cpu") for _ in range(row.steps * 2)]
    transformers.AutoModelForCausalLM.from_pretrained = lambda path: model
    HiFTEngine.save_checkpoint = lambda engine, folder: None
    exec(code, {"loader": batches})
    machine.mark(f"step {row.steps - 1}")


def config_of(row: Row, folder: str) -> dict[str, Any]:
    hift = json.loads(json.dumps(row.hift).replace("FOLDER", folder))
    if row.checkpointing:
        hift.setdefault("activations", {})["checkpointing"] = True
    timers = {} if row.timer else {"timers": {"throughput": {"enabled": False}}}
    optimizer: dict[str, Any] = {"type": row.optimizer, "params": {"lr": 1e-3}}
    if row.optimizer == "AdamW":
        optimizer["params"]["fused"] = True
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": row.gas,
        "gradient_clipping": row.clip,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": row.stage, **row.more.get("zero_optimization", {})},
        "optimizer": optimizer,
        "hift": hift,
        **timers,
        **{key: value for key, value in row.more.items() if key != "zero_optimization"},
    }


def tiny_llama(num_blocks: int = 2) -> Any:
    """On the meta device."""
    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=num_blocks,
        num_attention_heads=2, num_key_value_heads=1, use_cache=False,
    )  # fmt: skip
    with unset_fake_temporarily(), torch.device("meta"):
        return LlamaForCausalLM(config)


def _join(world_size: int) -> None:
    import logging

    import torch.distributed as dist

    from hift_ds.simulation.accelerator import join_fake_ranks, use_fake_accelerator

    logging.disable(logging.WARNING)
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT="29500"
    )
    if not dist.is_initialized():
        join_fake_ranks(world_size)
        use_fake_accelerator()


def _take_out(module: str, owner: str, function: str, text: str, instead: str) -> None:
    """Replace a method by one without ``text``, which must be there once."""
    import importlib

    cls = getattr(importlib.import_module(module), owner)
    method = cls.__dict__[function]
    source = textwrap.dedent(inspect.getsource(method))
    assert source.count(text) == 1, f"{owner}.{function} has changed: {text!r} is there {source.count(text)} times"
    namespace: dict[str, Any] = {}
    exec(source.replace(text, instead), method.__globals__, namespace)
    setattr(cls, function, namespace[function])


def _outcome(data: dict[str, Any]) -> dict[str, Any]:
    import traceback

    try:
        return asdict(run_row(Row(**data)))
    except Exception:
        return asdict(Outcome(0, [], {}, error=traceback.format_exc()[-4000:]))


def _outcome_in_child(row: dict[str, Any]) -> dict[str, Any]:
    try:
        return in_child(_outcome, row)
    except ChildError as error:
        return asdict(Outcome(0, [], {}, error=str(error)))


class ChildError(Exception):
    """A child process has ended, or was ended, without an answer."""


def in_child(work: Callable[..., Any], *args: Any, seconds: float = ROW_SECONDS) -> Any:
    """What ``work(*args)`` returns in a fork of this process.

    Raises:
        ChildError: the child died, or took longer than ``seconds``.
    """
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=_answer, args=(sender, work, args))
    child.start()
    sender.close()  # else its end would not be seen
    try:
        if not receiver.poll(seconds):
            raise ChildError(f"no answer within {seconds:g} s")
        return receiver.recv()
    except EOFError:
        child.join()
        code = child.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        raise ChildError(f"its process {how} before it answered") from None
    finally:
        child.kill()
        child.join()


def _answer(sender: Any, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    sender.send(work(*args))
    sender.close()


def _main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    import trl.models.activation_offloading  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    import hift_ds.engine.initialize
    import hift_ds.simulation.accelerator
    import hift_ds.simulation.step  # noqa: F401

    outcomes = [_outcome_in_child(row) for row in json.load(sys.stdin)]
    print(json.dumps(outcomes), file=answers, flush=True)


if __name__ == "__main__":
    _main()
