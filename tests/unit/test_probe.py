"""hift-ds estimate --probe: a real step beside the predicted one, or one line that says why not."""

from __future__ import annotations

import json

import pytest

import model_zoo
from hift_ds.cli import estimate as estimate_module
from hift_ds.cli import probe as probe_module
from hift_ds.cli.estimate_table import print_estimate
from hift_ds.cli.main import main
from hift_ds.errors import ConfigError
from hift_ds.forecast.setting import WORKSPACE_BYTES, GroupStep, Result, Setting
from hift_ds.store import machine as room

SMALL = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 3,
         "num_key_value_heads": 3, "vocab_size": 2048, "max_position_embeddings": 256}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model_zoo.config("llama2_7b", **SMALL).save_pretrained(path)
    return path


def test_the_command_measures_what_it_predicted(folder, monkeypatch, capsys):
    """All switches on but offloading, which a CPU has no use for. The estimate itself is left out: it takes longer."""
    asked = []
    monkeypatch.setattr(estimate_module, "estimate", lambda setting: asked.append(setting) or {"peak_gib": 1.0})
    assert main(["estimate", "--model", str(folder), "--batch", "2", "--length", "64", "--probe", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["probe"]
    assert asked[0].engine_config["hift"]["activations"]["offload"] is True
    assert found["device"] == "cpu" and found["measured_gib"] > 0.01
    assert found["predicted_gib"] == pytest.approx(found["measured_gib"], rel=0.01)


def test_the_table_has_both(capsys):
    from tests.unit.test_memory_estimate import KEYS

    figures = dict.fromkeys(KEYS, 1.0) | dict.fromkeys(
        ("numel", "num_groups", "gpus", "length", "batch", "pinned_gib", "checkpoint_gib", "state_gib_per_step",
         "flops_per_step", "flops_ratio_lora", "full_fine_tuning_peak_gib"), 1
    )  # fmt: skip
    figures |= {"model": "m", "phases": {}, "categories": {}, "worst_group": {"index": 3, "name": "layers.2"},
                "fits": [],
                "switched": {}, "switches": {}, "method": "counted", "assumptions": []}  # fmt: skip
    probe = {"device": "cuda", "group": "3 (layers.2)", "predicted_gib": 2.0, "measured_gib": 2.1}
    print_estimate({**figures, "probe": probe})
    out = capsys.readouterr().out
    assert (
        "One real step on cuda" in out
        and "3 (layers.2)" in out
        and "2.000" in out
        and "2.100" in out
        and "+5.00%" in out
    )


SETTING = Setting("llama2_7b", {"optimizer": {"type": "AdamW"}, "hift": {}})
STEP = GroupStep(0, "embed", 100, {"update:": {"weights": 8 << 30}}, {}, 1200, 0)


def test_one_line_when_it_cannot_be_done(monkeypatch):
    from dataclasses import replace

    monkeypatch.setattr(probe_module, "measure", lambda setting: pytest.fail("the model was built"))
    with pytest.raises(
        ConfigError, match="--probe: takes a step on one rank, and the estimate is for 2; leave --gpus out"
    ):
        probe_module.probe(replace(SETTING, world_size=2))
    numel = 1 << 30  # 12 GiB of states at 12 bytes
    monkeypatch.setattr(probe_module, "simulate", lambda settings: [Result(0, numel, [STEP])])
    monkeypatch.setattr(room, "host_bytes", lambda: room.HostBytes(16 << 30, 16 << 30))
    with pytest.raises(ConfigError, match=r"20.0 GiB of host memory \(states 12.0\), and 16.0 GiB are free"):
        probe_module.probe(SETTING, 0)
    monkeypatch.setattr(probe_module, "_accelerator", lambda: "cuda")
    monkeypatch.setattr(probe_module, "_device_bytes", lambda: 6 << 30)
    with pytest.raises(ConfigError, match="need 8.0 GiB on the device, which has 6.0"):
        probe_module.probe(SETTING, 0)


def test_on_an_accelerator_the_workspaces_are_added_and_no_parked_state(monkeypatch):
    monkeypatch.setattr(probe_module, "simulate", lambda settings: [Result(0, 100, [STEP])])
    monkeypatch.setattr(probe_module, "_accelerator", lambda: "cuda")
    monkeypatch.setattr(probe_module, "_device_bytes", lambda: 24 << 30)
    measured = {"device": "cuda", "peak_bytes": 9 << 30, "parked_bytes": 5 << 30, "reserved_bytes": 10 << 30}
    monkeypatch.setattr(probe_module, "measure", lambda setting: measured)
    assert probe_module.probe(SETTING, 0) == {
        "device": "cuda", "group": "0 (embed)", "predicted_gib": 8 + WORKSPACE_BYTES / 2**30, "measured_gib": 9.0,
        "reserved_gib": 10.0,
    }  # fmt: skip
