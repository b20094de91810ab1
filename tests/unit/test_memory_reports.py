"""At run time: measured peaks beside forecasts, and out of memory answered with what would fit."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers import TrainerControl, TrainerState

import model_zoo
from hift_ds.engine import memory_forecast
from hift_ds.engine.memory_forecast import MemoryForecast
from hift_ds.errors import CheckpointError, HiFTError, OutOfMemory
from hift_ds.forecast import advice as out_of_memory
from hift_ds.forecast.advice import Advice
from hift_ds.forecast.setting import WORKSPACE_BYTES, GroupStep, Setting
from hift_ds.forecast.steps import Slope
from hift_ds.report.callback import ReportCallback
from hift_ds.report.metrics import read_metrics
from hift_ds.report.progress import SilentProgress
from hift_ds.store.host import HostStateStore
from tests.helpers.engines import ds_config, make_engine
from tests.helpers.out_of_memory import NoAdvice, full
from tests.helpers.toy import Toy, loss_of, make_batches


@pytest.fixture
def engine():
    engine = make_engine(model_zoo.tiny.build("llama"), ds_config(rows=2, bf16={"enabled": True}))
    yield engine
    engine.destroy()


class Forecast(NoAdvice):
    def text(self, batch, length, budget_bytes):
        return f"forecast for {batch}"


def message_of(call) -> str:
    with pytest.raises(OutOfMemory) as caught:
        call()
    assert isinstance(caught.value, HiFTError) and should_reduce_batch_size(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_message_names_what_ran_and_one_forecast_serves_several_batches(engine, monkeypatch):
    monkeypatch.setattr(out_of_memory, "Advice", Forecast)
    handle = engine.module.model.norm.register_forward_hook(full)
    texts = [
        message_of(lambda rows=rows: engine(**model_zoo.tiny.batch(engine.module, rows=rows, tokens=6)))
        for rows in (4, 2)
    ]
    assert texts[0].startswith(
        "CUDA out of memory. HiFT: in forward at 4 x 6 tokens while group 0 (embed) trains; forecast for 4"
    )
    assert texts[1].endswith("forecast for 2") and Forecast.made == 1
    handle.remove()
    loss = engine(**model_zoo.tiny.batch(engine.module, rows=2, tokens=6)).loss
    monkeypatch.setattr(engine.optimizer, "step", full)
    engine.backward(loss)
    assert "in the update at 2 x 6 tokens" in message_of(engine.step)


def test_evaluation_and_saving_have_their_own_answers(engine, monkeypatch, tmp_path):
    handle = engine.module.model.norm.register_forward_hook(full)
    engine.eval()
    text = message_of(lambda: engine(**model_zoo.tiny.batch(engine.module)))
    assert "in evaluation at 2 x 12 tokens" in text and "evaluation batch" in text
    handle.remove()
    monkeypatch.setattr("hift_ds.engine.saving.random_state", full)
    with pytest.raises(CheckpointError, match="CUDA out of memory"):
        engine.save_checkpoint(tmp_path)


def test_a_forecast_that_cannot_be_made_hides_nothing(engine, monkeypatch):
    monkeypatch.setattr(Advice, "make", lambda setting: 1 / 0)
    engine.module.model.norm.register_forward_hook(full)
    text = message_of(lambda: engine(**model_zoo.tiny.batch(engine.module)))
    assert text.startswith("CUDA out of memory.") and "ZeroDivisionError" in text


def test_other_errors_pass_through(engine):
    def broken(*_):
        raise RuntimeError("shapes do not match")

    engine.module.model.norm.register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="^shapes do not match$") as caught:
        engine(**model_zoo.tiny.batch(engine.module))
    assert not isinstance(caught.value, OutOfMemory)


def test_auto_find_batch_size_goes_on_with_a_smaller_batch(monkeypatch, tmp_path):
    """A model that has room for two rows."""
    from datasets import Dataset
    from transformers import TrainingArguments

    from hift_ds import HiFTTrainer

    monkeypatch.setattr(out_of_memory, "Advice", Forecast)
    model = model_zoo.tiny.build("llama")
    rows = []

    def two_rows_fit(module, args, kwargs):
        rows.append(len(kwargs["input_ids"]))
        if rows[-1] > 2:
            full()

    model.register_forward_pre_hook(two_rows_fit, with_kwargs=True)
    tokens = torch.randint(3, 60, (8, 6)).tolist()
    config = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 0}, "hift": {},
              "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}  # fmt: skip
    arguments = TrainingArguments(
        str(tmp_path), deepspeed=config, per_device_train_batch_size=8, auto_find_batch_size=True, max_steps=3,
        report_to=[], save_strategy="no", use_cpu=True, learning_rate=1e-3,
    )  # fmt: skip
    HiFTTrainer(model, arguments, train_dataset=Dataset.from_dict({"input_ids": tokens, "labels": tokens})).train()
    assert rows[0] == 8 and set(rows[-3:]) <= {1, 2}


# -- real forecasts -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """Large enough for activations to count: 3 blocks, 2 x 128 tokens."""
    config = {"hidden_size": 64, "intermediate_size": 176, "vocab_size": 4000, "max_position_embeddings": 256}
    engine = make_engine(model_zoo.tiny.build("llama", **config), ds_config(rows=2, bf16={"enabled": True}, clip=1.0))
    yield engine
    engine.destroy()


def test_advice_says_which_batch_and_which_switches_fit(small, monkeypatch, tmp_path):
    advice = Advice.make(small.memory.setting(str(tmp_path), 8, 128))
    peak = advice.slope.peak_bytes(8)
    assert set(advice.switched) == {"slice_numel", "checkpointing", "chunked_loss", "offload", "everything"}
    text = advice.text(8, 128, 0.9 * peak)
    assert "would fit: micro-batches of" in text and "hift.activations.checkpointing" in text
    largest = int(text.split("micro-batches of ")[1].split(";")[0])
    assert advice.slope.peak_bytes(largest) <= 0.9 * peak < advice.slope.peak_bytes(largest + 1)
    assert "no switch makes it fit" in advice.text(8, 128, 1000)
    switched = next(part for part in advice.text(4, 128, peak).split("; ") if "checkpointing" in part)
    assert switched.endswith("GiB at 8 x 128)")  # for the batch that it was made for


class Line:
    """Steps of one group that take 1000 bytes and 300 for each row."""

    def __init__(self, rows):
        self.rows = rows

    def known(self):
        return [0]

    def step(self, index):
        return GroupStep(0, "embed", 1, {"forward:": {"weights": 1000, "activations": 300 * self.rows}}, {}, 0, 0)


def test_advice_for_a_packed_row_counts_tokens():
    advice = Advice(Setting("m", {}, batch=1, length=6400), Slope(((1, Line(1)), (2, Line(2)))), {})
    assert (
        advice.answers(1, 6400)
        and advice.answers(1, 200)
        and not advice.answers(1, 6464)
        and not advice.answers(2, 200)
    )
    assert advice.text(1, 6400, 1150).endswith("would fit: 3200 tokens at once")
    assert advice.text(1, 3264, 1150).endswith("would fit: 3200 tokens at once")
    assert advice.text(3, 6400, 1700).endswith("would fit: micro-batches of 2")
    assert "no switch makes it fit" in advice.text(1, 6400, 1000)


def test_peaks_are_per_step_and_the_forecast_comes_beside_them(small):
    small.memory.start(2, 128)
    deadline = time.monotonic() + 240
    while small.memory.peak_bytes(0) is None and time.monotonic() < deadline:
        time.sleep(0.2)
    forecasts = [small.memory.peak_bytes(group.index) for group in small.groups]
    assert all(forecasts) and forecasts[1] != forecasts[-1]
    batch = model_zoo.tiny.batch(small.module, rows=2, tokens=128)
    small.backward(small(**batch).loss)
    small.step()
    assert small.last_report.forecast_bytes == forecasts[small.last_report.group]
    assert small.last_report.peak_bytes > 0  # host memory of this process
    small.memory.stop()
    assert small.memory.peak_bytes(0) is None


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_metrics_show_the_peak_and_on_accelerators_the_forecast(tmp_path, device):
    """Of a device with a peak counter, faked."""
    asked = []

    class Engine:
        last_report = None

        class memory:  # noqa: N801
            @staticmethod
            def start(rows, tokens, padded):
                asked.append((rows, tokens, padded))

    engine = Engine()
    report = ReportCallback(
        tmp_path, get_engine=lambda: engine, largest_batch=(4, 512), progress=SilentProgress(), plots=lambda: False
    )
    arguments = SimpleNamespace(device=torch.device(device), load_best_model_at_end=False)
    state, control = TrainerState(max_steps=3, train_batch_size=3), TrainerControl()  # 4 rows did not fit
    report.on_train_begin(arguments, state, control)
    for step, forecast in enumerate((None, 6 << 30, 5 << 30), start=1):
        state.global_step = step
        engine.last_report = SimpleNamespace(group=step - 1, group_name=f"g{step}", peak_bytes=step << 30,
                                             forecast_bytes=forecast if asked else None)  # fmt: skip
        report.on_step_end(arguments, state, control)
    report.on_train_end(arguments, state, control)
    steps = read_metrics(tmp_path).steps
    assert [(r["group"], r["peak_memory_gib"]) for r in steps] == [(0, 1.0), (1, 2.0), (2, 3.0)]
    on_device = device != "cpu"
    assert asked == ([(3, 512, False)] if on_device else [])
    assert [r.get("forecast_memory_gib") for r in steps] == ([None, 6.0, 5.0] if on_device else [None] * 3)


class Counters:
    """An accelerator's: ``allocated`` bytes, and the most of them since the last reset."""

    def __init__(self):
        self.allocated = self.peak = 0

    def change(self, num_bytes):
        self.allocated += num_bytes
        self.peak = max(self.peak, self.allocated)

    def max_memory_allocated(self):
        return self.peak

    def reset_peak_memory_stats(self):
        self.peak = self.allocated

    def synchronize(self): ...


def test_a_step_reports_its_own_peak_and_not_that_of_an_evaluation_before_it(monkeypatch):
    counters = Counters()
    model = Toy()
    engine = make_engine(model, ds_config(gas=2))
    monkeypatch.setattr("hift_ds.engine.deepspeed_seam.get_accelerator", lambda: counters)
    sizes = {"now": 0}

    def use_memory(*_):
        counters.change(sizes["now"])
        counters.change(-sizes["now"])

    model.head.register_forward_hook(use_memory)
    batches = make_batches(4)
    for micro_batches, peak in ((batches[:2], 30), (batches[2:], 20)):
        engine.eval()
        with torch.no_grad():
            sizes["now"] = 1000
            loss_of(engine, batches[0])
        engine.train()
        for batch, sizes["now"] in zip(micro_batches, (peak, 10), strict=True):
            engine.backward(loss_of(engine, batch))
            engine.step()
        assert engine.last_report.peak_bytes == peak
    engine.destroy()


def test_a_probe_on_an_accelerator_reads_the_peak_of_the_steps(monkeypatch):
    """The engine restarts the counter in each step: read after them it shows what came last."""
    from hift_ds.cli import probe

    counters = Counters()
    monkeypatch.setattr(probe, "_accelerator", lambda: SimpleNamespace(type="gpu"))
    engine = SimpleNamespace(optimizer=SimpleNamespace(store=None), last_report=None)
    monkeypatch.setattr(probe, "_build", lambda setting, device: engine)

    def step(engine, setting, device):
        counters.reset_peak_memory_stats()
        counters.change(100)
        counters.change(-90)
        engine.last_report = SimpleNamespace(peak_bytes=counters.max_memory_allocated())
        counters.reset_peak_memory_stats()

    monkeypatch.setattr(probe, "_step", step)
    monkeypatch.setattr(torch.accelerator.memory, "max_memory_allocated", counters.max_memory_allocated)
    monkeypatch.setattr(torch.accelerator.memory, "reset_peak_memory_stats", counters.reset_peak_memory_stats)
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(max_memory_reserved=lambda: 120))
    found = probe._run(Setting("m", {}))
    assert (found["peak_bytes"], found["reserved_bytes"]) == (110, 120)


def test_nothing_is_expected_before_a_forecast():
    memory = MemoryForecast(None)
    assert memory.peak_bytes(0) is None
    memory._forecast = SimpleNamespace(peak_bytes=lambda group: 1000 + group)
    assert memory.peak_bytes(7) == 1007 + WORKSPACE_BYTES  # which are among what is measured


def test_each_step_asks_whether_there_is_room_for_more_slots(monkeypatch):
    engine, asked = make_engine(Toy(), ds_config(gas=2)), []
    monkeypatch.setattr(engine.memory, "use_spare", lambda: asked.append(engine.global_steps))
    for batch in make_batches(4):
        engine.backward(loss_of(engine, batch))
        engine.step()
    assert asked == [1, 2]
    engine.destroy()


@pytest.mark.parametrize("forecast", [True, False])
def test_slots_that_are_left_to_us_follow_the_first_rank(monkeypatch, forecast):
    """From its forecast, or from what a cycle after the first has measured: as many as help, in half of the rest."""

    def store_on_an_accelerator():
        store = HostStateStore(torch.device("cpu"), (), 0, 1)
        store.device, store.largest_bytes = torch.device("meta"), lambda: 2 << 30
        return store

    def engine_of(rank, store):
        groups = [SimpleNamespace(index=index, chunks=(1,)) for index in range(2)]
        state = SimpleNamespace(slots=None, prefetch=True)
        optimizer = SimpleNamespace(store=store, questions={}, answers=None, groups=dict(enumerate(groups)))
        return SimpleNamespace(hift=SimpleNamespace(state=state), optimizer=optimizer, global_rank=rank,
                               partition=SimpleNamespace(groups=groups), last_report=None)  # fmt: skip

    monkeypatch.setattr(memory_forecast, "device_bytes", lambda: 10 << 30)
    stores = [store_on_an_accelerator() for _ in range(2)]
    engines = [engine_of(rank, store) for rank, store in enumerate(stores)]
    memories = [MemoryForecast(engine) for engine in engines]
    if forecast:
        monkeypatch.setattr(memories[0], "peak_bytes", lambda group: 3 << 30)
    seen = []
    for step in range(8):
        asked = [{name: ask() for name, ask in engine.optimizer.questions.items()} for engine in engines]
        answers = {name: asked[0][name] or asked[1][name] for name in asked[0]} if asked[0] else None
        for engine, memory in zip(engines, memories, strict=True):
            engine.optimizer.answers = answers
            engine.last_report = SimpleNamespace(cycle=step // 2, group=step % 2, peak_bytes=3 << 30)
            memory.use_spare()
        seen.append([store.num_slots for store in stores])
    assert all(one == other for one, other in seen), seen
    assert seen[0] == [1, 1] and seen[-1] == [2, 2] and not engines[0].optimizer.questions
    assert seen.index([2, 2]) == (1 if forecast else 4)
