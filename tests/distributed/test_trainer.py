"""The Trainer on two ranks: the same run as one rank on the merged batch, label tokens ragged, accumulation
uneven."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import model_zoo
from hift_ds.integrations.transformers import HiFTTrainer
from tests.helpers.distributed import run_distributed
from tests.helpers.trainer import arguments, ragged_dataset

pytestmark = pytest.mark.distributed

NUM_STEPS = 14  # more than two epochs, nearly three cycles
ROWS = 32  # 16 micro-batches a rank and epoch: five accumulations of three and one of one


def train(folder: str, micro_batch_size: int, accumulation: int, **options: Any) -> dict[str, Any]:
    trainer = HiFTTrainer(
        model=model_zoo.tiny.build("llama", seed=5),
        args=arguments(
            Path(folder), max_steps=NUM_STEPS, learning_rate=1e-2, optim="adamw_torch", warmup_steps=3,
            max_grad_norm=0.5,
            per_device_train_batch_size=micro_batch_size, gradient_accumulation_steps=accumulation,
            per_device_eval_batch_size=micro_batch_size, eval_strategy="steps", eval_steps=5, **options,
        ),
        train_dataset=ragged_dataset(ROWS), eval_dataset=ragged_dataset(6, seed=9),
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    trainer.save_model(str(Path(folder) / "saved"))
    return {
        "eval_before": before,
        "eval_after": trainer.evaluate()["eval_loss"],
        "losses": [entry["loss"] for entry in logs],
        "rates": [entry["learning_rate"] for entry in logs],
        "norms": [entry["grad_norm"] for entry in logs],
        "weights": {name: value.clone() for name, value in trainer.model.state_dict().items()},
        "coverage": trainer.engine.coverage(),
        "predictions": trainer.predict(ragged_dataset(5, seed=9)).predictions,
    }


def test_two_ranks_with_accumulation_are_one_rank_with_the_merged_batch(tmp_path):
    ranks = run_distributed(train, 2, str(tmp_path), 1, 3)
    alone = train(str(tmp_path / "alone"), micro_batch_size=6, accumulation=1)
    for found in ranks:
        assert found["losses"] == pytest.approx(alone["losses"], abs=1e-5)
        assert found["norms"] == pytest.approx(alone["norms"], rel=1e-4)
        assert found["rates"] == alone["rates"] and found["coverage"] == alone["coverage"]
        for name, value in alone["weights"].items():
            torch.testing.assert_close(
                found["weights"][name], value, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
            )
        assert found["predictions"] == pytest.approx(alone["predictions"], abs=1e-4)
    assert ranks[0]["eval_after"] != ranks[0]["eval_before"]
    # A mean of means over other batches.
    assert ranks[0]["eval_before"] == pytest.approx(alone["eval_before"], abs=0.02)
    for name in ("eval_before", "eval_after"):
        assert ranks[0][name] == ranks[1][name]

    from transformers import AutoModelForCausalLM

    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", use_safetensors=True)
    for name, value in saved.state_dict().items():
        assert torch.equal(value, ranks[0]["weights"][name])
