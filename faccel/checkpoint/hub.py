"""`push_to_hub`: an exported model as a commit of a repository on the Hugging Face Hub."""

from __future__ import annotations

import os

from faccel.checkpoint.arguments import folder_argument
from faccel.checkpoint.export import INDEX_FILES, WEIGHTS_FILES
from faccel.checks import instance_of
from faccel.context import DistContext, require_context
from faccel.effects import AMBIENT, effectful
from faccel.errors import CheckpointError, summary

# Weights of an earlier export in the repository. The Hub keeps the files that the commit has.
_STALE_FILES = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model*.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "adapter_model.safetensors",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
)
_ADAPTER_FILE = "adapter_model.safetensors"


@effectful(AMBIENT)
def push_to_hub(
    path: str | os.PathLike[str],
    repo_id: str,
    ctx: DistContext,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Upload a model",
    token: str | None = None,
) -> str | None:
    """Upload a folder of `export_model` to the Hugging Face Hub, as one commit.

    Effects: ambient. Rank 0 uploads; the other ranks return at once, and do not wait. The
    repository is created if it does not exist. Weights of an earlier export are deleted from it in
    the same commit, so that a reader never gets files of two exports. Needs `huggingface_hub`,
    which `pip install "faccel[hf]"` installs.

    Args:
        path: The folder. All of its files are uploaded.
        repo_id: The repository, such as `"user/model"`.
        ctx: The context.
        private: Whether a new repository is private; None is the default of the account.
        revision: The branch, which must exist; None is the main one.
        message: The message of the commit.
        token: The access token; None takes the one of `hf auth login`, or `HF_TOKEN`.

    Returns:
        The address of the commit on rank 0, None on the other ranks.

    Raises:
        CheckpointError: `huggingface_hub` is not installed, the folder has no weights, or the Hub
            does not accept the upload. The repository then has the files of before.
        ConfigError: `repo_id` is not a text, or `path` is not a local path.

    Examples:
        >>> from faccel.testing import fake_context
        >>> push_to_hub("runs/export", "user/model", fake_context(1, 2))  # not rank 0
    """
    call = 'faccel.checkpoint.push_to_hub("runs/export", "user/model", ctx)'
    require_context(ctx, call)
    instance_of("repo_id", repo_id, str, fix=f"write `{call}`")
    folder = folder_argument(path)
    if not ctx.is_main:
        return None
    _check_weights(folder)
    try:
        # Imported here: `import faccel` loads no package of an extra.
        from huggingface_hub import HfApi
    except ImportError:
        raise CheckpointError(
            "`push_to_hub` needs the package huggingface_hub",
            got="it is not installed",
            fix='run `pip install "faccel[hf]"`',
        ) from None
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            delete_patterns=list(_STALE_FILES),
        )
    except Exception as error:  # also those of its HTTP library, another one in each version
        raise CheckpointError(
            f"the Hub did not accept the upload to `{repo_id}`",
            got=summary(error),
            fix="check the name and the network; `hf auth login` stores a token that may write",
        ) from error
    return commit.commit_url


def _check_weights(folder: str) -> None:
    """Raise for a folder that `export_model` has not written."""
    try:
        names = os.listdir(folder)
    except OSError as error:
        names = []
        got = f"{type(error).__name__}: {error.strerror}"
    else:
        got = f"{len(names)} files, none of them {WEIGHTS_FILES[0]}"
    if not {*WEIGHTS_FILES, *INDEX_FILES, _ADAPTER_FILE}.intersection(names):
        raise CheckpointError(
            f"`{folder}` has no exported model",
            got=got,
            fix="write it first: `faccel.checkpoint.export_model(model, path, ctx)`",
        )
