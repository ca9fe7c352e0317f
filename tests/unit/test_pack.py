"""Tensors as one row of bytes."""

import torch

from faccel.comm.pack import pack

# every item size, and leaves without elements between the others
LEAVES = [
    torch.arange(3, dtype=torch.uint8),
    torch.ones(0, 2, dtype=torch.complex128),
    torch.randn(2, 3, dtype=torch.float64),
    torch.tensor([True, False]),
    torch.randn(5).bfloat16(),
    torch.ones(3, 0),
    torch.randn(2, 2, dtype=torch.complex64),
    torch.tensor(7, dtype=torch.int16),
    torch.randn(1, 4),
]


def test_copies_of_packed_leaves_are_the_leaves_of_all_rows_without_the_bytes_of_the_others():
    others = [leaf * 2 for leaf in LEAVES]
    packed = pack(LEAVES)
    rows = torch.stack([packed.row, pack([*others[:3], LEAVES[3], *others[4:]]).row])
    others[3] = LEAVES[3]  # booleans times 2 are integers
    for leaf, other, copy in zip(LEAVES, others, packed.read_copies(rows), strict=True):
        assert torch.equal(copy, torch.stack([leaf, other])), leaf
        assert copy.dtype == leaf.dtype
        assert copy.untyped_storage().nbytes() == copy.nbytes, leaf
    assert packed.read_copies(rows[:0])[2].shape == (0, 2, 3)


def test_the_leaves_of_many_rows_are_copied_by_one_operation():
    packed = pack([torch.ones(2, 2)] * 20)
    with torch.profiler.profile() as profile:
        packed.read_copies(packed.row[None])
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts.pop("aten::split_with_sizes_copy") == 1
    # two views of each copy; the split slices and clones within C++
    assert counts["aten::view"] <= 40, counts
