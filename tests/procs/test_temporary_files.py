"""Where a launch of a function puts temporary files: no other user reads or replaces them."""

import os
import sys
import tempfile

import pytest

import faccel
from faccel.errors import RankFailedError
from tests.ranks import SERVER


def failing(ctx, folder):
    raise ValueError("of a rank")


def working(ctx, folder):
    """Return where this rank puts temporary files, and what is in the folder for them."""
    return tempfile.gettempdir(), os.listdir(folder)


def record_names(event, arguments):
    """Record the files that this process opens or creates."""
    if event in ("open", "tempfile.mkstemp", "tempfile.mkdtemp"):
        PATHS.append(str(arguments[0]))


PATHS = []


def run(pipe, folder, launch, fn):
    tempfile.tempdir = folder
    sys.addaudithook(record_names)
    result = None
    try:
        result = launch(fn, folder, num_processes=2)
    except RankFailedError as error:
        result = error.got
    pipe.send((result, PATHS, tempfile.tempdir))


@pytest.mark.parametrize(
    ("launch", "fn"),
    [
        (faccel.notebook_launch, failing),
        pytest.param(faccel.notebook_launch, working, marks=pytest.mark.slow),
        pytest.param(faccel.launch, failing, marks=pytest.mark.slow),
        pytest.param(faccel.launch, working, marks=pytest.mark.slow),
    ],
)
def test_the_temporary_files_of_a_launch_are_in_its_private_folder(tmp_path, launch, fn):
    folder = str(tmp_path)
    receiver, sender = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=run, args=(sender, folder, launch, fn))
    process.start()
    sender.close()
    result, paths, temporary = receiver.recv()
    process.join()
    # The launcher opened files in its private folder, and none beside it.
    inside = [os.path.relpath(path, folder) for path in paths if path.startswith(folder + os.sep)]
    assert any("pytorch-errorfile" in name for name in inside), paths
    assert [name for name in inside if not name.startswith("faccel-launch-")] == []
    assert os.listdir(folder) == []
    assert temporary == folder  # of the script, as before
    if fn is working:
        assert [where for where, _ in result] == [folder] * 2
        for _, names in result:
            assert len(names) == 1 and names[0].startswith("faccel-launch-")
    else:
        assert "ValueError: of a rank" in result
