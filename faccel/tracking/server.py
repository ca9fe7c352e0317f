"""A check that a server answers, for libraries that repeat a request for minutes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from faccel.tracking import service

_TIMEOUT_S = 5.0
# A pause after a failed check, in durations of the check: waiting takes 1 % of the time at most.
_PAUSE = 100


class Server:
    """A server that is asked for a sign of life before a library sends something.

    Args:
        uri: Where it is, with `http://` or `https://`.
        path: A page that needs no account. Every answer is a sign of life, also an error.
        timeout_s: How long to wait for an answer.
        clock: Returns the time in seconds.
    """

    def __init__(
        self,
        uri: str,
        path: str,
        *,
        timeout_s: float = _TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = uri.rstrip("/") + path
        self._timeout_s = timeout_s
        self._clock = clock
        self._requests = service.import_service("requests", "mlflow", "mlflow")
        # One connection for all checks: a new one takes longer than the request.
        self._session = self._requests.Session()
        self._paused_until = 0.0
        self._reason = ""

    def require(self) -> None:
        """Raise if the server does not answer. After a failure, it is left alone for a while.

        Effects: ambient. Sends a request.

        Raises:
            ConnectionError: It does not answer, or did not a short time ago.
        """
        start = self._clock()
        if start < self._paused_until:
            raise ConnectionError(self._reason)
        try:
            self.ask()
        except ConnectionError as error:
            self._reason = str(error)
            end = self._clock()
            self._paused_until = end + _PAUSE * (end - start)
            raise

    def ask(self) -> None:
        """Raise if the server does not answer now.

        Effects: ambient. Sends a request.

        Raises:
            ConnectionError: It does not answer.
        """
        errors: Any = self._requests.exceptions
        try:
            self._get()
        except errors.SSLError:
            return  # it answers; the library may accept its certificate
        except errors.Timeout:
            reason = f"no answer in {self._timeout_s:g} s"
        except errors.ConnectionError as error:
            reason = str(_cause(error))
        else:
            return
        parts = urlsplit(self._url)
        # Without a name and password of the user.
        host = parts.netloc.rpartition("@")[2]
        raise ConnectionError(f"the server {host} is down: {reason}")

    def _get(self) -> None:
        errors: Any = self._requests.exceptions
        options = {"timeout": self._timeout_s, "allow_redirects": False}
        try:
            self._session.get(self._url, **options).close()
        except errors.Timeout:
            raise
        except errors.ConnectionError:
            # The server may have closed the connection while nothing was sent.
            self._session.get(self._url, **options).close()


def _cause(error: BaseException) -> BaseException:
    """Return the innermost error: the outer ones repeat its text and the whole URL."""
    while error.__context__ is not None:
        error = error.__context__
    return error
