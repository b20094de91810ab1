"""Training data that are read while they are trained on: nothing is stored, and the first step waits for no row but its
own."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from hift_ds.data import packing
from hift_ds.data.row_tokens import Tokenize, check_vocabulary, nothing_to_learn
from hift_ds.data.rows import generate_rows, row_features
from hift_ds.data.sources import HUB, Source, files_of, resolve

COUNTED_ROWS = 256
"""Rows that are looked at before the run, for what it says and plans of the data."""
PACKED_AT_ONCE = 1000
"""Samples among which those are found that fill a row together."""


@dataclass(eq=False)
class Stream(IterableDataset[dict[str, Any]]):
    """Samples without an end: pass after pass through the sources, each shuffled anew.

    The rows of a pass are those of ``load_rows``, in its order without ``shuffle``. Of each pass the ranks (and the
    worker processes of a rank) take turns row by row. The same arguments give the same samples, so that whoever goes on
    skips what was seen by reading it again.

    Attributes:
        tokenize: what becomes of a row.
        shuffle_buffer: rows from which the next one is drawn; 0: as they stand in the data.
        seed: of the order, and of the mixture where sources have weights.
        pack: fill rows with several samples.
        vocab_size: rows of the model's embedding; None: unknown.
    """

    sources: list[Source]
    tokenize: Tokenize
    shuffle_buffer: int = 0
    seed: int = 0
    pack: bool = False
    vocab_size: int | None = None
    rank: int = 0
    world_size: int = 1

    def rows(self) -> Iterator[tuple[int, dict[str, str]]]:
        """All ranks' rows, each with the number of its pass."""
        for number in count():
            yield from ((number, row) for row in self.one_pass(number, self.shuffle_buffer))

    def one_pass(self, number: int, shuffle_buffer: int) -> Iterator[dict[str, str]]:
        """The rows of pass ``number``: with weights until every source has been read to its end."""
        from datasets import IterableDataset as Rows
        from datasets import concatenate_datasets, interleave_datasets

        seed = self.seed + number
        parts = [
            Rows.from_generator(generate_rows, gen_kwargs={"source": source, "stamp": ""}, features=row_features())
            for source in self.sources
        ]
        weights = [source.weight for source in self.sources]
        if any(weight is not None for weight in weights):
            given = [1.0 if weight is None else weight for weight in weights]
            shares = [weight / sum(given) for weight in given]
            rows = interleave_datasets(parts, probabilities=shares, seed=seed, stopping_strategy="all_exhausted")
        else:
            rows = concatenate_datasets(parts)
        if shuffle_buffer:
            rows = rows.shuffle(seed=seed, buffer_size=shuffle_buffer)
        # Not iter(rows), which in a worker process gives it sources of its own.
        for batch in rows.iter(batch_size=50):
            names = list(batch)
            yield from (dict(zip(names, values, strict=True)) for values in zip(*batch.values(), strict=True))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        samples = self._samples()
        if not self.pack:
            yield from samples
            return
        from datasets import Dataset

        while several := list(islice(samples, PACKED_AT_ONCE)):
            yield from packing.pack(Dataset.from_list(several), self.tokenize.max_length)

    def _samples(self) -> Iterator[dict[str, Any]]:
        """The samples of this rank, and of this of its worker processes."""
        worker = get_worker_info()
        share, shares = self.rank, self.world_size
        if worker is not None:
            share, shares = share * worker.num_workers + worker.id, shares * worker.num_workers
        last_pass = 0  # in which something was to be learned
        for number, row in islice(self.rows(), share, None, shares):
            out = self.tokenize({name: [value] for name, value in row.items()})
            for ids, labels, learned in zip(out["input_ids"], out["labels"], out["learned"], strict=True):
                if learned:
                    last_pass = number
                    if self.vocab_size is not None:
                        check_vocabulary(max(ids), self.vocab_size)
                    yield {"input_ids": ids, "labels": labels}
            if number - last_pass > shares:  # it has had every row there is
                raise nothing_to_learn("train", 0, 0, self.tokenize)

    def fingerprint(self) -> dict[str, Any]:
        """What tells these data from others: a checksum of the first rows as they stand there and of the sizes of
        files."""
        head = [row["row"] for row in islice(self.one_pass(0, 0), COUNTED_ROWS)]
        sizes = [_sizes(source) for source in self.sources]
        return {"rows": None, "crc32": f"{zlib.crc32(json.dumps([head, sizes]).encode()):08x}"}


def _sizes(source: Source) -> Iterable[int] | Mapping[str, Any]:
    source = resolve(source)
    if source.path.startswith(HUB):
        return {"hub": source.path, "subset": source.subset, "split": source.split}
    return [file.stat().st_size for file in files_of(source)]
