"""From tensors to the bytes that are kept, and back: what all stores share, wherever the bytes rest."""

from __future__ import annotations

import functools
import hashlib
import logging
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hift_ds.errors import ConfigError
from hift_ds.store.base import StateStore, Weights
from hift_ds.store.codecs import BF16_MOMENTS, INT8_MOMENTS, SPLIT_MASTER, Exact, SplitMaster, codec_for
from hift_ds.store.layout import ChunkLayout
from hift_ds.store.machine import Machine
from hift_ds.store.speeds import Link

logger = logging.getLogger(__name__)


@dataclass
class Working:
    """A fetched chunk: its tensors, those of them that are views of ``memory``, and that memory (uint8)."""

    tensors: dict[str, Tensor]
    in_place: set[str]
    memory: Tensor


@dataclass
class EncodedStateStore(StateStore):
    """Keeps each chunk as one run of bytes (:class:`ChunkLayout`); subclasses say where.

    Args:
        codecs: names of compact forms (:mod:`hift_ds.store.codecs`).
        seed: of stochastic rounding; different on every rank.
        num_slots: that chunks arrive in ahead of their update (:mod:`hift_ds.store.parked`); 0: no prefetch.
    """

    codecs: tuple[str, ...] = ()
    seed: int = 0
    num_slots: int = 0
    _layouts: dict[int, ChunkLayout] = field(default_factory=dict, init=False)
    _working: dict[int, Working] = field(default_factory=dict, init=False)
    # Of chunks that are held: what belongs to their forms beside the bytes, by key.
    _asides: dict[int, dict[str, Tensor | None]] = field(default_factory=dict, init=False)
    # Written, not yet encoded: a chunk and its decoded tensors.
    _staged: tuple[int, dict[str, Tensor]] | None = field(default=None, init=False)

    # -- where the bytes rest ------------------------------------------------------------------------------

    @abstractmethod
    def _bring(self, chunk: int) -> Tensor:
        """Memory on the update device (uint8) with the chunk's bytes; the caller's until ``_send``."""

    @abstractmethod
    def _grow(self, chunk: int, memory: Tensor) -> Tensor:
        """What ``_bring`` gave; if the layout has outgrown it, larger memory that starts with its bytes."""

    @abstractmethod
    def _send(self, chunk: int) -> None:
        """The bytes in the chunk's memory have changed."""

    @abstractmethod
    def _at_rest(self, chunk: int) -> Tensor:
        """The chunk's bytes (uint8) in its resting place. Who changes them gives them to
        ``_replace_at_rest``."""

    @abstractmethod
    def _replace_at_rest(self, chunk: int, memory: Tensor) -> None:
        """New bytes for the resting place."""

    @property
    def place(self) -> str:
        """Where states rest, in words."""
        return "in host memory" if self.device.type == "cpu" else "on the device"

    @functools.cached_property
    def link(self) -> Link | None:
        """How fast chunks come and go, measured when first asked for; ``None`` if they rest where updates run."""
        return self._measured_link()

    def _measured_link(self) -> Link | None:
        return None

    @abstractmethod
    def _hold(self, chunk: int) -> None:
        """The chunk's bytes as they are now must last until ``_release`` or ``_take_back``."""

    @abstractmethod
    def _release(self, chunk: int) -> None:
        """Those bytes may go."""

    @abstractmethod
    def _take_back(self, chunk: int) -> None:
        """Those bytes are the chunk's again."""

    # -- StateStore ----------------------------------------------------------------------------------------

    def ensure(self, chunk: int, key: str, numel: int, dtype: torch.dtype, weights: Weights | None = None) -> None:
        layout = self._layouts.setdefault(chunk, ChunkLayout())
        if key in layout.entries:
            return
        layout.add(key, numel, dtype, codec_for(self.codecs, key, dtype, weights))
        if chunk in self._working:  # reserved while the chunk is updated for the first time
            self._working[chunk].tensors[key] = torch.zeros(numel, dtype=dtype, device=self.device)

    def start(self) -> StateStore:
        kept = [entry.codec for layout in self._layouts.values() for entry in layout.entries.values()]
        if SPLIT_MASTER in self.codecs and kept and not any(isinstance(codec, SplitMaster) for codec in kept):
            raise ConfigError(
                '"hift.state.codec": split_master needs bf16 weights with fp32 masters (and with ZeRO stage '
                "3 an optimizer that does not look at shapes); there are none here: set "
                '"bf16": {"enabled": true}, or remove it'
            )
        no_moments = kept and all(isinstance(codec, Exact | SplitMaster) for codec in kept)
        if no_moments and {BF16_MOMENTS, INT8_MOMENTS} & set(self.codecs):
            logger.warning("hift.state.codec: no moment among the states so far for %s", list(self.codecs))
        return self

    def check_room(self, machine: Machine, beside: int = 0) -> None:
        machine.check_room(self.host_bytes(), beside)

    def keys(self, chunk: int) -> list[str]:
        return list(self._layouts[chunk].entries) if chunk in self._layouts else []

    def num_bytes(self, chunk: int) -> int:
        """Bytes kept for ``chunk``."""
        return self._layouts[chunk].num_bytes if chunk in self._layouts else 0

    def total_bytes(self) -> int:
        return sum(layout.num_bytes for layout in self._layouts.values())

    def held_bytes(self) -> int:
        """The bytes of the second copies of what may be held at once."""
        return max((sum(self.num_bytes(chunk) for chunk in chunks) for chunks in self.may_hold), default=0)

    def largest_bytes(self) -> int:
        """Bytes kept for the largest chunk."""
        return max((layout.num_bytes for layout in self._layouts.values()), default=0)

    def fetch(self, chunk: int) -> dict[str, Tensor]:
        if chunk not in self._layouts:
            return {}
        if chunk not in self._working:
            self._encode_staged()
            memory = self._bring(chunk)
            entries = self._layouts[chunk].entries
            in_place = {key for key, entry in entries.items() if entry.codec.in_place}
            self._working[chunk] = Working(self._decode(chunk, memory), in_place, memory)
        tensors = self._working[chunk].tensors
        if self.on_fetch is not None:
            self.on_fetch(tensors)
        return tensors

    def evict(self, chunk: int, step: int = 0) -> None:
        working = self._working.pop(chunk, None)
        if working is None:
            return
        memory = self._grow(chunk, working.memory)
        for key, values in working.tensors.items():
            if key not in working.in_place:
                self._encode(chunk, key, values, memory, step)
        self._send(chunk)

    @property
    def reads_weights(self) -> bool:
        return SPLIT_MASTER in self.codecs

    def hold(self, chunk: int) -> None:
        self._encode_staged()
        assert chunk not in self._working and chunk not in self._asides
        entries = self._layouts[chunk].entries if chunk in self._layouts else {}
        self._asides[chunk] = {key: entry.codec.aside() for key, entry in entries.items()}
        self._hold(chunk)

    def release(self, chunk: int) -> None:
        del self._asides[chunk]
        self._release(chunk)

    def take_back(self, chunk: int) -> None:
        assert chunk not in self._working
        for key, kept in self._asides.pop(chunk).items():
            self._layouts[chunk].entries[key].codec.set_aside(kept)
        self._take_back(chunk)

    def synchronize(self) -> None:
        self._encode_staged()

    def read(self, chunk: int) -> Mapping[str, Tensor]:
        if chunk in self._working:
            return self._working[chunk].tensors
        self._encode_staged()
        return self._decode(chunk, self._at_rest(chunk)) if chunk in self._layouts else {}

    def write(self, chunk: int, key: str, values: Tensor, start: int = 0) -> None:
        if chunk in self._working:
            self._working[chunk].tensors[key][start : start + values.numel()].copy_(values)
            return
        if self._staged is None or self._staged[0] != chunk:
            self._encode_staged()
            self._staged = (chunk, {})
        staged = self._staged[1]
        if key not in staged:
            staged.update({k: v.clone() for k, v in self._decode(chunk, self._at_rest(chunk), [key]).items()})
        staged[key][start : start + values.numel()].copy_(values)

    def close(self) -> None:
        self._working.clear()
        self._staged = None
        self._layouts.clear()  # codecs keep positions, and the weights that masters are told from

    # -- bytes ---------------------------------------------------------------------------------------------

    def _decode(self, chunk: int, memory: Tensor, keys: list[str] | None = None) -> dict[str, Tensor]:
        layout = self._layouts[chunk]
        return {
            key: layout.entries[key].codec.decode(layout.parts(key, memory))
            for key in (layout.entries if keys is None else keys)
        }

    def _encode(self, chunk: int, key: str, values: Tensor, memory: Tensor, step: int) -> None:
        layout = self._layouts[chunk]
        digest = hashlib.blake2b(f"{self.seed}:{step}:{key}".encode(), digest_size=8).digest()
        seed = int.from_bytes(digest, "little") >> 1
        layout.entries[key].codec.encode(values, layout.parts(key, memory), seed)

    def _encode_staged(self) -> None:
        if self._staged is None:
            return
        (chunk, tensors), self._staged = self._staged, None
        memory = self._at_rest(chunk)
        for key, values in tensors.items():
            self._encode(chunk, key, values, memory, step=0)
        self._replace_at_rest(chunk, memory)
