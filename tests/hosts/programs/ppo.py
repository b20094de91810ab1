"""PPO of TRL before 1.15: ``ppo.py plain|one|hift FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from datasets import Dataset
from safetensors.torch import save_file
from trl.experimental.ppo import PPOConfig, PPOTrainer

import hift_ds
import model_zoo
from tests.parity.test_trl import tokenizer

form, folder = sys.argv[1], Path(sys.argv[2])
folder.mkdir(parents=True, exist_ok=True)
generator = torch.Generator().manual_seed(0)
prompts = torch.randint(3, 67, (16, 4), generator=generator).tolist()
args = PPOConfig(
    str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=1, num_mini_batches=1, num_ppo_epochs=2,
    total_episodes=12, response_length=4, num_sample_generations=0, learning_rate=1e-2, use_cpu=True, report_to="none",
    save_strategy="no", bf16=False, seed=3, lr_scheduler_type="constant", max_grad_norm=0.0, optim="sgd",
)  # fmt: skip
if form != "plain":
    config = {
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "zero_optimization": {"stage": 0},
        "hift": {"groups": [["."]], "lr_update": "step"} if form == "one" else {"group_size": 1},
    }  # fmt: skip
    Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))


def build(kind: str, seed: int):
    options = {"num_labels": 1} if kind == "sequence_classification" else {}
    model = model_zoo.tiny.build("llama", kind, seed=seed, **options)
    model.config.pad_token_id = 0
    return model


def make() -> PPOTrainer:
    return PPOTrainer(
        args=args, processing_class=tokenizer(), model=build("causal_lm", 1), ref_model=build("causal_lm", 1),
        reward_model=build("sequence_classification", 2), value_model=build("sequence_classification", 3),
        train_dataset=Dataset.from_dict({"input_ids": prompts}), eval_dataset=Dataset.from_dict({"input_ids": prompts}),
    )  # fmt: skip


if form == "plain":
    trainer = make()
else:
    with hift_ds.accelerate() as engines:
        trainer = make()
    assert engines == [trainer.model]
    print("ref", type(trainer.ref_model).__name__, "reward", type(trainer.reward_model).__name__)
model = trainer.accelerator.unwrap_model(trainer.model)
before = {name: value.clone() for name, value in model.state_dict().items()}
trainer.train()
if form != "plain":
    print("coverage", sorted(set(engines[0].coverage().values())), "of", [group.name for group in engines[0].groups])
    engines[0].destroy()
still = [name for name, value in model.state_dict().items() if torch.equal(before[name], value)]
assert not still, still
# One name each: the value model's backbone has two.
save_file({name: value.detach().contiguous() for name, value in model.named_parameters()}, folder / "model.safetensors")
print("trained")
