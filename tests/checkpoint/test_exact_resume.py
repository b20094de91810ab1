"""An interrupted and resumed run equals the uninterrupted one bit for bit: weights, states, losses,
counters."""

import functools
import tempfile

import pytest
import torch
from torch import nn

from tests.checkpoint.runs import Case, advance, assert_same_end, end_of, interrupted_and_whole
from tests.helpers.engines import ds_config
from tests.helpers.toy import Toy

BF16, FP16 = (
    {"enabled": True},
    {"enabled": True, "initial_scale_power": 20, "loss_scale_window": 3, "hysteresis": 1},
)


ASYNC = {"asynchronous": True}
ON_DISK = {"residency": "disk", "path": tempfile.gettempdir()}  # each engine makes and removes its own folder


class Noisy(Toy):
    """Draws from the global generator in every forward, and has a running statistic."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, tokens, targets):
        self.seen += 1
        h = nn.functional.dropout(self.embed(tokens), 0.3, self.training) + 0.001 * self.seen[0]
        for layer in self.layers:
            h = layer(h)
        return nn.functional.cross_entropy(self.head(self.norm(h)).flatten(0, 1).float(), targets.flatten())


def partly_frozen(seed):
    model = Toy(seed=seed)
    model.layers[1].up.weight.requires_grad_(False)
    model.norm.requires_grad_(False)
    return model


def decay_and_no_decay(model):
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    return torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0, "lr": 3e-3}], lr=1e-2
    )


def one_cycle(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-2, total_steps=40)


def steps_down(optimizer):
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[4, 9, 9], gamma=0.5)


def hift(**block):
    return ds_config(hift=block)


WARMUP = {
    "type": "WarmupDecayLR",
    "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 6, "total_num_steps": 20},
}

CASES = {
    "fp32": Case(at=(1, 5, 7, 15)),
    "accumulation": Case(
        ds_config(gas=3, clip=0.05, params={"weight_decay": 0.1}), num_micro_batches=27, at=(6, 16, 17)
    ),
    "bf16": Case(ds_config(bf16=BF16)),
    "bf16, accumulation": Case(ds_config(gas=3, bf16=BF16), num_micro_batches=27, at=(6, 16, 17)),
    "bf16, stochastic rounding": Case(
        ds_config(bf16=BF16, hift={"master_weights": False, "stochastic_rounding": True})
    ),
    "fp16, overflows": Case(ds_config(fp16=FP16), num_micro_batches=24, at=(2, 4, 12, 13)),
    "autocast": Case(ds_config(torch_autocast={"enabled": True, "dtype": "bfloat16"})),
    "top2down": Case(hift(order="top2down")),
    "random": Case(hift(order="random", reshuffle=True, seed=3)),
    "turns": Case(hift(steps_per_group=3), num_micro_batches=34, at=(4, 15, 17)),
    "always active": Case(hift(always_active=["embed", "head"], order="random", reshuffle=True)),
    "group_size": Case(hift(group_size=2)),
    "tied": Case(model=functools.partial(Toy, tied=True)),
    "frozen": Case(model=partly_frozen),
    "dropout and buffers": Case(model=Noisy),
    "device": Case(ds_config(bf16=BF16, hift={"state": {"residency": "device"}})),
    "step on host": Case(hift(state={"step_on": "host"})),
    "slices": Case(ds_config(bf16=BF16, hift={"state": {"slice_numel": 17}})),
    "no prefetch": Case(ds_config(bf16=BF16, hift={"state": {"prefetch": False}})),
    "two slots": Case(
        ds_config(bf16=BF16, hift={"state": {"slots": 2, "slice_numel": 40}, "steps_per_group": 2})
    ),
    "disk": Case(ds_config(bf16=BF16, hift={"state": ON_DISK})),
    "disk, asynchronous": Case(
        ds_config(hift={"state": {**ON_DISK, "slice_numel": 40}, "checkpoint": ASYNC}), at=(1, 5, 7)
    ),
    "split master": Case(ds_config(bf16=BF16, hift={"state": {"codec": "split_master"}})),
    "bf16 moments": Case(ds_config(bf16=BF16, hift={"state": {"codec": "bf16_moments"}})),
    "int8 moments": Case(ds_config(hift={"state": {"codec": "int8_moments", "slice_numel": 40}})),
    "split master, int8 moments, disk, asynchronous": Case(
        ds_config(
            bf16=BF16,
            hift={"state": {**ON_DISK, "codec": "split_master+int8_moments"}, "checkpoint": ASYNC},
        ),
        at=(1, 5, 7),
    ),
    "split master, stage 3": Case(ds_config(stage=3, bf16=BF16, hift={"state": {"codec": "split_master"}})),
    "stage 1": Case(ds_config(stage=1)),
    "stage 2": Case(ds_config(stage=2)),
    "stage 3": Case(ds_config(stage=3)),
    "stage 3, accumulation": Case(ds_config(stage=3, gas=3, bf16=BF16), num_micro_batches=27, at=(6, 16, 17)),
    "asynchronous": Case(hift(checkpoint=ASYNC), at=(1, 5, 7, 15)),
    "asynchronous, all at once": Case(
        ds_config(
            gas=3, bf16=BF16, hift={"checkpoint": ASYNC, "steps_per_group": 2, "always_active": ["head"]}
        ),
        model=partly_frozen, num_micro_batches=40, at=(5, 6, 7, 20),
    ),
    "asynchronous, buffers": Case(hift(checkpoint=ASYNC), model=Noisy),
    "asynchronous, stage 3": Case(
        ds_config(stage=3, hift={"checkpoint": ASYNC}), model=partly_frozen, at=(1, 5, 7)
    ),
    "in backward": Case(
        ds_config(gas=3, bf16=BF16, hift={"update": "in_backward", "group_size": "all"}), num_micro_batches=27,
        at=(6, 16, 17),
    ),
    "in backward, asynchronous, clipped by the last norm": Case(
        ds_config(
            clip=0.05,
            hift={"update": "in_backward", "clipping": "last_visit", "group_size": 2, "checkpoint": ASYNC},
        ),
        at=(1, 5, 7),
    ),
    **{
        f"in backward, clipping {clipping}": Case(
            ds_config(
                clip=0.2, bf16=BF16, hift={"update": "in_backward", "clipping": clipping, "group_size": 2}
            ),
            at=(1, 5, 7),
        )
        for clipping in ("exact", "speculative", "per_part")
    },
    "SGD": Case(ds_config(optimizer="SGD")),
    "SGD, momentum": Case(ds_config(optimizer="SGD", params={"momentum": 0.9, "nesterov": True})),
    "AdamW, amsgrad": Case(ds_config(params={"amsgrad": True})),
    "Adagrad": Case(ds_config(optimizer="Adagrad")),
    "Adafactor": Case(ds_config(optimizer="Adafactor")),
    "Adafactor, slices": Case(ds_config(optimizer="Adafactor", hift={"state": {"slice_numel": 17}})),
    "RMSprop": Case(ds_config(optimizer="RMSprop", params={"momentum": 0.9, "centered": True})),
    "Lion": Case(ds_config(optimizer="Lion")),
    "Muon": Case(ds_config(optimizer="Muon", params={"weight_decay": 0.1})),
    "NAdam": Case(ds_config(optimizer="NAdam")),
    "ASGD": Case(ds_config(optimizer="ASGD")),
    "Rprop": Case(ds_config(optimizer="Rprop")),
    "Adadelta": Case(ds_config(optimizer="Adadelta")),
    "client optimizer": Case(ds_config(optimizer=None), optimizer=decay_and_no_decay),
    "scheduler of the config": Case(ds_config(scheduler=WARMUP), at=(3, 8)),
    "scheduler, per step": Case(ds_config(scheduler=WARMUP, hift={"lr_update": "step"})),
    "scheduler, reference": Case(ds_config(scheduler=WARMUP, hift={"lr_update": "reference"}), at=(3, 8)),
    "client scheduler": Case(ds_config(optimizer=None), optimizer=decay_and_no_decay, scheduler=one_cycle),
    "client scheduler, counter": Case(scheduler=steps_down, at=(4, 10)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_resume_is_exact(name, tmp_path):
    interrupted_and_whole(CASES[name], tmp_path)


def test_saving_changes_nothing(tmp_path):
    ends = []
    for saves in (False, True):
        engine = CASES["dropout and buffers"].engine(seed=0)
        save = functools.partial(engine.save_checkpoint, tmp_path) if saves else int
        ends.append(end_of(engine, advance(engine, 0, 12, on_batch=lambda i, save=save: save())))
        engine.destroy()
    assert_same_end(*ends)


def test_the_overflow_case_overflows_where_it_is_saved():
    engine = CASES["fp16, overflows"].engine(seed=0)
    skipped = {}
    advance(engine, 0, 14, on_batch=lambda i: skipped.update({i: engine.last_report.skipped}))
    engine.destroy()
    assert skipped[4] and skipped[12] and skipped[13] and not skipped[2] and not skipped[14]
