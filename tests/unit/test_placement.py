"""Placements: tables computed by hand, ties, units that are not split, and mistakes."""

import attrs
import pytest
import torch
from torch import nn

import faccel
from faccel.errors import ConfigError, ModelError
from faccel.inference import placement_for


class Layer(nn.Module):
    """A module with a parameter of `size` bytes."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8), requires_grad=False)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = Layer(5), Layer(5)


class Attention(nn.Module):
    """Reads the weight of `out` outside of its forward, as `nn.MultiheadAttention`."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(4, dtype=torch.uint8), requires_grad=False)
        self.out = Layer(6)


class Net(nn.Module):
    """Blocks, and around them what the arguments name."""

    def __init__(self, blocks, *, embed=0, head=0, tied=False, buffer=0, root=0):
        super().__init__()
        if root:
            self.scale = nn.Parameter(torch.empty(root, dtype=torch.uint8), requires_grad=False)
        if embed:
            self.embed = Layer(embed)
        self.blocks = nn.ModuleList(Layer(size) for size in blocks)
        if head:
            self.head = Layer(head)
        if tied:
            self.head.weight = self.embed.weight
        if buffer:
            self.register_buffer("mask", torch.empty(buffer, dtype=torch.uint8))


class NoSplit(nn.Sequential):
    _no_split_modules = ("Pair",)


SEQUENTIAL, BALANCED = "sequential", "balanced"
C0, C1, C2, CPU, DISK = "cuda:0", "cuda:1", "cuda:2", "cpu", "disk"
TENS = [10] * 6

# model, budget, strategy, the device of each unit, the window for offloaded units
TABLE = {
    "one device": (Net([10] * 4), {C0: 100}, SEQUENTIAL, [C0] * 4, 0),
    # 25 bytes hold two blocks
    "sequential": (Net([10] * 4), {C0: 25, C1: 100}, SEQUENTIAL, [C0, C0, C1, C1], 0),
    "sequential fills": (Net([10] * 4), {C0: 100, C1: 100}, SEQUENTIAL, [C0] * 4, 0),
    "halves": (Net([10] * 4), {C0: 100, C1: 100}, BALANCED, [C0, C0, C1, C1], 0),
    # 30 and 20: the largest part of five blocks is at least 30
    "odd": (Net([10] * 5), {C0: 100, C1: 100}, BALANCED, [C0, C0, C0, C1, C1], 0),
    "thirds": (Net([10] * 5), {C0: 99, C1: 99, C2: 99}, BALANCED, [C0, C0, C1, C1, C2], 0),
    # 30 + 10 + 10 and 10 + 10 + 30
    "ends": (
        Net([10] * 4, embed=30, head=30),
        {C0: 100, C1: 100},
        BALANCED,
        [C0, C0, C0, C1, C1, C1],
        0,
    ),
    # The tied weight counts once, where the embedding is: 30 + 10 and 10 + 10 + 10.
    "tied ends": (
        Net([10] * 4, embed=30, head=30, tied=True),
        {C0: 100, C1: 100},
        BALANCED,
        [C0, C0, C1, C1, C1, C0],
        0,
    ),
    "a small device": (Net(TENS), {C0: 20, C1: 100}, BALANCED, [C0, C0, *[C1] * 4], 0),
    # 50 - 2 blocks for the units in use = 30
    "cpu and disk": (Net(TENS), {CPU: 50, DISK: 100}, BALANCED, [CPU] * 3 + [DISK] * 3, 20),
    # Two units do not fit into 15 bytes, one does; 5 bytes hold none.
    "one unit in use": (Net(TENS), {CPU: 15, DISK: 100}, BALANCED, [DISK] * 6, 15),
    "all fits the host": (Net(TENS), {CPU: 60, DISK: 100}, BALANCED, [CPU] * 6, 0),
    "three kinds": (
        Net([10] * 9),
        {C0: 50, CPU: 20, DISK: 100},
        SEQUENTIAL,
        [C0] * 3 + [CPU] * 2 + [DISK] * 4,
        20,
    ),
    # 60 - (40 + 10) = 10: the embedding is larger than that, the next block is not
    "a large embedding": (
        Net([10] * 4, embed=40),
        {C0: 60, CPU: 100},
        BALANCED,
        [CPU, C0, CPU, CPU, CPU],
        50,
    ),
    # 60 - (30 + 10) = 20: of the tied ends one is in use at a time
    "tied ends on disk": (
        Net([10] * 4, embed=30, head=30, tied=True),
        {CPU: 60, DISK: 100},
        BALANCED,
        [DISK, CPU, CPU, DISK, DISK, DISK],
        40,
    ),
    # 55 - 5 - 2 blocks = 30
    "buffers": (
        Net(TENS, buffer=5),
        {CPU: 55, DISK: 100},
        BALANCED,
        [CPU] * 3 + [DISK] * 3,
        20,
    ),
    # What the root uses itself is in memory all the time: 57 - 7 - 20 = 30.
    "parameters of the root": (
        Net(TENS, root=7),
        {CPU: 57, DISK: 100},
        BALANCED,
        [CPU, *[CPU] * 3, *[DISK] * 3],
        20,
    ),
    # 34 - 2 * 10 = 14: one pair of 10 bytes
    "pairs": (NoSplit(Pair(), Pair(), Pair(), Pair()), {CPU: 34, DISK: 99}, BALANCED, None, 24),
    # Without `_no_split_modules`: 34 - 2 * 5 = 24 are four layers of 5 bytes.
    "layers": (
        nn.Sequential(Pair(), Pair(), Pair(), Pair()),
        {CPU: 34, DISK: 99},
        BALANCED,
        [CPU] * 4 + [DISK] * 4,
        14,
    ),
    # A module with parameters is one unit with what is inside: 10 bytes each.
    "attention": (
        nn.Sequential(Attention(), Attention(), Attention()),
        {CPU: 29, DISK: 99},
        BALANCED,
        [DISK] * 3,
        29,
    ),
    "a map": (
        Net(TENS, embed=10),
        {C0: 40, CPU: 100},
        {"": CPU, "blocks": C0, "blocks.2": CPU, "blocks.3": CPU, "blocks.5": CPU},
        [CPU, C0, C0, CPU, CPU, C0, CPU],
        10,
    ),
}
TABLE["pairs"] = (*TABLE["pairs"][:3], [CPU, DISK, DISK, DISK], 24)


@pytest.mark.parametrize("name", TABLE)
def test_a_placement_equals_the_table_computed_by_hand(name):
    model, budget, strategy, devices, window = TABLE[name]
    placement = placement_for(model, budget, strategy=strategy)
    assert list(placement.device_map.values()) == devices
    assert placement.window_bytes == window
    assert all(size <= dict(placement.budget)[key] for key, size in placement.bytes_on.items())


def test_bytes_and_transfer_are_predicted():
    model = Net([10] * 9, embed=7, head=7, tied=True, buffer=3)
    placement = placement_for(model, {C0: 60, CPU: 20, DISK: 100})
    # 60 - 3 - 20 = 37: the tied 7 bytes, and three blocks.
    assert placement.bytes_on == {C0: 40, CPU: 20, DISK: 40}
    assert placement.transfer_bytes == {CPU: 20, DISK: 40}
    assert placement.window_bytes == 20
    text = str(placement)
    assert "head      cuda:0    7 B, tied to embed" in text
    assert "read from disk in each forward: 40 B" in text


def test_a_dtype_changes_the_bytes_of_floating_point_weights():
    model = nn.Sequential(nn.Linear(10, 1, bias=False), nn.Linear(10, 1, bias=False))
    halved = placement_for(model, {CPU: 40}, dtype=torch.bfloat16)
    assert halved.bytes_on == {CPU: 40}
    assert placement_for(model, {CPU: 80}).bytes_on == {CPU: 80}


def test_units_are_chosen_by_the_patterns_of_a_plan():
    model = nn.Sequential(Pair(), Pair())
    placement = placement_for(model, {CPU: 99}, plan=faccel.Plan(units="Pair"))
    assert list(placement.device_map) == ["0", "1"]


def test_a_model_on_meta_has_the_same_placement():
    with torch.device("meta"):
        model = Net(TENS, embed=30, head=30)
    assert placement_for(model, {CPU: 99, DISK: 99}) == placement_for(
        Net(TENS, embed=30, head=30), {CPU: 99, DISK: 99}
    )


def test_a_placement_can_be_edited_and_keeps_ties_together():
    model = Net([10] * 4, embed=30, head=30, tied=True)
    placement = placement_for(model, {C0: 100, CPU: 100}).with_device("head", "cpu")
    assert placement.device_map["embed"] == placement.device_map["head"] == "cpu"
    moved = placement.with_device("blocks.*", "cpu")
    assert set(moved.device_map.values()) == {"cpu"}
    assert placement_for(model, {C0: 100, CPU: 100}, strategy=moved.device_map) == moved
    with pytest.raises(ConfigError, match=r"no device `disk`"):
        placement.with_device("head", "disk")
    with pytest.raises(ConfigError, match=r"no unit matches `blocks\.9`"):
        placement.with_device("blocks.9", "cpu")
    with pytest.raises(ConfigError, match="`name` must be a str"):
        placement.with_device(["blocks.0"], "cpu")


TIED = Net([10], embed=30, head=30, tied=True)
MISTAKES = {
    "the largest unit, `embed`. Got 20 B": (Net(TENS, embed=30), {CPU: 20, DISK: 99}, BALANCED),
    "does not fit the budget": (Net(TENS), {CPU: 50}, BALANCED),
    '"disk": "100GB"': (Net(TENS), {CPU: 50}, BALANCED),
    "must be a mapping": (Net(TENS), "20GB", BALANCED),
    "unknown device": (Net(TENS), {"gpu:0": "20GB"}, BALANCED),
    "twice": (Net(TENS), {"cuda": 10, "cuda:0": 10}, BALANCED),
    "no device that computes": (Net(TENS), {DISK: 10}, BALANCED),
    "positive size": (Net(TENS), {CPU: "lots"}, BALANCED),
    "use `balanced`": (Net(TENS), {CPU: 99}, "balance"),
    "tied parameter is on two devices": (TIED, {C0: 99, CPU: 99}, {"": C0, "head": CPU}),
    "no device for the unit `blocks.0`": (Net(TENS), {CPU: 99}, {"blocks.1": CPU}),
    "names no unit `embed`": (Net(TENS), {CPU: 99}, {"": CPU, "embed": CPU}),
    "splits the unit `0`": (NoSplit(Pair()), {CPU: 99}, {"": CPU, "0.a": CPU}),
    "on a device without a budget": (Net(TENS), {CPU: 99}, {"": C0}),
    "do not fit its budget": (Net(TENS), {C0: 20, CPU: 99}, {"": C0}),
    "to run the largest unit": (Net(TENS), {C0: 25, CPU: 99}, {"": C0, **{
        f"blocks.{i}": CPU for i in range(2, 6)}}),
    "cannot be offloaded": (Net(TENS, root=5), {CPU: 99, DISK: 99}, {"": DISK}),
}  # fmt: skip


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_named(message):
    model, budget, strategy = MISTAKES[message]
    with pytest.raises(ConfigError) as error:
        placement_for(model, budget, strategy=strategy)
    assert message in str(error.value)


def test_sizes_have_units():
    model = nn.Linear(1000, 250, bias=False)  # 1 MB
    assert placement_for(model, {CPU: "1MB"}).bytes_on == {CPU: 10**6}
    with pytest.raises(ConfigError, match=r"1\.00 MB"):
        placement_for(model, {CPU: "999KB", DISK: "1GB"})
    with pytest.raises(ModelError, match="must be"):
        placement_for("gpt2", {CPU: "1MB"})


def test_a_placement_is_a_value():
    placement = placement_for(Net(TENS), {CPU: 99})
    assert hash(placement) == hash(attrs.evolve(placement))
