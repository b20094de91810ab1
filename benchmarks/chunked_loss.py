"""A language head's loss: whole logits, ours in tiles, and torch's ``linear_cross_entropy``, side by side.

    python benchmarks/chunked_loss.py [--rows 2048] [--hidden 1024] [--vocabulary 32000]

bf16 on the CPU; prints for each the peak of what forward and backward allocate, the CPU time of both, and how far loss
and gradients are from those in fp64.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hift_ds.activations.chunked_loss import LinearCrossEntropy  # noqa: E402
from hift_ds.simulation.tracker import MemoryTracker, Timeline, Watch  # noqa: E402

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def whole(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What transformers computes: logits in the weights' dtype, their loss in fp32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def in_tiles(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Ours."""
    return LinearCrossEntropy.apply(hidden, weight, None, targets, -100, lambda logits: logits).mean()


def torchs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Of torch 2.13."""
    return F.linear_cross_entropy(hidden, weight, targets)


def run(loss_of: Loss, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[float, list[Tensor]]:
    """Seconds of this process, and [loss, gradient of hidden, gradient of weight]."""
    hidden, weight = (tensor.detach().clone().requires_grad_() for tensor in (hidden, weight))
    started = time.process_time()
    loss = loss_of(hidden, weight, targets)
    loss.backward()
    return time.process_time() - started, [loss.detach(), hidden.grad, weight.grad]


def peak_mib(loss_of: Loss, hidden: Tensor, weight: Tensor, targets: Tensor) -> float:
    """The most that forward and backward hold beside the inputs, gradients included."""
    tracker = MemoryTracker("cpu")
    with Watch(tracker):
        tracker.mark("step")
        run(loss_of, hidden, weight, targets)
    inputs = sum(tensor.numel() * tensor.element_size() for tensor in (hidden, weight))
    return (Timeline(tracker).peak(0, len(tracker.events)).num_bytes - inputs) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("rows", 2048), ("hidden", 1024), ("vocabulary", 32_000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(args.rows, args.hidden, generator=generator).bfloat16()
    weight = (torch.randn(args.vocabulary, args.hidden, generator=generator) / args.hidden**0.5).bfloat16()
    targets = torch.randint(args.vocabulary, (args.rows,), generator=generator)
    exact = run(lambda h, w, t: F.cross_entropy(F.linear(h, w), t), hidden.double(), weight.double(), targets)[1]
    ways: dict[str, Loss] = {"whole logits": whole, "ours, in tiles": in_tiles}
    if hasattr(F, "linear_cross_entropy"):
        ways["torch.nn.functional.linear_cross_entropy"] = torchs
    print("| | peak, MiB | CPU s | loss off by | gradient of hidden | of weight |\n|---|---|---|---|---|---|")
    for name, loss_of in ways.items():
        seconds, found = run(loss_of, hidden, weight, targets)
        off = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
        peak = peak_mib(loss_of, hidden, weight, targets)
        print(
            f"| {name} | {peak:,.0f} | {seconds:.1f} | {' | '.join(f'{error:.1e}' for error in off)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
