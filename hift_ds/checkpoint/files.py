"""Files that are either whole or not there: written, checksummed and fsynced, then renamed.

The checksum is ``zlib.crc32``: in Python's standard library everywhere, about 4 GB/s on one core (blake2b
0.7, sha256 1.2), computed on the way to disk so that nothing is read twice. It finds every burst of up to 32
bits and misses other damage once in 4e9. It is against damage, not against an attacker: nothing in a
checkpoint is executed.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from hift_ds.dtypes import safetensors_code
from hift_ds.durable import sync
from hift_ds.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK_BYTES = 1 << 24  # checksummed and written at once: stays in the processor's cache
ALIGNMENT = 8  # of tensors in a file: no element straddles, whatever its dtype
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")
PADDING = "$padding."  # names of the tensors that fill the gaps


@dataclass(frozen=True)
class FileRecord:
    """A file as a manifest lists it."""

    num_bytes: int
    crc32: str  # 8 hexadecimal digits


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's entry in a safetensors header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's elements."""
        numel = 1
        for length in self.shape:
            numel *= length
        return numel * self.dtype.itemsize


class DurableFile:
    """A new file that is checksummed as it is written and on disk once closed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115  (open until close)
        self._crc32 = 0
        self._num_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append ``data`` and count it into size and checksum."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), BLOCK_BYTES):
            block = view[start : start + BLOCK_BYTES]
            self._crc32 = zlib.crc32(block, self._crc32)
            while block:
                block = block[self._file.write(block) :]
        self._num_bytes += len(view)

    def close(self) -> FileRecord:
        """Bring everything to the disk; returns size and checksum."""
        os.fsync(self._file.fileno())
        self._file.close()
        return FileRecord(self._num_bytes, f"{self._crc32:08x}")

    def discard(self) -> None:
        """Close the file, whatever has become of it."""
        self._file.close()


class SafetensorsWriter:
    """A safetensors file written one tensor after another, so that memory is bounded by one tensor.

    ``safetensors.save_file`` wants all of them at once. The format asks for the header first and for no gaps:
    the caller names the tensors in advance, gaps for alignment are ``uint8`` tensors named ``$padding.N``.
    """

    def __init__(self, path: Path, specs: Sequence[TensorSpec]) -> None:
        self._plan: list[tuple[TensorSpec, int]] = []  # with the bytes of padding after it
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for spec in specs:
            assert spec.name not in header, spec.name
            end = offset + spec.num_bytes
            header[spec.name] = {
                "dtype": safetensors_code(spec.dtype),
                "shape": list(spec.shape),
                "data_offsets": [offset, end],
            }
            padding = -end % ALIGNMENT
            if padding:
                header[f"{PADDING}{end}"] = {
                    "dtype": "U8",
                    "shape": [padding],
                    "data_offsets": [end, end + padding],
                }
            self._plan.append((spec, padding))
            offset = end + padding
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._next = 0
        self._file = DurableFile(path)
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)

    def write(self, tensor: Tensor) -> None:
        """Write the next tensor, of the shape and dtype that were planned for it, from any device."""
        import torch

        spec, padding = self._plan[self._next]
        assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), (spec, tensor.dtype)
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            self._file.write(flat.view(torch.uint8).numpy().data)
        self._file.write(b"\0" * padding)
        self._next += 1

    def close(self) -> FileRecord:
        """Bring the file to the disk, once every tensor was written; returns size and checksum."""
        assert self._next == len(self._plan)
        return self._file.close()

    def discard(self) -> None:
        """Close the file, whatever has become of it."""
        self._file.discard()


def write_json(path: Path, value: object, indent: int | None = 1) -> FileRecord:
    """Write ``value`` to a new file and to the disk."""
    return write_bytes(path, json.dumps(value, indent=indent, allow_nan=False).encode())


def write_bytes(path: Path, data: bytes) -> FileRecord:
    """Write ``data`` to a new file and to the disk."""
    file = DurableFile(path)
    try:
        file.write(data)
        return file.close()
    except BaseException:
        file.discard()
        raise


def open_regular(path: Path) -> BinaryIO:
    """A file to read that is one: reading a device or a pipe might never end.

    Raises:
        OSError: it cannot be opened, or is something else.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(handle, "rb", buffering=0)


def read_regular_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises OSError as :func:`open_regular`, and UnicodeDecodeError."""
    with open_regular(path) as file:
        return file.read().decode("utf-8")


def is_plain_name(name: object) -> bool:
    """True if ``name`` can only be of a file in the folder that it is looked up in."""
    return isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\0"} & set(name)


def record_of(path: Path) -> FileRecord:
    """Size and checksum of a file on disk.

    Raises:
        OSError: there is none, or it is no regular file, or a link to one outside of its folder.
    """
    if path.is_symlink() and path.resolve().parent != path.parent.resolve():
        raise OSError(errno.EINVAL, "a link to a file outside of its folder", str(path))
    crc32 = num_bytes = 0
    with open_regular(path) as file:
        while block := file.read(BLOCK_BYTES):
            crc32 = zlib.crc32(block, crc32)
            num_bytes += len(block)
    return FileRecord(num_bytes, f"{crc32:08x}")


def as_json(records: Mapping[str, FileRecord]) -> dict[str, Any]:
    """The records as JSON values, by file name."""
    return {name: asdict(record) for name, record in records.items()}


def replace_text(path: Path, text: str) -> None:
    """Give ``path`` new contents in one step: a reader sees the old or the new ones, after a crash too."""
    show_text(path, text)
    sync(path.parent)


def show_text(path: Path, text: str) -> None:
    """Give ``path`` new contents in one step. Who sees them may move the folder: nothing is done in it after."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    write_bytes(temporary, text.encode())
    os.replace(temporary, path)


def replace_json(path: Path, content: Any) -> None:
    """Give ``path`` new contents as :func:`replace_text` does: a JSON value, indented."""
    replace_text(path, json.dumps(content, indent=2) + "\n")


def publish_folder(temporary: Path, final: Path) -> None:
    """Rename a complete folder to its name. A whole one of that name stays until the new one is there."""
    sync(temporary)
    replaced = final.with_name(final.name + ".replaced")
    if final.exists():
        if replaced.exists():
            remove_folder(replaced)
        os.rename(final, replaced)  # a kill now leaves it as a checkpoint that a search finds
    os.rename(temporary, final)
    sync(final.parent)
    if replaced.exists():
        remove_folder(replaced)


def second_name(file: Path, name: Path) -> None:
    """``name`` becomes the same file as ``file`` (a hard link; a copy where the file system has no links), in one
    step."""
    temporary = temporary_folder(name, uuid.uuid4().hex[:12])
    try:
        os.link(file, temporary)
    except OSError as error:
        if error.errno not in (
            errno.EPERM,
            errno.EOPNOTSUPP,
            errno.ENOSYS,
            errno.EMLINK,
            errno.EXDEV,
            errno.EACCES,
        ):
            raise
        shutil.copyfile(file, temporary)
        sync(temporary)
    os.replace(temporary, name)
    sync(name.parent)


def temporary_folder(final: Path, token: str) -> Path:
    """The hidden name of a folder that is being written or removed. ``token``: 12 hexadecimal digits."""
    return final.with_name(f".{final.name}.{token}.tmp")


def is_temporary(path: Path) -> bool:
    """True for a path that :func:`temporary_folder` may have given."""
    return _TEMPORARY.fullmatch(path.name) is not None


def remove_folder(path: Path) -> None:
    """Remove a folder in one step: a kill leaves a hidden rest, never half a checkpoint under its name."""
    hidden = temporary_folder(path, uuid.uuid4().hex[:12])
    os.rename(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


@contextmanager
def write_errors(folder: Path, what: str = "a checkpoint") -> Iterator[None]:
    """Errors of the file system as one line, also those that torch and safetensors have put into their own words.

    Raises:
        CheckpointError: the file system refused something.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        refusal = refusal_of(error)
        if refusal is None:
            raise
        raise CheckpointError(explain_refusal(refusal, folder, what)) from error


def refusal_of(error: BaseException) -> OSError | None:
    """What the file system said; None for an error that it has nothing to do with."""
    if isinstance(error, OSError):
        return None if isinstance(error, ConnectionError | TimeoutError) else error
    text = str(error)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO):
        if f"(os error {number})" in text or os.strerror(number) in text:
            return OSError(number, os.strerror(number))
    if "PytorchStreamWriter failed" in text:  # torch.save does not say why; it is hardly ever anything else
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return None


def explain_refusal(error: OSError, folder: Path, what: str) -> str:
    """One line, with the way out, for ``what`` that could not be written into ``folder``."""
    where = error.filename or folder
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free_gib = shutil.disk_usage(existing).free / 2**30
        return f"no space left for {what} in {folder} ({free_gib:.2f} GiB free); free some or save elsewhere"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"cannot write {what} to {where}: {error.strerror}; choose a folder this user may write to"
    return f"cannot write {what} to {where}: {error.strerror or error}"
