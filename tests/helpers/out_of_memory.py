"""A device without room, and forecasts that take no time."""

from __future__ import annotations

import torch

ALLOCATOR_SAYS = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 23.6 GiB. Of the allocated"
)


def full(*_, **__):
    raise torch.OutOfMemoryError(ALLOCATOR_SAYS)


class NoAdvice:
    """In place of a forecast, which takes seconds. A test's own subclass has the text.

    Attributes:
        made: how many of the class.
    """

    made = 0

    def __init__(self, setting):
        self.setting = setting

    @classmethod
    def make(cls, setting):
        cls.made += 1
        return cls(setting)

    def answers(self, batch, length):
        return length == self.setting.length
