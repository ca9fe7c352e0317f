"""Loading a part of a checkpoint: renamed entries, and the report of what did not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import attrs

from faccel.checkpoint.codec import Node, kind_of
from faccel.checkpoint.tensor_names import child_name
from faccel.errors import ConfigError, nearest, short_repr


@attrs.frozen
class LoadReport:
    """What `load(..., strict=False)` has left as it was; equal on every rank.

    Names are the keys that lead to an entry, joined by dots: `model.head.weight`.

    Args:
        missing: In the state and not in the checkpoint.
        unexpected: In a model, an optimizer or averages of the checkpoint and not in the state's.
        mismatched: In both, with another shape, or a dtype that cannot be cast to the model's.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()

    @classmethod
    def of_ranks(cls, reports: Sequence[LoadReport]) -> LoadReport:
        """Return the report of all ranks: those of a pipeline have parts of a model."""
        missing: set[str] = set()
        mismatched: set[str] = set()
        unexpected = set(reports[0].unexpected)
        for report in reports:
            missing |= set(report.missing)
            mismatched |= set(report.mismatched)
            unexpected &= set(report.unexpected)
        return cls(tuple(sorted(missing)), tuple(sorted(unexpected)), tuple(sorted(mismatched)))


class Renamed:
    """The node of a state with other names, and where its tensors are in the files.

    Args:
        node: The node that was saved.
        rename: New names by old ones, both as keys joined by dots. A name stands for all below it.

    Raises:
        ConfigError: A name is not in the checkpoint, or the new one is in another place.
    """

    def __init__(self, node: Node, rename: Mapping[str, str]) -> None:
        self.node = node
        self._stored_paths: dict[str, str] = {}
        for old, new in rename.items():
            self.node = self._renamed(self.node, "", old, new, full=(old, new))
        self.current_names: Mapping[str, str] = {}
        if rename:
            self.current_names = _module_entries(self.node, "", self.stored_path)

    def stored_path(self, path: str) -> str:
        """Return the name in the files of what has the name `path` in the state."""
        if not self._stored_paths:
            return path
        suffix = ""
        parent = path
        while parent:
            if parent in self._stored_paths:
                return self._stored_paths[parent] + suffix
            parent, _, key = parent.rpartition("/")
            suffix = f"/{key}{suffix}"
        return path

    def _renamed(self, node: Node, path: str, old: str, new: str, full: tuple[str, str]) -> Node:
        """Return `node` with what is called `old` inside of it called `new`."""
        if kind_of(node) == "module":
            return node | {"v": self._renamed_entries(node["v"], path, old, new, full)}
        if kind_of(node) != "dict" or "!" in node:
            raise _unknown(full, [])
        for key, child in node.items():
            is_module = kind_of(child) == "module"
            if old == key and not (is_module and new.startswith(f"{key}.")):
                if "." in new or new in node:
                    raise _unknown(full, node, "another key of the same dict")
                self._move(child_name(path, key), child_name(path, new))
                return {new if name == key else name: value for name, value in node.items()}
            if old == key or old.startswith(f"{key}."):
                if new != key and not new.startswith(f"{key}."):
                    raise _unknown(full, node, f"a name below `{key}`")
                inner_old, inner_new = old[len(key) + 1 :], new[len(key) + 1 :]
                child_path = child_name(path, key)
                renamed = self._renamed(child, child_path, inner_old, inner_new, full)
                return node | {key: renamed}
        raise _unknown(full, node)

    def _renamed_entries(
        self, entries: Mapping[str, Node], path: str, old: str, new: str, full: tuple[str, str]
    ) -> dict[str, Node]:
        """Return the entries of a module with another prefix; an empty one stands for all."""
        renamed: dict[str, Node] = {}
        for name, entry in entries.items():
            current = name
            if not old or name == old or name.startswith(f"{old}."):
                rest = name[len(old) :].removeprefix(".")
                current = f"{new}.{rest}".strip(".")
                self._move(child_name(path, name), child_name(path, current))
            if current in renamed:
                raise _unknown(full, entries, "names that no other entry has")
            renamed[current] = entry
        if renamed.keys() == entries.keys():
            raise _unknown(full, entries)
        return renamed

    def _move(self, old_path: str, new_path: str) -> None:
        self._stored_paths[new_path] = self.stored_path(old_path)


def _unknown(
    names: tuple[str, str], known: Mapping[str, Node] | list[str], must_be: str = ""
) -> ConfigError:
    old, new = names
    if must_be:
        return ConfigError(
            f"`rename` must name {must_be}",
            got=f"rename={{{short_repr(old)}: {short_repr(new)}}}",
            fix="change the name",
        )
    return ConfigError(
        "`rename` has a name that is not in the checkpoint",
        got=short_repr(old),
        fix=nearest(old.rpartition(".")[2], [str(key) for key in known]),
    )


def _module_entries(node: Node, path: str, stored_path: Callable[[str], str]) -> dict[str, str]:
    """Return the current path of each entry of a module that has another one in the files."""
    current: dict[str, str] = {}
    kind = kind_of(node)
    if kind == "module":
        node = node["v"]
    elif kind != "dict" or "!" in node:
        return current
    for key, child in node.items():
        child_path = child_name(path, key)
        if kind == "module":
            stored = stored_path(child_path)
            if stored != child_path:
                current[stored] = child_path
        else:
            current |= _module_entries(child, child_path, stored_path)
    return current
