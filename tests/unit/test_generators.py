"""`faccel.random.generators`: what it draws, and what it leaves of the process's generators."""

import random

import numpy as np
import pytest
import torch

import faccel
from faccel.random.generators import Generators, call_seeded, detect_draws, seed_all, using
from faccel.testing import simulate


def draws(_=None):
    return torch.rand(()).item(), random.random(), np.random.rand()


def test_seeded_calls_repeat_and_depend_on_the_seed_alone():
    first = call_seeded(draws, None, 5)
    draws()
    assert call_seeded(draws, None, 5) == first != call_seeded(draws, None, 6)


@pytest.mark.parametrize("between", [0, 1, 2, 623, 624, 625, 1500])
def test_the_draws_of_the_process_are_the_same_with_and_without_seeded_calls(between):
    seed_all(3)
    expected = [
        [random.getrandbits(32) for _ in range(between)] + [random.gauss(0, 1), draws()]
        for _ in range(4)
    ]
    seed_all(3)
    got = []
    for number in range(4):
        call_seeded(draws, None, number)
        call_seeded(draws, None, number)
        got.append([random.getrandbits(32) for _ in range(between)] + [random.gauss(0, 1), draws()])
    assert got == expected


def test_seeded_calls_between_draws_of_every_kind_change_no_draw():
    kinds = (
        random.random,
        lambda: random.gauss(0, 1),
        lambda: random.getrandbits(32),
        lambda: random.sample(range(10), 3),
        lambda: random.seed(7),
        lambda: None,
    )

    def stream(with_calls):
        random.seed(3)
        choice = random.Random(9)
        values = []
        for number in range(3000):
            if with_calls:
                call_seeded(draws, None, number)
            kind = choice.choice(kinds)
            if kind is not kinds[4] or number % 100 == 0:
                values.append(kind())
        return values

    assert stream(with_calls=True) == stream(with_calls=False)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.rand(1),
        lambda: random.random(),
        lambda: np.random.rand(),
        lambda: np.random.seed(0),
    ],
)
def test_a_draw_from_any_generator_is_detected_and_undone(draw):
    seed_all(3)
    expected = [draws() for _ in range(4)]
    seed_all(3)
    got = []
    for number in range(4):
        assert detect_draws(lambda value=number: value) == (number, False)
        assert detect_draws(draw)[1]
        assert detect_draws(lambda: None, torch_only=True) == (None, False)
        got.append(draws())
    assert got == expected


def test_the_second_of_a_pair_of_normals_is_drawn_once():
    seed_all(3)
    expected = [random.gauss(0, 1) for _ in range(6)]
    seed_all(3)
    got = []
    for number in range(6):
        call_seeded(draws, None, number)
        got.append(random.gauss(0, 1))
    assert got == expected


def test_generators_are_restored_after_an_error():
    seed_all(1)
    expected = draws()
    seed_all(1)
    with pytest.raises(ZeroDivisionError):
        call_seeded(lambda _: 1 / 0, None, 9)
    assert draws() == expected


def test_using_updates_the_state_and_restores_the_generators_of_the_process():
    seed_all(1)
    expected = [draws(), draws()]
    seed_all(2)
    process_draws = draws()
    seed_all(2)
    state = Generators.seeded(1)
    got = []
    for _ in range(2):
        with using(state):
            got.append(draws())
    assert got == expected
    assert draws() == process_draws


def test_seeded_calls_may_be_nested_and_overlap():
    outer = call_seeded(lambda _: (call_seeded(draws, None, 6), draws()), None, 5)
    assert outer == (call_seeded(draws, None, 6), call_seeded(draws, None, 5))


def test_seeded_calls_that_overlap_in_a_simulation_change_no_draw():
    def fn(ctx, with_calls):
        def body(_):
            draws()
            faccel.barrier(ctx)  # other ranks run now, inside their calls
            draws()

        values = []
        for number in range(6):
            if with_calls:
                call_seeded(body, None, number)
                call_seeded(body, None, number)
            values.append(draws())
        return values

    seed_all(1)
    expected = draws()
    seed_all(1)
    assert simulate(fn, 3, True) == simulate(fn, 3, False)
    call_seeded(draws, None, 2)
    assert draws() == expected


def test_a_draw_of_torch_is_detected_without_comparing_the_others():
    assert detect_draws(lambda: torch.rand(1).numel(), torch_only=True) == (1, True)
    assert detect_draws(lambda: random.getrandbits(1) * 0, torch_only=True) == (0, False)
