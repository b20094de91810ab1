"""The weights of a Trainer's checkpoint are one file with two names, and both readers find what they would have
found."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

import model_zoo
from hift_ds.checkpoint.trainer_folder import broken_seal, find_checkpoints, why_unusable
from hift_ds.integrations.transformers import HiFTTrainer
from hift_ds.integrations.weights_once import has_the_form_of_a_checkpoint
from tests.helpers.trainer import AUTO, arguments, ragged_dataset


class Remember(TrainerCallback):
    """The weights as they were at each save."""

    def __init__(self):
        self.weights = {}

    def on_save(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step] = {n: t.detach().clone() for n, t in model.state_dict().items()}


def trained(folder, family="llama", asynchronous=False, trainer_class=HiFTTrainer, **options):
    remember = Remember()
    ds = {**AUTO, "hift": {"checkpoint": {"asynchronous": asynchronous}}}
    options = {
        "bf16": True,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "learning_rate": 1e-2,
        **options,
    }
    trainer = trainer_class(
        model=model_zoo.tiny.build(family), args=arguments(folder, ds, **options),
        train_dataset=ragged_dataset(10), callbacks=[remember],
    )  # fmt: skip
    trainer.train()
    return trainer, remember.weights


def files_of_weights(checkpoint):
    tag = (checkpoint / "latest").read_text()
    return checkpoint / "model.safetensors", checkpoint / tag / "model.safetensors"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_file_that_from_pretrained_and_resume_both_read(tmp_path, asynchronous):
    trainer, weights = trained(tmp_path / "run", asynchronous=asynchronous)
    for step in (3, 6):
        checkpoint = tmp_path / "run" / f"checkpoint-{step}"
        theirs, ours = files_of_weights(checkpoint)
        assert theirs.samefile(ours)
        loaded, info = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", output_loading_info=True)
        assert not any(info.values()), info
        assert loaded.dtype == torch.bfloat16
        state = loaded.state_dict()
        assert state.keys() == weights[step].keys()
        assert all(torch.equal(state[name], weight) for name, weight in weights[step].items())
        trainer.model.save_pretrained(tmp_path / "plain")  # what the Trainer itself would have put there
        there = {path.name for path in (tmp_path / "plain").iterdir()}
        assert there <= {path.name for path in checkpoint.iterdir()}
        assert load_file(theirs).keys() == load_file(tmp_path / "plain" / "model.safetensors").keys()
        assert broken_seal(checkpoint, weights=True) is None and why_unusable(checkpoint) is None
    assert [path.name for path in find_checkpoints(tmp_path / "run", "auto")[0]] == [
        "checkpoint-6",
        "checkpoint-3",
    ]

    resumed, _ = trained(tmp_path / "run", asynchronous=asynchronous, max_steps=7)
    assert resumed.state.global_step == 7
    trainer.save_model(tmp_path / "model")  # not a checkpoint's: there it is a file of its own
    assert (tmp_path / "model" / "model.safetensors").stat().st_nlink == 1


class WritesMore(Trainer):
    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, {f"extra.{n}": t for n, t in (state_dict or self.model.state_dict()).items()})


class HiFTWritesMore(HiFTTrainer.__mro__[1], WritesMore):
    pass


def test_where_both_files_would_differ_there_are_two(tmp_path):
    _, weights = trained(tmp_path / "mixtral", family="mixtral", max_steps=3, bf16=False)  # no bf16 experts on CPUs
    theirs, ours = files_of_weights(tmp_path / "mixtral" / "checkpoint-3")
    assert not theirs.samefile(ours)
    assert any("block_sparse_moe" in name for name in load_file(theirs))
    loaded = AutoModelForCausalLM.from_pretrained(theirs.parent, dtype="auto").state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in weights[3].items())

    trained(tmp_path / "more", trainer_class=HiFTWritesMore, max_steps=3)
    theirs, ours = files_of_weights(tmp_path / "more" / "checkpoint-3")
    assert not theirs.samefile(ours) and all(name.startswith("extra.") for name in load_file(theirs))

    trained(tmp_path / "only", max_steps=3, save_only_model=True)
    assert (tmp_path / "only" / "checkpoint-3" / "model.safetensors").stat().st_nlink == 1


def test_which_models_are_saved_as_they_are():
    forms = {name: has_the_form_of_a_checkpoint(model_zoo.tiny.build(name)) for name in ("llama", "gpt2", "mixtral")}
    assert forms == {"llama": True, "gpt2": True, "mixtral": False}
    odd = model_zoo.tiny.build("llama", dtype=torch.bfloat16, vocab_size=67, hidden_size=18, num_attention_heads=1,
                               num_key_value_heads=1, head_dim=18)  # fmt: skip
    assert not has_the_form_of_a_checkpoint(odd)  # its norms have 36 bytes
    assert not has_the_form_of_a_checkpoint(torch.nn.Linear(2, 2))
