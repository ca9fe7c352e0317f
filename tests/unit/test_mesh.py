"""`MeshSpec`: coordinates, groups of ranks, and meshes that do not fit."""

import itertools

import pytest

from faccel.errors import ConfigError
from faccel.mesh import AXES, VIEWS, MeshSpec


def test_coordinates_number_every_rank_once_last_axis_fastest():
    spec = MeshSpec(dp_replicate=2, dp_shard=3, tp=2, pp=2)
    coordinates = [tuple(spec.coordinates(r).get(axis) for axis in AXES) for r in range(spec.size)]
    assert coordinates == list(itertools.product(range(2), range(2), range(3), range(1), range(2)))
    assert spec.data_world_size == 6
    assert [spec.data_rank(r) for r in range(12)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert [spec.data_rank(r) for r in range(12, 24)] == [spec.data_rank(r) for r in range(12)]


def test_minus_one_fills_the_world():
    assert MeshSpec(dp_replicate=-1).fill(8).dp_replicate == 8
    assert MeshSpec(dp_shard=-1, tp=4).fill(8) == MeshSpec(dp_shard=2, tp=4)
    assert MeshSpec(dp_shard=-1, tp=2, ep=-1).fill(8) == MeshSpec(dp_shard=4, tp=2, ep=8)


@pytest.mark.parametrize(
    ("spec", "world_size", "words"),
    [
        (MeshSpec(dp_replicate=3), 4, "`dp_replicate=4`"),
        (MeshSpec(tp=2), 8, "`dp_replicate=4`"),
        (MeshSpec(dp_replicate=-1, tp=3), 8, "divides"),
        (MeshSpec(dp_replicate=-1, dp_shard=-1), 8, "only one axis"),
        (MeshSpec(dp_shard=2, tp=2, ep=3), 4, "must divide .* = 4"),
        (MeshSpec(dp_shard=3, tp=2, ep=3), 6, "a multiple or a divisor of `tp`"),
    ],
)
def test_a_mesh_that_does_not_fit_raises_with_one_that_does(spec, world_size, words):
    with pytest.raises(ConfigError, match=words):
        spec.fill(world_size)


def test_a_mesh_is_parsed_from_text_and_mappings():
    assert (
        MeshSpec.of("dp_shard=2, tp=4")
        == MeshSpec.of({"dp_shard": 2, "tp": 4})
        == MeshSpec(dp_shard=2, tp=4)
    )
    for bad in (0, -2, "2", True):
        with pytest.raises(ConfigError):
            MeshSpec(tp=bad)


def test_peers_differ_along_the_axes_of_a_view_only_and_are_cheap_on_a_huge_mesh():
    spec = MeshSpec(dp_replicate=2, dp_shard=3, cp=2, tp=2, pp=2, ep=4)
    for view in (*AXES, *VIEWS):
        axes = VIEWS.get(view, (view,))
        for rank in range(spec.size):
            same = {axis: at for axis, at in spec.coordinates(rank).items() if axis not in axes}
            slow = tuple(r for r in range(spec.size) if same.items() <= spec.coordinates(r).items())
            assert spec.peers(rank, view) == slow
    for rank in range(spec.size):
        assert rank in spec.peers(rank, "ep")
        assert set(spec.peers(rank, "ep")) & set(spec.peers(rank, "ep_storage")) == {rank}
        assert len(spec.peers(rank, "ep")) == 4
        assert len(spec.peers(rank, "ep_storage")) == 3 * 2 * 2 / 4
        # The ranks of `tp` are in one block.
        assert set(spec.peers(rank, "tp")) <= set(spec.peers(rank, "ep"))
    huge = MeshSpec(dp_replicate=10**6, dp_shard=8, tp=8)
    assert huge.peers(64 * 999_999 + 9, "tp") == tuple(range(64 * 999_999 + 8, 64 * 999_999 + 16))
