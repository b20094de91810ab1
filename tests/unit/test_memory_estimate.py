"""hift-ds estimate: from a config alone, whole figures or one clear line."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from dataclasses import replace

import pytest

import model_zoo
from benchmarks import needs
from hift_ds.cli import estimate as estimate_module
from hift_ds.cli.main import main
from hift_ds.errors import ConfigError
from hift_ds.forecast.setting import SWITCHES, Setting, is_on, with_switch

KEYS = {"peak_gib", "phases", "categories", "worst_group", "host_gib", "disk_gib", "flops_ratio_full", "fits"}
SMALL = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 1000, "max_position_embeddings": 512}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model_zoo.config("llama2_7b", **SMALL).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def run_file(tmp_path_factory, folder):
    tmp_path = tmp_path_factory.mktemp("run")
    (tmp_path / "ds.json").write_text(json.dumps({"bf16": {"enabled": True}, "hift": {"state": {"residency": "host"}}}))
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {{path: {folder}}}\n"
        "data: {train: nowhere.jsonl, max_length: 64}\n"
        f"train: {{output_dir: {tmp_path / 'out'}, micro_batch_size: 3, gradient_checkpointing: true}}\n"
        f"deepspeed: {tmp_path / 'ds.json'}\n"
        "hift: {fit: off}\n"
    )
    return path


@pytest.fixture(scope="module")
def figures(run_file):
    """Of the run file, through the command line."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["estimate", str(run_file), "--json"]) == 0
    return json.loads(out.getvalue())


def test_figures_of_a_run_file_without_weights_or_data(figures):
    assert figures.keys() >= KEYS
    assert (figures["batch"], figures["length"], figures["num_groups"]) == (3, 64, 5)
    assert figures["switches"] == {
        "slice_numel": False,
        "checkpointing": True,
        "chunked_loss": False,
        "offload": False,
    }
    assert figures["peak_gib"] == pytest.approx(max(figures["phases"].values()))
    assert figures["peak_gib"] == pytest.approx(sum(figures["categories"].values()))
    assert figures["peak_gib"] == pytest.approx(max(group["peak_gib"] for group in figures["groups"]))
    assert figures["weights_gib"] == pytest.approx(2 * figures["numel"] / 2**30, rel=0.01)
    states = 12 * figures["numel"] / 2**30  # master and two moments in fp32
    assert figures["host_gib"] == pytest.approx(states, rel=0.01)
    assert figures["checkpoint_gib"] == pytest.approx(states + figures["weights_gib"], rel=0.01)
    assert figures["disk_gib"] == 0
    assert 0.3 < figures["flops_ratio_full"] < 1 and figures["flops_ratio_lora"] < 1
    assert figures["switched"]["checkpointing"] > figures["peak_gib"]  # off
    assert all(row["fits"] for row in figures["fits"])
    batches = [row["largest_batch"] for row in figures["fits"]]
    assert batches == sorted(batches) and batches[0] > 100
    assert {row["largest_length"] for row in figures["fits"]} == {512}  # as long as the positions go


def test_flags_and_tables(folder, figures, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(estimate_module, "estimate", lambda setting: (asked.append(setting), figures)[1])
    argv = [
        "estimate",
        "--model",
        str(folder),
        "--batch",
        "2",
        "--length",
        "128",
        "--precision",
        "mixed",
        "--gpus",
        "2",
    ]
    assert main([*argv, "--no-offload", "--blocks-kept", "1", "--accumulation", "8"]) == 0
    out = capsys.readouterr().out
    for words in ("Peak on the GPU", "update in slices", "24 GiB", "page-locked", "Assumed:"):
        assert words in out
    (setting,) = asked
    assert (setting.batch, setting.length, setting.world_size, setting.micro_batches) == (2, 128, 2, 2)
    assert setting.weight_dtype == "float32" and setting.engine_config["torch_autocast"]["enabled"]
    assert setting.engine_config["hift"]["activations"] == {
        "checkpointing": True, "blocks_kept": 1, "chunked_loss": True, "offload": False,
    }  # fmt: skip
    assert setting.engine_config["hift"]["state"]["slice_numel"] == 1 << 24


def test_the_largest_batch_really_fits_and_the_next_does_not():
    """Arithmetic of cards, on steps that are made up."""
    from hift_ds.forecast.setting import GroupStep
    from hift_ds.forecast.steps import Slope

    class Line:
        def __init__(self, batch):
            self.batch = batch

        def known(self):
            return [0]

        def step(self, index):
            places = {
                "forward:": {"weights": 1000, "activations": 30 * self.batch},
                "update:": {"weights": 1200},
            }
            places["backward:"] = {"temporaries": self.batch**2}
            return GroupStep(0, "embed", 1, places, {}, 0, 0)

    slope = Slope(((4, Line(4)), (8, Line(8))))
    assert slope.peak_bytes(4) == 1200 and slope.peak_bytes(10) == 1300
    assert slope.largest(1300) == 10 and slope.largest(1329) == 10
    assert slope.largest(1199) == 0
    assert slope.largest(10_000, multiple_of=16, limit=100) == 96
    square = Slope(((4, Line(4)), (8, Line(8)), (12, Line(12))))
    assert square.peak_bytes(100) == 10_000 and slope.peak_bytes(100) < 5_000
    assert square.largest(1_000_000) == 1000


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "give a run file, or --model"),
        (["--model", "llama2_7b", "--card", "24"], "--card is what a run file is fitted to"),
        (["train.epochs=1", "--model", "llama2_7b"], "changes a run file, and none is given"),
        (["--model", "llama2_7"], "no such folder"),
        (["--model", "llama2_7b", "--length", "5000"], "--length: 5000 is longer than the 4096 positions"),
        (["--model", "llama2_7b", "--batch", "0"], "--batch: expected a whole number of at least 1, got 0"),
        (["--model", "llama2_7b", "--precision", "fp8"], "invalid choice: 'fp8'"),
        (["missing.yaml"], "missing.yaml"),
        (["{run}", "--batch", "2"], "--batch: the run file decides; write train.micro_batch_size=..."),
        (["{run}", "hift=false"], "hift: false is ordinary full fine-tuning"),
        (["{run}", "hift.group_sizes=3"], "did you mean 'group_size'"),
    ],
)
def test_one_line_and_exit_code_two(argv, message, run_file, capsys, monkeypatch):
    monkeypatch.setattr(
        estimate_module, "run_requests", lambda *args: pytest.fail("stepped before the input was checked")
    )
    assert main(["estimate", *(part.format(run=run_file) for part in argv)]) == 2
    err = capsys.readouterr().err.strip()
    assert message in err and "\n" not in err


def test_a_run_file_is_counted_with_what_train_would_choose(folder, tmp_path):
    """Group size by the length of the run, micro-batch and switches by the card; without a card, all that saves
    memory."""
    from hift_ds.cli.estimate_input import add_input_arguments, setting_and_choice

    data, file = tmp_path / "data.jsonl", tmp_path / "run.yaml"
    data.write_text('{"text": "a"}\n' * 100)
    file.write_text(
        f"model: {{path: {folder}}}\ndata: {{train: {data}, max_length: 64, val_size: 4}}\n"
        f"train: {{output_dir: {tmp_path / 'out'}, global_batch_size: 8, epochs: 4}}\nhift: {{order: top2down}}\n"
    )

    def asked(*argv):
        parser = argparse.ArgumentParser()
        add_input_arguments(parser)
        return setting_and_choice(parser.parse_args([str(file), *argv]))

    with pytest.raises(ConfigError, match="^estimate: --card: expected GiB above 0, got -3$"):
        asked("--card=-3")
    setting, chosen = asked("--card", "24")
    assert setting.batch == 8 and chosen.keys["train.micro_batch_size"] == 8
    # 96 rows, 12 steps an epoch.
    assert "group size 1: 5 layer groups, each trained in 9.6 of 48 steps" in chosen.lines[0]
    assert not any(is_on(setting, switch) for switch in SWITCHES)
    lean, chosen = asked()
    assert lean.batch == 1 and all(is_on(lean, switch) for switch in SWITCHES) and "no GPU here" in chosen.lines[-1]
    plain, chosen = asked("hift.fit=off")
    assert plain.batch == 1 and not any(is_on(plain, switch) for switch in SWITCHES)
    assert plain.engine_config["hift"]["order"] == "top2down" and set(chosen.keys) == {"hift.group_size"}


def test_switches_on_and_off():
    setting = Setting("llama2_7b", {"hift": {"activations": {"checkpointing": True, "blocks_kept": 3}}})
    off = with_switch(setting, "checkpointing", on=False)
    assert not is_on(off, "checkpointing") and off.engine_config["hift"]["activations"]["blocks_kept"] == 0
    sliced = with_switch(off, "slice_numel", on=True)
    assert is_on(sliced, "slice_numel") and not is_on(off, "slice_numel")
    assert is_on(setting, "checkpointing")  # unchanged


def test_partitioned_weights_are_stepped_with_prefetching():
    """Stage 3 prefetches from a group's second visit on."""
    from hift_ds.forecast.steps import Request, Structure

    structure = Structure(tuple("abcdefghijklmnopqrst"), (1,) * 20, None, 1)
    replicated, partitioned = (
        Request(Setting("m", {"zero_optimization": {"stage": stage}, "hift": {}}), structure).to_simulate()
        for stage in (2, 3)
    )
    assert (replicated.visits, partitioned.visits) == (1, 2)


def test_groups_near_the_top_are_stepped_where_lines_bend():
    """With kept blocks and with a full offload stash the memory of a step has bends, counted from the head."""
    from hift_ds.forecast.steps import Request, Structure

    structure = Structure(("group",) * 34, (1,) * 34, None, 1)
    activations = {"checkpointing": True, "blocks_kept": 4, "offload": True}
    request = Request(Setting("m", {"hift": {"activations": activations}}), structure)
    assert request.to_simulate().groups == (0, 1, 2, 17, 25, 26, 27, 28, 31, 32, 33)
    assert replace(request, ends_only=True).to_simulate().groups == (0, 1, -1)


def test_several_ranks_leave_less_of_a_card():
    from hift_ds.cli.estimate import NCCL_GIB, budget_gib

    assert budget_gib(24, 1) == pytest.approx((24 - 0.6) / 1.05 - 0.0625)
    assert budget_gib(24, 1) - budget_gib(24, 2) == pytest.approx(NCCL_GIB / 1.05)


def test_gradients_that_rest_in_host_memory_are_counted():
    """With the update in backward: sums of micro-batches (4 bytes, or 2 in bf16), and what waits for the norm (2, as
    many as the sum has, or 4 over ranks); of a last visit's norm at the first visit, before there is one."""

    def on_host(clip=1.0, update="in_backward", clipping="exact", sums="fp32", **more):
        config = {"gradient_clipping": clip, "hift": {"update": update, "clipping": clipping},
                  "data_types": {"grad_accum_dtype": sums}}  # fmt: skip
        return estimate_module.gradient_bytes_on_host(Setting("model", config, **more), 100)

    assert on_host() == 200 and on_host(clip=0.0) == 0 and on_host(update="after_backward") == 0
    assert on_host(micro_batches=2) == 800 and on_host(world_size=4) == 100
    assert on_host(clipping="speculative") == 1400
    assert on_host(clipping="last_visit") == 200 and on_host(clipping="per_part") == 0
    assert on_host(micro_batches=2, sums="bf16") == 400 and on_host(world_size=4, micro_batches=2, sums="bf16") == 300
    with pytest.raises(ConfigError, match="grad_accum_dtype"):
        on_host(micro_batches=2, sums="fp16")


def test_layers_that_the_link_hides_by_assumed_speeds():
    """More tokens, more layers; all without a link in the way."""

    def size(batch, state=None, clip=0.0, clipping="exact"):
        block = {"update": "in_backward", "group_size": "auto", "state": {"slots": 2, **(state or {})}}
        config = {"gradient_clipping": clip, "hift": {**block, "clipping": clipping}}
        setting = Setting("llama2_7b", config, batch=batch, length=1024)
        settled, line = estimate_module.settle_layers(setting, 2)
        assert f"at {2 * batch * 1024:,} tokens" in line and settled.engine_config["hift"]["tokens_per_step"] is None
        said.append(line)
        return settled.engine_config["hift"]["group_size"]

    said: list[str] = []

    assert 1 <= size(1) < size(4) < 34 and size(64) == "all"
    assert size(1, {"residency": "device"}) == "all"
    assert 1 < size(64, clip=1.0) < 34 and size(64, clip=1.0, clipping="per_part") == "all"
    for share, words in (({"host_share": 0.1}, ", 10% updated on the host)"), ({}, "and waits 0 s for")):
        assert size(1, {"step_on": "split", **share}) == 2  # what is given holds; of two layers the link needs no help
        assert words in said[-1] and ("on the host" in said[-1]) == bool(share)


def test_what_readme_says_a_model_needs_is_what_the_script_counted():
    counted = needs.table_of(needs.RESULT.read_text())
    assert needs.table_of(needs.README.read_text()) == counted
    assert [line.split(" | ")[0].strip("| ") for line in counted.splitlines()[2:]] == list(needs.MODELS)


@pytest.mark.slow
def test_the_script_counts_as_estimate_does(tmp_path, capsys):
    """On a small model: GPU, host memory, and the disk of three checkpoints and the exported weights."""
    sizes = {**SMALL, "max_position_embeddings": 1024, "vocab_size": 64_000, "hidden_size": 512}
    model_zoo.config("llama2_7b", **sizes).save_pretrained(tmp_path)
    assert main(["estimate", "--model", str(tmp_path), "--batch", "1", "--length", "1024", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    disk = 3 * figures["checkpoint_gib"] + figures["weights_gib"]
    expected = f"| small | {figures['peak_gib']:.1f} | {figures['host_gib']:.0f} | {disk:.0f} |"
    assert needs.row("small", str(tmp_path)) == expected and disk > 2
