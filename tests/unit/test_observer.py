"""The observer of a rank in this process: what it writes, answers, and leaves."""

import gc
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time

import attrs
import pytest

import faccel
from faccel.errors import ConfigError
from faccel.observe.ask import ask
from faccel.observe.rank_file import FOLDER, rank_path
from faccel.observe.socket_address import socket_address
from faccel.observe.verdict import verdict


def document(run_dir):
    return json.loads(rank_path(str(run_dir), 0).read_text())


def change(run_dir, **values):
    path = rank_path(str(run_dir), 0)
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def snapshot(run_dir):
    return ask(str(run_dir), duration_s=0.02, interval_s=0.002)[0]


@pytest.fixture
def run_dir(tmp_path):
    with faccel.init(env={}, run_dir=str(tmp_path)):
        yield tmp_path


@pytest.mark.parametrize(
    ("env", "options", "is_observed"),
    [
        ({}, {}, False),
        ({"FACCEL_RUN_DIR": "a"}, {}, True),
        ({"FACCEL_LAUNCH": '{"run_dir": "a"}'}, {}, True),
        ({}, {"run_dir": "a"}, True),
    ],
)
def test_a_run_is_observed_if_its_folder_was_given(
    tmp_path, monkeypatch, env, options, is_observed
):
    monkeypatch.chdir(tmp_path)
    with faccel.init(env=env, **options):
        names = [thread.name for thread in threading.enumerate()]
        assert ("faccel-observe" in names) == is_observed
        assert os.path.exists(os.path.join("a", FOLDER)) == is_observed
    assert sorted(os.listdir(tmp_path)) == ["a"] * is_observed


@pytest.mark.slow
def test_a_run_without_a_folder_imports_no_observer():
    code = (
        "import faccel, sys; faccel.init(env={});"
        "print([m for m in sys.modules if 'faccel.observe' in m])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_command_does_not_import_torch(run_dir):
    code = (
        "import sys; from faccel.observe.ask import ask;"
        "from faccel.observe.verdict import verdict;"
        f"print(verdict(ask({str(run_dir)!r}, duration_s=0.1, interval_s=0.01)).sentence);"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    sentence, has_torch = done.stdout.splitlines()
    assert sentence.startswith("rank 0 waits in the script (")
    assert "test_observer.py:" in sentence
    assert has_torch == "False"


def test_nothing_is_left_after_the_context(tmp_path):
    before = (list(gc.callbacks), threading.active_count(), dict(os.environ))
    handlers = [signal.getsignal(number) for number in range(1, signal.SIGRTMAX)]
    with faccel.init(env={}, run_dir=str(tmp_path)):
        folder = document(tmp_path)["folder"]
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    assert not os.path.exists(folder)
    assert before == (list(gc.callbacks), threading.active_count(), dict(os.environ))
    assert handlers == [signal.getsignal(number) for number in range(1, signal.SIGRTMAX)]
    assert snapshot(tmp_path).status == "finished"


def test_an_error_that_ends_the_run_is_read_after_it(tmp_path):
    with pytest.raises(ValueError), faccel.init(env={}, run_dir=str(tmp_path)):
        raise ValueError("bad sample\nmore")
    result = verdict([snapshot(tmp_path)])
    assert (result.kind, result.sentence) == ("broken", "rank 0 failed: ValueError: bad sample")


def test_a_failed_init_leaves_no_observer(tmp_path):
    env = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    env |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with pytest.raises(faccel.errors.WorldError):
        faccel.init(env=env, run_dir=str(tmp_path), start_timeout_s=1, device="cpu")
    assert "faccel-observe" not in [thread.name for thread in threading.enumerate()]
    assert "WorldError" in snapshot(tmp_path).reason


def test_stacks_of_all_threads_and_the_line(run_dir):
    event = threading.Event()
    other = threading.Thread(target=event.wait, name="reader")
    other.start()
    result = snapshot(run_dir)
    event.set()
    other.join()
    assert result.status == "answered"
    # This thread asks, so that it waits in `ask`.
    functions = [frame.function for frame in result.moments[-1].stack]
    assert "test_stacks_of_all_threads_and_the_line" in functions
    assert "wait" in [frame.function for frame in result.threads["reader"]]


def test_the_collector_is_seen_while_it_runs(run_dir):
    class Slow:
        def __init__(self):
            self.cycle = self

        def __del__(self):
            seen.append(snapshot(run_dir))

    seen = []
    Slow()
    gc.collect()
    assert seen[0].moments[-1].in_collector
    # The search before `__del__` may take longer than that, and has no moments.
    ((start_s, end_s),) = seen[0].pauses
    assert start_s < seen[0].moments[0].time_s < seen[0].moments[-1].time_s <= end_s
    later = snapshot(run_dir)
    assert not later.moments[-1].in_collector
    assert later.pauses


def test_a_process_that_is_another_one_by_now_is_dead(run_dir):
    change(run_dir, start_ticks=document(run_dir)["start_ticks"] - 1)
    assert snapshot(run_dir).status == "dead"


def test_a_rank_of_another_node_is_not_asked(run_dir):
    change(run_dir, host="elsewhere", pid=1)
    result = snapshot(run_dir)
    assert (result.status, result.host) == ("remote", "elsewhere")


def test_a_rank_of_the_world_without_a_file_is_missing(run_dir):
    change(run_dir, world_size=3)
    statuses = [each.status for each in ask(str(run_dir), duration_s=0.02, interval_s=0.01)]
    assert statuses == ["answered", "missing", "missing"]


def test_files_of_an_earlier_run_on_more_ranks_are_left_out(run_dir):
    old = {**document(run_dir), "rank": 1, "world": "earlier", "start_s": 1.0, "pid": 1}
    rank_path(str(run_dir), 1).write_text(json.dumps(old))
    (run_dir / FOLDER / "rank-00002.json").write_text("{")
    (run_dir / FOLDER / "rank-00003.json").write_text('["rank"]')
    assert [each.rank for each in ask(str(run_dir), duration_s=0.02, interval_s=0.01)] == [0]


@pytest.mark.slow
def test_a_second_run_in_the_folder_does_not_replace_one_that_runs(run_dir):
    before = document(run_dir)
    code = f"import faccel; faccel.init(env={{}}, run_dir={str(run_dir)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "is observed already" in done.stderr
    assert document(run_dir) == before


def test_a_folder_that_cannot_be_written_is_logged(tmp_path, log_records):
    path = tmp_path / "file"
    path.write_text("")
    with faccel.init(env={}, run_dir=str(path)):
        assert "is not observed" in log_records()[0].getMessage()


def test_a_client_that_asks_nothing_or_leaves_does_not_end_the_thread(run_dir):
    for request in (b"", b"{", b"[]", b'{"duration_s": "x"}'):
        with socket.socket(socket.AF_UNIX) as connection:
            with socket_address(document(run_dir)["folder"]) as address:
                connection.connect(address)
            connection.sendall(request)
    assert snapshot(run_dir).status == "answered"


def test_a_socket_in_a_folder_with_a_long_path(tmp_path, monkeypatch):
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with faccel.init(env={}, run_dir=str(tmp_path)):
        assert len(document(tmp_path)["folder"]) > 120
        assert snapshot(tmp_path).status == "answered"


BAD = {
    "missing": "which is no folder",
    "file": "which is no folder",
    "empty": "`RUN` has no files of ranks",
}


@pytest.mark.parametrize("name", BAD)
def test_a_folder_without_a_run_is_an_error(tmp_path, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=BAD[name]) as caught:
        ask(str(tmp_path / name), duration_s=0.02, interval_s=0.01)
    assert "run-dir" in caught.value.fix


def test_the_folder_of_a_tracker_and_the_parent_of_a_run(tmp_path):
    with faccel.init(env={}, run_dir=str(tmp_path / "run")):
        (tmp_path / "run" / "tracker").mkdir()
        assert snapshot(tmp_path / "run" / "tracker").status == "answered"
        with pytest.raises(ConfigError) as caught:
            ask(str(tmp_path), duration_s=0.02, interval_s=0.01)
    assert f"faccel why {tmp_path / 'run'}" in caught.value.fix


@pytest.mark.slow
def test_a_rank_of_another_user_is_named_and_does_not_answer():
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    # Not `tmp_path`, which only this user may enter.
    with tempfile.TemporaryDirectory() as run_dir, faccel.init(env={}, run_dir=run_dir):
        os.chmod(run_dir, 0o755)
        # A child, because this process must stay root.
        code = (
            "from faccel.observe.ask import ask; import os; os.setuid(65534)\n"
            f"print(ask({run_dir!r}, duration_s=0.02, interval_s=0.01)[0].reason)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        # Even if the folder were open, the rank would close the connection.
        folder = document(run_dir)["folder"]
        os.chmod(folder, 0o755)
        os.chmod(os.path.join(folder, "socket"), 0o777)
        refused = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert refused.stdout.startswith("does not answer"), refused
    assert done.stdout == f"runs as another user, process {os.getpid()}\n", done.stderr


def test_an_answer_takes_as_long_as_the_window(run_dir):
    result = ask(str(run_dir), duration_s=0.1, interval_s=0.01)[0]
    first, last = result.moments[0], result.moments[-1]
    assert last.time_s - first.time_s > 0.05
    assert attrs.evolve(result).at(time.time()) == last
