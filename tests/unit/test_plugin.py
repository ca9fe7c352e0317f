import subprocess
import sys


def run(tmp_path, source):
    (tmp_path / "test_it.py").write_text("import pytest\n" + source)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        str(tmp_path),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path).stdout


def test_a_marked_test_fails_in_the_world_in_which_it_fails(tmp_path):
    out = run(
        tmp_path, "@pytest.mark.world_size(1, 2)\ndef test_a(ctx): assert ctx.world_size == 1\n"
    )
    assert "1 failed, 1 passed" in out
    assert "test_a[world2]" in out


def test_a_marked_test_that_could_not_fail_is_an_error(tmp_path):
    for source in (
        "@pytest.mark.world_size(2)\ndef test_a(): pass\n",
        "@pytest.mark.world_size()\ndef test_a(ctx): pass\n",
        "@pytest.mark.world_size([1, 2])\ndef test_a(ctx): pass\n",
    ):
        out = run(tmp_path, source)
        assert "takes `ctx`" in out
        assert "passed" not in out
