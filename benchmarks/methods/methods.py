"""The methods of the study, each a class with ``step(batch, rate)``. bf16 weights; fp32 masters of what is trained.

The peers are used as their packages give them (BAdam, GaLore, PEFT); LISA, which comes inside LMFlow, is its published
rule on top of torch: embedding and head always, some blocks drawn anew every few steps.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

Schedule = Callable[[int], float]
CLIP = 1.0
BETAS, EPS = (0.9, 0.999), 1e-8


class Masters:
    """fp32 copies of parameters and an optimizer on them: what every mixed-precision trainer holds.

    Args:
        params: the weights, of any dtype.
        make: the optimizer of a list of fp32 tensors.
    """

    def __init__(self, params: Iterable[nn.Parameter], make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> None:
        self.params = list(params)
        self.copies = [nn.Parameter(p.detach().float().clone()) for p in self.params]
        self.optimizer = make(self.copies)

    def step(self, rate: float) -> None:
        """Clip the gradients that are there to norm 1, update, write back; parameters without one are left alone."""
        pairs = [(p, copy) for p, copy in zip(self.params, self.copies, strict=True) if p.grad is not None]
        for p, copy in pairs:
            copy.grad, p.grad = p.grad.float(), None
        nn.utils.clip_grad_norm_([copy for _, copy in pairs], CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        for p, copy in pairs:
            p.data.copy_(copy.data)
            copy.grad = None


def adamw(params: list[Tensor]) -> torch.optim.Optimizer:
    """torch's fused AdamW, no weight decay."""
    return torch.optim.AdamW(params, lr=0.0, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True)


class Method:
    """Trains ``model`` (bf16) by one step a call.

    Attributes:
        model: as it is judged.
        schedule: the learning rate of each step of the run, by its number.
        steps: made so far.
    """

    def __init__(self, model: nn.Module, seed: int, schedule: Schedule) -> None:
        self.model = model
        self.seed = seed
        self.schedule = schedule
        self.steps = 0

    def step(self, batch: dict[str, Tensor]) -> float:
        """One optimizer step; the loss before it."""
        loss = self.model(**batch).loss
        loss.backward()
        self.update(self.schedule(self.steps))
        self.steps += 1
        return float(loss.detach())

    def update(self, rate: float) -> None:
        """Take the gradients that are there into the weights."""
        raise NotImplementedError

    def trained(self) -> int:
        """Weights that the coming step trains."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def steps_per_cycle(self) -> int:
        """Steps after which every part of the model has had its turn; a few where that does not matter."""
        return 6

    def close(self) -> None:
        """Give everything back."""


class Full(Method):
    """Every weight in every step."""

    def __init__(self, model: nn.Module, seed: int, schedule: Schedule) -> None:
        super().__init__(model, seed, schedule)
        self.masters = Masters(model.parameters(), adamw)

    def update(self, rate: float) -> None:
        self.masters.step(rate)


class LoRA(Full):
    """PEFT's adapters on every linear layer of the blocks, ``alpha = 2 * rank``; a new head is trained whole."""

    def __init__(self, model: nn.Module, seed: int, schedule: Schedule, rank: int = 16) -> None:
        from peft import LoraConfig, get_peft_model

        head = [name for name in ("score", "classifier") if hasattr(model, name)]
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", modules_to_save=head or None,
            task_type="SEQ_CLS" if head else "CAUSAL_LM",
        )  # fmt: skip
        # PEFT's default is fp32 adapters, to which every input is cast: with long rows as much time again on a CPU.
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
        Method.__init__(self, model, seed, schedule)
        self.masters = Masters((p for p in model.parameters() if p.requires_grad), adamw)


class GaLore(Full):
    """Gradients of the blocks' matrices projected to rank ``rank``; the rest by the same optimizer, unprojected."""

    def __init__(
        self, model: nn.Module, seed: int, schedule: Schedule, rank: int = 128, update_proj_gap: int = 200,
        scale: float = 0.25,
    ) -> None:  # fmt: skip
        from galore_torch import GaLoreAdamW

        Method.__init__(self, model, seed, schedule)
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        params = list(model.parameters())
        projected = [p.dim() == 2 and id(p) not in embeddings for p in params]

        def make(copies: list[Tensor]) -> torch.optim.Optimizer:
            low = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale, "proj_type": "std"}
            groups = [
                {"params": [c for c, is_low in zip(copies, projected, strict=True) if not is_low]},
                {"params": [c for c, is_low in zip(copies, projected, strict=True) if is_low], **low},
            ]
            return GaLoreAdamW(groups, lr=0.0, betas=BETAS, eps=EPS, no_deprecation_warning=True)

        self.masters = Masters(params, make)


class LISA(Full):
    """LISA (arXiv 2403.17919): everything outside of the blocks in every step, ``num_blocks`` of the blocks drawn anew
    every ``every`` steps."""

    def __init__(self, model: nn.Module, seed: int, schedule: Schedule, num_blocks: int = 2, every: int = 5) -> None:
        super().__init__(model, seed, schedule)
        self.blocks = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
        self.num_blocks, self.every = min(num_blocks, len(self.blocks)), every
        self.rng = random.Random(seed)

    def step(self, batch: dict[str, Tensor]) -> float:
        if self.steps % self.every == 0:
            drawn = self.rng.sample(range(len(self.blocks)), self.num_blocks)
            for i, block in enumerate(self.blocks):
                block.requires_grad_(i in drawn)
        return super().step(batch)


class BAdam(Method):
    """The package ``badam``: its BlockOptimizer over torch's AdamW, blocks from the top, states begun anew at each
    visit."""

    def __init__(self, model: nn.Module, seed: int, schedule: Schedule, switch_block_every: int = 50) -> None:
        from badam import BlockOptimizer

        super().__init__(model, seed, schedule)
        base = adamw(list(model.parameters()))
        self.optimizer = BlockOptimizer(
            base_optimizer=base, named_parameters_list=list(model.named_parameters()), switch_mode="descending",
            switch_block_every=switch_block_every, include_embedding=True, include_lm_head=True, verbose=0,
        )  # fmt: skip

    def update(self, rate: float) -> None:
        nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None], CLIP)
        for group in [*self.optimizer.param_groups, *self.optimizer.base_optimizer.param_groups]:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def steps_per_cycle(self) -> int:
        return self.optimizer.block_num * self.optimizer.switch_block_every


class HiFT(Method):
    """Ours: the engine, with any keys of the ``"hift"`` block; it steps the schedule, as ``lr_update`` says."""

    def __init__(
        self, model: nn.Module, seed: int, schedule: Schedule, betas: tuple[float, float] = BETAS, **block: Any
    ) -> None:
        import hift_ds

        super().__init__(model, seed, schedule)
        params = {"lr": 1.0, "betas": list(betas), "eps": EPS, "weight_decay": 0.0, "fused": True}
        self.engine, *_ = hift_ds.initialize(
            model=model,
            model_parameters=list(model.parameters()),
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, schedule),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": CLIP,
                "optimizer": {"type": "AdamW", "params": params},
                "bf16": {"enabled": True},
                "hift": {"seed": seed, "state": {"residency": "device"}, **block},
            },
        )

    def step(self, batch: dict[str, Tensor]) -> float:
        loss = self.engine(**batch).loss
        self.engine.backward(loss)
        self.engine.step()
        return float(loss.detach())

    def trained(self) -> int:
        groups = self.engine.optimizer.active_groups
        return sum(member.param.numel() for group in groups for member in group.members)

    def steps_per_cycle(self) -> int:
        turns = len(self.engine.groups)
        return turns * -(-6 // turns)

    def close(self) -> None:
        self.engine.destroy()


METHODS: dict[str, type[Method]] = {
    "full": Full, "hift": HiFT, "badam": BAdam, "lisa": LISA, "lora": LoRA, "galore": GaLore,
}  # fmt: skip


def build(name: str, model: nn.Module, seed: int, schedule: Schedule, settings: dict[str, Any]) -> Method:
    """The method of that name on ``model``."""
    return METHODS[name](model, seed, schedule, **settings)
