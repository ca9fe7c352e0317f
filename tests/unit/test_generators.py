"""`faccel.random.generators`: what it draws, and what it leaves of the process's generators."""

import random

import numpy as np
import pytest
import torch

import faccel
from faccel.random.generators import (
    Generators,
    call_seeded,
    call_watched,
    detect_draws,
    seed_all,
    using,
)
from faccel.testing import fake_context, simulate


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


@pytest.mark.parametrize(
    "draw",
    [
        lambda _: torch.rand(1),
        lambda _: random.random(),
        lambda _: random.gauss(0, 1),
        lambda _: random.seed(5),
        lambda _: np.random.rand(),
        lambda _: np.random.seed(5),
        lambda _: call_seeded(draws, None, 5) and random.random(),
    ],
)
def test_a_watched_call_detects_every_draw_and_changes_no_draw_of_the_process(draw):
    seed_all(3)
    expected = [(random.gauss(0, 1), draws()) for _ in range(4)]
    seed_all(3)
    got = []
    for number in range(4):
        gauss = random.gauss(0, 1)  # the second one of a pair is stored at odd numbers
        assert call_watched(lambda value: value, number) == (number, False)
        assert call_watched(draw, None)[1]
        assert call_watched(draw, None)[1]
        call_watched(lambda _: call_seeded(draws, None, 5), None)
        got.append((gauss, draws()))
    assert got == expected


def test_a_watched_call_that_raises_restores_the_generators():
    seed_all(1)
    expected = draws()
    seed_all(1)
    with pytest.raises(ZeroDivisionError):
        call_watched(lambda _: draws() and 1 / 0, None)
    assert call_watched(lambda _: 2, None) == (2, False)
    assert draws() == expected


class _Drawing(torch.utils.data.Dataset):
    """Counts reads; draws from item `first_draw` on."""

    def __init__(self, first_draw):
        self.first_draw = first_draw
        self.num_reads = []

    def __len__(self):
        return 8

    def __getitem__(self, index):
        self.num_reads.append(index)
        if index >= self.first_draw:
            return index + random.random() + np.random.rand() + torch.rand(()).item()
        return float(index)


@pytest.mark.parametrize("first_draw", [0, 4, 8])
def test_a_dataset_that_draws_is_reproducible_and_read_once(first_draw):
    def read(seed_of_process):
        seed_all(seed_of_process)
        dataset = _Drawing(first_draw)
        loader = faccel.shard(torch.utils.data.DataLoader(dataset, 2), fake_context(0, 1))
        first = torch.cat(list(loader))
        second = torch.cat(list(loader.at(0, step=2)))
        return first, second, dataset.num_reads, draws()

    (first, second, num_reads, after), (again, _, _, _) = read(1), read(2)
    seed_all(1)
    assert after == draws()
    assert torch.equal(first, again)
    assert torch.equal(first[4:], second)
    # The batch that drew although the batches before it did not is read again, once.
    repeated = [4, 5] if first_draw == 4 else []
    assert sorted(num_reads) == sorted([*range(8), *range(4, 8), *repeated])


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
