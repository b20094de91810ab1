"""The layout arithmetic, and one rank; the collectives of several run in tests/distributed."""

import pytest
import torch

from hift_ds import collectives
from hift_ds.collectives import Ranks, assign_owners, plan_buckets, shard_bounds, shard_numel


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


def test_on_one_rank_every_collective_hands_back_what_it_was_given():
    """No process group, no copy, no cast: callers have no second code path for one rank."""
    alone, cpu = Ranks(), torch.device("cpu")
    grad = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    buckets = plan_buckets([6, 4], 1, 4)
    assert len(buckets) > 1
    whole, none = collectives.reduce_scatter_shards(alone, [grad, None], [6, 4], buckets, torch.float32, cpu)
    owned = collectives.reduce_to_owner(alone, grad, 6, cpu, 0, torch.float32)
    back = collectives.scatter_from_owner(alone, grad, 6, grad, 0)
    for same in (whole, owned, back):
        assert same.data_ptr() == grad.data_ptr() and same.shape == (6,) and same.dtype == torch.bfloat16
    assert none is None and collectives.reduce_to_owner(alone, None, 6, cpu, 0, torch.float32) is None
    before = grad.clone()
    collectives.all_gather_shards(alone, [grad], [buckets[0]])
    collectives.broadcast_from_owner(alone, grad, 0)
    assert torch.equal(grad, before)
    norm = torch.tensor(0.1)  # whose square's root is another number
    assert collectives.join_norms_and_flags(alone, norm, [True, False]) == (norm, None, [True, False])
    assert alone.grad_numel_sent == 0
