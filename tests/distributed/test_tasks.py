"""Every task on two ranks, with replicated and with partitioned weights, as one rank: losses and scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hift_ds.report.metrics import read_metrics
from hift_ds.train.finetune import finetune
from hift_ds.train.run_config import load_run_config
from hift_ds.train.tasks import TASKS
from tests.helpers.distributed import run_distributed
from tests.unit.test_launch import own_cache  # noqa: F401  (a fixture)
from tests.unit.test_tasks import (  # noqa: F401  (fixtures)
    KINDS,
    folders,
    no_pictures,
    write,
)

pytestmark = pytest.mark.distributed
KTO = {"loss_type": "apo_zero_unpaired"}  # of rows one by one; the others compare the neighbours on a rank


def run_all(files: list[str]) -> list[dict[str, Any]]:
    found = []
    for file in files:
        run = load_run_config(file)
        results = finetune(run)
        losses = [row["loss"] for row in read_metrics(run.output_dir).steps if "loss" in row]
        found.append({"losses": losses} | {k: v for k, v in results.items() if k.startswith("eval_")})
    return found


def files_of(root: Path, models: Path, kinds: list[str], num_ranks: int, **options: Any) -> list[str]:
    files = []
    for kind in kinds:
        folder = root / f"{kind}_{num_ranks}"
        folder.mkdir(parents=True)
        rows = (4 if kind == "kto" else 2) // num_ranks
        # TRL's scores are means over batches, and rows that fill up the last one count twice: one batch has all rows.
        more = {"train__arguments": KTO, "train__eval_batch_size": 6 // num_ranks} if kind == "kto" else {}
        files.append(str(write(models, folder, kind, train__micro_batch_size=rows, train__max_grad_norm=0,
                               **more, **options)))  # fmt: skip
    return files


def compare(kinds: list[str], alone: list[dict[str, Any]], ranks: list[list[dict[str, Any]]]) -> None:
    for index, kind in enumerate(kinds):
        measured = [f"eval_{name}" for name in ("loss", *TASKS[KINDS[kind][0]].metrics)]
        for found in (rank[index] for rank in ranks):
            assert found["losses"] == pytest.approx(alone[index]["losses"], abs=1e-5), kind
            for name in (name for name in measured if name in alone[index]):
                assert found[name] == pytest.approx(alone[index][name], abs=1e-4, rel=1e-5), f"{kind}: {name}"


QUICK = ["reward", "token_classification"]
MANY = [kind for kind in KINDS if kind not in QUICK]


@pytest.mark.parametrize("kinds", [QUICK, pytest.param(MANY, marks=pytest.mark.slow)], ids=["quick", "many"])
@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_two_ranks_are_one_rank_with_the_merged_batch(folders, tmp_path, stage, kinds):  # noqa: F811
    if any(TASKS[KINDS[kind][0]].uses_trl for kind in kinds):
        pytest.importorskip("trl")
    deepspeed = {"zero_optimization": {"stage": stage}}
    alone = run_all(files_of(tmp_path, folders, kinds, 1))
    ranks = run_distributed(run_all, 2, files_of(tmp_path, folders, kinds, 2, deepspeed=deepspeed))
    compare(kinds, alone, ranks)
