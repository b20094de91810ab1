"""Whatever happens to the files, a load is whole or refused by name; whatever refuses to be written, the
previous checkpoint stays and says why."""

import json
import logging
import os
import random
import shutil
import subprocess
import zlib
from pathlib import Path

import pytest
import torch

from hift_ds.checkpoint import files as durable_files
from hift_ds.checkpoint import shared_folder
from hift_ds.checkpoint.manifest import MANIFEST
from hift_ds.errors import CheckpointError
from tests.checkpoint.conftest import disk_of
from tests.checkpoint.runs import Case, advance, states_of, whole_weights
from tests.helpers.engines import ds_config

CASE = Case(ds_config())
FILES = [
    "model.safetensors", "states-rank-00000.safetensors", "rank-00000.json", "checkpoint.json",
    "client_state.pt", MANIFEST,
]  # fmt: skip


@pytest.fixture
def engine():
    engine = CASE.engine(seed=0)
    yield engine
    engine.destroy()


@pytest.fixture
def two_saves(engine, memory_path):
    """Checkpoints of steps 3 and 5; the engine is at step 6."""
    for stop in (3, 5):
        advance(engine, stop - (3 if stop == 3 else 2), stop)
        engine.save_checkpoint(memory_path, client_state={"table": torch.arange(5.0), "stop": stop})
    advance(engine, 5, 6)
    return memory_path


def everything(engine):
    return {**whole_weights(engine), **states_of(engine)}, engine.global_steps, engine.schedule.cursor


def same(a, b) -> bool:
    return a[0].keys() == b[0].keys() and all(torch.equal(a[0][n], b[0][n]) for n in a[0]) and a[1:] == b[1:]


def test_a_thousand_flipped_bits_are_each_found_or_harmless(engine, two_saves):
    """Each bit of each file of the newest checkpoint is as likely. Loading by tag refuses; loading the latest
    falls back to the checkpoint before."""
    seed = 20240131
    print("seed", seed)
    draw = random.Random(seed)
    engine.load_checkpoint(two_saves, tag="global_step3")
    older = everything(engine)
    engine.load_checkpoint(two_saves)
    newer = everything(engine)
    files = [p for p in [*(two_saves / "global_step5").iterdir(), two_saves / "latest"]]
    assert len(files) == 7
    sizes = [p.stat().st_size for p in files]
    outcomes = {"refused": 0, "harmless": 0}
    for trial in range(1000):
        # Small files get their share too.
        path = draw.choices(files, sizes)[0] if trial % 2 else draw.choice(files)
        content = bytearray(path.read_bytes())
        good = bytes(content)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        try:
            engine.load_checkpoint(two_saves, tag="global_step5")
            assert path.name == "latest", path
            outcomes["harmless"] += 1
        except CheckpointError as error:
            assert path.name in str(error) and "\n" not in str(error)
            outcomes["refused"] += 1
        if trial % 10 == 0:
            engine.load_checkpoint(two_saves)
            assert same(everything(engine), newer if path.name == "latest" else older), path
        path.write_bytes(good)
    assert outcomes["refused"] > 800
    engine.load_checkpoint(two_saves)
    assert same(everything(engine), newer)


@pytest.mark.parametrize("where", ["first byte", "half", "last byte", "gone"])
@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_missing_file_is_named_and_the_run_falls_back(engine, two_saves, caplog, name, where):
    path = two_saves / "global_step5" / name
    size = path.stat().st_size
    if where == "gone":
        path.unlink()
    else:
        os.truncate(path, {"first byte": 0, "half": size // 2, "last byte": size - 1}[where])
    before = everything(engine)
    with pytest.raises(CheckpointError, match=name):
        engine.load_checkpoint(two_saves, tag="global_step5")
    assert same(everything(engine), before)  # never half-loaded
    with caplog.at_level(logging.WARNING):
        loaded, client_state = engine.load_checkpoint(two_saves)
    assert Path(loaded).name == "global_step3" and client_state["stop"] == 3 and engine.global_steps == 3
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("hift_ds")]
    assert len(lines) == 1 and name in lines[0] and "global_step3" in lines[0]


def test_no_whole_checkpoint_left(engine, two_saves):
    for tag in ("global_step3", "global_step5"):
        os.truncate(two_saves / tag / "model.safetensors", 10)
    before = everything(engine)
    with pytest.raises(CheckpointError, match=r"global_step5.*global_step3.*no whole checkpoint"):
        engine.load_checkpoint(two_saves)
    assert same(everything(engine), before)


def test_no_checkpoint_at_all_is_deepspeeds_answer(engine, memory_path):
    assert engine.load_checkpoint(memory_path) == (None, None)
    assert engine.load_checkpoint(memory_path / "nowhere") == (None, None)
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        engine.load_checkpoint(memory_path, tag="nowhere")


def test_the_checkpoint_in_place_of_its_folder(engine, two_saves):
    with pytest.raises(
        CheckpointError, match=r"is itself a checkpoint: load_checkpoint\(.*, tag=.global_step3.\) loads it"
    ):
        engine.load_checkpoint(two_saves / "global_step3")


def test_latest_that_is_missing_or_names_nothing(engine, two_saves):
    for text in (None, "", "global_step99", "../../etc"):
        (two_saves / "latest").unlink(missing_ok=True)
        if text is not None:
            (two_saves / "latest").write_text(text)
        assert Path(engine.load_checkpoint(two_saves)[0]).name == "global_step5"


def test_a_newer_format_is_an_error_and_not_damage(engine, two_saves):
    path = two_saves / "global_step5" / MANIFEST
    content = json.loads(path.read_text())
    content.pop("crc32")
    content |= {"format": 99, "hift_ds": "7.0"}
    content["crc32"] = f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"
    path.write_text(json.dumps(content))
    for tag in (None, "global_step5"):
        with pytest.raises(CheckpointError, match=r"hift_ds 7.0 in format 99.*upgrade"):
            engine.load_checkpoint(two_saves, tag=tag)


def test_a_checkpoint_of_plain_deepspeed(engine, memory_path):
    folder = memory_path / "global_step4"
    folder.mkdir()
    (folder / "mp_rank_00_model_states.pt").touch()
    (memory_path / "latest").write_text("global_step4")
    with pytest.raises(CheckpointError, match='saved by DeepSpeed without a "hift" block'):
        engine.load_checkpoint(memory_path)


# -- what cannot be written ------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    with disk_of("128k", tmp_path / "small") as folder:
        yield folder


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_says_so_and_keeps_the_previous_checkpoint(small_disk, asynchronous):
    """The second save does not fit. With "continue" training goes on as if it had not been tried."""
    block = {"checkpoint": {"asynchronous": asynchronous, "on_error": "continue"}}
    engine, twin = (Case(ds_config(hift=block)).engine(seed=0) for _ in range(2))
    advance(engine, 0, 3)
    assert engine.save_checkpoint(small_disk) and engine.wait_for_checkpoint()
    saved = everything(engine)
    (small_disk / "other people's data").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 30_000))
    advance(engine, 3, 6)
    good = [engine.save_checkpoint(small_disk), engine.wait_for_checkpoint()]
    assert good.count(False) == 1
    assert sorted(p.name for p in small_disk.iterdir()) == ["global_step3", "latest", "other people's data"]
    advance(engine, 6, 9)
    advance(twin, 0, 9)
    assert same(everything(engine), everything(twin))
    assert engine.load_checkpoint(small_disk)[0] and same(everything(engine), saved)
    engine.destroy()
    twin.destroy()


def test_a_full_disk_is_an_error_by_default(engine, small_disk):
    (small_disk / "other people's data").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 20_000))
    with pytest.raises(CheckpointError, match=r"no space left for a checkpoint in .*small .*GiB free.*free some"):
        engine.save_checkpoint(small_disk)
    assert [p.name for p in small_disk.iterdir()] == ["other people's data"]


def test_a_folder_that_may_not_be_written(engine, tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir()
    if os.geteuid() == 0:  # to whom modes say nothing
        mount = ["mount", "-t", "tmpfs", "-o", "size=64k,ro", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("cannot mount a read-only tmpfs here")
    else:
        folder.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match=r"cannot write a checkpoint to .*locked.*choose a folder"):
            engine.save_checkpoint(folder)
        with pytest.raises(CheckpointError, match=r"cannot write a checkpoint to .*locked"):
            engine.save_checkpoint(folder / "below")
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", "-l", str(folder)], check=True)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot write a checkpoint to .*file"):
        engine.save_checkpoint(tmp_path / "file")


def test_bad_tags_and_client_states(engine, tmp_path):
    with pytest.raises(CheckpointError, match="'a/b' is not a folder name"):
        engine.save_checkpoint(tmp_path, tag="a/b")
    with pytest.raises(CheckpointError, match=r"client_state: thing: only JSON values, tensors"):
        engine.save_checkpoint(tmp_path, client_state={"thing": Path("x"), "fine": 1})
    with pytest.raises(ValueError, match="save_dir"):
        engine.save_checkpoint("")
    assert not list(tmp_path.iterdir())


def test_client_states_come_back_as_they_were(engine, tmp_path):
    state = {
        "tuple": (1, (2.5, None)), "infinite": float("inf"), "by_int": {3: "x", 4: [True]},
        "scalar": torch.tensor(2, dtype=torch.int8),
        "tensor": torch.arange(6).view(2, 3), "nested": {"t": [torch.ones(2), "s"]}, "": {"$tuple": 1},
    }  # fmt: skip
    engine.save_checkpoint(tmp_path, client_state=state)
    _, loaded = engine.load_checkpoint(tmp_path)
    assert loaded.keys() == state.keys()
    for key in ("tuple", "infinite", "by_int", ""):
        assert loaded[key] == state[key] and type(loaded[key]) is type(state[key])
    assert loaded["scalar"].dtype == torch.int8 and loaded["scalar"] == 2
    assert torch.equal(loaded["tensor"], state["tensor"]) and torch.equal(loaded["nested"]["t"][0], torch.ones(2))


def test_saving_between_backward_and_step_is_refused(engine, tmp_path):
    from tests.helpers.toy import loss_of, make_batches

    engine.backward(loss_of(engine, make_batches(1)[0]))
    with pytest.raises(CheckpointError, match="call it after engine.step"):
        engine.save_checkpoint(tmp_path)


# -- several ranks ---------------------------------------------------------------------------------


def save_with_a_failing_rank(folder: str, asynchronous: bool) -> None:
    import torch.distributed as dist

    rank = dist.get_rank()
    case = Case(ds_config(hift={"checkpoint": {"asynchronous": asynchronous}}))
    engine = case.engine(seed=0)
    advance(engine, 0, 3, rank, 2)
    engine.save_checkpoint(folder)
    engine.wait_for_checkpoint()
    advance(engine, 3, 5, rank, 2)
    for failing in (1, 0):
        if rank == failing:
            real = durable_files.DurableFile.close
            durable_files.DurableFile.close = _fails_on_states
        rmtree = shutil.rmtree
        if asynchronous and rank == failing == 0:
            # The other rank's file appears while this one clears up: the folder is not empty, and stays.
            shutil.rmtree = lambda *_, real=rmtree, **__: setattr(shutil, "rmtree", real)
        with pytest.raises(CheckpointError, match=rf"rank {failing}: .*no space left|rank 0: rank 1: .*no space left"):
            engine.save_checkpoint(folder)
            engine.wait_for_checkpoint()
        if rank == failing:
            assert shutil.rmtree is rmtree, "the leader cleared nothing up"
            durable_files.DurableFile.close = real
        dist.barrier()  # the first rank clears up
        assert sorted(os.listdir(folder)) == ["global_step3", "latest"]
    assert Path(folder, "latest").read_text() == "global_step3"
    if rank == 1:
        tag = "mine"
    else:
        tag = "yours"
    with pytest.raises(CheckpointError, match="same on all ranks"):
        engine.save_checkpoint(folder, tag=tag)
    engine.save_checkpoint(folder)
    engine.wait_for_checkpoint()
    assert Path(folder, "latest").read_text() == "global_step5"


def _fails_on_states(self):
    if "states" in self.path.name:
        raise OSError(28, "No space left on device", str(self.path))
    os.fsync(self._file.fileno())
    self._file.close()
    return durable_files.FileRecord(self._num_bytes, f"{self._crc32:08x}")


@pytest.mark.distributed
@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_rank_that_cannot_write_stops_the_save_of_all(launcher, memory_path, asynchronous):
    launcher.run(save_with_a_failing_rank, 2, str(memory_path), asynchronous)


def test_a_folder_may_be_published_as_soon_as_the_last_rank_says_that_it_is_ready(tmp_path, monkeypatch):
    """The leader polls: it can rename the folder right after the last part's name is there."""
    leader, other = (shared_folder.SharedFolder(tmp_path, "step", "token", rank) for rank in (0, 1))
    leader.create()
    for folder in (leader, other):
        folder.join([leader.find_leader()] * 2)
    leader.write_part({})
    replace = os.replace

    def replace_and_publish(source, target):
        monkeypatch.setattr(os, "replace", replace)
        replace(source, target)
        leader.publish(global_steps=1, save_latest=True, node_local=False, timeout_s=1.0)

    monkeypatch.setattr(os, "replace", replace_and_publish)
    other.write_part({})
    assert (tmp_path / "step" / MANIFEST).is_file() and (tmp_path / "latest").read_text() == "step"


def save_on_two_nodes(folder: str) -> None:
    """Each rank sees only its own folder, as on nodes without a shared file system."""
    import torch.distributed as dist

    rank = dist.get_rank()
    here = Path(folder) / f"node{rank}"
    shared = Case(ds_config()).engine(seed=0)
    advance(shared, 0, 2, rank, 2)
    shared_folder.VISIBLE_AFTER_S = 0.3
    with pytest.raises(CheckpointError, match=r"rank 1: .*not the same folder on all nodes.*use_node_local_storage"):
        shared.save_checkpoint(here)
    assert not here.exists() or not list(here.iterdir())

    case = Case(ds_config(checkpoint={"use_node_local_storage": True}))
    engine = case.engine(seed=0)
    engine.local_rank = 0  # the first rank of its node
    for stop in (3, 5):
        advance(engine, engine.global_steps, stop, rank, 2)
        engine.save_checkpoint(here)
    names = {p.name for p in (here / "global_step5").iterdir()}
    assert names == {
        "model.safetensors",
        "checkpoint.json",
        MANIFEST,
        f"rank-0000{rank}.json",
        f"states-rank-0000{rank}.safetensors",
    }
    expected = everything(engine)
    advance(engine, 5, 7, rank, 2)
    assert Path(engine.load_checkpoint(here)[0]) == here / "global_step5" and same(everything(engine), expected)

    if rank == 1:  # this node was killed between the other's rename and its own
        shutil.rmtree(here / "global_step5")
    assert Path(engine.load_checkpoint(here)[0]) == here / "global_step3"
    engine.destroy()
    shared.destroy()


def load_one_node_alone(folder: str) -> None:
    engine = Case(ds_config()).engine(seed=0)
    before = everything(engine)
    with pytest.raises(CheckpointError, match="bring the files of all nodes together"):
        engine.load_checkpoint(Path(folder) / "node0", tag="global_step3")
    assert same(everything(engine), before)
    for name in ("rank-00001.json", "states-rank-00001.safetensors"):
        shutil.copy(Path(folder) / "node1" / "global_step3" / name, Path(folder) / "node0" / "global_step3")
    assert engine.load_checkpoint(Path(folder) / "node0", tag="global_step3")[0]
    engine.destroy()


@pytest.mark.distributed
def test_nodes_without_a_shared_file_system(launcher, memory_path):
    launcher.run(save_on_two_nodes, 2, str(memory_path))
    launcher.run(load_one_node_alone, 1, str(memory_path))


# -- what a folder may make a reader do ------------------------------------------------------------------------


def rewrite_manifest(folder: Path, name: str, record: dict) -> None:
    """With one more file, and a checksum that is right."""
    path = folder / MANIFEST
    content = json.loads(path.read_text())
    del content["crc32"]
    content["files"][name] = record
    crc32 = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    path.write_text(json.dumps({**content, "crc32": f"{crc32:08x}"}))


@pytest.mark.parametrize("name", ["/dev/zero", "../global_step3/model.safetensors", "pipe", "link"])
def test_a_manifest_is_of_regular_files_in_its_folder(engine, two_saves, name):
    """Reading the first or the third would never end."""
    folder = two_saves / "global_step5"
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to("/dev/zero")
    rewrite_manifest(folder, name, {"num_bytes": 0, "crc32": "00000000"})
    before = everything(engine)
    with pytest.raises(CheckpointError, match=r"not a file of the folder|not a regular file|a link to a file outside"):
        engine.load_checkpoint(two_saves, tag="global_step5")
    assert same(everything(engine), before)
    loaded, _ = engine.load_checkpoint(two_saves)
    assert Path(loaded).name == "global_step3"


def test_pipes_in_place_of_small_files(engine, two_saves):
    for name in (MANIFEST, "checkpoint.json", "rank-00000.json"):
        path = two_saves / "global_step5" / name
        good = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(CheckpointError, match=name):
            engine.load_checkpoint(two_saves, tag="global_step5")
        path.unlink()
        path.write_bytes(good)
    (two_saves / "latest").unlink()
    os.mkfifo(two_saves / "latest")
    assert Path(engine.load_checkpoint(two_saves)[0]).name == "global_step5"


def test_a_client_state_that_would_run_code_is_one_line(engine, two_saves, tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    folder = two_saves / "global_step5"
    torch.save({"table": Attack()}, folder / "client_state.pt")
    data = (folder / "client_state.pt").read_bytes()
    rewrite_manifest(folder, "client_state.pt", {"num_bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"})
    before = everything(engine)
    with pytest.raises(CheckpointError, match=r"client_state.pt holds more than plain values") as error:
        engine.load_checkpoint(two_saves, tag="global_step5")
    assert "\n" not in str(error.value) and not (tmp_path / "executed").exists()
    assert same(everything(engine), before)


def test_names_that_a_checkpoint_cannot_have(engine, tmp_path):
    for tag, reason in (
        ("latest", "names the newest"),
        ("x" * 240, "longer than 220"),
        (".x", "hidden"),
        ("a\nb", "not a"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            engine.save_checkpoint(tmp_path, tag=tag)
    assert not list(tmp_path.iterdir())
    engine.save_checkpoint(tmp_path, tag="x" * 220)
    assert Path(engine.load_checkpoint(tmp_path)[0]).name == "x" * 220
    for content in ("y" * 5000, "..", "/dev/zero", "latest", "\0"):
        (tmp_path / "latest").write_text(content)
        assert Path(engine.load_checkpoint(tmp_path)[0]).name == "x" * 220, content
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").mkdir()
    assert Path(engine.load_checkpoint(tmp_path)[0]).name == "x" * 220
    with pytest.raises(CheckpointError, match=r"latest is a folder, where a file .*; move it"):
        engine.save_checkpoint(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "x" * 220]
