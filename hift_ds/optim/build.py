"""From an ``"optimizer"`` block to a ``torch.optim.Optimizer``, and what the engine must know about a class.

Only Python classes: nothing is compiled at run time. DeepSpeed's own fused and CPU optimizers work when a client
passes one in.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch

from hift_ds.errors import ConfigError, unknown_key
from hift_ds.layers.arch import whole_shape
from hift_ds.optim.lion import Lion
from hift_ds.optim.muon import MuonWithAuxAdamW
from hift_ds.optim.piecewise import has_replaced_step

OptimizerT = TypeVar("OptimizerT", bound=torch.optim.Optimizer)

# Each element of the update depends on that element's weight, gradient and state only, so these may run on flat
# shards. Any class not listed gets whole tensors, which is right for every optimizer.
ELEMENTWISE = frozenset(
    ["Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"]
)
ELEMENTWISE_ELSEWHERE = frozenset(
    [
        "hift_ds.optim.lion.Lion",
        "deepspeed.ops.adam.fused_adam.FusedAdam",
        "deepspeed.ops.adam.cpu_adam.DeepSpeedCPUAdam",
        "deepspeed.ops.adagrad.cpu_adagrad.DeepSpeedCPUAdagrad",
        "deepspeed.ops.lion.fused_lion.FusedLion",
        "deepspeed.ops.lion.cpu_lion.DeepSpeedCPULion",
    ]
)
_BY_NAME = {name.lower(): getattr(torch.optim, name) for name in (*ELEMENTWISE, "Adafactor")}
_BY_NAME["lion"] = Lion
_UNUSABLE = {"lbfgs": "it evaluates the loss several times a step", "sparseadam": "it needs sparse gradients"}
_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
# Keys of DeepSpeed's "optimizer" blocks that choose between its kernels, not between results.
_DEEPSPEED_KERNEL_KEYS = ("torch_adam", "fp32_optimizer_states")


def is_elementwise(optimizer: torch.optim.Optimizer) -> bool:
    """True if the optimizer may update flat shards of a parameter instead of the whole tensor."""
    cls = type(optimizer)
    if cls.__module__.startswith("torch.optim"):
        return cls.__name__ in ELEMENTWISE
    return f"{cls.__module__}.{cls.__qualname__}" in ELEMENTWISE_ELSEWHERE


def build_optimizer(
    name: str,
    options: Mapping[str, Any],
    param_groups: Sequence[dict[str, Any]],
    *,
    matrices: frozenset[int] = frozenset(),
    update_device: str = "cpu",
    on_accelerator: bool = False,
    hollow_weights: bool = True,
) -> torch.optim.Optimizer:
    """The optimizer of a DeepSpeed ``"optimizer": {"type": name, "params": options}`` block.

    ``Adam`` means AdamW unless ``adam_w_mode`` is false, as in DeepSpeed. ``Muon`` is Muon for ``matrices`` and
    AdamW for the rest. Any ``torch.optim`` class goes by its name, any other by its dotted path.

    Args:
        matrices: ``id`` of each 2-D weight inside a block.
        update_device: device type on which updates run.
        on_accelerator: the model is on an accelerator; then the fused kernels are the default, since the others
            need one more copy of the states (and are ten times slower on a host).
        hollow_weights: take the elements from the weights while the optimizer is constructed, so that a constructor
            that makes states does not make them for the whole model. Fake tensors cannot be without.

    Raises:
        ConfigError: unknown name or option.
    """
    options = {k: v for k, v in options.items() if k not in _DEEPSPEED_KERNEL_KEYS}
    if options.pop("bias_correction", True) is False:
        raise ConfigError('"optimizer.params.bias_correction": false is not supported; remove it')
    if "max_grad_norm" in options:
        raise ConfigError('"optimizer.params.max_grad_norm": clip with "gradient_clipping" at the top level instead')
    if name.lower() == "muon":
        return _build_muon(options, param_groups, matrices, hollow_weights)
    cls = _optimizer_class(name, options)
    if cls in _FUSED and on_accelerator and not options.keys() & {"fused", "foreach", "differentiable"}:
        options["fused"] = update_device in ("cuda", "cpu")
    if isinstance(options.get("betas"), list):
        options["betas"] = tuple(options["betas"])
    _check_options(name, cls, options)
    optimizer = _construct(name, cls, options, list(param_groups), hollow_weights)
    if (reason := _reason_against(optimizer)) is not None:
        raise ConfigError(f'"optimizer.type": {name} cannot train one layer group at a time: {reason}')
    return optimizer


def check_usable(optimizer: object) -> None:
    """Refuse an optimizer of the caller's that cannot be stepped on one layer group.

    Raises:
        ConfigError: it is one.
    """
    name = type(optimizer).__name__
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"optimizer=: expected a torch.optim.Optimizer, or a function of the parameters that makes one; got {name}"
        )
    if (reason := _reason_against(optimizer)) is not None:
        raise ConfigError(f"optimizer=: {name} cannot train one layer group at a time: {reason}; take another")
    # Adagrad's constructor makes states, of step 0.
    if any(state and float(state.get("step", 1)) != 0 for state in optimizer.state.values()):
        raise ConfigError(
            f"optimizer=: {name} has states (it was stepped, or load_state_dict was called), which the engine does not "
            "take over; give it a new one"
        )


def _reason_against(optimizer: torch.optim.Optimizer) -> str | None:
    """What keeps the optimizer from being stepped on one layer group; ``None`` if nothing does."""
    name = type(optimizer).__name__
    if reason := _UNUSABLE.get(name.lower()):
        return reason
    needed = list(inspect.signature(type(optimizer).step).parameters.values())[1:]
    if any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in needed):
        return f"its step() wants {needed[0].name!r}"
    if (inner := _inner_optimizer(optimizer)) is not None:
        return f"it steps an optimizer inside it ({inner}), which has all weights"
    if has_replaced_step(optimizer):
        return "its step() was replaced on the object, where register_step_post_hook would have done"
    if all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval")):
        return "its train() and eval() need the states of all weights"
    if any(group.get("differentiable") for group in optimizer.param_groups):
        return "differentiable=True keeps a graph of its steps"
    return None


def _inner_optimizer(optimizer: torch.optim.Optimizer) -> str | None:
    """The class of an optimizer that is in an attribute of this one, by itself or with others (Lookahead)."""
    if isinstance(optimizer, MuonWithAuxAdamW):  # hands its param_groups and states on
        return None
    for value in vars(optimizer).values():
        several = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        for item in several:
            if isinstance(item, torch.optim.Optimizer):
                return type(item).__name__
    return None


def takes_option(name: str, option: str) -> bool:
    """Whether the optimizer of that name has such an argument; False for names that are not known here."""
    try:
        cls = _muon() if name.lower() == "muon" else _optimizer_class(name, {})
    except ConfigError:
        return False
    return option in inspect.signature(cls.__init__).parameters


def _muon() -> type[torch.optim.Optimizer]:
    if not hasattr(torch.optim, "Muon"):
        raise ConfigError(f'"optimizer": Muon comes with torch 2.9, and this is {torch.__version__}; update it')
    return torch.optim.Muon


def _optimizer_class(name: str, options: dict[str, Any]) -> type[torch.optim.Optimizer]:
    lower = name.lower()
    adam_w_mode = options.pop("adam_w_mode", True) if lower in ("adam", "adamw") else True
    if lower == "adam":
        return torch.optim.AdamW if adam_w_mode else torch.optim.Adam
    if lower in _UNUSABLE:
        raise ConfigError(f'"optimizer.type": {name} cannot train one layer group at a time: {_UNUSABLE[lower]}')
    if lower in _BY_NAME:
        return _BY_NAME[lower]
    if "." not in name:
        known, where = [*ELEMENTWISE, "Adafactor", "Lion", "Muon"], '"optimizer.type"'
        raise unknown_key(name, known, f"{where} (of another package: its dotted path)", "optimizer")
    module, _, attribute = name.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f'"optimizer.type": cannot import {name!r}: {error}') from None
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise ConfigError(f'"optimizer.type": {name!r} is not a torch.optim.Optimizer class')
    return cls


def _check_options(name: str, cls: type[torch.optim.Optimizer], options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(cls).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    known = [p for p in parameters if p != "params"]
    for key in options:
        if key not in known:
            raise unknown_key(key, known, f'"optimizer.params" of {name}')


def _construct(
    name: str,
    cls: Callable[..., OptimizerT],
    options: Mapping[str, Any],
    param_groups: list[dict[str, Any]],
    hollow_weights: bool,
) -> OptimizerT:
    params = [p for key in ("adamw_groups",) for group in options.get(key, ()) for p in group["params"]]
    params += [p for group in param_groups for p in group["params"]]
    try:
        with _hollow(params if hollow_weights else ()):
            return cls(param_groups, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f'"optimizer.params" of {name}: {error}') from None


@contextlib.contextmanager
def _hollow(params: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Parameters without elements meanwhile: a constructor that makes states (Adagrad's) must not make them for
    the whole model; the engine has them made piece by piece."""
    full = [param.data for param in params]
    try:
        for param in params:
            # ZeRO-3 leaves a partitioned weight without its shape.
            dim = len(whole_shape(param))
            param.data = param.data.new_empty((0,) * dim) if dim else param.data
        yield
    finally:
        for param, data in zip(params, full, strict=True):
            param.data = data


def _build_muon(
    options: dict[str, Any],
    param_groups: Sequence[dict[str, Any]],
    matrices: frozenset[int],
    hollow_weights: bool,
) -> MuonWithAuxAdamW:
    """Options without prefix are Muon's; ``adam_lr``, ``betas`` and ``adam_eps`` are for the AdamW part."""
    options.pop("adam_w_mode", None)
    adamw = {
        "lr": options.pop("adam_lr", options.get("lr", 1e-3)),
        "betas": tuple(options.pop("betas", (0.9, 0.999))),
    }
    adamw["eps"] = options.pop("adam_eps", 1e-8)
    adamw["weight_decay"] = options.get("weight_decay", 0.01)
    muon = dict(options)
    muon["lr"] = muon.pop("muon_lr", muon.get("lr", 1e-3))
    _check_options("Muon", _muon(), muon)
    split: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for group in param_groups:
        for is_matrix, members in split.items():
            params = [p for p in group["params"] if (id(p) in matrices) is is_matrix]
            if params:
                members.append({**group, "params": params})
    return _construct(
        "Muon",
        MuonWithAuxAdamW,
        {"muon": muon, "adamw": adamw, "adamw_groups": split[False]},
        split[True],
        hollow_weights,
    )
