"""Settings of PyTorch for the whole process that the configuration asks for."""

from __future__ import annotations

import os

import attrs
import torch

from faccel.config import Config
from faccel.errors import ConfigError, short_text

# cuBLAS reads it at its first call: without it, its results depend on the streams.
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@attrs.frozen
class _Settings:
    matmul_precision: str
    is_deterministic: bool
    tunes_convolutions: bool
    workspace: str | None

    @classmethod
    def current(cls) -> _Settings:
        return cls(
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.benchmark,
            os.environ.get(_WORKSPACE),
        )

    # Each of them is one variable of the process, for all threads.
    def apply(self) -> None:
        torch.set_float32_matmul_precision(self.matmul_precision)
        torch.backends.cudnn.benchmark = self.tunes_convolutions
        # Only a change: the function imports the compiler, which takes a second.
        if torch.are_deterministic_algorithms_enabled() != self.is_deterministic:
            torch.use_deterministic_algorithms(self.is_deterministic)
        os.environ.pop(_WORKSPACE, None)
        if self.workspace is not None:
            os.environ[_WORKSPACE] = self.workspace


def _asked(config: Config) -> str | None:
    """Return the settings that a configuration has, as text; None if it has none."""
    if config.matmul_precision is None and not config.deterministic:
        return None
    return f"matmul_precision={config.matmul_precision}, deterministic={config.deterministic}"


class Numerics:
    """The settings before the first context that changes them, until the last one is closed."""

    def __init__(self) -> None:
        self._asked_by_key: dict[int, str] = {}
        self._before: _Settings | None = None

    def check(self, config: Config) -> None:
        """Raise if an open context has asked for other settings.

        Raises:
            ConfigError: They are settings of the process.
        """
        asked = _asked(config)
        for other in self._asked_by_key.values():
            if asked not in (None, other):
                raise ConfigError(
                    "`matmul_precision` and `deterministic` are settings of the process, and an "
                    "open context has others",
                    got=f"{short_text(asked)}, and {short_text(other)} before",
                    fix="call `faccel.shutdown(ctx)` of the other context first",
                )

    def install(self, key: int, config: Config) -> None:
        """Apply what the configuration of a context asks for, after `check`."""
        asked = _asked(config)
        if asked is None:
            return
        settings = _Settings.current()
        if self._before is None:
            self._before = settings
        self._asked_by_key[key] = asked
        if config.deterministic:
            # The user's value of the workspace stays: it may be smaller, for the memory.
            settings = attrs.evolve(
                settings,
                is_deterministic=True,
                tunes_convolutions=False,
                workspace=settings.workspace or ":4096:8",
            )
        if config.matmul_precision is not None:
            settings = attrs.evolve(settings, matmul_precision=config.matmul_precision)
        settings.apply()

    def uninstall(self, key: int) -> None:
        """Restore the settings, if this was the last context that had asked for some."""
        if self._asked_by_key.pop(key, None) is None or self._asked_by_key:
            return
        assert self._before is not None
        self._before.apply()
        self._before = None
