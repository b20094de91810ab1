"""What an installation without the extra "train" can do: everything but the commands, which name the extra."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hift_ds.errors import COMMANDS_IMPORT

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_EXTRA = f"import sys\nfor name in {COMMANDS_IMPORT!r}: sys.modules[name] = None\n"

TRAINS = WITHOUT_EXTRA + textwrap.dedent("""
    import os
    os.environ["DS_ACCELERATOR"] = "cpu"
    from transformers import TrainingArguments
    import model_zoo
    from hift_ds import HiFTTrainer, deepspeed_config, errors
    from hift_ds.cli.main import main
    from hift_ds.train import worker
    from tests.helpers.trainer import ragged_dataset

    args = TrainingArguments(sys.argv[1], deepspeed=deepspeed_config("bf16_host"), bf16=True, max_steps=6, use_cpu=True,
                             save_steps=5, report_to="none", disable_tqdm=True)
    trainer = HiFTTrainer(model_zoo.tiny.build("llama"), args, train_dataset=ragged_dataset(12))
    trainer.train()
    assert min(trainer.engine.coverage().values()) >= 1
    assert trainer.evaluate(ragged_dataset(3, seed=1))["eval_loss"] > 0

    import hift_ds.simulation.__main__  # the process that answers a run out of memory
    print("base trains")
    codes = main(["groups", "llama2_7b"]), worker.main(["smollm2_135m"])
    print("codes", codes)
""")


def test_engine_trainer_and_forecast_need_none_of_what_only_the_commands_import(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", TRAINS, str(tmp_path)], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert "base trains" in done.stdout, done.stderr[-3000:]
    assert "codes (2, 2)" in done.stdout, done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("hift-ds: error")]
    assert lines == [
        "hift-ds: error: this needs rich, not installed here; pip install 'hift_ds[train]'",
        "hift-ds: error: this needs datasets, matplotlib, rich, not installed here; pip install 'hift_ds[train]'",
    ]


@pytest.mark.parametrize("name", ["deepspeed", "transformers", "accelerate", "trl"])
def test_the_oldest_release_that_may_be_installed_was_run(name):
    """docs/versions.md has a row for it, and there it passes."""
    bound = re.search(rf'"{name}>=([0-9.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    lines = (ROOT / "docs" / "versions.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.count("|") == 4]
    found = [row[2] for row in rows if re.match(rf"{name} (\S+, )?{bound}(\.0)?\b", row[0], re.IGNORECASE)]
    assert len(found) == 1 and re.match(r"\d+ pass", found[0]), found


def test_the_extra_installs_what_the_commands_import():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements):
        return {text.split(">")[0].split("[")[0] for text in requirements}

    assert names(project["optional-dependencies"]["train"]) == {*COMMANDS_IMPORT, "protobuf"}
    assert not names(project["dependencies"]) & set(COMMANDS_IMPORT)
