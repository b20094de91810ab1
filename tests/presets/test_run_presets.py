"""Every run file in model_zoo/presets/ is complete: it parses, its configs exist, its model can be cut, its
header is true."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

import model_zoo
from hift_ds.forecast.fit import GIB, budget_gib, leanest_setting
from hift_ds.forecast.steps import Request, read_structure, run_requests, worst_step
from hift_ds.hf.model_structure import build_on_meta
from hift_ds.layers.grouping import partition_model
from hift_ds.train.fit import Facts, free_keys, setting_of
from hift_ds.train.run_config import load_run_config
from hift_ds.train.settings import (
    read_deepspeed,
    resolve,
    resolve_dtype,
    training_arguments,
)
from hift_ds.train.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "model_zoo" / "presets").glob("*.yaml"))


def size_of(file: Path) -> str:
    return max((size for size in model_zoo.SIZES if f"{file.stem}_".startswith(f"{size}_")), key=len)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_preset_is_complete(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # its DeepSpeed JSON is found from anywhere
    run = load_run_config(file)
    ds = read_deepspeed(run)
    assert ds["hift"] and (ROOT / "ds_configs" / f"{run.deepspeed}.json").is_file()
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", run.model.path)  # a hub name, which needs no folder here
    dtype = resolve_dtype(resolve(run, 1), "bf16" if "fp32" not in run.deepspeed else "fp32")
    for world_size in (1, 2, 4, 8):
        batch = resolve(run, world_size).batch
        assert batch.micro_batch_size * batch.gradient_accumulation_steps * world_size == run.train.global_batch_size
        options = training_arguments(resolve(run, world_size), dtype, has_eval=True)
        assert options["deepspeed"]["train_batch_size"] == run.train.global_batch_size
        assert options["bf16"] == (dtype == "bf16") == ("bf16" in run.deepspeed)
    assert run.data.max_length <= getattr(model_zoo.config(size_of(file)), "max_position_embeddings", 512)
    assert run.train.output_dir == f"runs/{file.stem}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_header_gives_the_command_and_true_numbers(file):
    header = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert re.search(rf" hift-ds train {file.stem}( data.train=\S+)?$", header[1])
    assert f"deepspeed --module hift_ds.launch {file.stem} " in header[2]
    model = build_on_meta(model_zoo.config(size_of(file)))
    run = load_run_config(file)
    block = resolve(run, 1).hift
    partition = partition_model(
        model, group_size=block.group_size, patterns=block.groups, always_active=block.always_active
    )
    numel = sum(group.numel for group in partition.groups) + (partition.always.numel if partition.always else 0)
    assert numel == sum(param.numel() for param in model.parameters())
    if block.always_active:
        assert partition.always.numel >= model.get_input_embeddings().weight.numel()
    is_fp32 = "fp32" in run.deepspeed
    billions, weights_gb, host_gb = (float(n) for n in re.findall(r"(\d+\.\d+) (?:B|GB)", header[3]))
    assert billions == pytest.approx(numel / 1e9, abs=0.005)
    assert weights_gb == pytest.approx((4 if is_fp32 else 2) * numel / 1e9, abs=0.05)
    assert host_gb == pytest.approx((8 if is_fp32 else 12) * numel / 1e9, abs=0.05)


def card_of(file: Path) -> int | None:
    """GB of the GPU that its header names."""
    found = re.search(r"meant for one GPU with (\d+) GB or more:$", file.read_text().splitlines()[0])
    return int(found[1]) if found else None


def test_a_header_names_a_card_unless_any_will_do():
    for file in FILES:
        model = build_on_meta(model_zoo.config(size_of(file)))
        is_small = 16 * sum(param.numel() for param in model.parameters()) < 8 * GIB
        assert (card_of(file) is None) == is_small, file.name


def leanest_peak_gib(file: Path, *overrides: str) -> float:
    """Counted, on one GPU, of its worst group, with everything on that ``hift.fit`` may turn on, but for streamed
    weights."""
    run = load_run_config(file, overrides)
    settings = resolve(run, 1)
    dtype = resolve_dtype(settings, "bf16" if "fp32" not in run.deepspeed else "fp32")
    asked = setting_of(Facts(settings, dtype, size_of(file), run.data.max_length, None))
    leanest, _ = leanest_setting(replace(asked, batch=1), free_keys(settings, is_host=False))
    (steps,) = run_requests([Request(leanest, read_structure(leanest), ends_only=True)])
    return worst_step(steps).peak_bytes / GIB


@pytest.mark.slow
@pytest.mark.parametrize("update", ["after_backward", "in_backward"])
@pytest.mark.parametrize("file", [file for file in FILES if card_of(file)], ids=lambda file: file.stem)
def test_fits_the_card_that_its_header_names(file, update):
    """As it is, and with all layers updated in backward, where it does not say which layers a step trains."""
    overrides = [f"hift.update={update}"]
    given = resolve(load_run_config(file), 1).hift.model_fields_set
    if update == "after_backward" and "update" in given:
        pytest.skip("it says update: in_backward")
    if update == "in_backward" and not given & {"group_size", "always_active", "steps_per_group"}:
        overrides.append("hift.group_size=all")
    peak = leanest_peak_gib(file, *overrides)
    print(f"{file.stem}, {update}: {peak:.2f} GiB of {budget_gib(card_of(file), 1):.2f}")
    assert peak <= budget_gib(card_of(file), 1)


def test_every_task_has_one():
    assert {load_run_config(file).task for file in FILES} >= set(TASKS) - {"text"}  # which needs texts of one's own


def test_the_common_models_have_one():
    assert {"smollm2_135m", "llama2_7b", "llama3_8b", "qwen2.5_7b", "mistral_7b"} <= {file.stem for file in FILES}
