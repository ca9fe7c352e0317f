"""The units of a plan that names none: a parameter that modules share is in one unit."""

from torch import nn

import faccel
from faccel.parallel.units import units_of


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner()
        self.linear = nn.Linear(2, 2)


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)


class Net(nn.Module):
    _no_split_modules = ("Block", "Inner", "Embedding")

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(4, 2)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(2, 4, bias=False)


def names(net):
    return set(units_of(net, faccel.Plan()))


BLOCKS = {"blocks.0", "blocks.1", "blocks.0.inner", "blocks.1.inner"}


def test_nothing_is_left_out_of_a_model_without_tied_parameters():
    assert names(Net()) == {"embedding", *BLOCKS}


def test_a_unit_that_shares_a_parameter_with_the_root_is_left_out():
    net = Net()
    net.head.weight = net.embedding.weight
    assert names(net) == BLOCKS


def test_a_parameter_of_a_unit_inside_of_a_unit_goes_to_the_outer_one():
    net = Net()
    net.blocks[0].inner.linear.weight = net.blocks[0].linear.weight
    assert names(net) >= {"embedding", "blocks.1", "blocks.1.inner"}
    assert "blocks.0.inner" not in names(net)


def test_a_parameter_of_two_blocks_goes_to_the_root():
    net = Net()
    net.blocks[0].linear.weight = net.blocks[1].linear.weight
    assert names(net) == {"embedding", "blocks.0.inner", "blocks.1.inner"}
