"""Autocast on the fake device: the casts that CUDA's autocast makes, so that their copies are counted.

Three lists, as in torch's own documentation of autocast ("CUDA Ops that can autocast to float16", "... to float32",
"... that promote to the widest input type"). Casts of fp32 leaves that require gradients are kept until autocast
ends, as torch's cache does; casts of frozen weights are not, and live as long as the graph saves them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_map_only

LOWER = (
    "linear", "matmul", "mm", "mv", "addmm", "addmv", "addbmm", "baddbmm", "bmm", "chain_matmul", "linalg_multi_dot",
    "conv1d", "conv2d", "conv3d", "convolution", "prelu", "scaled_dot_product_attention", "einsum",
)  # fmt: skip
WIDER = (
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh",
    "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm", "native_layer_norm",
    "group_norm", "cosine_similarity", "cosine_embedding_loss", "nll_loss", "nll_loss_nd", "smooth_l1_loss", "mse_loss",
    "l1_loss", "kl_div", "binary_cross_entropy_with_logits", "dist", "cdist", "logsumexp", "renorm", "cumprod",
    "cumsum", "prod", "softmax.int", "log_softmax.int", "norm.Scalar", "linalg_vector_norm",
)  # fmt: skip
# Unless ``dtype=`` is given.
WIDER_UNLESS_GIVEN = ("softmax.int", "log_softmax.int", "cumprod", "cumsum", "prod", "linalg_vector_norm")


def register(device: str) -> list[object]:
    """Register kernels for the device's autocast key. Returns the libraries, which must be kept alive."""
    key = f"Autocast{'PrivateUse1'}"
    everything_else = torch.library.Library("_", "IMPL", key)
    everything_else.fallback(torch.library.fallthrough_kernel)
    library = torch.library.Library("aten", "IMPL", key)
    cache: dict[Tensor, Tensor] = {}
    for names, cast in ((LOWER, _lower(device, cache)), (WIDER, _wider(device))):
        for name in names:
            op = _find(name)
            if op is not None:
                library.impl(name, _casting(op, cast, getattr(torch._C.DispatchKey, key), name in WIDER_UNLESS_GIVEN))
    _clear_with_torch(cache)
    return [everything_else, library, cache]


def _find(name: str) -> OpOverload | None:
    packet_name, _, overload = name.partition(".")
    packet = getattr(torch.ops.aten, packet_name, None)
    return None if packet is None else getattr(packet, overload or "default", None)


def _casting(
    op: OpOverload, cast: Callable[[Tensor], Tensor], key: torch._C.DispatchKey, unless_dtype: bool
) -> Callable:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            if unless_dtype and kwargs.get("dtype") is not None:
                return op(*args, **kwargs)
            args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
            return op(*args, **kwargs)

    return kernel


def _lower(device: str, cache: dict[Tensor, Tensor]) -> Callable[[Tensor], Tensor]:
    def cast(tensor: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype(device)
        if tensor.device.type != device or not tensor.is_floating_point() or tensor.dtype in (dtype, torch.float64):
            return tensor
        keep = tensor.is_leaf and tensor.requires_grad and tensor.dtype == torch.float32
        if not (keep and torch.is_autocast_cache_enabled()):
            return tensor.to(dtype)
        if tensor not in cache:
            cache[tensor] = tensor.to(dtype)
        return cache[tensor]

    return cast


def _wider(device: str) -> Callable[[Tensor], Tensor]:
    def cast(tensor: Tensor) -> Tensor:
        low = tensor.device.type == device and tensor.dtype in (torch.bfloat16, torch.float16)
        return tensor.float() if low else tensor

    return cast


def _clear_with_torch(cache: dict[Tensor, Tensor]) -> None:
    real = torch.clear_autocast_cache

    def clear() -> None:
        cache.clear()
        real()

    torch.clear_autocast_cache = clear
