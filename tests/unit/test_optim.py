"""Building optimizers from a DeepSpeed block, and running any of them piecewise."""

import copy

import pytest
import torch
from torch import nn

from hift_ds.collectives import Ranks
from hift_ds.errors import ConfigError
from hift_ds.optim.build import build_optimizer, is_elementwise, takes_option
from hift_ds.optim.clip import fp32_norm
from hift_ds.optim.lion import Lion
from hift_ds.optim.muon import MuonWithAuxAdamW
from hift_ds.optim.parameters import ReplicatedParameters
from hift_ds.optim.piecewise import PieceUpdate, PiecewiseOptimizer


def make_params():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(7))]


def build(name, options=None, **kwargs):
    return build_optimizer(name, options or {"lr": 0.1}, [{"params": make_params()}], **kwargs)


def test_names_follow_deepspeed():
    assert type(build("AdamW")) is torch.optim.AdamW
    assert type(build("Adam")) is torch.optim.AdamW  # DeepSpeed's default for Adam
    assert type(build("Adam", {"lr": 0.1, "adam_w_mode": False})) is torch.optim.Adam
    for name in ("SGD", "Adagrad", "Adafactor", "RMSprop", "NAdam"):
        assert type(build(name)) is getattr(torch.optim, name)
    assert type(build("lion")) is Lion
    assert type(build("torch.optim.Adamax")) is torch.optim.Adamax
    assert type(build("Adam", {"lr": 0.1, "torch_adam": True, "betas": [0.8, 0.9]})).__name__ == "AdamW"


@pytest.mark.parametrize(
    "name,options,expected",
    [
        ("AdamX", {}, "did you mean"),
        ("AdamW", {"learning_rate": 1}, "unknown key 'learning_rate'"),
        ("AdamW", {"lr": -1.0}, "Invalid learning rate"),
        ("LBFGS", {}, "LBFGS"),
        ("nowhere.Opt", {}, "cannot import"),
        ("torch.nn.Linear", {}, "not a torch.optim.Optimizer"),
        ("AdamW", {"max_grad_norm": 1.0}, "gradient_clipping"),
        ("Muon", {"momentun": 0.9}, "did you mean 'momentum'"),
    ],
)
def test_bad_blocks_are_one_line(name, options, expected):
    with pytest.raises(ConfigError, match=expected) as error:
        build(name, options)
    assert "\n" not in str(error.value)


def test_shape_dependent_and_unknown_optimizers_get_whole_tensors():
    assert is_elementwise(build("AdamW")) and is_elementwise(build("lion")) and is_elementwise(build("SGD"))
    assert not is_elementwise(build("Adafactor"))

    class Unknown(torch.optim.SGD):
        pass

    assert not is_elementwise(Unknown(make_params(), lr=0.1))


def test_muon_orthogonalises_matrices_and_leaves_the_rest_to_adamw():
    params = make_params()
    groups = [{"params": params, "weight_decay": 0.0}]
    optimizer = build_optimizer("Muon", {"lr": 0.1, "momentum": 0.9}, groups, matrices=frozenset([id(params[0])]))
    assert type(optimizer) is MuonWithAuxAdamW
    assert [(g["algorithm"], len(g["params"])) for g in optimizer.param_groups] == [("muon", 1), ("adamw", 1)]
    expected = [p.detach().clone() for p in params]
    muon = torch.optim.Muon([nn.Parameter(expected[0])], lr=0.1, momentum=0.9, weight_decay=0.0)
    adamw = torch.optim.AdamW([nn.Parameter(expected[1])], lr=0.1, weight_decay=0.0)
    for step in range(3):
        for i, (param, part) in enumerate(zip(params, (muon, adamw), strict=True)):
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(10 * step + i))
            part.param_groups[0]["params"][0].grad = param.grad.clone()
            part.step()
        optimizer.step()
    assert torch.equal(params[0], muon.param_groups[0]["params"][0])
    assert torch.equal(params[1], adamw.param_groups[0]["params"][0])


def test_muon_needs_a_torch_that_has_it(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    weight = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ConfigError, match=r'^"optimizer": Muon comes with torch 2.9, and this is .*; update it$'):
        build_optimizer("Muon", {"lr": 0.1}, [{"params": [weight]}], matrices=frozenset([id(weight)]))
    assert not takes_option("muon", "momentum")


def test_lion_is_the_papers_update():
    param = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = Lion([param], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    param.grad = torch.tensor([0.3, -0.2])
    optimizer.step()
    assert torch.allclose(param, torch.tensor([1 - 0.05 - 0.1, -2 + 0.1 + 0.1]))
    assert torch.allclose(optimizer.state[param]["exp_avg"], torch.tensor([0.003, -0.002]))


OPTIMIZERS = {
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.05, weight_decay=0.1, amsgrad=True),
    "Adam": lambda ps: torch.optim.Adam(ps, lr=0.05, weight_decay=0.1),
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.05),
    "SGDM": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, dampening=0.3),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.05, initial_accumulator_value=0.2),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, lr=0.05, momentum=0.5, centered=True),
    "Adafactor": lambda ps: torch.optim.Adafactor(ps, lr=0.05),
    "Lion": lambda ps: Lion(ps, lr=0.05, weight_decay=0.1),
    "NAdam": lambda ps: torch.optim.NAdam(ps, lr=0.05),
    "Rprop": lambda ps: torch.optim.Rprop(ps, lr=0.05),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_piecewise_equals_the_optimizer_itself(name):
    """Flat pieces for elementwise optimizers, whole tensors otherwise; states handed in and out as copies."""
    params = make_params()
    expected = copy.deepcopy(params)
    direct = OPTIMIZERS[name](expected)
    base = OPTIMIZERS[name](params)
    cut = is_elementwise(base)
    piecewise = PiecewiseOptimizer(base)
    bounds = [[(0, 4), (4, 15)], [(0, 7)]] if cut else [[None], [None]]
    states = {}
    for step in range(4):
        grads = [
            torch.randn(p.shape, generator=torch.Generator().manual_seed(step * 2 + i)) for i, p in enumerate(params)
        ]
        for param, grad in zip(expected, grads, strict=True):
            param.grad = grad.clone()
        direct.step()
        for i, param in enumerate(params):
            for piece in bounds[i]:
                target, grad = param.detach(), grads[i]
                if piece is not None:
                    target, grad = target.view(-1)[slice(*piece)], grad.view(-1)[slice(*piece)]
                state = copy.deepcopy(states.get((i, piece)))
                update = PieceUpdate(target, grad.clone(), 0, state)
                assert piecewise.step([update], [0.05], {}) == {}
                states[i, piece] = update.state
    for got, want in zip(params, expected, strict=True):
        assert torch.equal(got, want)
    assert all(p.grad is None for p in params) and not base.state  # the user's optimizer object is left alone


def test_step_counts_kept_in_param_groups_belong_to_the_caller():
    class CountsInGroup(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 1.0})

        def step(self):
            for group in self.param_groups:
                group["count"] = group.get("count", 0) + 1
                for p in group["params"]:
                    p.data.add_(p.grad, alpha=-group["lr"] / group["count"])

    piecewise = PiecewiseOptimizer(CountsInGroup(make_params()))
    target = torch.zeros(2)
    extras = {}
    for expected in (1, 2, 3):
        extras = piecewise.step([PieceUpdate(target, torch.ones(2), 0, {})], [1.0], extras)
        assert extras == {0: {"count": expected}}
    assert torch.allclose(target, torch.full((2,), -(1 + 1 / 2 + 1 / 3)))


def test_elementwise_keys_are_found_without_knowing_the_class():
    def keys(name, options):
        return PiecewiseOptimizer(build(name, options)).elementwise_keys(torch.device("cpu"))

    assert keys("AdamW", {"lr": 0.1}) == {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}
    assert keys("SGD", {"lr": 0.1}) == {}
    assert keys("SGD", {"lr": 0.1, "momentum": 0.9}) == {"momentum_buffer": torch.float32}
    assert keys("Adagrad", {"lr": 0.1}) == {"sum": torch.float32}


def test_adagrads_constructor_makes_no_state_for_the_whole_model():
    params = make_params()
    optimizer = build_optimizer("Adagrad", {"lr": 0.1}, [{"params": params}])
    assert sum(s["sum"].numel() for s in optimizer.state.values()) == 0
    assert params[0].shape == (5, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_norm_of_a_large_gradient_is_that_of_its_values(dtype):
    """torch's own, of 16 bits on a CPU, loses 2e-4 of it."""
    grad = torch.randn(1 << 23, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = float(torch.linalg.vector_norm(grad.double()))
    assert float(fp32_norm(grad)) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(fp32_norm(grad, grad.float()), fp32_norm(grad))
    assert float(fp32_norm(grad[: 3 * 70_000].view(3, 70_000).t())) == pytest.approx(
        float(torch.linalg.vector_norm(grad[: 3 * 70_000].double())), rel=1e-5
    )


class TwoRanks:
    """What of ``torch.distributed`` says who is there."""

    def __init__(self, rank):
        self.rank = rank

    def get_world_size(self, group):
        return 2

    def get_rank(self, group):
        return self.rank


@pytest.mark.parametrize(
    "rank, of_a_block",
    [(0, [["w0", "w1", "w2", "b0"], ["b1"]]), (1, [["w3", "w4", "w5", "b2"]])],
)
def test_the_drawing_of_a_group_on_two_ranks(rank, of_a_block):
    """Two blocks, a weight of 6 elements and a bias of 3 each, slices of 4: as drawn in ``optim/group_shard.py``."""
    names = ["0.w", "0.b", "1.w", "1.b"]
    entries = [(name, nn.Parameter(torch.zeros(6 if name.endswith("w") else 3)), 0) for name in names]
    parameters = ReplicatedParameters(Ranks(TwoRanks(rank)), torch.float32, 1 << 20, False, slice_numel=4)
    group = parameters.group_shard(0, "blocks", entries, [(1, names[:2]), (2, names[2:])])
    drawn = [
        [
            f"{group.members[piece.member].name[-1]}{element}"
            for piece in chunk.pieces
            for element in range(piece.start, piece.start + piece.numel)
        ]
        for chunk in group.chunks
    ]
    assert drawn == of_a_block * 2
    assert [part.first for part in group.parts] == [0, 2]
    (bucket,) = group.buckets[torch.float32]
    assert [(column.index, column.length) for column in bucket] == [(0, 3), (1, 2), (2, 3), (3, 2)]
