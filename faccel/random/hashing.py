"""Folding integers into a seed: the one hash behind data orders and random streams."""

from __future__ import annotations

_MASK = (1 << 64) - 1


def mix(seed: int, *ints: int) -> int:
    """Fold integers into a seed: a 64-bit number that looks unrelated for any change of any argument.

    Effects: pure. The finalizer of SplitMix64 (Steele, Lea, Flood 2014), chained.

    Examples:
        >>> mix(0, 1) == mix(0, 1), mix(0, 1) == mix(1, 0), mix(0, 1) == mix(0, 1, 0)
        (True, False, False)
    """
    state = seed & _MASK
    for value in (len(ints), *ints):
        state = (state + 0x9E3779B97F4A7C15 * ((value & _MASK) + 1)) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state
