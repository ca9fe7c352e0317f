import random

import numpy as np
import pytest
import torch

from faccel.generators import Generators, seed_all, seeded, under


def draws(_=None):
    return torch.rand(()).item(), random.random(), np.random.rand()


def test_seeded_calls_repeat_and_depend_on_the_seed_alone():
    first = seeded(draws, None, 5)
    draws()
    assert seeded(draws, None, 5) == first != seeded(draws, None, 6)


@pytest.mark.parametrize("between", [0, 1, 2, 623, 624, 625, 1500])
def test_the_processes_own_go_on_as_if_nothing_had_happened(between):
    seed_all(3)
    expected = [[random.getrandbits(32) for _ in range(between)] + [random.gauss(0, 1), draws()] for _ in range(4)]
    seed_all(3)
    got = []
    for number in range(4):
        seeded(draws, None, number)
        seeded(draws, None, number)
        got.append([random.getrandbits(32) for _ in range(between)] + [random.gauss(0, 1), draws()])
    assert got == expected


def test_they_are_put_back_after_an_error():
    seed_all(1)
    expected = draws()
    seed_all(1)
    with pytest.raises(ZeroDivisionError):
        seeded(lambda _: 1 / 0, None, 9)
    assert draws() == expected


def test_a_state_moves_on_under_it_and_the_own_stay():
    seed_all(1)
    expected = [draws(), draws()]
    seed_all(2)
    own = draws()
    seed_all(2)
    state = Generators.seeded(1)
    got = []
    for _ in range(2):
        with under(state):
            got.append(draws())
    assert got == expected
    assert draws() == own
