"""A model small enough to step thousands of times, with what usually goes wrong: odd sizes that no world size
divides, a 1-element parameter, optional weight tying, and data that any rank can cut for itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

VOCAB, WIDTH = 11, 7


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 13)
        self.down = nn.Linear(13, WIDTH, bias=False)
        self.gain = nn.Parameter(torch.ones(1))  # fewer elements than ranks

    def forward(self, h: Tensor) -> Tensor:
        return h + self.gain * self.down(nn.functional.gelu(self.up(h)))


class Toy(nn.Module):
    """Embedding, ``num_layers`` blocks, norm and head: ``num_layers + 2`` layer groups."""

    def __init__(self, num_layers: int = 3, tied: bool = False, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(num_layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=not tied)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        h = self.embed(tokens)
        for layer in self.layers:
            h = layer(h)
        logits = self.head(self.norm(h))
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def make_batches(num: int, rows: int = 12, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """``num`` micro-batches of (tokens, targets), each (rows, 5)."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randint(0, VOCAB, (rows, 5), generator=generator),
            torch.randint(0, VOCAB, (rows, 5), generator=generator),
        )
        for _ in range(num)
    ]


def rows_of_rank(batch: tuple[Tensor, Tensor], rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    """This rank's equal part of a micro-batch, so that the mean over ranks is the mean over the batch."""
    return tuple(part.chunk(world_size)[rank] for part in batch)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return model(*batch)
