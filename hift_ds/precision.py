"""Number formats of weights and masters, stochastic rounding, and the loss scale of fp16.

| policy    | DeepSpeed keys                                   | weights | master                              |
|-----------|--------------------------------------------------|---------|-------------------------------------|
| fp32      | none                                             | fp32    | the weight itself                   |
| mixed     | torch_autocast                                   | fp32    | the weight itself                   |
| mixed_hi  | bf16 or fp16                                     | 16 bit  | fp32, active group on the device    |
| bf16      | bf16, "hift": {"master_weights": false}          | bf16    | none: fp32 only while it is updated |

"mixed_hi" is the paper's Mixed^Hi (arXiv 2401.15207), there for fp16 only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PrecisionPolicy:
    """What the update needs to know about number formats."""

    name: str
    keep_masters: bool  # 16-bit weights have an fp32 master that survives the step
    stochastic_rounding: bool

    def has_master(self, weight_dtype: torch.dtype) -> bool:
        """True if a weight of that dtype has an fp32 master."""
        return self.keep_masters and weight_dtype != torch.float32


def write_weight_(
    weight: Tensor,
    value: Tensor,
    generator: torch.Generator | None,
) -> None:
    """Round ``value`` into ``weight``, in place.

    Args:
        weight: of any float dtype.
        value: fp32, of the same shape; may be on another device, and is rounded there so that fewer bytes travel.
        generator: of the value's device, to round stochastically where the weight is bf16; ``None``: to the nearest.
    """
    if generator is not None and weight.dtype == torch.bfloat16:
        value = round_to_bf16_stochastic(value, generator)
    elif weight.device != value.device:
        value = value.to(weight.dtype)
    # Towards the host a copy must end before it is read.
    weight.copy_(value, non_blocking=weight.device.type != "cpu")


def round_to_bf16_stochastic(value: Tensor, generator: torch.Generator) -> Tensor:
    """``value`` (fp32) rounded to a neighbouring bf16, up with the probability of its distance from below.

    bf16 is the high half of fp32, so: add 16 random bits below the cut, then cut (arXiv 2010.06192, section 4).
    The mean of many roundings is ``value``. Infinities and NaN pass through unchanged.
    """
    noise = torch.randint(0, 1 << 16, value.shape, generator=generator, device=value.device, dtype=torch.int32)
    bits = (value.contiguous().view(torch.int32) + noise).bitwise_and_(-65536)
    rounded = bits.view(torch.float32).to(torch.bfloat16)
    return torch.where(torch.isfinite(value), rounded, value.to(torch.bfloat16))


class LossScaler:
    """The fp16 loss scale, static or dynamic, with DeepSpeed's keys and rules.

    Dynamic: after ``hysteresis`` overflows halve the scale; after ``window`` steps without one double it.
    """

    def __init__(
        self,
        scale: float = 1.0,
        dynamic: bool = False,
        window: int = 1000,
        hysteresis: int = 2,
        min_scale: float = 1.0,
        consecutive_hysteresis: bool = False,
    ) -> None:
        self.scale = scale
        self.dynamic = dynamic
        self.window = window
        self.hysteresis = hysteresis
        self.min_scale = min_scale
        self.consecutive_hysteresis = consecutive_hysteresis
        self._left = hysteresis  # overflows still tolerated before the scale is halved
        self._good_steps = 0

    @classmethod
    def from_fp16_block(cls, fp16: dict[str, Any]) -> LossScaler:
        """Make a scaler of DeepSpeed's ``"fp16"`` block. ``loss_scale: 0`` (the default) means dynamic."""
        static = float(fp16.get("loss_scale", 0) or 0)
        return cls(
            scale=static or 2.0 ** int(fp16.get("initial_scale_power", 16)),
            dynamic=static == 0,
            window=int(fp16.get("loss_scale_window", 1000)),
            hysteresis=int(fp16.get("hysteresis", 2)),
            min_scale=float(fp16.get("min_loss_scale", 1)),
            consecutive_hysteresis=bool(fp16.get("consecutive_hysteresis", False)),
        )

    def overflowed(self, grad_norm: float) -> bool:
        """True if the step must be skipped. ``grad_norm`` is the global one, so all ranks agree."""
        return self.active and not math.isfinite(grad_norm)

    @property
    def active(self) -> bool:
        """True if losses are multiplied at all."""
        return self.dynamic or self.scale != 1.0

    def update(self, overflow: bool) -> None:
        """Note whether a step overflowed, and change a dynamic scale by DeepSpeed's rule."""
        if not self.dynamic:
            return
        if overflow:
            self._good_steps = 0
            if self._left > 1:
                self._left -= 1
            else:
                self.scale = max(self.scale / 2, self.min_scale)
                # DeepSpeed keeps halving once hysteresis is used up, until a window passes (or a good step).
            return
        self._good_steps += 1
        if self.consecutive_hysteresis:
            self._left = self.hysteresis
        if self._good_steps % self.window == 0:
            self._left = self.hysteresis
            self.scale *= 2

    def state_dict(self) -> dict[str, Any]:
        """The scale and its counters, for a checkpoint."""
        return {"scale": self.scale, "left": self._left, "good_steps": self._good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        self.scale, self._left, self._good_steps = state["scale"], state["left"], state["good_steps"]
