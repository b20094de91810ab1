"""From how many tokens a step on the link hides the update in backward, by card and form of the states.

    python benchmarks/in_backward_tokens.py          seconds: arithmetic, no model is built

writes benchmarks/results/in_backward_tokens.md.

The arithmetic of ``"group_size": "auto"`` and of ``hift-ds estimate`` (``hift_ds.store.hiding``) with the sustained
rates that ``benchmarks/timeline.py`` assumes for each card; neither measured nor driven by the engine's log, as the
tokens of benchmarks/results/timeline_in_backward.md are. LLaMA-2-7B, AdamW, one rank, no recomputation; whole parts in
slots.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "in_backward_tokens.md"
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from timeline import CARDS, IN_BACKWARD  # noqa: E402

from hift_ds.config import StateConfig  # noqa: E402
from hift_ds.store.hiding import BackwardCosts, layers_hidden, tokens_that_hide  # noqa: E402
from hift_ds.store.speeds import ASSUMED_SPEEDS, Speeds  # noqa: E402

BLOCK, EDGE, NUM_BLOCKS = 202_383_360, 131_072_000, 32
PARTS = [EDGE, *[BLOCK] * NUM_BLOCKS, EDGE + 4096]
WEIGHT_BYTES = 2  # of a parameter, and of its gradient
SLOTS = (2, 8)
TOKENS = (4096, 16384)


EXAMPLE = ("A6000", "none", 2, 8192)  # of the line that a run says

PAGE = """\
# From how many tokens a step on the link hides the update in backward

`python benchmarks/in_backward_tokens.py`. **Computed, not measured**: the arithmetic of `"group_size": "auto"` with the
rates that `benchmarks/timeline.py` assumes for each card. LLaMA-2-7B, AdamW, bf16 with fp32 masters, one rank, 25 GB/s
each way, no recomputation, whole parts in slots. Hidden: steps wait for at most 5 % of their computing. No clipping, or
one that waits for nothing; clipped exactly, updates begin when backward has ended and gradients come back for them. The
host's help is `"step_on": "split"` with an update of {host_ns:g} ns a parameter on the host, also assumed.

"""


def costs_of(name: str, codec: str, slots: int, is_clipped: bool = False) -> BackwardCosts:
    """What an estimate would assume on one of ``CARDS``. An update reads and writes a parameter's states, gradient and
    weight.

    Args:
        is_clipped: exactly.
    """
    card = CARDS[name]
    state = StateConfig(slots=slots, codec=() if codec == "none" else codec)  # type: ignore[arg-type]  # is parsed
    speeds = Speeds(card.flops_s, card.link_s, device_s=32 / card.bytes_s)
    parked = WEIGHT_BYTES if is_clipped else None
    return BackwardCosts.assumed(
        WEIGHT_BYTES, max(PARTS), state, masters=True, ranks=1, parked_bytes=parked, speeds=speeds
    )


def table() -> Iterator[str]:
    yield ("| card | `codec` | bytes each way | slots | all layers hidden from, tokens | clipped exactly, from | "
           "layers a step at " + " | at ".join(f"{tokens:,} tokens" for tokens in TOKENS)
           + f" | clipped exactly, at {TOKENS[-1]:,} | with the host's help |")  # fmt: skip
    yield "|---|---|---|---|---|---|" + "---|" * (len(TOKENS) + 2)
    for name, codec, slots in itertools.product(CARDS, IN_BACKWARD, SLOTS):
        costs, clipped = costs_of(name, codec, slots), costs_of(name, codec, slots, is_clipped=True)
        sizes = [layers_hidden(costs, PARTS, tokens).group_size for tokens in TOKENS]
        sizes.append(layers_hidden(clipped, PARTS, TOKENS[-1]).group_size)
        split = layers_hidden(costs, PARTS, TOKENS[0], split=True)
        helped = f"{split.group_size} at {TOKENS[0]:,} ({split.costs.share:.0%} on the host)"
        enough = " | ".join(_or_never(tokens_that_hide(each, PARTS)) for each in (costs, clipped))
        moved = f"{costs.state_bytes:.3g}"
        yield f"| {name} | {codec} | {moved} | {slots} | {enough} | {' | '.join(map(str, sizes))} | {helped} |"


def _or_never(tokens: int | None) -> str:
    return f"{tokens:,}" if tokens else "never"


def main() -> None:
    name, codec, slots, tokens = EXAMPLE
    said = layers_hidden(costs_of(name, codec, slots), PARTS, tokens).line()
    example = (
        f"What a run says, on an {name} with {slots} slots and {tokens:,} tokens a step:\n\n    group size auto: {said}"
    )
    text = PAGE.format(host_ns=1e9 * ASSUMED_SPEEDS.host_s) + "\n".join(table()) + f"\n\n{example}\n"
    OUT.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
