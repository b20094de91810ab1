"""DeepSpeed's Ulysses under a layer group's step: ranks that share sequences train as one rank with whole sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers

from hift_ds.engine.zero3.shards import is_partitioned, whole_of
from hift_ds.reference import ReferenceHiFT
from model_zoo import tiny
from tests.helpers.distributed import run_distributed
from tests.helpers.engines import ds_config, make_engine

pytestmark = pytest.mark.distributed

LENGTH, SHARING, LR = 16, 2, 0.5  # of SGD, which a gradient of twice the size would mislead


def loss_sum(model: Any, tokens: torch.Tensor, part: slice) -> torch.Tensor:
    """Of the next tokens in ``part`` of the sequence; the model sees that part only."""
    labels = torch.cat([tokens[:, 1:], torch.full((len(tokens), 1), -100)], 1)
    positions = torch.arange(LENGTH).expand(len(tokens), -1)
    logits = model(input_ids=tokens[:, part], position_ids=positions[:, part], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, part].flatten(), reduction="sum")


def compare(folder: Path, mpu: Any, options: dict[str, Any]) -> list[str]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    replicas = world_size // SHARING
    config = ds_config(lr=LR, world_size=1, rows=2, optimizer="SGD", clip=options.get("clip", 0.0))
    config |= {"zero_optimization": {"stage": options["stage"]}, "sequence_parallel_size": SHARING}
    model = transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    engine = make_engine(model, config, mpu=mpu)
    twin = transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
    reference = ReferenceHiFT(
        twin, [group.param_names for group in engine.groups],
        lambda named: torch.optim.SGD([p for _, p in named], lr=LR),
        max_grad_norm=options.get("clip", 0.0),
    )  # fmt: skip
    start = rank % SHARING * (LENGTH // SHARING)
    mine = slice(start, start + LENGTH // SHARING)
    generator = torch.Generator().manual_seed(5)
    for _ in range(8):
        tokens = torch.randint(3, 67, (2 * replicas, LENGTH), generator=generator)
        reference.step([tokens], lambda m, t: loss_sum(m, t, slice(0, LENGTH)) / (len(t) * (LENGTH - 1)))
        rows = tokens[rank // SHARING * 2 :][:2]
        engine.backward(loss_sum(engine, rows, mine) / (len(rows) * (LENGTH - 1)))
        engine.step()
    trained = {n: (whole_of(p) if is_partitioned(p) else p) for n, p in model.named_parameters()}
    worst = max((trained[name] - value).abs().max().item() for name, value in twin.named_parameters())
    engine.destroy()
    return [f"{options}: weights differ by {worst}"] if worst > 1e-6 else []


def all_cases(folder: str) -> list[str]:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    transformers.logging.set_verbosity_error()
    mpu = UlyssesSPAttentionHF.register_with_transformers(
        folder, core_attn_implementation="sdpa", sequence_parallel_size=SHARING, micro_batch_size=2,
        seq_length_is_variable=True,
    )  # fmt: skip
    return [
        error for options in ({"stage": 0, "clip": 0.05}, {"stage": 3}) for error in compare(Path(folder), mpu, options)
    ]


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_that_share_sequences_train_as_one(tmp_path, world_size):
    config = tiny.config("llama", num_attention_heads=4, num_key_value_heads=2, hidden_size=32)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    for rank, errors in enumerate(run_distributed(all_cases, world_size, str(tmp_path))):
        assert not errors, f"rank {rank}: " + "\n".join(errors)
