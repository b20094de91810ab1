"""Lightning's Trainer over its DeepSpeed strategy: ``lightning_loop.py deepspeed|one|hift FOLDER``."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from safetensors.torch import save_file
from torch.utils.data import DataLoader

import hift_ds
import model_zoo
from tests.helpers.trainer import ragged_dataset

form, folder = sys.argv[1], Path(sys.argv[2])
folder.mkdir(parents=True, exist_ok=True)


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = model_zoo.tiny.build("llama", seed=1)

    def training_step(self, batch, index):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class OnCPU(DeepSpeedStrategy):
    """Lightning's, without its insistence on CUDA and on a device with a number."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        DDPStrategy.setup_distributed(self)


block = {"groups": [["."]], "lr_update": "step"} if form == "one" else {"group_size": 1}
config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 0}}
trainer = lightning.Trainer(
    accelerator="cpu", devices=1, max_steps=6, logger=False, enable_checkpointing=False, enable_progress_bar=False,
    default_root_dir=folder, strategy=OnCPU(config=config),
)  # fmt: skip
module = Module()
before = {name: value.clone() for name, value in module.state_dict().items()}
data = DataLoader(ragged_dataset(12), batch_size=2)
with contextlib.nullcontext([]) if form == "deepspeed" else hift_ds.accelerate(block) as engines:
    trainer.fit(module, data)
if form != "deepspeed":
    (engine,) = engines
    assert set(engine.coverage().values()) <= ({6} if form == "one" else {1, 2}), engine.coverage()
after = module.model.state_dict()
assert all(not torch.equal(before[f"model.{name}"], value) for name, value in after.items())
save_file({name: value.contiguous() for name, value in after.items()}, folder / "model.safetensors")
print("trained")
