"""From how many tokens a step on the link hides the update in backward, by card and form of the states.

    python benchmarks/in_backward_tokens.py          seconds: arithmetic, no model is built

The arithmetic of ``"group_size": "auto"`` (``hift_ds.store.hiding``) with the sustained rates that
``benchmarks/timeline.py`` assumes for each card; neither measured nor driven by the engine's log. LLaMA-2-7B, AdamW,
one rank, no recomputation; whole parts in slots.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from timeline import CARDS  # noqa: E402

from hift_ds.store.hiding import BackwardCosts, layers_hidden, tokens_that_hide  # noqa: E402
from hift_ds.store.speeds import Link  # noqa: E402

BLOCK, EDGE, NUM_BLOCKS = 202_383_360, 131_072_000, 32
PARTS = [EDGE, *[BLOCK] * NUM_BLOCKS, EDGE + 4096]
BYTES = {"none": 12.0, "split_master": 10.0, "split_master+int8_moments": 4.03}
SLOTS = (2, 8)
TOKENS = (4096, 16384)


def main() -> None:
    print("| card | `codec` | bytes each way | slots | all layers hidden from, tokens | layers a step at "
          + " | at ".join(f"{tokens:,} tokens" for tokens in TOKENS) + " | with the host's help |")  # fmt: skip
    print("|---|---|---|---|---|" + "---|" * (len(TOKENS) + 1))
    for name, card in CARDS.items():
        for codec, size in BYTES.items():
            for slots in SLOTS:
                # An update reads and writes a parameter's states, gradient and weight.
                costs = BackwardCosts(
                    size, slots * BLOCK, card.flops_s, Link(card.link_s, card.link_s),
                    device_s=32 / card.bytes_s, host_link=Link(card.link_s, card.link_s),
                )  # fmt: skip
                sizes = [layers_hidden(costs, PARTS, tokens).group_size for tokens in TOKENS]
                split = layers_hidden(costs, PARTS, TOKENS[0], split=True)
                helped = f"{split.group_size} at {TOKENS[0]:,} ({split.costs.share:.0%} on the host)"
                tokens = tokens_that_hide(costs, PARTS)
                row = [
                    name,
                    codec,
                    f"{size:g}",
                    str(slots),
                    f"{tokens:,}" if tokens else "never",
                    *map(str, sizes),
                    helped,
                ]
                print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
