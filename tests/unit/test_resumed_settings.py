"""Every setting that is another when a run goes on is refused or said, and what is said is true."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from hift_ds.errors import CheckpointError
from hift_ds.report.metrics import read_metrics
from hift_ds.train import finetune as module
from hift_ds.train.finetune import finetune
from hift_ds.train.resumed_settings import (
    CHANGED,
    ELSEWHERE,
    KEPT,
    REFUSED,
    RESOLVED,
    RULES,
    SETTINGS_FILE,
    compare,
    fingerprint,
    read_settings,
    settings_text,
)
from hift_ds.train.run_config import RunConfig, load_run_config
from tests.unit.test_launch import inputs, own_cache, weights_in, write_run  # noqa: F401  (fixtures)


def all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from all_keys(info.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


KEYS = list(all_keys(RunConfig))


def test_every_key_of_the_run_file_has_a_rule():
    assert set(KEYS) <= RULES.keys(), "a new key: say in RULES what becomes of it when a run goes on with another value"
    assert set(RULES) - set(KEYS) == {"hift: false", "training data", "model config"}
    assert set(RESOLVED.values()) <= set(KEYS)


@pytest.mark.parametrize("key", [key for key in KEYS if RULES[key][0] != ELSEWHERE and key != "deepspeed"])
def test_another_value_of_any_key_is_refused_or_said_once(key):
    def settings(value: Any) -> dict[str, Any]:
        place, run, deepspeed = key.split("."), {}, {}
        if key in RESOLVED.values():
            place = next(theirs for theirs, ours in RESOLVED.items() if ours == key).split(".")
            place += ["betas"] if key == "train.optimizer_args" else []
        below = deepspeed if key in RESOLVED.values() else run
        for part in place[:-1]:
            below = below.setdefault(part, {})
        below[place[-1]] = value
        return {"run": run, "deepspeed": deepspeed}

    assert compare(settings("one"), settings("one")).lines("folder") == []
    found = compare(settings("one"), settings("two"))
    lists = {REFUSED: found.refused, KEPT: found.kept, CHANGED: found.changed}
    assert [len(lines) for what, lines in lists.items() if what != RULES[key][0]] == [0, 0]
    (line,) = lists[RULES[key][0]]
    assert line.startswith(key) and "one" in line and "two" in line


def test_what_the_keys_lead_to():
    run = {"run": {"hift": {}}}
    assert compare(run, {"run": {"hift": False}}).refused == (
        "hift: false false -> true (its states are of another engine)",
    )
    with pytest.raises(CheckpointError, match="saved with other settings: hift: false"):
        compare(run, {"run": {"hift": False}}).raise_refused("folder")
    other = {**run, "deepspeed": {"zero_optimization": {"stage": 2}}, "model config": {"rms_norm_eps": 1e-5}}
    assert compare(run, other).changed == (
        "deepspeed.zero_optimization.stage null -> 2",
        "model config.rms_norm_eps null -> 1e-05 (the model computes something else)",
    )


def test_fingerprints_are_of_the_rows_and_their_order():
    from datasets import Dataset

    rows = [{"input_ids": list(range(n)), "labels": [-100] * n} for n in (3, 5, 2)]
    data = Dataset.from_list(rows)
    same = Dataset.from_list([{"input_ids": [9], "labels": [9]}, *rows]).select([1, 2, 3])
    assert fingerprint(data) == fingerprint(same) and fingerprint(data)["rows"] == 3
    others = [[*rows, rows[0]], rows[::-1], [{**rows[0], "labels": [-100, -100, 1]}, *rows[1:]]]
    assert len({json.dumps(fingerprint(Dataset.from_list(other))) for other in [rows, *others]}) == 4


def test_settings_that_are_not_what_was_written_are_said(tmp_path, caplog):
    """A changed letter that leaves valid JSON too; what an earlier version wrote, without a checksum, is read."""
    settings = {"run": {"train": {"learning_rate": 1e-05}}, "deepspeed": {}, "model config": {}, "training data": {}}
    file = tmp_path / SETTINGS_FILE
    file.write_text(settings_text(settings))
    assert read_settings(tmp_path) == settings
    module._compare_settings(tmp_path, settings)
    assert not caplog.records
    for content in (file.read_text().replace("1e-05", "1e-06"), "[]", "{", json.dumps({"crc32": None})):
        file.write_text(content)
        assert read_settings(tmp_path) is None
        caplog.clear()
        module._compare_settings(tmp_path, settings)
        [record] = caplog.records
        assert "settings.json is missing or is not what was written" in record.getMessage()
    file.write_text(json.dumps(settings))
    assert read_settings(tmp_path) == settings


def test_what_is_said_is_true(inputs, tmp_path, caplog):  # noqa: F811
    """Kept: rate, decay, seed. Changed: the schedule's length, the rows, the model's config."""
    data = tmp_path / "data.jsonl"
    shutil.copy(inputs / "data.jsonl", data)
    model = tmp_path / "model"
    shutil.copytree(inputs / "model", model)
    out = tmp_path / "run"
    options = {"train__eval_steps": None, "train__save_steps": 5, "data__val_size": 0, "train__max_steps": 5}
    file = write_run(inputs, out, model__path=str(model), data__train=str(data), train__weight_decay=0.0, **options)
    finetune(load_run_config(file))
    with data.open("a") as more:
        more.write("\n" + data.read_text().splitlines()[0])
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    seen = {}

    def look(trainer, *rest):
        seen["decay"] = [group["weight_decay"] for group in trainer.engine.optimizer.param_groups]
        seen["eps"] = trainer.model.config.rms_norm_eps
        return real(trainer, *rest)

    real, module.training_results = module.training_results, look
    caplog.clear()
    changes = [
        "train.learning_rate=0.5",
        "train.weight_decay=0.3",
        "train.seed=7",
        "train.max_steps=10",
        "export.dtype=bf16",
    ]
    try:
        finetune(load_run_config(file, changes))
    finally:
        module.training_results = real
    kept = next(r.getMessage() for r in caplog.records if r.getMessage().startswith("going on with settings of"))
    changed = next(r.getMessage() for r in caplog.records if r.getMessage().startswith("changed since"))
    for text in (
        "train.learning_rate 0.01, not 0.5",
        "train.weight_decay 0.0, not 0.3",
        "train.seed 42, not 7",
    ):
        assert text in kept and text.split()[0] not in changed
    for text in (
        "train.max_steps 5 -> 10",
        "training data 44 -> 45",
        "rms_norm_eps 1e-06 -> 0.5",
        "export.dtype auto -> bf16",
    ):
        assert text in changed and text.split()[0] not in kept
    rates = [record["lr"] for record in read_metrics(out).steps]
    assert len(rates) == 10 and max(rates) <= 0.01
    # The second cycle begins at step 5 of a cosine over 10, although the schedule of 5 steps had ended at 0.
    assert rates[5:] == pytest.approx([0.005] * 5)
    assert set(seen["decay"]) == {0.0} and seen["eps"] == 0.5
    with pytest.raises(CheckpointError, match="saved with other settings: train.optimizer AdamW -> Adafactor"):
        finetune(load_run_config(file, [*changes, "train.max_steps=11", "train.optimizer=Adafactor"]))
    assert "changed since" not in json.dumps(json.loads((out / "checkpoint-10" / "settings.json").read_text()))
