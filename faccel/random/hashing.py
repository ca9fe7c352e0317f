"""The hash that folds integers into a seed, for data orders and random streams."""

from __future__ import annotations

_MASK = (1 << 64) - 1  # arithmetic modulo 2^64


def mix(seed: int, *ints: int) -> int:
    """Fold integers into a seed: a 64-bit number that changes with each argument and their order.

    Effects: pure. The finalizer of SplitMix64, chained. Steele, Lea, Flood: Fast splittable
    pseudorandom number generators, 2014.

    Examples:
        >>> mix(0, 1) == mix(0, 1), mix(0, 1) == mix(1, 0), mix(0, 1) == mix(0, 1, 0)
        (True, False, False)
    """
    state = seed & _MASK
    # Starts with the number of ints: otherwise `mix(0)` would be a prefix of `mix(0, 1)`.
    for value in (len(ints), *ints):
        # 0x9E37... is 2^64 divided by the golden ratio, an odd number.
        state = (state + 0x9E3779B97F4A7C15 * ((value & _MASK) + 1)) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state
