import random

import numpy as np
import pytest
import torch

from faccel.random.generators import Generators, seed_all, seeded, under, watched


def draws(_=None):
    return torch.rand(()).item(), random.random(), np.random.rand()


def test_seeded_calls_repeat_and_depend_on_the_seed_alone():
    first = seeded(draws, None, 5)
    draws()
    assert seeded(draws, None, 5) == first != seeded(draws, None, 6)


@pytest.mark.parametrize("between", [0, 1, 2, 623, 624, 625, 1500])
def test_the_processes_own_go_on_as_if_nothing_had_happened(between):
    seed_all(3)
    expected = [
        [random.getrandbits(32) for _ in range(between)] + [random.gauss(0, 1), draws()]
        for _ in range(4)
    ]
    seed_all(3)
    got = []
    for number in range(4):
        seeded(draws, None, number)
        seeded(draws, None, number)
        got.append([random.getrandbits(32) for _ in range(between)] + [random.gauss(0, 1), draws()])
    assert got == expected


@pytest.mark.parametrize(
    "draw",
    [
        lambda _: torch.rand(1),
        lambda _: random.random(),
        lambda _: np.random.rand(),
        lambda _: np.random.seed(0),
    ],
)
def test_watching_sees_whoever_draws_and_leaves_nothing_behind(draw):
    seed_all(3)
    expected = [draws() for _ in range(4)]
    seed_all(3)
    got = []
    for number in range(4):
        assert watched(lambda x: x + 1, number) == (number + 1, False)
        assert watched(draw, None)[1]
        assert watched(lambda x: x, number) == (number, False)
        got.append(draws())
    assert got == expected


def test_the_second_of_a_pair_of_normals_comes_once():
    seed_all(3)
    expected = [random.gauss(0, 1) for _ in range(6)]
    seed_all(3)
    got = []
    for number in range(6):
        seeded(draws, None, number)
        got.append(random.gauss(0, 1))
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
