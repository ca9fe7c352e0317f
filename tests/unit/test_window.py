"""The window of offloaded units: what is read ahead, evicted and reused."""

import threading

import pytest
import torch

from faccel.errors import ModelError
from faccel.inference.copies import DirectCopies
from faccel.inference.use_order import UseOrder
from faccel.inference.window import OffloadedUnit, Window

COPIES = DirectCopies(torch.device("cpu"))


class Source:
    """Fills the parameters of a unit with a number, and counts."""

    def __init__(self, value):
        self.value, self.num_reads, self.began = value, 0, threading.Event()

    def read(self, tensors):
        self.num_reads += 1
        for tensor in tensors:
            tensor.fill_(self.value)
        self.began.set()


def window(names, capacity, sizes=None):
    sources = {name: Source(ord(name)) for name in names}
    sizes = sizes or dict.fromkeys(names, 64)
    units = {
        name: OffloadedUnit([torch.Size([sizes[name]])], [torch.uint8], source)
        for name, source in sources.items()
    }
    return Window(units, capacity, COPIES), sources


def use(windows, names):
    for name in names:
        (param,) = windows.acquire(name)
        assert param.unique().tolist() == [ord(name)]
        windows.release(name)


def test_the_next_unit_is_read_while_one_is_in_use():
    windows, sources = window("abc", 128)
    windows.acquire("a")
    assert sources["b"].began.wait(timeout=60)  # `a` is still in use
    assert sources["c"].num_reads == 0  # there is no room for a third one
    windows.close()


def test_the_order_is_learned_from_the_previous_pass():
    windows, sources = window("abc", 128)
    use(windows, "cba" * 3)
    windows.acquire("c")
    windows.close()  # waits for the reads
    # Each pass reads each unit once, and the first pass may have read ahead in another order.
    assert [source.num_reads for source in sources.values()] <= [4, 6, 4]
    order = UseOrder("abc")
    for name in "cbac":
        order.use(name)
    assert list(order.upcoming()) == ["b", "a"]
    assert order.distances() == {"c": 0, "b": 1, "a": 2}


def test_a_unit_that_is_expected_sooner_stays():
    windows, sources = window("abcd", 192)
    use(windows, "ababab")
    windows.close()
    # After the first `b`, the next one is `a`: of the others one makes room, not `b`.
    assert sources["b"].num_reads == 1
    assert sources["a"].num_reads == 2


def test_all_units_stay_if_there_is_room():
    windows, sources = window("abc", 192)
    use(windows, "abc" * 5 + "cab")
    assert [source.num_reads for source in sources.values()] == [1, 1, 1]
    assert windows.num_read == 3


@pytest.mark.parametrize("capacity", [192, 256, 320])
def test_units_of_different_sizes_never_exceed_the_capacity(capacity):
    sizes = {"a": 64, "b": 192, "c": 128, "d": 1}
    windows, _ = window("abcd", capacity, sizes)
    for name in "abcd" * 3 + "dcba" * 2 + "bbdd":
        use(windows, name)
        assert windows.num_allocated() <= capacity
    windows.close()
    assert windows.num_allocated() == 0


def test_units_that_do_not_fit_together_are_an_error():
    windows, _ = window("ab", 100)
    windows.acquire("a")
    with pytest.raises(ModelError, match=r"no room is left for the unit `b`.*100 B"):
        windows.acquire("b")
    windows.close()


class Failing:
    def read(self, tensors):
        raise OSError("the disk is gone")


def test_a_read_that_fails_raises_where_the_unit_is_used_and_is_tried_again():
    units = {"a": OffloadedUnit([torch.Size([4])], [torch.float32], Failing())}
    windows = Window(units, 64, COPIES)
    for _ in range(2):
        with pytest.raises(OSError, match="gone"):
            windows.acquire("a")
        windows.release("a")
    assert windows.num_read == 2


class Stream(DirectCopies):
    """Copies on a pretended stream; a point in time is the number of computations before it."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.num_computed, self.last_use, self.ready = 0, {}, set()
        self.began, self.too_early = 0, []

    def mark(self):
        return self.num_computed

    def fill(self, mark, read):
        self.began = mark
        return read()

    def wait(self, end):
        self.ready.add(end)

    def write(self, name, address):
        """Record that a buffer is overwritten after the computations before `began` only."""
        if self.last_use.get(address, 0) > self.began:
            self.too_early.append(name)
        self.ready.discard((name, address))

    def compute(self, name, address):
        assert (name, address) in self.ready, "computes before its copies have ended"
        self.num_computed += 1
        self.last_use[address] = self.num_computed


class StreamSource(Source):
    def __init__(self, name, copies):
        super().__init__(ord(name))
        self.name, self.copies = name, copies

    def read(self, tensors):
        super().read(tensors)
        end = (self.name, tensors[0].data_ptr())
        self.copies.write(*end)
        return end


@pytest.mark.parametrize("capacity", [64, 128, 192])
def test_a_buffer_is_filled_after_its_computation_and_computes_after_its_copies(capacity):
    copies = Stream()
    units = {}
    for name in "abcde":
        source = StreamSource(name, copies)
        units[name] = OffloadedUnit([torch.Size([64])], [torch.uint8], source)
    windows = Window(units, capacity, copies)
    for name in "abcde" * 3 + "edcba" * 2 + "aabb":
        (param,) = windows.acquire(name)
        copies.compute(name, param.data_ptr())
        windows.release(name)
    windows.close()
    assert copies.num_computed == 29
    assert copies.too_early == []
    # Buffers are reused, else nothing was tested.
    assert len(copies.last_use) <= capacity // 64
