"""Parked weights in a file: values, dtypes, room, and nothing left behind."""

import pytest
import torch

from hift_ds.engine.zero3.weight_file import PAGE, WeightFile
from hift_ds.errors import StateStoreError


def test_what_is_written_is_kept_through_letting_go_and_reading_ahead(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(n, generator=generator).to(dtype) for n, dtype in ((3, torch.float32), (5001, torch.bfloat16))
    ]
    file = WeightFile(tmp_path, sum(WeightFile.room(tensor.nbytes) for tensor in tensors))
    placed = [file.reserve(tensor.numel(), tensor.dtype).copy_(tensor) for tensor in tensors]
    for _ in range(3):
        for tensor, copy in zip(tensors, placed, strict=True):
            assert torch.equal(tensor, copy)
            tensor.mul_(2)
            copy.mul_(2)
            file.let_go(copy)
            file.will_need(copy)


def test_nothing_has_a_name_in_the_folder(tmp_path):
    file = WeightFile(tmp_path, 10 * PAGE)
    file.reserve(PAGE, torch.float32).fill_(1)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_refused_with_both_sizes(tmp_path):
    with pytest.raises(StateStoreError, match="need 1,152,921,504,606,846,976 bytes, .* are free"):
        WeightFile(tmp_path, 1 << 60)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StateStoreError, match="cannot hold"):
        WeightFile(tmp_path / "file" / "folder", PAGE)
