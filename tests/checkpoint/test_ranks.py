"""Resuming on the same ranks (bit for bit) and on another number of ranks (within 1e-6 a step, no
conversion)."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hift_ds.checkpoint.saved_checkpoint import SavedCheckpoint
from tests.checkpoint.runs import Case, advance, interrupted_and_whole, whole_weights
from tests.checkpoint.test_exact_resume import CASES, Noisy
from tests.helpers.engines import ds_config

BF16 = {"enabled": True}
EXACT = [
    "accumulation", "bf16", "bf16, stochastic rounding", "turns", "slices", "stage 1", "stage 2",
    "stage 3, accumulation", "Adafactor", "Muon", "client optimizer", "dropout and buffers", "asynchronous",
    "asynchronous, stage 3",
]  # fmt: skip
MOVES = [(1, 2), (2, 3), (3, 1), (4, 2)]


def elastic_cases(world_size):
    def config(**options):
        return ds_config(world_size=world_size, **options)

    return {
        "AdamW": Case(config(hift={"steps_per_group": 2}), at=(7,), num_micro_batches=12),
        "accumulation": Case(config(gas=3, clip=0.05), at=(7,), num_micro_batches=12),
        "bf16": Case(config(bf16=BF16, hift={"state": {"slice_numel": 17}}), at=(7,), num_micro_batches=9),
        "Adafactor": Case(config(optimizer="Adafactor"), at=(7,), num_micro_batches=11),
        "Muon": Case(config(optimizer="Muon"), at=(7,), num_micro_batches=11),
        "stage 3, Muon": Case(
            config(stage=3, optimizer="Muon", hift={"order": "random"}), at=(6,), num_micro_batches=10
        ),
        "stage 3, buffers": Case(config(stage=3), model=Quiet, at=(7,), num_micro_batches=10),
    }


class Quiet(Noisy):
    """Without dropout, whose draws depend on the number of ranks."""

    def forward(self, tokens, targets):
        self.eval()
        return super().forward(tokens, targets)


def run_elastic(folder: str) -> list[str]:
    """Everything that is to move to this number of ranks moves here; then leave checkpoints for the next
    one."""
    folder, rank, world_size = Path(folder), dist.get_rank(), dist.get_world_size()
    moved = []
    for name, case in elastic_cases(world_size).items():
        moved += [f"{name}: {source} to {world_size}" for source in move_here(case, name, folder, rank, world_size)]
        if not (folder / name / str(world_size)).exists():
            uninterrupted(case, folder / name / str(world_size), rank, world_size)
    return moved


def run_exact(folder: str) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for name in EXACT:
        torch.manual_seed(100 + rank)
        interrupted_and_whole(CASES[name], Path(folder) / name, rank, world_size)


def uninterrupted(case, folder, rank, world_size):
    """Save once on the way, and keep the weights after every later step."""
    engine = case.engine(seed=0)

    def keep(i):
        if i in case.at:
            engine.save_checkpoint(folder)
        if i >= case.at[0]:
            weights = whole_weights(engine)
            if rank == 0:
                torch.save(weights, folder / f"weights.{i}.pt")

    advance(engine, 0, case.num_micro_batches, rank, world_size, keep)
    engine.destroy()


def move_here(case, name, folder, rank, world_size):
    """Resume every checkpoint of a world size that is to move to this one."""
    for source, target in MOVES:
        if (
            target == world_size
            and (folder / name / str(source)).exists()
            and not (folder / name / f"{source}-{target}").exists()
        ):
            resume_elsewhere(case, folder / name / str(source), rank, world_size)
            yield source


def resume_elsewhere(case, folder, rank, world_size):
    engine = case.engine(seed=9)
    path, _ = engine.load_checkpoint(folder)
    start, low = case.at[0], "bf16" in case.config
    again = folder.with_name(f"{folder.name}-{world_size}")
    assert engine.save_checkpoint(again)  # before any step: the same elements, cut differently
    same_elements(SavedCheckpoint(Path(path)), SavedCheckpoint(again / Path(path).name))

    def compare(i):
        weights = whole_weights(engine)
        expected = torch.load(folder / f"weights.{i}.pt")
        # A bf16 weight near the middle of two values rounds either way; its master is compared above.
        tolerance = 0.01 if low else 1e-6 * (i - start)
        for n, weight in expected.items():
            difference = (weights[n].float() - weight.float()).abs().max().item()
            assert difference <= tolerance, (folder, world_size, n, i, difference)

    advance(engine, start, case.num_micro_batches, rank, world_size, compare)
    engine.destroy()


def same_elements(a: SavedCheckpoint, b: SavedCheckpoint):
    assert a.weight_names and set(a.weight_names) == set(b.weight_names)
    for name in a.weight_names:
        assert torch.equal(a.weight(name), b.weight(name)), name
    compared = 0
    for name, entry in a.parameters.items():
        assert a.states.keys(name) == b.states.keys(name) and a.states.scalars(name) == b.states.scalars(name), name
        assert entry == b.parameters[name]
        for key in a.states.keys(name):
            numel = torch.Size(entry["shape"]).numel()
            if a.states.is_flat(name, key):
                left, right = a.states.elements(name, key, 0, numel), b.states.elements(name, key, 0, numel)
            else:
                left, right = a.states.shaped(name, key), b.states.shaped(name, key)
            assert torch.equal(left, right), (name, key)
            compared += 1
    assert compared


@pytest.mark.distributed
def test_resume_on_the_same_ranks(launcher, tmp_path):
    launcher.run(run_exact, 2, str(tmp_path))


@pytest.mark.distributed
def test_resume_on_another_number_of_ranks(launcher, tmp_path):
    moved = [
        line for world_size in (1, 2, 3, 4, 2, 1) for line in launcher.run(run_elastic, world_size, str(tmp_path))[0]
    ]
    assert set(moved) == {f"{name}: {a} to {b}" for name in elastic_cases(1) for a, b in MOVES}
