"""HiFTTrainer: interrupted and resumed is the uninterrupted run, data order included; rotation; signals."""

import json
import os
import pickle
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils.parametrizations import orthogonal
from transformers import Trainer, TrainerCallback

import model_zoo
from hift_ds.checkpoint.trainer_folder import broken_seal, find_checkpoints, rotate_checkpoints
from hift_ds.errors import CheckpointError
from hift_ds.integrations.callback import HiFTCallback
from hift_ds.integrations.transformers import HiFTTrainer
from hift_ds.train.preemption import PreemptionCallback
from tests.helpers.trainer import AUTO, arguments, ragged_dataset

ADAMW = {"type": "AdamW", "params": {"lr": "auto"}}
WARM_UP = {"type": "WarmupLR", "params": {"warmup_num_steps": "auto", "warmup_max_lr": "auto", "warmup_min_lr": 0}}


def make_trainer(folder, hift=None, ds=AUTO, **options):
    ds = {**ds, "hift": hift or {}}
    callbacks = options.pop("callbacks", None)
    defaults = {
        "max_steps": 13,
        "save_strategy": "steps",
        "save_steps": 4,
        "learning_rate": 1e-2,
        "gradient_accumulation_steps": 2,
    }
    args = arguments(folder, ds, **{**defaults, **options})
    model = model_zoo.tiny.build("llama")
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda m, inputs: (torch.nn.functional.dropout(inputs[0], 0.1, m.training),)
            )
    return HiFTTrainer(model=model, args=args, train_dataset=ragged_dataset(10), callbacks=callbacks)


def end_of(trainer):
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}
    return weights, losses, trainer.engine.coverage(), trainer.engine.schedule.cursor, trainer.engine.get_lr()


@pytest.mark.parametrize(
    ("precision", "hift"),
    [
        ("fp32", {"order": "random", "reshuffle": True}),
        ("bf16", {"steps_per_group": 3, "checkpoint": {"asynchronous": True}}),
        ("bf16", {"always_active": ["embed"], "state": {"slice_numel": 100}}),
    ],
)
def test_resume_is_exact(tmp_path, hift, precision):
    """With dropout, shuffled data, accumulation, a warm-up and several epochs."""
    options = {"bf16": precision == "bf16", "warmup_steps": 3}
    trainer = make_trainer(tmp_path, hift, **options)
    trainer.train()
    weights, losses, *rest = end_of(trainer)
    for step in (4, 8):
        resumed = make_trainer(tmp_path / "again", hift, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        theirs, their_losses, *their_rest = end_of(resumed)
        assert all(torch.equal(theirs[name], weight) for name, weight in weights.items())
        assert their_losses == losses and their_rest == rest
        shutil.rmtree(tmp_path / "again")


class NoneOfTransformers(torch.nn.Module):
    """What safetensors does not take as it stands: tied weights, one that is not contiguous; and a buffer that is
    complex."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(67, 8)
        self.layers = torch.nn.ModuleList(orthogonal(torch.nn.Linear(8, 8)) for _ in range(3))
        self.head = torch.nn.Linear(8, 67)
        self.head.weight = self.embed.weight
        self.register_buffer("turns", torch.polar(torch.ones(8), torch.arange(8.0)))

    def forward(self, input_ids, attention_mask=None, labels=None):
        h = self.embed(input_ids) * self.turns.real
        for layer in self.layers:
            h = h + layer(h).tanh()
        logits = self.head(h)
        return {"loss": torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}


@pytest.mark.parametrize("stage", [0, 3])
def test_a_model_that_is_none_of_transformers(tmp_path, stage):
    """Checkpoints, going on from them, and the weights as ``load_state_dict`` wants them."""

    def trained(folder, **options):
        args = arguments(
            folder, {**AUTO, "zero_optimization": {"stage": stage}}, max_steps=7, save_strategy="steps", save_steps=4,
            save_total_limit=1,
        )  # fmt: skip
        trainer = HiFTTrainer(NoneOfTransformers(), args, train_dataset=ragged_dataset(10))
        trainer.train(**options)
        trainer.save_model(str(folder / "model"))
        model = NoneOfTransformers()
        model.load_state_dict(load_file(folder / "model" / "model.safetensors"))
        assert model.embed.weight is model.head.weight
        return model.state_dict(), trainer.state.log_history[-2]["loss"], NoneOfTransformers().state_dict()

    weights, loss, begin = trained(tmp_path)
    args = arguments(tmp_path / "first", {**AUTO, "zero_optimization": {"stage": stage}}, max_steps=7,
                     save_strategy="steps", save_steps=4)  # fmt: skip
    stops = HiFTTrainer(NoneOfTransformers(), args, train_dataset=ragged_dataset(10), callbacks=[StopsAt(4)])
    stops.train()
    again, their_loss, _ = trained(tmp_path / "again", resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-4"))
    assert their_loss == loss and all(torch.equal(again[name], value) for name, value in weights.items())
    buffers = {name for name, _ in NoneOfTransformers().named_buffers()}
    assert {name for name in begin if torch.equal(begin[name], weights[name])} == buffers


class StopsAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step == self.step


class WouldRun:
    """A pickle that runs code, which makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_damage_of_what_the_trainer_writes_is_found_before_it_is_read(tmp_path, caplog):
    """A named checkpoint is one line; the newest whole one is found."""
    trainer = make_trainer(tmp_path / "run", max_steps=5, save_steps=2)
    trainer.train()
    weights, *_ = end_of(trainer)
    shutil.rmtree(tmp_path / "run" / "checkpoint-5")
    for number, (name, damage) in enumerate(
        [(name, damage) for name in ("scheduler.pt", "rng_state.pth", "trainer_state.json") for damage in (1, 2)]
        + [("trainer_state.json", "[" * 100_000)]
    ):
        run = shutil.copytree(tmp_path / "run", tmp_path / str(number))
        file = run / "checkpoint-4" / name
        content = file.read_bytes()
        file.write_bytes(damage.encode() if isinstance(damage, str) else content[: len(content) // damage - 1])
        again = make_trainer(run, max_steps=5, save_strategy="no")
        with pytest.raises(CheckpointError, match=f"^resume_from_checkpoint: .*{name} .*; choose another"):
            again.train(resume_from_checkpoint=str(run / "checkpoint-4"))
        assert again.engine is None
        caplog.clear()
        again.train(resume_from_checkpoint=True)
        assert f"checkpoint-4/{name} " in caplog.text and f"going on from {run / 'checkpoint-2'}" in caplog.text
        assert all(torch.equal(again.model.state_dict()[key], weight) for key, weight in weights.items())
        shutil.rmtree(run)


@pytest.mark.parametrize("name", ["scaler.pt", "optimizer.pt", "scheduler.pt"])
def test_a_file_that_was_not_saved_with_a_checkpoint_is_not_read(tmp_path, caplog, name):
    """Nor executed: the checkpoint is passed over as a damaged one."""
    ds = {**AUTO, "optimizer": ADAMW, "scheduler": WARM_UP} if name == "scheduler.pt" else AUTO
    trainer = make_trainer(tmp_path / "run", ds=ds, max_steps=5, save_steps=2)
    trainer.train()
    weights, *_ = end_of(trainer)
    shutil.rmtree(tmp_path / "run" / "checkpoint-5")
    planted = tmp_path / "run" / "checkpoint-4" / name
    assert not planted.exists()
    planted.write_bytes(pickle.dumps(WouldRun(tmp_path / "ran")))
    again = make_trainer(tmp_path / "run", ds=ds, max_steps=5, save_strategy="no")
    with pytest.raises(CheckpointError, match=f"^resume_from_checkpoint: .*{name} was not saved with the checkpoint"):
        again.train(resume_from_checkpoint=str(planted.parent))
    again.train(resume_from_checkpoint=True)
    assert f"going on from {tmp_path / 'run' / 'checkpoint-2'}" in caplog.text and not (tmp_path / "ran").exists()
    assert all(torch.equal(again.model.state_dict()[key], weight) for key, weight in weights.items())


def test_files_of_a_checkpoint_without_a_seal(tmp_path):
    """Of another program, or one whose list was lost: what cannot be read is one line all the same."""
    make_trainer(tmp_path / "run", max_steps=2, save_steps=2).train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    (checkpoint / "trainer_files.json").unlink()
    make_trainer(tmp_path / "again", max_steps=3, save_strategy="no").train(resume_from_checkpoint=str(checkpoint))
    for name in ("scheduler.pt", "rng_state.pth"):
        good = (checkpoint / name).read_bytes()
        for content in (good[:-30], b"", pickle.dumps(WouldRun(tmp_path / "ran"))):
            (checkpoint / name).write_bytes(content)
            again = make_trainer(tmp_path / "again", max_steps=3, save_strategy="no")
            with pytest.raises(CheckpointError, match=rf"^resume_from_checkpoint: \S*{name} is damaged"):
                again.train(resume_from_checkpoint=str(checkpoint))
        (checkpoint / name).write_bytes(good)
    assert not (tmp_path / "ran").exists()


def test_the_callback_does_not_go_on_from_damaged_files(tmp_path):
    """transformers reads them after the engine's checkpoint, and ends in the traceback of whatever is wrong."""

    def make(folder, **options):
        return Trainer(
            model_zoo.tiny.build("llama"), arguments(folder, max_steps=2, **options), train_dataset=ragged_dataset(8),
            callbacks=[HiFTCallback()],
        )  # fmt: skip

    make(tmp_path, save_strategy="steps", save_steps=2).train()
    good = (tmp_path / "checkpoint-2" / "scheduler.pt").read_bytes()
    for name, content, line in (
        ("scheduler.pt", good[:-30], rf"scheduler\.pt has {len(good) - 30} bytes, expected {len(good)}"),
        ("rng_state.pth", b"", r"rng_state\.pth has 0 bytes, expected \d+"),
        ("scaler.pt", good, r"scaler\.pt was not saved with the checkpoint: trainer_files\.json does not list it"),
    ):
        folder = shutil.copytree(tmp_path / "checkpoint-2", tmp_path / name / "checkpoint-2")
        (folder / name).write_bytes(content)
        again = make(tmp_path / "again")
        before = {key: value.clone() for key, value in again.model.state_dict().items()}
        with pytest.raises(CheckpointError, match=rf"^resume_from_checkpoint: {folder}/{line}; choose another"):
            again.train(resume_from_checkpoint=str(folder))
        assert all(torch.equal(again.model.state_dict()[key], value) for key, value in before.items())


def test_going_on_with_the_other_kind_of_scheduler(tmp_path, caplog):
    """The engine's, of a DeepSpeed config, or the Trainer's: what was saved of one is nothing to the other."""
    of_the_engine = {**AUTO, "optimizer": ADAMW, "scheduler": WARM_UP}
    make_trainer(tmp_path / "engine", ds=of_the_engine, max_steps=2, save_steps=2).train()
    make_trainer(tmp_path / "trainer", max_steps=2, save_steps=2).train()
    again = make_trainer(tmp_path, max_steps=3, save_strategy="no")
    with pytest.raises(CheckpointError, match="checkpoint-2 has no scheduler.pt: it was saved with the scheduler of a"):
        again.train(resume_from_checkpoint=str(tmp_path / "engine" / "checkpoint-2"))
    again = make_trainer(tmp_path, ds=of_the_engine, max_steps=3, save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-2"))
    assert "saved without a scheduler of the engine's: this run's begins at its first step" in caplog.text


def test_a_checkpoint_with_all_steps_trains_none(tmp_path, caplog):
    """Ten rows in fives are an epoch of two and a half steps: step 7 is in the middle of one."""
    trainer = make_trainer(tmp_path, max_steps=7)
    trainer.train()
    weights, *_ = end_of(trainer)
    for max_steps in (7, 5):
        again = make_trainer(tmp_path / "again", max_steps=max_steps)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
        assert again.state.global_step == 7 and again.had_no_step_left
        theirs, *_ = end_of(again)
        assert all(torch.equal(theirs[name], weight) for name, weight in weights.items())
    assert "has done all 7 steps" in caplog.text and "more than the 5 of this run" in caplog.text
    again = make_trainer(tmp_path, max_steps=8)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 8 and not again.had_no_step_left


def train_and_resume(folder: str) -> bool:
    """On this rank: whether the weights at the end are the same with and without an interruption."""
    import torch.distributed as dist

    hift = {"order": "random", "reshuffle": True}
    folder = Path(folder)
    whole = make_trainer(folder / "whole", hift, max_steps=9)
    whole.train()
    expected = end_of(whole)
    dist.barrier()
    resumed = make_trainer(folder / "again", hift, max_steps=9)
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-4"))
    theirs = end_of(resumed)
    same = all(torch.equal(theirs[0][name], weight) for name, weight in expected[0].items())
    return same and (dist.get_rank() > 0 or theirs[1] == expected[1]) and theirs[2:] == expected[2:]


@pytest.mark.distributed
def test_resume_is_exact_on_two_ranks(launcher, tmp_path):
    """Dropout differs between the ranks, and so does their share of the data."""
    launcher.preload(__name__)
    assert launcher.run(train_and_resume, 2, str(tmp_path)) == [True, True]


# -- rotation --------------------------------------------------------------------------------------


def checkpoints(folder):
    return sorted(int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*"))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_limit_counts_whole_checkpoints(tmp_path, asynchronous):
    seen = []

    class Look(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            seen.append(find_checkpoints(tmp_path, "auto")[0])

    trainer = make_trainer(
        tmp_path,
        {"checkpoint": {"asynchronous": asynchronous}},
        save_steps=2,
        save_total_limit=1,
        max_steps=8,
        callbacks=[Look()],
    )
    # What a killed run left: half of a later checkpoint.
    (tmp_path / "checkpoint-99" / "global_step99").mkdir(parents=True)
    trainer.train()
    assert checkpoints(tmp_path) == [8, 99]
    first = 2 if not asynchronous else next(i for i, found in enumerate(seen) if found)
    assert first < 8 and all(seen[first:])  # from the first on there is always one to resume from
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_rotation_keeps_the_best_and_forgets_what_a_kill_left(tmp_path):
    make_trainer(tmp_path, save_steps=2, max_steps=8, gradient_accumulation_steps=1).train()
    assert checkpoints(tmp_path) == [2, 4, 6, 8]
    (tmp_path / "checkpoint-8" / "global_step8" / "model.safetensors").unlink()
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text("{")
    deleting, others = tmp_path / ".checkpoint-1.0123456789ab.tmp", tmp_path / ".checkpoint-notes"
    for folder in (deleting, others):
        folder.mkdir()
    for unlimited in (None, 0, -1):
        assert rotate_checkpoints(tmp_path, unlimited) == []
    assert rotate_checkpoints(tmp_path, 2) == [tmp_path / "checkpoint-4"]
    assert checkpoints(tmp_path) == [2, 6, 8]
    assert rotate_checkpoints(tmp_path, 1, best=str(tmp_path / "checkpoint-2")) == []
    rotate_checkpoints(tmp_path, 1)
    assert checkpoints(tmp_path) == [6, 8]
    (tmp_path / "checkpoint-6" / "latest").unlink()
    rotate_checkpoints(tmp_path, 1)  # nothing whole is left: nothing is deleted
    assert checkpoints(tmp_path) == [6, 8] and others.exists() and not deleting.exists()


def test_every_small_file_of_a_checkpoint_is_sealed(tmp_path):
    """A flipped bit in any of them makes the run go on from the checkpoint before."""
    make_trainer(tmp_path, save_steps=2, max_steps=4, gradient_accumulation_steps=1).train()
    newest = tmp_path / "checkpoint-4"
    assert find_checkpoints(tmp_path, "auto") == ([newest, tmp_path / "checkpoint-2"], [])
    files = [p for p in newest.iterdir() if p.is_file() and p.suffix != ".safetensors" and p.name != "latest"]
    assert {
        "trainer_state.json",
        "scheduler.pt",
        "rng_state.pth",
        "training_args.bin",
        "trainer_files.json",
    } <= {p.name for p in files}
    for path in files:
        good = path.read_bytes()
        path.write_bytes(good[:50] + bytes([good[50] ^ 4]) + good[51:])
        whole, reasons = find_checkpoints(tmp_path, "auto")
        assert whole == [tmp_path / "checkpoint-2"], path
        assert len(reasons) == 1 and str(newest) in reasons[0]
        path.unlink()
        if path.name != "trainer_files.json":
            assert find_checkpoints(tmp_path, "auto")[0] == [tmp_path / "checkpoint-2"], path
        path.write_bytes(good)


def test_rotation_of_checkpoints_without_states(tmp_path):
    """``save_only_model``: nothing can go on from them, and they count all the same."""
    make_trainer(tmp_path, save_steps=2, max_steps=6, save_only_model=True, save_total_limit=1).train()
    assert checkpoints(tmp_path) == [6]
    assert find_checkpoints(tmp_path, "auto")[0] == []
    for asked in (True, str(tmp_path / "checkpoint-6")):
        with pytest.raises(CheckpointError, match="checkpoint-6 holds the model without the states of training"):
            make_trainer(tmp_path).train(resume_from_checkpoint=asked)


def test_the_weights_for_from_pretrained_are_sealed_too(tmp_path):
    make_trainer(tmp_path, save_steps=2, max_steps=2).train()
    folder = tmp_path / "checkpoint-2"
    assert broken_seal(folder, weights=True) is None
    path = folder / "model.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-3] + bytes([good[-3] ^ 1]) + good[-2:])
    assert broken_seal(folder) is None  # a run goes on from the engine's own
    assert "model.safetensors is damaged" in broken_seal(folder, weights=True)
    seal = json.loads((folder / "trainer_files.json").read_text())
    (folder / "trainer_files.json").write_text(json.dumps({**seal, "/dev/zero": seal["config.json"]}))
    assert "is damaged" in broken_seal(folder)


# -- signals ---------------------------------------------------------------------------------------


def train_until_told(folder: str) -> None:
    """A program: in step 6 waits for the signal, then goes on; saves and leaves when told to."""
    trainer = make_trainer(folder, save_strategy="no")
    stop = PreemptionCallback(lambda: trainer.engine)
    trainer.add_callback(stop)

    class Wait(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:
                Path(folder, "in step 6").touch()
                while not Path(folder, "go on").exists():
                    time.sleep(0.01)

    trainer.add_callback(Wait())
    trainer.train()
    stop.exit_if_stopped("python train.py")


@pytest.fixture(scope="module")
def one_thread():
    """As in the processes that ``launcher`` forks: the same operations in the same order, whatever OMP_NUM_THREADS."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, one_thread):
    trainer = make_trainer(tmp_path_factory.mktemp("whole"), save_strategy="no")
    trainer.train()
    return trainer.model.state_dict()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_saves_after_the_step_and_leaves_with_code_0(launcher, whole_run, tmp_path, name):
    """And the run goes on exactly."""
    launcher.preload(__name__)
    job = launcher.start(train_until_told, 1, str(tmp_path))
    wait_for(tmp_path / "in step 6", job)
    os.kill(job.pids[0], getattr(signal, name))
    (tmp_path / "go on").touch()
    assert job.wait() == [0], job.output(0)
    assert "stopped and saved; to go on: python train.py" in job.output(0)
    assert f"{name}: saving after this step" in job.output(0)
    assert checkpoints(tmp_path) == [6]
    resumed = make_trainer(tmp_path / "resumed", save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    weights = resumed.model.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in whole_run.items())


def test_a_second_ctrl_c_leaves_at_once(launcher, tmp_path):
    launcher.preload(__name__)
    job = launcher.start(train_until_told, 1, str(tmp_path))
    wait_for(tmp_path / "in step 6", job)
    os.kill(job.pids[0], signal.SIGINT)
    wait_until(lambda: "Ctrl-C again" in job.output(0))
    os.kill(job.pids[0], signal.SIGINT)
    assert job.wait() == [-signal.SIGINT]
    assert checkpoints(tmp_path) == []


def wait_for(path, job):
    wait_until(path.exists, lambda: job.output(0))


def wait_until(condition, explain=lambda: "", timeout_s=120):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.01)
