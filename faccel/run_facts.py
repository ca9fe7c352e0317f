"""What the folder of a run stores about its start: configuration, command and versions."""

from __future__ import annotations

import platform
import re
import sys
import time

import torch

from faccel.config import Config, config_fields, text_of

# Names of hyperparameters have dots between their parts.
_SECRET = re.compile(
    r"(^|[._-])((api|access|secret|private)[_-]?keys?|secrets?|passwords?|passwd|token|auth"
    r"|credentials?)(\.|$)",
    re.I,
)
# The password of a URL, as of a database.
_URL_PASSWORD = re.compile(r"(://[^/:@\s]*:)[^/@\s]+(?=@)")
HIDDEN = "(hidden)"


def run_facts(config: Config) -> dict[str, object]:
    """Return the facts of this process, as JSON.

    Effects: ambient. Reads the arguments of the process and the clock.

    Examples:
        >>> from faccel.config_sources import resolve
        >>> run_facts(resolve(env={"FACCEL_SEED": "7"}))["fields"]["seed"]
        {'value': '7', 'source': 'environment FACCEL_SEED, over default 0'}
    """
    fields: dict[str, dict[str, str]] = {}
    for field in config_fields():
        value = text_of(getattr(config, field.name))
        # As in `Config.explain`: without `resolve` all fields are arguments.
        fields[field.name] = {"value": value, "source": config.sources.get(field.name, "argument")}
    return {
        "time_s": time.time(),
        "command": without_secrets(sys.argv),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        "fields": fields,
    }


def is_secret(name: str) -> bool:
    """Return whether the value of a name must not be in a report, which people send to others.

    Effects: pure.

    Examples:
        >>> is_secret("hf_token"), is_secret("--wandb-api-key"), is_secret("num_tokens")
        (True, True, False)
        >>> is_secret("tracker.api_key"), is_secret("credentials.user")
        (True, True)
    """
    return _SECRET.search(name) is not None


def without_passwords(text: str) -> str:
    """Return a text without the passwords of its URLs.

    Effects: pure.

    Examples:
        >>> without_passwords("postgresql://me:abc@host/runs")
        'postgresql://me:(hidden)@host/runs'
    """
    return _URL_PASSWORD.sub(rf"\1{HIDDEN}", text)


def without_secrets(words: list[str]) -> list[str]:
    """Return the words of a command without the values of secret flags.

    Effects: pure.

    Examples:
        >>> without_secrets(["train.py", "--hf-token", "abc", "--secret=x", "--lr", "1"])
        ['train.py', '--hf-token', '(hidden)', '--secret=(hidden)', '--lr', '1']
    """
    shown: list[str] = []
    is_value_hidden = False
    for word in words:
        flag, mark, _ = word.partition("=")
        is_flag = flag.startswith("-")
        # `--secret --lr 1`: the second flag is no value.
        if is_value_hidden and not is_flag:
            word = HIDDEN
        # Both forms of a flag with a value.
        if is_flag and is_secret(flag) and mark:
            word = f"{flag}={HIDDEN}"
        is_value_hidden = is_flag and is_secret(flag) and not mark
        shown.append(without_passwords(word))
    return shown
