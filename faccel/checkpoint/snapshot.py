"""`Snapshot`: the attributes of objects, to undo a `load_state_dict` that has failed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from faccel.checkpoint.codec_modules import is_stateful
from faccel.tree import Tree


class Snapshot:
    """The attributes of objects with `load_state_dict`, and of such objects inside of them.

    It calls none of their methods and copies no tensor: it stores which values their attributes,
    dicts, lists and sets have. A tensor that is modified in place is not restored.

    Args:
        objects: What `load` is about to update, except models.
    """

    def __init__(self, objects: Iterable[object]) -> None:
        self._undos: list[Callable[[], None]] = []
        self._seen: dict[int, object] = {}  # with the objects, so that no id is used again
        pending = list(objects)
        # A list and not a recursion: objects refer to each other, as schedulers to optimizers.
        while pending:
            value = pending.pop()
            if id(value) not in self._seen:
                self._seen[id(value)] = value
                pending += self._store(value)

    def restore(self) -> None:
        """Give all objects the attributes that they had."""
        for undo in self._undos:
            undo()

    def _store(self, value: object) -> Iterable[object]:
        """Store the values inside of a container or an object; return them."""
        if isinstance(value, dict):
            return self._store_dict(value)
        if isinstance(value, list):
            items = list(value)
            self._undos.append(lambda: _set_items(value, items))
            return items
        if isinstance(value, set):
            members = set(value)
            self._undos.append(lambda: _set_members(value, members))
            return ()
        if isinstance(value, tuple):
            return value
        # The parameters of a module are modified in place: there is nothing to store.
        if is_stateful(value) and not isinstance(value, nn.Module) and hasattr(value, "__dict__"):
            return self._store_dict(vars(value))
        return ()

    def _store_dict(self, value: dict[Any, Tree]) -> Iterable[object]:
        entries = dict(value)
        self._undos.append(lambda: _set_entries(value, entries))
        return entries.values()


def _set_items(value: list[Tree], items: list[Tree]) -> None:
    value[:] = items


def _set_members(value: set[Tree], members: set[Tree]) -> None:
    value.clear()
    value.update(members)


def _set_entries(value: dict[Any, Tree], entries: dict[Any, Tree]) -> None:
    value.clear()
    value.update(entries)
