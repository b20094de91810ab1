"""Page-locked host memory, cut from slabs of a power of two; and ordinary memory in huge pages.

torch's allocator rounds every page-locked block up to a power of two: the shards of LLaMA-2-13B in host memory would
take 44 GB in place of 26. Slabs of such a size waste what is left at their ends.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
from collections.abc import Callable

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SLAB_BYTES = 1 << 28
_ALIGNMENT = 256
HUGE_PAGE_BYTES = 1 << 21


def _page_locked(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


class PageLockedMemory:
    """Gives out pieces. A slab is given back when the last of its pieces is gone.

    Args:
        expected_bytes: of pieces that must be whole, in all: of many, slabs are larger, since their ends are lost.
        allocate: makes page-locked memory (uint8) of so many bytes.

    Attributes:
        num_bytes: page-locked so far.
        exhausted: the system gave no more, and what has come since is ordinary memory, whose copies are waited for.
    """

    def __init__(self, expected_bytes: int = 0, allocate: Callable[[int], Tensor] = _page_locked) -> None:
        self._slab_bytes = SLAB_BYTES
        while self._slab_bytes < min(expected_bytes >> 3, 1 << 30):
            self._slab_bytes *= 2
        self.num_bytes = 0
        self.exhausted = False
        self._allocate = allocate
        self._rests: list[Tensor] = []  # of slabs, aligned

    def some(self, at_most: int) -> Tensor:
        """Zeros (uint8, 1-D), 1 to ``at_most`` bytes of them (none if that is 0): what is left of a slab, or of a new
        one."""
        if at_most and not self._rests:
            self._rests.append(self._new(self._slab_bytes))
        if not at_most:
            return torch.empty(0, dtype=torch.uint8)
        return self._cut(len(self._rests) - 1, min(at_most, self._rests[-1].numel())).zero_()

    def whole(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A flat tensor with undefined values."""
        num_bytes = numel * dtype.itemsize
        fits = [i for i, rest in enumerate(self._rests) if rest.numel() >= num_bytes]
        if fits:
            at = min(fits, key=lambda i: self._rests[i].numel())
        else:
            self._rests.append(self._new(max(self._slab_bytes, 1 << (num_bytes - 1).bit_length() if num_bytes else 0)))
            at = len(self._rests) - 1
        return self._cut(at, num_bytes).view(dtype)

    def _cut(self, at: int, num_bytes: int) -> Tensor:
        rest = self._rests[at]
        piece, rest = rest[:num_bytes], rest[-(-num_bytes // _ALIGNMENT) * _ALIGNMENT :]
        if rest.numel():
            self._rests[at] = rest
        else:
            del self._rests[at]
        return piece

    def _new(self, num_bytes: int) -> Tensor:
        if not self.exhausted:
            try:
                slab = self._allocate(num_bytes)
                self.num_bytes += num_bytes
                return slab
            except RuntimeError as error:  # no memory, or a limit on what may be locked (ulimit -l)
                self.exhausted = True
                logger.warning(
                    "the system page-locks no more than the %.1f GiB that it has (%s): the rest is ordinary memory, "
                    'whose copies the step waits for; a compact "hift.state.codec" needs less',
                    self.num_bytes / 2**30, str(error).splitlines()[0],
                )  # fmt: skip
        return torch.empty(num_bytes, dtype=torch.uint8)


def return_page_locked(device: torch.device) -> None:
    """Give the system back the page-locked memory of which nothing is used any more, and no copy is under way.

    torch's allocator keeps it for the next time, and the system counts it as taken: an engine that comes after this
    one would find no room for its states beside what these have left.

    Args:
        device: for whose copies it was page-locked.
    """
    if device.type == "cpu":
        return
    give_back = getattr(torch.accelerator, "empty_host_cache", None) or getattr(torch._C, "_host_emptyCache", None)
    with contextlib.suppress(RuntimeError):  # an accelerator whose memory torch does not keep
        if give_back is not None:
            give_back()


def huge_pages(num_bytes: int) -> Tensor:
    """Zeros (uint8) in host memory, in huge pages where the kernel gives them on request.

    A read into small pages takes a fifth of the rate of matrix multiplications beside it (one interrupt for
    every 254 pages, and a page fault for each new one), one into huge pages a thirtieth.
    Copies out of huge pages are up to twice as fast.
    """
    if not hasattr(mmap, "MAP_ANONYMOUS"):  # Windows
        return torch.zeros(num_bytes, dtype=torch.uint8)
    private = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # not Linux; a kernel without huge pages
        private.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(private, dtype=torch.uint8)
    skip = -memory.data_ptr() % HUGE_PAGE_BYTES
    return memory[skip : skip + num_bytes]
