"""What a run leaves behind and shows: records, pictures, coverage, progress."""

from __future__ import annotations

import io
import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from rich.console import Console
from transformers import Trainer, TrainingArguments

from hift_ds.errors import DataError
from hift_ds.process_group import as_single_process
from hift_ds.report.callback import ReportCallback, report_instead_of_printing
from hift_ds.report.coverage import make_coverage, write_coverage
from hift_ds.report.groups import GroupSummary, add_distances, read_groups, record_movement, write_groups
from hift_ds.report.metrics import MetricsWriter, read_metrics
from hift_ds.report.plots import groups_figure, loss_figure, plot_run, raster, smoothed
from hift_ds.report.progress import LiveProgress, PlainProgress, clock, make_progress
from model_zoo import tiny
from tests.helpers.trainer import arguments, ragged_dataset


def steps_of_a_run(num_steps: int, num_groups: int, steps_per_group: int = 1, first: int = 1) -> list[dict]:
    out = []
    for i in range(first - 1, num_steps):
        turn = i // steps_per_group
        group = turn % num_groups
        out.append({
            "step": i + 1, "cycle": turn // num_groups, "position": group, "group": group,
            "group_name": f"layers.{group}", "loss": 2 + 1 / (i + 1), "lr": 1e-4, "grad_norm": 1.0 + group,
            "step_time_s": 0.5, "tokens_per_s": 100.0, "skipped": False,
        })  # fmt: skip
    return out


# --- metrics ------------------------------------------------------------------------------------------


def test_records_come_back_as_written_and_stay_valid_json(tmp_path):
    writer = MetricsWriter(tmp_path / "run")
    writer.write({"step": 1, "loss": 2.5, "grad_norm": math.inf, "group_name": "norm+head"})
    writer.write({"step": 1, "eval_loss": 2.25})
    writer.close()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0], parse_constant=pytest.fail)["grad_norm"] is None
    metrics = read_metrics(tmp_path / "run")
    assert metrics.steps == [{"step": 1, "loss": 2.5, "grad_norm": None, "group_name": "norm+head"}]
    assert metrics.evals == [{"step": 1, "eval_loss": 2.25}]
    assert read_metrics(tmp_path / "nowhere").steps == []


def test_every_line_is_on_disk_before_the_next_step(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write({"step": 1, "loss": 1.0})
    assert [r["step"] for r in read_metrics(tmp_path).steps] == [1]
    writer.close()


@pytest.mark.parametrize("damage", [b'{"step": 9, "lo', b"\x00\x00\x00", b'{"step": 9, "loss": 1.0}'])
def test_a_killed_run_is_readable_and_resumes_without_gap_or_repeat(tmp_path, damage):
    writer = MetricsWriter(tmp_path)
    for step in range(1, 9):
        writer.write({"step": step, "loss": float(step)})
        if step % 3 == 0:
            writer.write({"step": step, "eval_loss": float(step)})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(damage)  # no newline: the kill came in the middle of a write
    assert [r["step"] for r in read_metrics(tmp_path).steps][:8] == list(range(1, 9))

    writer = MetricsWriter(tmp_path, resume_step=5)
    for step in (6, 7):
        writer.write({"step": step, "loss": -1.0})
    writer.close()
    metrics = read_metrics(tmp_path)
    assert [(r["step"], r["loss"]) for r in metrics.steps] == [(s, float(s)) for s in range(1, 6)] + [
        (6, -1.0),
        (7, -1.0),
    ]
    assert [r["step"] for r in metrics.evals] == [3]
    assert MetricsWriter(tmp_path, resume_step=0).path.read_bytes() == b""


# --- coverage -----------------------------------------------------------------------------------------


GROUPS = [
    SimpleNamespace(index=0, name="embed", param_names=("e",), numel=4),
    SimpleNamespace(index=1, name="layers.0", param_names=("a", "b"), numel=6),
]


def test_full_coverage_says_so_and_does_not_shout(tmp_path):
    coverage = make_coverage({"e": 3, "a": 2, "b": 2}, 5, GROUPS)
    assert coverage.warning() is None
    assert coverage.summary() == "3 of 3 trainable tensors updated in 5 steps, 2 to 3 times each"
    content = json.loads(write_coverage(tmp_path / "run", coverage).read_text())
    assert content["updates"] == {"e": 3, "a": 2, "b": 2} and content["never_updated"] == []


def test_a_parameter_never_updated_is_named_loudly_with_its_group(tmp_path):
    coverage = make_coverage({"e": 1, "a": 0, "b": 0}, 1, GROUPS)
    warning = coverage.warning(max_names=1)
    assert warning.startswith("2 OF 3 TRAINABLE TENSORS WERE NEVER UPDATED")
    assert "Groups: layers.0" in warning and "\n  a\n" in warning and "1 more" in warning
    assert json.loads(write_coverage(tmp_path, coverage).read_text())["never_updated"] == ["a", "b"]


# --- how far groups moved -----------------------------------------------------------------------------


def test_distances_add_up_per_group():
    groups = [GroupSummary(0, "x", 2, ["p", "q"]), GroupSummary(1, "y", 1, ["r"])]
    add_distances(groups, {"p": (3.0, 6.0), "q": (4.0, 8.0)})
    assert (groups[0].moved, groups[0].norm, groups[0].relative) == (5.0, 10.0, 0.5)
    assert groups[1].moved is None and groups[1].relative is None


def test_movement_is_measured_for_names_that_differ_on_disk(tmp_path):
    from hift_ds.hf.export import export_model

    model = tiny.build("mixtral")
    names = [name for name, _ in model.named_parameters()]
    moved = next(name for name in names if "layers.1.mlp.experts.down_proj" in name)
    rest = [name for name in names if name != moved]
    write_groups(tmp_path, [GroupSummary(0, "rest", 0, rest), GroupSummary(1, "one", 0, [moved])])
    export_model(model, tmp_path / "before")
    with torch.no_grad():
        before = model.get_parameter(moved).norm().item()
        model.get_parameter(moved).mul_(1.25)
    export_model(model, tmp_path / "after")
    record_movement(tmp_path, tmp_path / "before", tmp_path / "after", model)
    rest_group, one = read_groups(tmp_path)
    assert rest_group.moved == 0.0 and rest_group.norm > 0
    assert one.norm == pytest.approx(before, rel=1e-5) and one.relative == pytest.approx(0.25, rel=1e-5)


# --- plots --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_groups, num_steps", [(3, 10), (80, 10), (80, 3000), (1, 1)])
def test_pictures_for_small_and_large_runs(tmp_path, num_groups, num_steps):
    writer = MetricsWriter(tmp_path)
    for record in steps_of_a_run(num_steps, num_groups):
        writer.write(record)
    writer.write({"step": num_steps, "eval_loss": 2.0})
    writer.close()
    write_groups(tmp_path, [GroupSummary(i, f"layers.{i}", 9, [], float(i), 10.0) for i in range(num_groups)])
    backend = matplotlib.rcParams._get("backend")
    paths = plot_run(tmp_path)
    assert [path.name for path in paths] == ["loss.png", "groups.png"]
    for path in paths:
        pixels = imread(path)
        assert pixels.shape[0] < 1800 and len(np.unique(pixels[::3, ::3, 0])) > 20
    assert matplotlib.rcParams._get("backend") is backend, "drawing must not choose a backend for the program"


def test_raster_shows_each_step_of_a_short_run_in_its_groups_row():
    image, width = raster(steps_of_a_run(8, 3), [0, 1, 2])
    assert width == 1 and image.shape == (3, 8)
    active = np.isfinite(image)
    assert active.sum(axis=0).tolist() == [1] * 8
    assert active.argmax(axis=0).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert image[2, 2] == 3.0


def test_raster_of_a_long_run_has_whole_cycles_as_columns():
    image, width = raster(steps_of_a_run(9000, 6), list(range(6)))
    assert width % 6 == 0 and image.shape[1] <= 450
    assert np.isfinite(image).all(), "every group was active in every column"
    assert np.allclose(image, np.arange(1.0, 7.0)[:, None])


def test_a_group_that_never_had_a_turn_has_an_empty_row():
    figure = groups_figure(steps_of_a_run(4, 2), [GroupSummary(i, f"g{i}", 1, []) for i in range(3)])
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["g0", "g1", "g2"]
    assert not np.isfinite(np.ma.filled(axes.images[0].get_array().astype(float), np.nan)[2]).any()


def test_one_spike_does_not_flatten_the_loss_curve():
    steps = steps_of_a_run(1000, 4)
    steps[500]["loss"] = 1e6
    low, high = loss_figure(SimpleNamespace(steps=steps, evals=[])).axes[0].get_ylim()
    assert high < 1e5 and low < 2.0


def test_runs_without_loss_norms_or_groups_are_still_drawn(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in range(1, 5):
        writer.write({"step": step, "loss": None if step == 2 else 1.0})
    writer.close()
    assert [p.name for p in plot_run(tmp_path)] == ["loss.png"]
    overflowed = [dict(record, grad_norm=None, skipped=True, loss=math.nan) for record in steps_of_a_run(5, 2)]
    writer = MetricsWriter(tmp_path)
    for record in overflowed:
        writer.write(record)
    writer.close()
    assert [p.name for p in plot_run(tmp_path)] == ["loss.png", "groups.png"]


def test_smoothing_is_unbiased_at_the_start_and_follows():
    assert smoothed(np.full(5, 3.0), 4) == pytest.approx(3.0)
    assert smoothed(np.arange(100.0), 1) == pytest.approx(np.arange(100.0))
    assert abs(smoothed(np.r_[np.zeros(50), np.ones(50)], 10)[-1] - 1) < 0.01


def test_plot_command_and_its_error(tmp_path, capsys):
    import argparse

    from hift_ds.cli import plot as plot_command

    parser = argparse.ArgumentParser()
    plot_command.add_arguments(parser)
    for folder, what in ((tmp_path, "holds no optimizer step in metrics.jsonl"), (tmp_path / "none", "no such folder")):
        with pytest.raises(DataError, match=what):
            plot_command.run(parser.parse_args([str(folder)]))
    writer = MetricsWriter(tmp_path)
    writer.write({"step": 1, "loss": 1.0})
    assert plot_command.run(parser.parse_args([str(tmp_path)])) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "loss.png")


# --- progress -----------------------------------------------------------------------------------------


def plain(interval_s: float) -> tuple[PlainProgress, io.StringIO]:
    out = io.StringIO()
    return PlainProgress(Console(file=out, width=40), interval_s), out


def test_plain_lines_say_what_matters_and_never_wrap():
    progress, out = plain(0.0)
    progress.start(1000)
    for record in steps_of_a_run(2, 2):
        progress.update(record)
    progress.note("[not markup] " + "x" * 100)
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("step    1/1000  cycle 0  layers.0  loss 3.000  100 tok/s  8:20 left  lr 1.00e-04")
    assert lines[2] == "[not markup] " + "x" * 100


def test_plain_lines_are_first_last_and_rare_between():
    progress, out = plain(1e9)
    progress.start(50)
    for record in steps_of_a_run(50, 3):
        progress.update(record)
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["1/50", "50/50"]


def test_time_left_and_rate_are_those_of_a_cycle_not_of_the_last_group():
    progress, out = plain(0.0)
    progress.start(100, window=2)
    for step in range(1, 21):  # one group takes 3 s for 30 tokens, the other 1 s
        slow = step % 2
        progress.update({"step": step, "step_time_s": 3.0 if slow else 1.0, "tokens_per_s": 10.0 if slow else 30.0})
    assert "15 tok/s  2:40 left" in out.getvalue().splitlines()[-1]


def test_live_line_on_a_terminal_restores_it():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, color_system=None, legacy_windows=False, _environ={})
    progress = make_progress(console)
    assert isinstance(progress, LiveProgress)
    progress.start(7)
    for record in steps_of_a_run(7, 3):
        progress.update(replace_skipped(record, record["step"] == 3))
    progress.note("evaluation at step 7", style="bold")
    progress.close()
    progress.close()
    text = out.getvalue()
    assert "7/7" in text and "cycle 2" in text and "layers.0" in text and "evaluation at step 7" in text
    assert text.rstrip().endswith("\x1b[?25h") or "\x1b[?25h" in text, "the cursor must come back"
    assert isinstance(make_progress(Console(file=io.StringIO())), PlainProgress)


def replace_skipped(record: dict, skipped: bool) -> dict:
    return {**record, "skipped": skipped}


def test_clock():
    assert [clock(s) for s in (0, 7.4, 754, 10_930, 187_800)] == [
        "0:00",
        "0:07",
        "12:34",
        "3:02:10",
        "2d 04:10",
    ]


def test_libraries_are_quiet_even_if_imported_later():
    code = """
import logging
from hift_ds.report.quiet import quiet_libraries
quiet_libraries(is_main={main})
logger = logging.getLogger("DeepSpeed")
logger.addHandler(logging.StreamHandler())
logger.setLevel(logging.DEBUG)  # as DeepSpeed's import does
logger.info("chatter"); logger.warning("Setting accelerator to CPU."); logger.warning("worth it")
logger.error("bad")
import transformers
print(transformers.logging.get_verbosity())
"""
    for main, shown in ((True, "worth it\nbad\n"), (False, "bad\n")):
        command = [sys.executable, "-c", code.format(main=main)]
        env = {k: v for k, v in __import__("os").environ.items() if not k.startswith(("TRANSFORMERS_", "HF_"))}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.stderr == shown, done.stderr
        assert int(done.stdout) == (logging.WARNING if main else logging.ERROR)


# --- the callback in a real Trainer -------------------------------------------------------------------


class Recorder:
    """A ``Progress`` that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.records: list[dict] = []

    def start(self, total_steps, done_steps=0, window=20):
        self.started = (total_steps, done_steps, window)

    def update(self, record):
        self.records.append(dict(record))

    def note(self, text, style=""):
        self.notes.append(text)

    def close(self):
        pass


def hift_trainer(folder: Path, **options):
    from hift_ds.integrations.transformers import HiFTTrainer

    dataset = ragged_dataset(24)
    trainer = HiFTTrainer(
        model=tiny.build("llama"),
        args=arguments(folder / "hf", **options),
        train_dataset=dataset,
        eval_dataset=dataset[:3],
    )
    progress = Recorder()
    callback = ReportCallback(folder, get_engine=lambda: trainer.engine, progress=progress)
    report_instead_of_printing(trainer, callback)
    return trainer, progress


def test_a_run_leaves_everything_behind(tmp_path, capsys):
    trainer, progress = hift_trainer(
        tmp_path,
        max_steps=7,
        eval_strategy="steps",
        eval_steps=3,
        include_num_input_tokens_seen="non_padding",
    )
    trainer.train()
    metrics = read_metrics(tmp_path)
    assert [r["step"] for r in metrics.steps] == list(range(1, 8))
    assert [r["group"] for r in metrics.steps] == [0, 1, 2, 3, 4, 0, 1]
    assert [r["cycle"] for r in metrics.steps] == [0] * 5 + [1] * 2
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [r["loss"] for r in metrics.steps] == [entry["loss"] for entry in logged]
    assert [r["lr"] for r in metrics.steps] == [entry["learning_rate"] for entry in logged]
    assert metrics.steps[-1]["num_tokens"] == trainer.state.num_input_tokens_seen > 0
    assert all(r["tokens_per_s"] > 0 and r["state_bytes_in"] > 0 and r["peak_memory_gib"] > 0 for r in metrics.steps)
    on_cpu = not torch.accelerator.is_available()
    assert all(r.get("memory_of_process", False) is on_cpu for r in metrics.steps)
    assert [r["step"] for r in metrics.evals] == [3, 6, 7] or [r["step"] for r in metrics.evals] == [3, 6]

    assert [g.name for g in read_groups(tmp_path)] == [g.name for g in trainer.engine.groups]
    assert json.loads((tmp_path / "coverage.json").read_text())["updates"] == trainer.engine.coverage()
    assert (tmp_path / "loss.png").is_file() and (tmp_path / "groups.png").is_file()
    assert progress.started == (7, 0, 5) and [r["step"] for r in progress.records] == list(range(1, 8))
    assert "5 layer groups, one trained in each step; 7 steps = 1.4 cycles" in progress.notes[0]
    assert not any("NEVER" in note for note in progress.notes)
    assert "'loss'" not in capsys.readouterr().out, "Trainer's own printing must be gone"

    steps = len(metrics.steps)
    trainer.evaluate()  # after training
    metrics = read_metrics(tmp_path)
    assert len(metrics.steps) == steps and metrics.evals[-1]["step"] == 7


def test_a_run_that_ends_with_its_best_weights(tmp_path):
    """Its step and loss are named, the counts are said to be that step's, and evaluating them again draws no cliff."""
    trainer, progress = hift_trainer(
        tmp_path, max_steps=9, learning_rate=1.0, optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant",
        eval_strategy="steps", save_strategy="steps", eval_steps=3, save_steps=3, load_best_model_at_end=True,
        metric_for_best_model="loss",
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_global_step
    assert best < 9
    loss = trainer.state.best_metric
    assert any(f"best: loss {loss:.4f} at step {best}, whose weights are kept" in note for note in progress.notes)
    assert any(f"trainable tensors updated in {best} steps" in note for note in progress.notes)
    assert json.loads((tmp_path / "coverage.json").read_text())["num_steps"] == best
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-6)
    assert [r["step"] for r in read_metrics(tmp_path).evals] == [3, 6, 9]
    assert f"evaluation of step {best}'s weights" in progress.notes[-1]


def test_a_run_too_short_for_its_groups_says_so_before_and_after(tmp_path):
    trainer, progress = hift_trainer(tmp_path, max_steps=3)
    trainer.train()
    assert any("takes 5 steps and the run has 3" in note for note in progress.notes[:2])
    assert any("TRAINABLE TENSORS WERE NEVER UPDATED" in note for note in progress.notes)
    assert json.loads((tmp_path / "coverage.json").read_text())["never_updated"]


@pytest.mark.parametrize("logging_steps", [1, 3])
def test_a_plain_trainer_is_reported_too_and_resumes(tmp_path, logging_steps):
    def train(max_steps: int, resume: str | None = None) -> Recorder:
        args = TrainingArguments(
            str(tmp_path / "hf"), max_steps=max_steps, logging_steps=logging_steps, save_strategy="steps",
            save_steps=4, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model=tiny.build("llama"), args=args, train_dataset=ragged_dataset(24))
        progress = Recorder()
        report_instead_of_printing(trainer, ReportCallback(tmp_path, progress=progress))
        with as_single_process():  # accelerate goes on with DeepSpeed in a process that has used it
            trainer.train(resume_from_checkpoint=resume)
        return progress

    train(6)
    progress = train(8, str(tmp_path / "hf" / "checkpoint-4"))
    assert progress.started[:2] == (8, 4) and "resumed after step 4, 4 steps to go" in progress.notes[0]
    steps = read_metrics(tmp_path).steps
    assert [r["step"] for r in steps] == list(range(1, 9))
    with_loss = [r["step"] for r in steps if "loss" in r]
    assert with_loss == [step for step in range(1, 9) if step % logging_steps == 0]
    assert "group" not in steps[0] and not (tmp_path / "groups.png").exists()


def test_other_ranks_write_and_show_nothing(tmp_path):
    callback = ReportCallback(tmp_path / "run")
    state = SimpleNamespace(is_world_process_zero=False, global_step=0, max_steps=5)
    for event in (
        callback.on_train_begin,
        callback.on_step_end,
        callback.on_log,
        callback.on_evaluate,
        callback.on_train_end,
    ):
        event(None, state, SimpleNamespace(should_log=False))
    assert not (tmp_path / "run").exists()


def test_long_lines_break_at_words_on_a_terminal_and_nowhere_else(capsys, monkeypatch):
    import hift_ds.report.progress as progress

    line = "train: 1,000 samples of 1,000 rows; " + "12 cut to data.max_length 2,048 (3,000 tokens lost); " * 3
    progress.print_line(line)
    assert capsys.readouterr().out.splitlines() == [line]
    console = progress.Console
    monkeypatch.setattr(progress, "Console", lambda **options: console(force_terminal=True, width=50, **options))
    progress.print_line(line)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) > 2 and max(map(len, printed)) <= 50
    assert " ".join(" ".join(printed).split()) == " ".join(line.split())  # no word was cut in two
