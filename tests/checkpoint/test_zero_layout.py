"""DeepSpeed's own ``zero_to_fp32.py``, unmodified, on our checkpoints."""

import inspect
import shutil
import subprocess
import sys

import pytest
import torch
from deepspeed.utils import zero_to_fp32

from hift_ds.checkpoint.zero_layout import write_zero_layout
from hift_ds.errors import CheckpointError
from tests.helpers.engines import ds_config, make_engine, train_step
from tests.helpers.toy import Toy, make_batches


@pytest.mark.parametrize(("stage", "low", "part_bytes"), [(3, True, 1 << 31), (0, True, 900), (3, False, 1500)])
def test_zero_to_fp32_gives_the_masters(tmp_path, stage, low, part_bytes):
    engine = make_engine(Toy(), ds_config(stage=stage, bf16={"enabled": low}))
    for batch in make_batches(7):  # some groups updated twice, some once
        train_step(engine, [batch])
    engine.save_checkpoint(tmp_path / "ours")
    optimizer, expected = engine.optimizer, {}
    for group in optimizer.groups.values():
        for chunk in group.chunks:
            tensors = optimizer.states.store_of(group).read(chunk.id)
            for piece, record in zip(chunk.pieces, optimizer.states.records[chunk.id], strict=True):
                master = record.master.view(tensors) if record.master else optimizer.parameters.weight(group, piece)
                expected[group.members[piece.member].name] = master.flatten().clone()
    engine.destroy()

    folder = write_zero_layout(tmp_path / "ours", tmp_path / "zero", part_bytes=part_bytes)
    assert (len(list(folder.glob("*_optim_states.pt"))) > 1) == (part_bytes < 1 << 31)
    done = subprocess.run(
        [sys.executable, shutil.copy(inspect.getfile(zero_to_fp32), tmp_path),
         str(tmp_path / "zero"), str(tmp_path / "fp32")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(tmp_path / "fp32" / "pytorch_model.bin", weights_only=True)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name].flatten(), value), name


def test_what_is_no_checkpoint_of_ours_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        write_zero_layout(tmp_path / "nothing", tmp_path / "zero")
