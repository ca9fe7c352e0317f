"""What the loads of a run have learned from hashes, so that no valid checkpoint is deleted."""

from __future__ import annotations

from faccel.context import DistContext


class VerifiedFolders:
    """For each checkpoint whose hashes this run has compared, whether it was valid.

    It is registered in the lifetime of the context, which it does not outlive.
    """

    def __init__(self) -> None:
        self._is_valid: dict[str, bool] = {}

    def __call__(self) -> None:
        """Do nothing: at the end of the context there is nothing to close."""

    @classmethod
    def of(cls, ctx: DistContext) -> VerifiedFolders:
        """Return those of a context. Updates its lifetime at the first call."""
        for folders in ctx.lifetime.callbacks(cls):
            return folders
        folders = cls()
        ctx.lifetime.on_close(folders)
        return folders

    def record(self, folder: str, *, is_valid: bool) -> None:
        """Store the result of a comparison."""
        self._is_valid[folder] = is_valid

    def forget(self, folder: str) -> None:
        """Drop the result of a folder that was written anew."""
        self._is_valid.pop(folder, None)

    def is_valid(self, folder: str) -> bool:
        """Return whether its hashes were compared and are right."""
        return self._is_valid.get(folder, False)

    def is_corrupt(self, folder: str) -> bool:
        """Return whether its hashes were compared and are wrong."""
        return not self._is_valid.get(folder, True)
