"""A run that has no memory left: a few plain lines and exit code 2, checkpoints whole, or a smaller batch and on."""

from __future__ import annotations

import logging
import weakref

import pytest
import torch

from hift_ds.checkpoint.saved_checkpoint import SavedCheckpoint
from hift_ds.checkpoint.trainer_folder import find_checkpoints
from hift_ds.config import BLOCK
from hift_ds.errors import NoRoomForModel, OutOfMemory
from hift_ds.forecast import advice as out_of_memory
from hift_ds.out_of_memory import full_device, no_traceback_when_full
from hift_ds.report.metrics import read_metrics
from hift_ds.train import load_model, worker
from hift_ds.train.finetune import finetune
from hift_ds.train.run_config import load_run_config
from tests.helpers.out_of_memory import ALLOCATOR_SAYS, NoAdvice, full
from tests.unit.test_launch import NUM_GROUPS, inputs, own_cache, write_run  # noqa: F401  (fixtures)


class Forecast(NoAdvice):
    def text(self, batch, length, budget_bytes):
        return f"forecast 30.0 GiB of 22.0 usable; would fit: micro-batches of {batch // 2}; a switch (21.0 GiB)"


@pytest.fixture(autouse=True)
def no_forecasts(monkeypatch):
    monkeypatch.setattr(out_of_memory, "Advice", Forecast)
    monkeypatch.setattr(Forecast, "made", 0)


@pytest.fixture
def hook(monkeypatch):
    """Give it a function: it is called with the model and the number of rows before each forward of the run's model."""

    def install(before_forward):
        real = load_model.load_pretrained

        def load(*args, **kwargs):
            model = real(*args, **kwargs)
            model.register_forward_pre_hook(
                lambda m, args, kw: before_forward(m, len(kw["input_ids"])), with_kwargs=True
            )
            return model

        monkeypatch.setattr(load_model, "load_pretrained", load)

    return install


def lines_of(capsys) -> list[str]:
    """What is said at the end: the error, and nothing after it."""
    err = capsys.readouterr().err
    assert "Traceback" not in err and err.count("hift-ds: error: ") == 1
    return ("hift-ds: error: " + err.partition("hift-ds: error: ")[2]).strip().splitlines()


def steps_saved(out) -> list[int]:
    """Of the checkpoints that a resumed run would take, each read whole."""
    folders, _ = find_checkpoints(out, "auto")
    steps = sorted(int(folder.name.removeprefix("checkpoint-")) for folder in folders)
    assert all(list(SavedCheckpoint(out / f"checkpoint-{n}" / f"global_step{n}").weights()) for n in steps)
    return steps


def test_training_ends_with_an_answer_and_goes_on_from_the_checkpoint(inputs, tmp_path, hook, capsys):  # noqa: F811
    out = tmp_path / "run"
    options = {
        "train__max_steps": 4,
        "train__save_steps": 1,
        "train__eval_steps": None,
        "train__save_total_limit": None,
    }
    file = write_run(inputs, out, train__micro_batch_size=8, **options)
    forwards = []

    def third_step_is_too_much(model, rows):
        forwards.append(model.training)
        if sum(forwards) == 3:
            full()

    hook(third_step_is_too_much)
    assert worker.main([str(file)]) == 2
    first, *others = lines_of(capsys)
    assert first.startswith("hift-ds: error: CUDA out of memory. HiFT: in forward at 8 x ")
    assert first.endswith("tokens while group 2 (layers.1) trains")
    assert [line.strip() for line in others] == [
        "forecast 30.0 GiB of 22.0 usable", "would fit: micro-batches of 4", "a switch (21.0 GiB)"
    ]  # fmt: skip
    assert steps_saved(out) == [1, 2]
    assert finetune(load_run_config(file))["steps"] == 4  # there is room now
    steps = read_metrics(out).steps
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    # On the CPU.
    assert all(record["peak_memory_gib"] > 0 and "forecast_memory_gib" not in record for record in steps)


@pytest.mark.parametrize("finds_a_batch", [False, True])
def test_evaluation(inputs, tmp_path, hook, capsys, finds_a_batch):  # noqa: F811
    """auto_find_batch_size must not try smaller training batches for it."""
    out = tmp_path / "run"
    options = {
        "train__micro_batch_size": 4,
        "train__global_batch_size": None,
        "train__auto_find_batch_size": finds_a_batch,
    }
    hook(lambda model, rows: None if model.training else full())
    assert worker.main([str(write_run(inputs, out, **options))]) == 2
    first, *others = lines_of(capsys)
    assert first == "hift-ds: error: CUDA out of memory. HiFT: in evaluation, at most 4 rows at once"
    assert "evaluation batch" in others[0]


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("hift_ds.train.load_model.load_pretrained", "while the model is loaded"),
        ("hift_ds.train.after_training.export_model", "while the model is exported"),
        ("hift_ds.engine.build.build_store", "no room for the weights (0.0 GiB)"),
        ("hift_ds.engine.saving.random_state", "CUDA out of memory"),
    ],
)
def test_what_is_around_the_steps(inputs, tmp_path, monkeypatch, capsys, where, says):  # noqa: F811
    out = tmp_path / "run"
    file = write_run(inputs, out, train__max_steps=2, train__save_steps=1, train__eval_steps=None)
    monkeypatch.setattr(where, full)
    assert worker.main([str(file)]) == 2
    assert says in lines_of(capsys)[0]
    assert steps_saved(out) == ([1, 2] if "export" in where else [])


def test_saving_leaves_the_checkpoints_that_are_there(inputs, tmp_path, monkeypatch, capsys):  # noqa: F811
    out = tmp_path / "run"
    file = write_run(inputs, out, train__max_steps=3, train__save_steps=1, train__eval_steps=None)
    from hift_ds.engine import saving

    calls, real = [], saving.random_state

    def second_is_too_much(device):
        calls.append(device)
        return full() if len(calls) == 2 else real(device)

    monkeypatch.setattr(saving, "random_state", second_is_too_much)
    assert worker.main([str(file)]) == 2
    assert "CUDA out of memory. Tried to allocate 20.00 MiB" in lines_of(capsys)[0] and steps_saved(out) == [1]


def test_a_smaller_batch_is_found_and_trains_the_same_groups(inputs, tmp_path, hook, caplog):  # noqa: F811
    """Room for 5 rows: 7 and 6 are tried before."""
    out = tmp_path / "run"
    file = write_run(
        inputs, out, train__micro_batch_size=7, train__global_batch_size=None, train__eval_batch_size=4,
        train__auto_find_batch_size=True, train__max_steps=2 * NUM_GROUPS, train__eval_steps=None,
    )  # fmt: skip
    tried, activations = [], []

    def five_rows_fit(norm, args, out):
        if norm.training and len(args[0]) > 5:
            activations.append(weakref.ref(args[0]))
            full()

    def before_forward(model, rows):
        assert all(ref() is None for ref in activations), "the attempt before holds on to its activations"
        tried.append(rows) if model.training else None
        if len(tried) + len(activations) == 0:
            model.model.norm.register_forward_hook(five_rows_fit)

    hook(before_forward)
    with caplog.at_level(logging.WARNING):
        results = finetune(load_run_config(file))
    assert tried[:2] == [7, 6] and set(tried[2:]) <= set(range(1, 6))
    assert results["micro_batch_size"] == 5 and results["steps"] == 2 * NUM_GROUPS and results["never_updated"] == 0
    assert Forecast.made <= 2  # one for each length, however many batches were tried
    answers = [record.message for record in caplog.records if "out of memory" in record.message]
    assert len(answers) == 2 and "would fit: micro-batches of 3" in answers[0]
    steps = read_metrics(out).steps
    assert [record["group"] for record in steps] == [*range(NUM_GROUPS)] * 2
    assert [record["step"] for record in steps] == list(range(1, 2 * NUM_GROUPS + 1))


def test_not_even_one_row(inputs, tmp_path, hook, capsys):  # noqa: F811
    file = write_run(
        inputs, tmp_path / "run", train__micro_batch_size=2, train__global_batch_size=None, train__eval_steps=None,
        train__auto_find_batch_size=True,
    )  # fmt: skip
    hook(lambda model, rows: full() if model.training else None)
    assert worker.main([str(file)]) == 2
    text = "\n".join(lines_of(capsys))
    assert "error: not even one row at a time fits: CUDA out of memory. HiFT: in forward at 1 x " in text


def test_full_fine_tuning_has_a_line_too(inputs, tmp_path, hook, capsys):  # noqa: F811
    hook(lambda model, rows: full() if model.training else None)
    assert worker.main([str(write_run(inputs, tmp_path / "run", hift=False, deepspeed=None))]) == 2
    assert "error: CUDA out of memory. HiFT: in training" in "\n".join(lines_of(capsys))


@pytest.mark.parametrize(
    ("changes", "world_size", "says"),
    [
        ({}, 1, "global_batch_size: 8 fixes"),
        ({"train__global_batch_size": None}, 2, "on 2 ranks"),
        (
            {"train__global_batch_size": None, "deepspeed": {"zero_optimization": {"stage": 3}}},
            1,
            '"zero_optimization.stage": 3',
        ),
    ],
)
def test_where_no_smaller_batch_can_be_tried(inputs, tmp_path, changes, world_size, says):  # noqa: F811
    from hift_ds.errors import ConfigError
    from hift_ds.train.preflight import check_run

    file = write_run(inputs, tmp_path / "run", train__auto_find_batch_size=True, **changes)
    with pytest.raises(ConfigError) as caught:
        check_run(load_run_config(file), world_size)
    assert "auto_find_batch_size" in str(caught.value) and says in str(caught.value)


def test_which_errors_say_that_there_is_no_memory():
    assert full_device(torch.OutOfMemoryError(ALLOCATOR_SAYS)) == "CUDA"
    assert full_device(torch.OutOfMemoryError("XPU out of memory. Tried")) == "XPU"
    assert full_device(RuntimeError("CUDA error: out of memory\nCUDA kernel errors might")) == "CUDA"
    assert (
        full_device(RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"))
        == "CPU"
    )
    assert full_device(RuntimeError("shapes do not match")) is None and full_device(ValueError(ALLOCATOR_SAYS)) is None


def test_an_answer_is_found_beneath_a_librarys_error():
    answer = OutOfMemory("CUDA out of memory. HiFT: in evaluation")
    with pytest.raises(OutOfMemory) as caught, no_traceback_when_full("in training"):
        raise RuntimeError("Evaluation hit an out-of-memory error.") from answer
    assert caught.value is answer
    with pytest.raises(RuntimeError, match="^another$"), no_traceback_when_full("in training"):
        raise RuntimeError("another")


def test_an_engine_that_cannot_be_built_is_not_built_again(tmp_path, monkeypatch):
    """With a batch of 4 and auto_find_batch_size there is one attempt, not four."""
    from accelerate.utils.memory import should_reduce_batch_size

    import model_zoo
    from tests.helpers.engines import ds_config, make_engine

    calls = []
    monkeypatch.setattr("hift_ds.engine.build.build_store", lambda *a, **k: calls.append(1) or full())
    with pytest.raises(NoRoomForModel) as caught:
        make_engine(model_zoo.tiny.build("llama"), ds_config(rows=2))
    assert not should_reduce_batch_size(caught.value) and len(calls) == 1
    assert BLOCK in str(caught.value)
