"""`ctx.lifetime`: what is open in a context, and what its end waits for."""

import threading

import pytest

from faccel.lifetime import Lifetime


def test_close_calls_every_callback_once_newest_first():
    lifetime, calls = Lifetime(), []
    for number in range(3):
        lifetime.on_close(lambda number=number: calls.append(number))
    lifetime.close()
    lifetime.close()
    assert calls == [2, 1, 0]


def test_close_calls_every_callback_and_raises_the_first_error():
    lifetime, calls = Lifetime(), []

    def fail(message):
        calls.append(message)
        raise OSError(message)

    lifetime.on_close(lambda: calls.append("last"))
    lifetime.on_close(lambda: fail("second"))
    lifetime.on_close(lambda: fail("first"))
    with pytest.raises(OSError, match="first"):
        lifetime.close()
    assert calls == ["first", "second", "last"]


def test_a_cancelled_callback_is_not_called():
    class Save:
        def __call__(self):
            raise AssertionError

    lifetime, save = Lifetime(), Save()
    lifetime.on_close(save)
    lifetime.on_close(lambda: None)
    assert lifetime.callbacks(Save) == [save]
    lifetime.cancel(save)
    lifetime.cancel(save)
    assert lifetime.callbacks(Save) == []
    lifetime.close()


@pytest.mark.parametrize("name", ["join", "uneven_iteration"])
def test_contexts_nest_and_end_with_an_error(name):
    lifetime = Lifetime()
    mark = getattr(lifetime, name)
    with mark():
        with pytest.raises(KeyError), mark():
            raise KeyError
        assert getattr(lifetime, f"has_{name}")
    assert not getattr(lifetime, f"has_{name}")


def test_callbacks_of_many_threads_are_all_called():
    lifetime, calls = Lifetime(), []

    def register():
        for _ in range(200):
            lifetime.on_close(lambda: calls.append(1))

    threads = [threading.Thread(target=register) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lifetime.close()
    assert len(calls) == 800
