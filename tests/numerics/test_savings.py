"""The switches of "activations" leave loss and gradients as they are, and save what they say."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import model_zoo
from hift_ds.activations import chunked_loss
from hift_ds.activations import switches as savings
from hift_ds.activations.chunked_loss import DeferredLogits, LinearCrossEntropy
from hift_ds.activations.switches import ActivationSavings
from hift_ds.config import ActivationsConfig
from hift_ds.engine.zero3.shards import whole_of
from hift_ds.errors import ConfigError
from hift_ds.layers.arch import find_arch
from hift_ds.layers.grouping import partition_model
from hift_ds.optim import group_update
from hift_ds.simulation.tracker import MemoryTracker, Watch
from tests.helpers.engines import ds_config, largest_difference, make_engine, train_step
from tests.helpers.toy import Toy, make_batches
from tests.numerics.test_engine_one_rank import adamw, compare

HEADS = [(name, head) for name, family in model_zoo.FAMILIES.items() for head in family.heads]
LANGUAGE = [(name, head) for name, head in HEADS if head in ("causal_lm", "masked_lm", "seq2seq_lm")]
FAMILIES = [(name, family.heads[0]) for name, family in model_zoo.FAMILIES.items()]


@pytest.fixture
def ragged_tiles(monkeypatch):
    """Tiles of five rows, or seven columns of the vocabulary: many, and the last one short."""
    monkeypatch.setattr(chunked_loss, "MIN_TILE_ROWS", 5)
    monkeypatch.setattr(chunked_loss, "TILE_NUMEL", 1)


@pytest.fixture
def chunked_calls(monkeypatch):
    """Shapes of the hidden states whose loss was taken in chunks."""
    shapes, real = [], LinearCrossEntropy.apply
    monkeypatch.setattr(
        LinearCrossEntropy, "apply", lambda *args: (shapes.append(tuple(args[0].shape)), real(*args))[1]
    )
    return shapes


def tiny(name: str, head: str, dtype: torch.dtype = torch.float32, **overrides) -> nn.Module:
    # grouped_mm wants strides that are multiples of 16 bytes, which tiny experts in bf16 do not have
    return model_zoo.tiny.build(name, head, dtype=dtype, attn_implementation="eager", **overrides)


def batch_with_prompt(model: nn.Module, rows: int = 3, tokens: int = 11) -> dict[str, torch.Tensor]:
    """The first tokens of one row are not learned, and nothing of another row."""
    batch = model_zoo.tiny.batch(model, rows=rows, tokens=tokens)
    if "labels" in batch and batch["labels"].dim() == 2:
        batch["labels"] = batch["labels"].clone()
        batch["labels"][0, :4] = -100
        batch["labels"][-1] = -100
    return batch


def loss_and_gradients(
    model: nn.Module, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def without_cache(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """``batch`` for a forward without transformers' key-value cache, as in a training forward of ours. With it keys are
    concatenated, hence contiguous, and a product with another layout may differ in its last bit, by processor."""
    accepts = "use_cache" in inspect.signature(model.forward).parameters
    return {**batch, "use_cache": False} if accepts else batch


def relative_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Of all gradients as one vector: some biases of attention have a gradient of zero, but for rounding."""
    assert a.keys() == b.keys()
    square = sum((a[n].double() - b[n].double()).square().sum() for n in a)
    return float((square / sum(a[n].double().square().sum() for n in a)).sqrt())


def groups_of(model: nn.Module) -> dict[int, tuple[str, ...]]:
    return {group.index: group.param_names for group in partition_model(model).groups}


def train_only(model: nn.Module, names) -> None:
    for name, param in model.named_parameters():
        param.requires_grad_(name in set(names))


# -- chunked loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name, head", LANGUAGE)
def test_chunked_loss_of_every_family(name, head, dtype, tolerance, ragged_tiles, chunked_calls):
    model = tiny(name, head, dtype, **({"experts_implementation": "eager"} if name == "mixtral" else {}))
    batch = batch_with_prompt(model)
    loss, gradients = loss_and_gradients(model, batch)
    assert chunked_loss.defer_logits(model, lambda: True) is not None
    chunked, chunked_gradients = loss_and_gradients(model, batch)
    assert len(chunked_calls) == 1 and chunked_calls[0][0] == 33
    # Some families take the loss of bf16 logits in bf16.
    last_bits = 2e-6 if loss.dtype == torch.float32 else 1e-2
    assert chunked.dtype == loss.dtype and float(chunked) == pytest.approx(float(loss), rel=last_bits)
    assert relative_difference(gradients, chunked_gradients) < tolerance


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_chunked_loss_with_a_bias_and_any_incoming_gradient(reduction, ragged_tiles):
    torch.manual_seed(0)
    head, targets = nn.Linear(6, 23), torch.randint(0, 23, (17,))
    targets[3] = -1
    hidden = torch.randn(17, 6, requires_grad=True)
    results = []
    for deferred in (False, True):
        hidden.grad = head.weight.grad = head.bias.grad = None
        logits = DeferredLogits(head, hidden) if deferred else head(hidden)
        if deferred:
            head.forward = chunked_loss._DeferringHead(head, lambda: True)
        loss = nn.functional.cross_entropy(2 * logits.float(), targets, ignore_index=-1, reduction=reduction)
        (loss * 0.37).backward()
        results.append([loss.detach(), hidden.grad, head.weight.grad, head.bias.grad])
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=2e-6, atol=1e-6)


def test_whole_logits_never_exist(ragged_tiles):
    """The largest tensors of a step are the head's weight and its gradient, not (tokens, vocabulary)."""
    model = tiny("llama", "causal_lm", vocab_size=997)
    batch = model_zoo.tiny.batch(model, rows=60, tokens=5)
    largest = []
    for active in (False, True):
        handle = chunked_loss.defer_logits(model, lambda: True) if active else None
        tracker = MemoryTracker("cpu", block_bytes=1)
        tracker.see_all(model.parameters())
        with Watch(tracker):
            model(**batch).loss.backward()
        largest.append(max(block.num_bytes for block in tracker.blocks))
        model.zero_grad()
    chunked_loss.restore(handle)
    assert largest[0] == 5 * 60 * 997 * 4
    assert largest[1] == 997 * 16 * 4


def test_backward_lets_go_of_the_hidden_states_though_the_loss_is_still_there():
    """A loss keeps its graph until it is dropped, after backward through all blocks; the graph must not keep them."""
    model, freed = tiny("llama", "causal_lm"), []
    chunked_loss.defer_logits(model, lambda: True)
    watch = weakref.finalize
    model.model.norm.register_forward_hook(
        lambda module, args, out: watch(out.untyped_storage(), freed.append, True) and None
    )
    loss = model(**batch_with_prompt(model)).loss
    assert not freed
    loss.backward()
    assert freed and loss.grad_fn is not None


def test_anything_else_done_with_the_logits_computes_them_and_says_so_once(caplog):
    model = tiny("gemma2", "causal_lm").requires_grad_(True)
    batch = model_zoo.tiny.batch(model, rows=2, tokens=7)
    whole = model(**batch).logits
    chunked_loss.defer_logits(model, lambda: True)
    deferred = model(**batch).logits
    assert isinstance(deferred, DeferredLogits) and deferred.shape == whole.shape
    assert torch.equal(deferred[:, -1, 3], whole[:, -1, 3])
    assert torch.equal(deferred.argmax(-1), whole.argmax(-1))
    assert torch.equal(torch.softmax(deferred, -1), torch.softmax(whole, -1))
    assert [line for line in caplog.messages if "chunked_loss saves nothing" in line] == caplog.messages[:1] != []
    # The head over fewer rows is another product: other tiles, and so another order of summation.
    torch.testing.assert_close(deferred[:, 2:].compute(), whole[:, 2:], rtol=2e-6, atol=1e-6)
    smoothed = [nn.functional.cross_entropy(x.view(-1, 67), batch["labels"].view(-1), label_smoothing=0.1)
                for x in (whole, deferred)]  # fmt: skip
    torch.testing.assert_close(*smoothed)


def test_models_without_a_language_head_are_left_alone():
    model = tiny("llama", "sequence_classification")
    assert chunked_loss.defer_logits(model, lambda: True) is None


# -- checkpointing ----------------------------------------------------------------------------------------------


class Calls:
    """How often each block's attention (or the block) ran."""

    def __init__(self, model: nn.Module) -> None:
        self.blocks = [model.get_submodule(names[0]) for names in find_arch(model).blocks]
        self.counts = [0] * len(self.blocks)
        for index, block in enumerate(self.blocks):
            inner = next(module for module in block.modules() if not list(module.children()))
            inner.register_forward_hook(lambda *_, i=index: self._ran(i))

    def _ran(self, index: int) -> None:
        self.counts[index] += 1

    def take(self) -> list[int]:
        taken, self.counts = self.counts, [0] * len(self.counts)
        return taken


@pytest.mark.parametrize("name, head", FAMILIES)
def test_checkpointing_of_every_family_and_group(name, head):
    """Gradients to the last bit, since the same operations run again on the same tensors (the cache is off on both
    sides); recomputed are the blocks at and above the active group, and no other."""
    model = tiny(name, head)
    batch, groups = without_cache(model, batch_with_prompt(model)), groups_of(model)
    calls = Calls(model)
    plain = {}
    for index, names in groups.items():
        train_only(model, names)
        plain[index] = loss_and_gradients(model, batch)
        usual = calls.take()
    saving = ActivationSavings(model, ActivationsConfig(checkpointing=True), groups)
    for index, names in groups.items():
        train_only(model, names)
        with saving.during_forward([index]):
            loss, gradients = loss_and_gradients(model, batch)
        assert torch.equal(loss, plain[index][0])
        for param, gradient in plain[index][1].items():
            assert torch.equal(gradients[param], gradient), param
        lowest = saving.lowest_block(index)
        assert calls.take() == usual[:lowest] + [2 * count for count in usual[lowest:]], index
    saving.close()
    train_only(model, groups[0])
    loss_and_gradients(model, batch)
    assert calls.take() == usual


def test_the_topmost_blocks_can_be_kept():
    model = tiny("llama", "causal_lm", num_hidden_layers=6)
    batch, groups = batch_with_prompt(model), groups_of(model)
    calls = Calls(model)
    saving = ActivationSavings(model, ActivationsConfig(checkpointing=True, blocks_kept=2), groups)
    expected = {0: [2, 2, 2, 2, 1, 1], 3: [1, 1, 2, 2, 1, 1], 5: [1] * 6, 7: [1] * 6}
    for index, counts in expected.items():
        train_only(model, groups[index])
        with saving.during_forward([index]):
            loss_and_gradients(model, batch)
        assert calls.take() == counts, index


def test_what_transformers_switched_on_is_taken_over_without_gradients_of_inputs():
    model = tiny("llama", "causal_lm")
    model.gradient_checkpointing_enable()
    groups = groups_of(model)
    train_only(model, groups[3])
    reached = []
    model.model.embed_tokens.register_forward_hook(lambda m, args, out: reached.append(out.requires_grad))
    model(**batch_with_prompt(model))
    assert reached == [True]  # what transformers does
    calls = Calls(model)
    saving = ActivationSavings(model, ActivationsConfig(), groups)
    with saving.during_forward([3]):
        loss_and_gradients(model, batch_with_prompt(model))
    assert reached == [True, False]
    assert calls.take() == [1, 1, 2]


# -- nothing below the active group -------------------------------------------------------------------------------


@pytest.mark.parametrize("name, head", HEADS)
def test_below_the_active_group_no_graph_is_built_and_nothing_is_kept(name, head):
    """After a training forward nothing is alive that a block below the one under the active group made."""
    model = tiny(name, head, **({"num_decoder_layers": 4} if name == "t5" else {}))
    groups, arch = groups_of(model), find_arch(model)
    saving = ActivationSavings(model, ActivationsConfig(), groups)
    index = max(i for i in groups if saving.lowest_block(i) < len(arch.blocks))
    lowest = saving.lowest_block(index)
    assert lowest >= 2
    train_only(model, groups[index])
    tracker, needs_gradient = MemoryTracker("cpu", block_bytes=1), {}

    def enter(block: int, args, kwargs) -> None:
        tracker.mark("forward", str(block))
        tensors = [x for x in [*args, *kwargs.values()] if isinstance(x, torch.Tensor)]
        needs_gradient[block] = any(x.requires_grad for x in tensors)

    for block, names in enumerate(arch.blocks):
        module = model.get_submodule(names[0])
        module.register_forward_pre_hook(lambda m, a, k, b=block: enter(b, a, k), with_kwargs=True)
        module.register_forward_hook(lambda m, a, o, b=block: tracker.mark("forward", "after"))
    batch = batch_with_prompt(model)
    tracker.see_all([*model.parameters(), *model.buffers(), *batch.values()])
    with Watch(tracker), saving.during_forward([index]):
        loss = model(**batch).loss
    assert loss.requires_grad
    assert not any(needs_gradient[block] for block in range(lowest + 1))
    below = [(mark.event, following.event) for mark, following in zip(tracker.marks, tracker.marks[1:], strict=False)
             if mark.place.isdigit() and int(mark.place) < lowest - 1]  # fmt: skip
    kept = [block for block in tracker.blocks if block.died is None and any(a <= block.born < b for a, b in below)]
    assert not kept, f"{sum(block.num_bytes for block in kept)} bytes of blocks below {lowest} are kept"


def test_no_cache_in_a_training_forward_unless_asked_for():
    model = tiny("llama", "causal_lm")
    saving = ActivationSavings(model, ActivationsConfig(), groups_of(model))
    batch = model_zoo.tiny.batch(model)
    assert model(**batch).past_key_values is None
    assert model(**batch, use_cache=True).past_key_values is not None
    assert model.eval()(**batch).past_key_values is not None
    saving.close()
    assert model.train()(**batch).past_key_values is not None


# -- the engine ---------------------------------------------------------------------------------------------------


def train(model: nn.Module, config: dict, cycles: int = 2) -> list[float]:
    engine = make_engine(model, config)
    losses = []
    try:
        for step in range(cycles * engine.schedule.steps_per_cycle):
            for micro in range(engine.gradient_accumulation_steps()):
                batch = model_zoo.tiny.batch(model, rows=2, tokens=9, seed=2 * step + micro)
                loss = engine(**batch).loss
                engine.backward(loss)
                engine.step()
                losses.append(float(loss))
    finally:
        engine.destroy()
    return losses


@pytest.mark.parametrize("name, head", [("llama", "causal_lm"), ("gpt2", "causal_lm"), ("t5", "seq2seq_lm")])
def test_the_engine_with_every_switch_on(name, head, ragged_tiles, chunked_calls):
    """Tied and untied heads, accumulation, clipping; two cycles."""
    activations = {"checkpointing": True, "blocks_kept": 1, "chunked_loss": True, "offload": True}
    plain, saving = tiny(name, head), tiny(name, head)
    expected = train(plain, ds_config(rows=2, gas=2, clip=0.5))
    losses = train(saving, ds_config(rows=2, gas=2, clip=0.5, hift={"activations": activations}))
    assert losses == pytest.approx(expected, rel=1e-5)
    assert largest_difference(plain, saving) < 2e-5
    assert len(chunked_calls) == len(losses)


def test_recomputation_alone_changes_no_bit_of_a_run():
    plain, saving = tiny("llama", "causal_lm"), tiny("llama", "causal_lm")
    expected = train(plain, ds_config(rows=2))
    losses = train(saving, ds_config(rows=2, hift={"activations": {"checkpointing": True}}))
    assert losses == expected
    assert largest_difference(plain, saving) == 0.0


def test_a_model_that_is_not_transformers_is_recomputed_too():
    model = Toy(num_layers=4)
    calls = Calls(model)
    compare(ds_config(hift={"activations": {"checkpointing": True}}), adamw(), model=model, cycles=1)
    counts = calls.take()
    # Once for the engine and once for the reference in each of six steps; the lowest block again for the embedding's
    # and its own, the topmost for all but the head's.
    assert counts[0] == 12 + 2 and counts[-1] == 12 + 5


class _Normed(nn.Module):
    """A block whose forward changes buffers: running statistics, and the power iteration of ``spectral_norm``, whose
    vectors gradients go by."""

    def __init__(self, spectral_norm: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.norm, self.up = nn.BatchNorm1d(7), spectral_norm(nn.Linear(7, 7))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h + self.up(self.norm(h.transpose(1, 2)).transpose(1, 2)).tanh()


@pytest.mark.parametrize("update", ["after_backward", "in_backward"])
@pytest.mark.parametrize("spectral_norm", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_a_forward_that_changes_buffers_counts_once(spectral_norm, update):
    model = Toy()
    model.layers = nn.ModuleList(_Normed(spectral_norm) for _ in range(3))
    torch_alone = copy.deepcopy(model)
    hift = {"activations": {"checkpointing": True}, "update": update, "groups": [["."]]}
    engine = make_engine(model, ds_config(optimizer="SGD", gas=2, hift=hift))
    sgd = torch.optim.SGD(torch_alone.parameters(), lr=1e-2)
    for batches in zip(*[iter(make_batches(6))] * 2, strict=True):
        train_step(engine, batches)
        for batch in batches:
            (torch_alone(*batch) / 2).backward()
        sgd.step()
        sgd.zero_grad()
    engine.destroy()
    for (name, ours), theirs in zip(model.state_dict().items(), torch_alone.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda m, name=name: f"{name}: {m}")


class _ComputesMore(nn.Module):
    """After its last weight, what backward does not need."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(7, 7), nn.Linear(7, 7)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        h = self.last(self.first(h).tanh())
        return h + h.tanh().detach()


@pytest.mark.parametrize("update", ["after_backward", "in_backward"])
def test_weights_in_shards_stay_while_their_backward_recomputes_what_comes_after_them(update):
    found = []
    for stage, checkpointing in ((0, False), (3, True)):
        model = Toy()
        model.layers = nn.ModuleList(_ComputesMore() for _ in range(3))
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        hift = {"activations": {"checkpointing": checkpointing}, "update": update, "group_size": 2}
        engine = make_engine(model, {**ds_config(hift=hift), "zero_optimization": zero})
        losses = [train_step(engine, [batch]) for batch in make_batches(7)]
        shards = getattr(engine.optimizer.parameters, "shards", None)
        assert shards is None or not shards.gathered()
        found.append((losses, [whole_of(p) if shards else p.detach() for p in model.parameters()]))
        engine.destroy()
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-7)


def test_blocks_that_are_bare_weights_have_nothing_to_recompute():
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList(torch.eye(3) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for weight in self.weights:
                x = (x @ weight).tanh()
            return x.square().mean()

    assert find_arch(model := Bare()).blocks
    engine = make_engine(model, ds_config(rows=2, hift={"activations": {"checkpointing": True}}))
    loss = engine(torch.ones(2, 3))
    engine.backward(loss)
    engine.step()
    engine.destroy()
    assert not torch.equal(model.weights[0], torch.eye(3))


def test_stepping_in_runs_changes_no_bit(monkeypatch):
    """Pieces of more than RUN_NUMEL elements are stepped part by part."""
    monkeypatch.setattr(group_update, "RUN_NUMEL", 5)
    compare(ds_config(clip=0.05, params={"weight_decay": 0.1}), adamw(weight_decay=0.1),
            reference_options={"max_grad_norm": 0.05}, cycles=3)  # fmt: skip


# -- offload ------------------------------------------------------------------------------------------------------


def test_offload_has_no_effect_on_the_cpu():
    assert savings.build_offload(tiny("llama", "causal_lm"), recomputes=True) is None


def test_offload_without_trl_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "trl.models.activation_offloading", None)
    with pytest.raises(ConfigError, match="pip install trl"):
        savings.build_offload(nn.Linear(2, 2, device="meta"), recomputes=False)


@pytest.mark.parametrize(
    "block, message",
    [
        ({"activations": {"checkpoint": True}}, "did you mean 'checkpointing'"),
        ({"activations": {"blocks_kept": 2}}, "no effect without checkpointing"),
        ({"activations": {"blocks_kept": -1}}, "blocks_kept"),
    ],
)
def test_wrong_switches_are_named(block, message):
    from hift_ds.config import parse_block

    with pytest.raises(ConfigError, match=message):
        parse_block(block)


def test_savings_leave_the_model_as_it_was():
    model = tiny("gpt2", "causal_lm")
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    batch = model_zoo.tiny.batch(model)
    expected = loss_and_gradients(model, batch)
    saving = ActivationSavings(model, ActivationsConfig(checkpointing=True, chunked_loss=True), groups_of(model))
    saving.close()
    assert isinstance(model(**batch).logits, torch.Tensor)
    assert torch.equal(loss_and_gradients(model, batch)[0], expected[0])
    added = {name: set(module.__dict__) - before[name] for name, module in model.named_modules()}
    assert set().union(*added.values()) <= {"gradient_checkpointing", "_gradient_checkpointing_func"}
