"""Cross-entropy of a language head without its logits: a tile of them exists at a time, forward and backward.

A model computes ``logits = head(hidden)``, does a little to them (a cast, a soft cap), shifts and flattens them and
calls ``cross_entropy``. :func:`defer_logits` lets the model do exactly that, with logits that are only a promise
(:class:`DeferredLogits`): casts, scalings and reshapings are remembered, ``cross_entropy`` computes them tile by tile.
Whatever else is done with them computes them whole, so every model stays right, and most save the memory: at a
vocabulary of 128256 and 8 x 2048 tokens 7.8 GiB a copy, of which backward holds three.

The backward recomputes each tile, with the incoming gradient known, so gradients round where those of whole logits do:
once, in the weights' dtype. ``torch.nn.functional.linear_cross_entropy`` (2.13) takes gradients in forward and returns
a bf16 model's loss in bf16; Liger's kernel needs Triton; TRL's is its trainers' own. docs/decisions.md has the numbers.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

logger = logging.getLogger(__name__)

TILE_NUMEL = 1 << 24  # logits in one tile: 64 MiB in fp32
MIN_TILE_ROWS = 256  # fewer would leave the matrix product bound by reading the weight

Transform = Callable[[Tensor], Tensor]  # elementwise
Logits: TypeAlias = "Tensor | DeferredLogits"
Factor: TypeAlias = "float | Tensor"
Request: TypeAlias = (
    "tuple[()] | tuple[Tensor, int, Transform]"  # targets, the target to ignore, what is done to logits
)


class LinearCrossEntropy(torch.autograd.Function):
    """Loss of each row: ``cross_entropy(transform(hidden @ weight.T + bias), targets, reduction="none")``.

    hidden (N, H) and weight (V, H) of one dtype, bias (V,) or None, targets (N,) int64, ``ignore_index`` where there is
    none. Returns (N,) in fp32, in which losses are computed whatever the logits' dtype; 0 where ignored.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int,
        transform: Transform,
    ) -> Tensor:  # fmt: skip
        losses, lses = [], []
        for rows in _tiles(len(hidden), weight.shape[0]):
            logits = transform(F.linear(hidden[rows], weight, bias)).float()
            lse = torch.logsumexp(logits, -1)
            kept = targets[rows] != ignore_index
            at_target = logits.gather(-1, targets[rows].where(kept, 0).unsqueeze(-1)).squeeze(-1)
            del logits
            losses.append((lse - at_target).where(kept, 0))
            lses.append(lse)
        ctx.save_for_backward(hidden, weight, bias, targets, torch.cat(lses))
        ctx.ignore_index, ctx.transform = ignore_index, transform
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lse = ctx.saved_tensors
        grad_losses = grad_losses.where(targets != ctx.ignore_index, 0)
        grad_hidden = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
            grad_hidden = torch.empty_like(hidden)
            sums = None if not ctx.needs_input_grad[2] else torch.zeros_like(bias, dtype=torch.float32)
            for rows in _tiles(len(hidden), weight.shape[0]):
                grad = _grad_of_logits(
                    ctx.transform, hidden[rows], weight, bias, targets[rows], lse[rows], grad_losses[rows]
                )
                torch.mm(grad, weight, out=grad_hidden[rows])
                if sums is not None:
                    sums += grad.sum(0, dtype=torch.float32)
            grad_bias = None if sums is None else sums.to(bias.dtype)
        # By columns, so that each entry is one product over all rows, as without tiles.
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight)
            for cols in _tiles(weight.shape[0], len(hidden)):
                part = None if bias is None else bias[cols]
                grad = _grad_of_logits(
                    ctx.transform, hidden, weight[cols], part, targets - cols.start, lse, grad_losses
                )
                torch.mm(grad.t(), hidden, out=grad_weight[cols])
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _tiles(length: int, across: int) -> Iterator[slice]:
    """Slices of ``range(length)`` that make tiles of about ``TILE_NUMEL`` with ``across`` entries the other way."""
    step = max(MIN_TILE_ROWS, TILE_NUMEL // max(across, 1))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _grad_of_logits(
    transform: Transform, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, lse: Tensor,
    grad_losses: Tensor,
) -> Tensor:  # fmt: skip
    """The gradient of a tile's logits, in the head's dtype: (softmax - one-hot) * grad, through the transform. Targets
    outside of the tile's columns have no one-hot in it."""
    raw = F.linear(hidden, weight, bias)
    with torch.enable_grad():
        leaf = raw.detach().requires_grad_()
        logits = transform(leaf)
    grad = (logits.detach().float() - lse.unsqueeze(-1)).exp_().mul_(grad_losses.unsqueeze(-1))
    inside = (targets >= 0) & (targets < weight.shape[0])
    one_hot = grad_losses.where(inside, 0).neg().unsqueeze(-1)
    grad.scatter_add_(-1, targets.where(inside, 0).unsqueeze(-1), one_hot)
    grad = grad.to(logits.dtype)
    return grad if logits is leaf else torch.autograd.grad(logits, leaf, grad)[0]


def _apply(transforms: tuple[Transform, ...], logits: Tensor) -> Tensor:
    for transform in transforms:
        logits = transform(logits)
    return logits


class DeferredLogits:
    """Logits of ``head`` over ``hidden`` that have not been computed.

    Attributes:
        hidden: (..., H), what the head was called with.
        transforms: what has been done to the logits since, elementwise.
    """

    def __init__(
        self, head: nn.Linear, hidden: Tensor, transforms: tuple[Transform, ...] = (), dtype: torch.dtype | None = None
    ) -> None:
        self._head = head
        self.hidden = hidden
        self.transforms = transforms
        self.dtype: torch.dtype = dtype or hidden.dtype

    def compute(self) -> Tensor:
        """The logits, whole: (..., V). Says so once for each head, since the memory that was to be saved is not."""
        deferring = self._head.__dict__["forward"]
        if not deferring.said_whole:
            deferring.said_whole = True
            num_bytes = self.shape.numel() * self.dtype.itemsize
            logger.warning(
                "hift.activations.chunked_loss saves nothing in this model: more is done with its logits than a plain "
                "cross-entropy, so they are computed whole (%s, %.2f GiB a copy)",
                " x ".join(map(str, self.shape)), num_bytes / 2**30,
            )  # fmt: skip
        with _computing(self._head):
            return _apply(self.transforms, self._head(self.hidden))

    def losses(self, targets: Tensor, ignore_index: int) -> Tensor:
        """The losses (N,) of (N, V) logits, by the head's own call, so that hooks which bring its weight run."""
        # Not self: the graph would keep ``hidden`` to its end.
        transform = functools.partial(_apply, self.transforms)
        with _computing(self._head, (targets, ignore_index, transform)):
            return self._head(self.hidden)

    # -- what models do with logits before the loss ---------------------------------------------------------------

    def _then(self, transform: Transform, dtype: torch.dtype | None = None) -> DeferredLogits:
        return DeferredLogits(self._head, self.hidden, (*self.transforms, transform), dtype or self.dtype)

    def _with_hidden(self, hidden: Tensor) -> DeferredLogits:
        return DeferredLogits(self._head, hidden, self.transforms, self.dtype)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self._head.out_features))

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.hidden.dim()

    def float(self) -> DeferredLogits:
        return self._in(torch.float32)

    def _in(self, dtype: torch.dtype) -> DeferredLogits:
        return self if dtype == self.dtype else self._then(lambda logits: logits.to(dtype), dtype)

    def to(self, *args: Any, **kwargs: Any) -> Logits:
        wanted = kwargs.get("dtype", args[0] if args else None)
        if isinstance(wanted, torch.dtype):
            return self._in(wanted)
        if (
            not kwargs
            and len(args) == 1
            and isinstance(wanted, str | int | torch.device)
            and torch.device(wanted) == self.device
        ):
            return self
        return self.compute().to(*args, **kwargs)

    def contiguous(self) -> DeferredLogits:
        return self

    def view(self, *shape: Any) -> Logits:
        sizes = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], tuple | list | torch.Size) else shape
        if (
            not all(isinstance(size, int) for size in sizes)
            or sizes[-1] not in (self.shape[-1], -1)
            or sizes[:-1] == ()
        ):
            return self.compute().view(*shape)
        return self._with_hidden(self.hidden.reshape(*sizes[:-1], self.hidden.shape[-1]))

    reshape = view

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Logits:
        if end_dim in (-1, self.dim() - 1):
            return self.compute().flatten(start_dim, end_dim)
        return self._with_hidden(self.hidden.flatten(start_dim, end_dim))

    def __getitem__(self, index: Any) -> Logits:
        parts = index if isinstance(index, tuple) else (index,)
        leading = self.dim() - 1
        expanded = sum(leading + 1 - (len(parts) - 1) if part is Ellipsis else 1 for part in parts)
        keeps_last = expanded <= leading or parts[-1] == slice(None)
        if keeps_last and all(isinstance(part, slice) or part is Ellipsis for part in parts):
            return self._with_hidden(self.hidden[index])
        return self.compute()[index]

    def _scaled(self, other: Factor, operation: Callable[[Tensor, Factor], Tensor]) -> Logits:
        if isinstance(other, int | float):
            return self._then(lambda logits: operation(logits, other))
        return operation(self.compute(), other)

    def __mul__(self, other: Factor) -> Logits:
        return self._scaled(other, lambda a, b: a * b)

    __rmul__ = __mul__

    def __truediv__(self, other: Factor) -> Logits:
        return self._scaled(other, lambda a, b: a / b)

    def tanh(self) -> DeferredLogits:
        return self._then(torch.tanh)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.compute(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tanh, Tensor.tanh) and isinstance(args[0], DeferredLogits):
            return args[0].tanh()
        if func is F.cross_entropy:
            loss = _cross_entropy(*args, **kwargs)
            if loss is not None:
                return loss
        args, kwargs = torch.utils._pytree.tree_map_only(DeferredLogits, lambda x: x.compute(), (args, kwargs))
        return func(*args, **kwargs)


def _cross_entropy(
    input: Logits, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None,  # noqa: A002
    ignore_index: int = -100, reduce: bool | None = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> Tensor | None:  # fmt: skip
    """``torch.nn.functional.cross_entropy`` for the plain case; ``None`` for any other."""
    plain = weight is None and size_average is None and reduce is None and label_smoothing == 0.0
    if not plain or not isinstance(input, DeferredLogits) or input.dim() != 2 or target.dim() != 1:
        return None
    if target.dtype != torch.int64 or reduction not in ("mean", "sum", "none"):
        return None
    losses = input.losses(target, ignore_index)
    if reduction != "none":
        losses = losses.sum()
    if reduction == "mean":
        losses = losses / (target != ignore_index).sum()
    return losses.to(input.dtype)


# -- the head -------------------------------------------------------------------------------------------------------


class _DeferringHead:
    """The ``forward`` of a head whose logits are deferred while ``active()``."""

    def __init__(self, head: nn.Linear, active: Callable[[], bool]) -> None:
        self.head = head
        self.active = active
        self.said_whole = False
        self.request: Request | None = None  # None: defer; (): compute; else what losses() wants

    def __call__(self, hidden: Tensor) -> Logits:
        head = self.head
        if self.request:
            targets, ignore_index, transform = self.request
            weight: Tensor = head.weight
            bias: Tensor | None = head.bias
            if torch.is_autocast_enabled(hidden.device.type):
                dtype = torch.get_autocast_dtype(hidden.device.type)
                hidden, weight = hidden.to(dtype), weight.to(dtype)
                bias = None if bias is None else bias.to(dtype)
            with torch.autocast(hidden.device.type, enabled=False):
                return LinearCrossEntropy.apply(hidden, weight, bias, targets, ignore_index, transform)
        if self.request is None and self.active():
            return DeferredLogits(head, hidden)
        return F.linear(hidden, head.weight, head.bias)


@contextlib.contextmanager
def _computing(head: nn.Module, request: Request = ()) -> Iterator[None]:
    deferring = head.__dict__["forward"]
    before, deferring.request = deferring.request, request
    try:
        yield
    finally:
        deferring.request = before


def defer_logits(model: nn.Module, active: Callable[[], bool]) -> nn.Module | None:
    """Let the language head of ``model`` (``get_output_embeddings()``) promise its logits while ``active()``.

    Returns:
        The head, or ``None`` if the model has none that is a plain ``nn.Linear``; then nothing is changed.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if type(head) is not nn.Linear:
        return None
    head.forward = _DeferringHead(head, active)  # type: ignore[method-assign, assignment]  # of this module alone; undone by restore
    return head


def restore(head: nn.Module) -> None:
    """Undo :func:`defer_logits`."""
    head.__dict__.pop("forward", None)
