"""The layout arithmetic; the collectives themselves run in tests/distributed."""

import pytest

from hift_ds.collectives import assign_owners, plan_buckets, shard_bounds, shard_numel


@pytest.mark.parametrize("numel", [1, 2, 3, 7, 12, 13])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_shards_cover_a_parameter_once(numel, world_size):
    bounds = [shard_bounds(numel, world_size, rank) for rank in range(world_size)]
    covered = [i for start, end in bounds for i in range(start, end)]
    assert covered == list(range(numel))
    assert max(end - start for start, end in bounds) <= shard_numel(numel, world_size)


@pytest.mark.parametrize("bucket_numel", [1, 4, 10, 1000])
@pytest.mark.parametrize("world_size", [2, 3])
def test_buckets_cover_every_column_once_and_stay_small(bucket_numel, world_size):
    numels = [1, 7, 13, 26, 2]
    buckets = plan_buckets(numels, world_size, bucket_numel)
    seen = [(c.index, i) for bucket in buckets for c in bucket for i in range(c.start, c.start + c.length)]
    assert seen == [(i, col) for i, n in enumerate(numels) for col in range(shard_numel(n, world_size))]
    assert all(sum(c.length for c in b) <= max(1, bucket_numel // world_size) for b in buckets)


def test_owners_are_balanced_and_do_not_depend_on_the_rank():
    numels = [100, 1, 50, 50, 1]
    owners = assign_owners(numels, 2)
    loads = [sum(n for n, o in zip(numels, owners, strict=True) if o == rank) for rank in (0, 1)]
    assert loads == [101, 101] and owners == assign_owners(numels, 2)
