"""Scripts with the calls of Accelerate's examples train the same after `faccel migrate`."""

import json
import pathlib
import subprocess
import sys

import pytest

from faccel.migration.rewrite import migrate_script

pytest.importorskip("accelerate")
FOLDER = pathlib.Path(__file__).parent / "scripts"
ROOT = FOLDER.parents[2]
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py"))
# Scripts with a call that has no equal, which has a note.
UNCONVERTED = {"local_sgd.py": 1, "profiler.py": 2}


def start(folder):
    """Run all scripts of a folder in one process, so that torch is imported once."""
    command = [sys.executable, "-m", "tests.migration.run_scripts", str(folder), *SCRIPTS]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def results(process):
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    return json.loads(out)


@pytest.mark.slow
def test_what_is_not_converted_has_a_note_before_its_line():
    for name in SCRIPTS:
        migration = migrate_script((FOLDER / name).read_bytes())
        code = migration.code.decode()
        assert migration.unconverted == UNCONVERTED.get(name, 0)
        assert code.count("# faccel: not converted: ") == migration.unconverted
        compile(code, name, "exec")


def test_at_least_80_percent_are_converted_completely():
    assert len(SCRIPTS) >= 20
    assert 1 - len(UNCONVERTED) / len(SCRIPTS) >= 0.8


@pytest.mark.slow
def test_a_migrated_script_reaches_the_losses_that_it_reaches_under_accelerate(tmp_path):
    for name in SCRIPTS:
        (tmp_path / name).write_bytes(migrate_script((FOLDER / name).read_bytes()).code)
    processes = start(FOLDER), start(tmp_path)  # both at once
    originals, migrated = map(results, processes)
    for name in SCRIPTS:
        assert "error" not in originals[name], originals[name]["error"]
        assert len(originals[name]["numbers"]) > 2
        if name in UNCONVERTED:  # fails at the call with the note
            assert "AttributeError: 'DistContext'" in migrated[name]["error"]
            continue
        assert "error" not in migrated[name], migrated[name]["error"]
        expected = pytest.approx(originals[name]["numbers"], rel=1e-5, abs=1e-7)
        assert migrated[name]["numbers"] == expected, name
