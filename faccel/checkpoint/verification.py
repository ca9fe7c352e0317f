"""What is wrong with a checkpoint beyond its manifest: the hashes, the nodes, the slices."""

from __future__ import annotations

from faccel.checkpoint.headers import check_slices, read_slices
from faccel.checkpoint.manifest import Manifest, check_hash, read_manifest
from faccel.checkpoint.node_checks import check_nodes
from faccel.errors import short_text


def first_problem(folder: str) -> str | None:
    """Return what is wrong with a checkpoint; None if it can be loaded into a state that fits.

    Effects: ambient. Reads all files.
    """
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return str(error)
    for entry in manifest.files:
        problem = check_hash(folder, entry)
        if problem is not None:
            return problem
    return content_problem(folder, manifest)


def content_problem(folder: str, manifest: Manifest) -> str | None:
    """Return what is wrong with the content of files whose hashes are right; None if it is valid.

    Effects: ambient. Reads the headers of all files.
    """
    # A hash shows that a disk has changed a byte. It does not show who wrote the file: a manifest
    # can be written again without a file, or by hand.
    try:
        slices = read_slices(folder, manifest.file_names)
        check_slices(slices)
        missing = check_nodes(manifest.state) - {piece.key for piece in slices}
    except ValueError as error:
        return str(error)
    if missing:
        return f"the tensor `{short_text(min(missing))}` is in no file"
    return None
