"""Whether a delay of any kind of work changes a bit of the weights: the check ``races`` of validate.py."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu.checks import Asked, Found, config_of, engine_of, leaves_no_memory

SLEEP_CYCLES = 80_000_000  # of ``torch.cuda._sleep``: about 50 ms


@dataclass(frozen=True)
class Race:
    """A run whose weights must be those of another one, which has its states on the device and nothing held back.

    Attributes:
        columns: of the table: where states rest.
        state: the same for the engine; ``alone`` is the other run's.
        more: arguments of :func:`trajectory`, for both runs.
        weights_on_host: of the first run, as of :func:`trajectory`.
        within: how far apart a weight of the two may be.
    """

    columns: dict[str, Any]
    state: dict[str, Any]
    alone: dict[str, Any] = field(default_factory=lambda: {"residency": "device"})
    more: dict[str, Any] = field(default_factory=dict)
    weights_on_host: bool = False
    within: float = 0.0


def races(asked: Asked) -> Found:
    """No bit depends on where states rest, also when each kind of work is held back in turn; and with the wait taken
    out that orders copies without prefetch, a delay must show."""

    found = Found("races")
    width, steps = (64, 9) if asked.tiny else (8192, 12)
    delays = ("none", "updates", "writes", "copies") if asked.on_gpu else ("none",)
    other: tuple[dict[str, Any], ...] = ()
    with tempfile.TemporaryDirectory() as folder:
        for race in _races(asked, width, folder):
            if (race.alone, race.more) != other:  # several are held against one
                other = race.alone, race.more
                expected = trajectory(asked, width, steps, race.alone, "none", **race.more)
            for delay in (*delays, "gathers") if race.weights_on_host and asked.on_gpu else delays:
                weights = trajectory(
                    asked, width, steps, race.state, delay, weights_on_host=race.weights_on_host, **race.more
                )
                apart = furthest_apart(weights, expected)
                found.rows.append({**race.columns, "held back": delay, "same bits": apart == 0, "apart": apart})
                found.require(apart <= race.within, f"{race.state}, {race.more}, {delay} held back: {apart} apart")
        if asked.on_gpu:
            state = {"residency": "disk", "prefetch": False, "path": folder}
            expected = trajectory(asked, width, steps, {"residency": "device"}, "none")
            with without_the_wait():
                apart = furthest_apart(trajectory(asked, width, steps, state, "updates"), expected)
            found.rows.append({"residency": "disk", "slots": 0, "codec": "fp32", "sliced": False,
                               "held back": "updates, and the wait for them is taken out",
                               "same bits": apart == 0, "apart": apart})  # fmt: skip
            found.require(apart != 0, "a wait was taken out and no bit changed: the delays show nothing")
    return found


def _races(asked: Asked, width: int, folder: str) -> Iterator[Race]:
    """Those that are held against the same other run one after the other."""
    disk = {"residency": "disk", "path": folder}
    for codec, slice_numel in itertools.product(("fp32", "split_master+int8_moments"), (None, width * width // 3)):
        base = {"codec": codec, **({"slice_numel": slice_numel} if slice_numel else {})}
        counts = (0, 1, 2, 4) if slice_numel else (0, 1, 2)
        for place, slots in itertools.product(({"residency": "host"}, disk), counts):
            columns = {"residency": place["residency"], "slots": slots, "codec": codec, "sliced": bool(slice_numel)}
            state = {**base, **place, "prefetch": slots > 0, **({"slots": slots} if slots else {})}
            yield Race(columns, state, alone={**base, "residency": "device"})
    plain = {"codec": "fp32", "sliced": False}
    yield Race({"residency": "host, weights too", "slots": 1, **plain}, {}, weights_on_host=True)
    for (name, more), place in itertools.product(MODES.items(), ({"residency": "host"}, disk)):
        columns = {"residency": place["residency"], "slots": 2, **plain, "mode": name}
        yield Race(columns, {**place, "slots": 2}, more=more)
    for step_on, share in (("host", {}), ("split", {"host_share": 0.5})):
        columns = {"residency": "host", "slots": 2, **plain, "mode": f"step_on {step_on}"}
        # Two layers a group: else there is nothing to divide. Two processors round each in its own way.
        yield Race(columns, {"step_on": step_on, "slots": 2, **share}, more={"layers_a_group": 2},
                   within=1e-2 if asked.on_gpu else 0.0)  # fmt: skip


# Each of a step's layers is updated while backward goes on below it.
MODES: dict[str, dict[str, Any]] = {
    "in backward": {"layers_a_group": 4, "hift": {"update": "in_backward"}},
    "in backward, by speculation": {
        "layers_a_group": 4, "hift": {"update": "in_backward", "clipping": "speculative"},
    },
    "in backward, two micro-batches": {"layers_a_group": 4, "micro_batches": 2, "hift": {"update": "in_backward"}},
}  # fmt: skip


@leaves_no_memory
def trajectory(
    asked: Asked,
    width: int,
    steps: int,
    state: dict[str, Any],
    delay: str,
    weights_on_host: bool = False,
    layers_a_group: int = 1,
    micro_batches: int = 1,
    hift: dict[str, Any] | None = None,
) -> list[Any]:
    """Weights at the end, on the host.

    Args:
        weights_on_host: ZeRO-3 with ``offload_param``.
        hift: more of that block.
    """
    import torch
    from torch import nn

    torch.manual_seed(0)
    model = nn.Sequential()
    like = {"device": asked.device, "dtype": torch.bfloat16}
    model.layers = nn.ModuleList(nn.Linear(width, width, bias=False, **like) for _ in range(4))
    model.forward = lambda x: sum(layer(x).float().square().mean() for layer in model.layers)
    groups = [[f"layers.{i}." for i in range(at, at + layers_a_group)] for at in range(0, 4, layers_a_group)]
    config = config_of(
        state, stage=3 if weights_on_host else 0, gradient_accumulation_steps=micro_batches,
        hift={"groups": groups, **(hift or {})},
    )  # fmt: skip
    if weights_on_host:
        offload = {"device": "cpu", "pin_memory": asked.on_gpu}
        config["zero_optimization"] |= {"offload_param": offload, "stage3_param_persistence_threshold": 0}
    engine = engine_of(model, config)
    with held_back(delay):
        for number in range(steps * micro_batches):
            generator = torch.Generator().manual_seed(number)
            x = torch.randn(4, width, generator=generator).to(asked.device, torch.bfloat16)
            engine.backward(engine(x))
            engine.step()
    parameters = engine.optimizer.parameters
    weights = [parameters.whole_weight(p).to("cpu", copy=True) for p in model.parameters()]
    engine.destroy()
    return weights


def furthest_apart(one: list[Any], other: list[Any]) -> float:
    """The largest difference of a weight in one and in the other; not a number where a weight is none."""
    import torch

    return float(torch.stack([(a.float() - b.float()).abs().max() for a, b in zip(one, other, strict=True)]).max())


@contextlib.contextmanager
def held_back(delay: str) -> Iterator[None]:
    """Inside, a kernel that does nothing for 50 ms stands in front of each of these."""
    import torch

    from hift_ds.engine.zero3 import host_shards, seam
    from hift_ds.optim import parameters, piecewise
    from hift_ds.store import movers

    places: list[tuple[Any, str]] = {
        "updates": [(piecewise.PiecewiseOptimizer, "step")],
        "writes": [(parameters, "write_weight_"), (host_shards, "write_weight_")],
        "copies": [(movers, "_run")],
        "gathers": [(seam, "start_copies")],
    }.get(delay, [])

    def after_a_while(real: Callable[..., Any]) -> Callable[..., Any]:
        def late(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is threading.main_thread():
                torch.cuda._sleep(SLEEP_CYCLES)
            else:  # copies between disk and device: the thread waits for them, and its stream is the computation's
                time.sleep(0.05)
            return real(*args, **kwargs)

        return late

    before = [getattr(owner, name) for owner, name in places]
    for (owner, name), real in zip(places, before, strict=True):
        setattr(owner, name, after_a_while(real))
    try:
        yield
    finally:
        for (owner, name), real in zip(places, before, strict=True):
            setattr(owner, name, real)


@contextlib.contextmanager
def without_the_wait() -> Iterator[None]:
    from hift_ds.store import movers

    real = movers.InlineMover.submit

    def submit(self: Any, direction: str, copy: Callable[[], None], after: Any = ()) -> None:
        copy()

    movers.InlineMover.submit = submit
    try:
        yield
    finally:
        movers.InlineMover.submit = real
