"""A YAML parser with a limit on what a small text can expand to."""

from __future__ import annotations

import yaml

from faccel.unique_keys import duplicate_key

MAX_VALUES = 20_000
"""The largest number of values of a file, each alias counted as a copy."""

_MAX_DEPTH = 50  # PyYAML's time is quadratic in the depth


class TooManyValuesError(yaml.YAMLError):
    """A text has too many values, or a value that contains itself."""


class _BoundedLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which also counts values and refuses a key that occurs twice.

    A text of 400 bytes can have 10^9 values: lists of aliases of lists of aliases. PyYAML
    represents them without copies, but merge keys, comparisons and messages visit each of them.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        # The number of values below a node, by the identity of the node. All nodes stay alive,
        # because they are parts of the document.
        self._num_values: dict[int, int] = {}
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Return the next node. For an alias it is the node of its anchor, counted already."""
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise TooManyValuesError("values are nested too deeply")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None or id(node) in self._num_values:
            return node
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
        num_values = 1
        for child in _children(node):
            # Parents are counted after their children: without a count, a child is its ancestor.
            if id(child) not in self._num_values:
                raise TooManyValuesError("a value contains itself")
            num_values += self._num_values[id(child)]
        self._num_values[id(node)] = num_values
        # the second, because a parent of many nodes is counted last
        if max(num_values, len(self._num_values)) > MAX_VALUES:
            raise TooManyValuesError(f"more than {MAX_VALUES:,} values, each alias counted")
        return node


def _check_keys(mapping: yaml.MappingNode) -> None:
    """Raise if a key occurs twice: YAML forbids it, but PyYAML takes the last value."""
    lines: dict[str, int] = {}
    for key, _ in mapping.value:
        # A list as a key is refused later, and `<<` merges a mapping.
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        # As text: `1` and `"1"` are one key of a configuration.
        line = key.start_mark.line + 1
        if key.value in lines:
            raise duplicate_key(key.value, [lines[key.value], line])
        lines[key.value] = line


def _children(node: yaml.Node) -> list[yaml.Node]:
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = list(node.value)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            children += [key, value]
    return children


def load(text: str) -> object:
    """Return the document of a text, which can contain plain values only.

    Effects: pure.

    Raises:
        yaml.YAMLError: The text is invalid or has too many values.
        ConfigError: A mapping has a key twice; names its lines.

    Examples:
        >>> load("seed: 3")
        {'seed': 3}
    """
    # `yaml.load` with another loader would construct any Python object that the text names.
    loader = _BoundedLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()
