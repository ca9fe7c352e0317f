"""The digits example with trackers: its report in Chromium, and its live view in tmux."""

import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

from tests.command_line import Command, run_command
from tests.docs.pages import accuracy_in_readme
from tests.ranks import TIMEOUT_S

pytestmark = pytest.mark.slow
DIGITS = ("--cpu", "--nproc", "2", "examples/digits.py", "--track", "tensorboard,csv")
NEEDS_CHROMIUM = pytest.mark.skipif(
    shutil.which("chromium") is None,
    reason="chromium is not installed (Debian: apt-get install chromium)",
)
NEEDS_TMUX = pytest.mark.skipif(
    shutil.which("tmux") is None, reason="tmux is not installed (Debian: apt-get install tmux)"
)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Return the run folder of the example, after it has ended."""
    run_dir = tmp_path_factory.mktemp("runs") / "digits-run"
    code, out, err = run_command("launch", *DIGITS, "--run-dir", str(run_dir))
    assert code == 0, err
    assert out.splitlines()[-1] == accuracy_in_readme()
    assert len(out.splitlines()) == 13
    code, out, err = run_command("report", str(run_dir))
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == str(run_dir / "report.html")
    return run_dir


def test_the_page_has_curves_times_configuration_and_a_verdict(digits):
    text = (digits / "report.html").read_text()
    assert re.search(r'class="sentence">[\d.]+ (s|min.*), \d+ % of it training', text)
    titles = [title.strip() for title in re.findall(r"<figcaption>([^<\n]*)", text)]
    assert titles[:2] == ["loss", "grad_norm"]
    assert {"steps per second", "peak of the largest rank"} <= set(titles)
    for rank in (0, 1):
        assert f"<span>rank {rank}</span>" in text
    assert '<code>learning_rate</code></td><td class="value">0.006<' in text
    assert "<code>run_dir</code>" in text and "<code>accuracy</code>" in text
    assert len(text) < 200_000


def chromium(page, *options):
    """Run Chromium on a page until it is drawn; return what it prints."""
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
    arguments = [*command, *options, f"file://{page}"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    return done.stdout


@NEEDS_CHROMIUM
def test_chromium_draws_the_page_and_requests_nothing_else(digits, tmp_path):
    log = tmp_path / "net.json"
    dom = chromium(
        digits / "report.html",
        "--dump-dom",
        f"--log-net-log={log}",
        f"--user-data-dir={tmp_path / 'profile'}",
    )
    assert dom.count("<path d=") >= 8
    # The browser asks for its updates; the page must not be the reason of any request.
    urls = set(re.findall(r'"url":"([^"]*)"', log.read_text()))
    hosts = {url for url in urls if url.startswith(("http:", "https:", "ws:", "wss:"))}
    assert not [url for url in hosts if not re.search(r"google|gvt1|chromium|gstatic", url)], hosts


def pixels(path):
    """Return width, height and the set of some pixels of a PNG of 8 bits per channel."""
    data = path.read_bytes()
    width, height, depth, kind = struct.unpack(">IIBB", data[16:26])
    assert depth == 8
    parts, begin = [], 8
    while begin < len(data):
        (size,) = struct.unpack(">I", data[begin : begin + 4])
        if data[begin + 4 : begin + 8] == b"IDAT":
            parts.append(data[begin + 8 : begin + 8 + size])
        begin += 12 + size
    raw = zlib.decompress(b"".join(parts))
    stride = 1 + width * {2: 3, 6: 4}[kind]
    return width, height, raw[:stride]


@NEEDS_CHROMIUM
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_has_the_colours_of_the_browser(digits, tmp_path, scheme):
    path = tmp_path / "page.png"
    options = [f"--screenshot={path}", "--window-size=1280,900"]
    options.append(f"--user-data-dir={tmp_path / 'profile'}")
    if scheme == "dark":
        options.append("--blink-settings=preferredColorScheme=0")
    chromium(digits / "report.html", *options)
    width, height, row = pixels(path)
    assert (width, height) == (1280, 900)
    # The first pixel is the background of the page.
    expected = {"light": (0xF6, 0xF7, 0xF9), "dark": (0x10, 0x13, 0x17)}
    assert tuple(row[1:4]) == expected[scheme]


class Tmux:
    """A terminal of tmux that runs a command."""

    def __init__(self, folder, command, width=100, height=30):
        self._socket = str(folder / "tmux")
        words = ["new-session", "-d", "-x", str(width), "-y", str(height), command]
        self._run("-f", "/dev/null", *words)

    def _run(self, *words):
        command = ["tmux", "-S", self._socket, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def wait_for(self, pattern):
        """Return the screen when it matches."""
        deadline_s = time.monotonic() + TIMEOUT_S
        screen = ""
        while time.monotonic() < deadline_s:
            screen = self._run("capture-pane", "-p")
            if re.search(pattern, screen):
                return screen
            time.sleep(0.2)  # the view changes once per second, and needs the CPU
        raise AssertionError(f"{pattern!r} is not on the screen:\n{screen}")

    def send(self, *keys):
        self._run("send-keys", *keys)

    def resize(self, width, height):
        self._run("resize-window", "-x", str(width), "-y", str(height))

    def close(self):
        subprocess.run(["tmux", "-S", self._socket, "kill-server"], check=True)


TRAINING = """
import os, sys
import faccel, torch
from faccel import tracking

with faccel.init() as ctx:
    trackers = tracking.init_trackers("a", ctx, trackers=("csv",))
    meter = tracking.init_meter(ctx, run="a")
    model = faccel.wrap(torch.nn.Linear(4, 1), ctx)
    opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0.01), model, ctx)
    while not os.path.exists(sys.argv[1]):
        loss = model(torch.ones(2, 4)).square().mean()
        scaler = faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx)
        faccel.optimizer_step(opt, scaler, ctx)
        meter = tracking.tick(meter, samples=2)
        if meter.num_steps % 100 == 0:
            tracking.log({"loss": loss}, trackers, step=meter.num_steps)
            tracking.rates(meter, ctx)
        faccel.barrier(ctx)
        if ctx.is_main and os.path.exists(sys.argv[1] + ".please"):
            open(sys.argv[1], "w").close()
        faccel.barrier(ctx)
    tracking.finish(trackers)
"""


@NEEDS_TMUX
def test_the_live_view_shows_a_run_until_it_ends(tmp_path):
    # In a folder with a short name: a row shows it, and has one line.
    script, run_dir, end = tmp_path / "job" / "train.py", tmp_path / "runs", tmp_path / "end"
    script.parent.mkdir()
    script.write_text(TRAINING)
    arguments = ("--cpu", "--nproc", "2", "--run-dir", str(run_dir), str(script), str(end))
    job = Command("launch", *arguments)
    while not (run_dir / "a" / "goodput" / "rates.jsonl").exists():
        assert job.is_running()
    # The variables would replace the size of the terminal.
    watch = f"env -u COLUMNS -u LINES {sys.executable} -m faccel watch {run_dir}"
    # The shell has a trap for Ctrl-C, or it would end with the command.
    commands = f"trap : INT; {watch}; echo code $?; {watch}; echo code $?; sleep 1000"
    terminal = Tmux(tmp_path, f"sh -c '{commands}'")
    try:
        screen = terminal.wait_for(r"rank 1  step [\d,]+ +\w+ in .*job/train\.py:\d+")
        assert re.search(r"runs/a  running  [\d.]+ s", screen)
        assert re.search(r"step [\d,]+  [\d.k]+ steps/s", screen)
        assert re.search(r"^loss +\d", screen, re.M)
        terminal.resize(40, 12)
        terminal.wait_for("running")
        terminal.resize(100, 30)
        # Ctrl-C leaves the other screen: what was on the terminal before is there again.
        terminal.send("C-c")
        screen = terminal.wait_for("interrupted\n(.*\n)*code 130")
        terminal.wait_for("runs/a  running")
        Path(f"{end}.please").touch()
        screen = terminal.wait_for("code 0")
        assert re.search(r"runs/a  ended .* s", screen)
        assert "rank 1" in screen and "has closed its context" in screen
        assert "interrupted" in screen  # the first screen, and not that of the live view
    finally:
        Path(f"{end}.please").touch()
        terminal.close()
        code, _, err = job.wait()
    assert code == 0, err


def test_a_report_of_a_run_that_is_killed(tmp_path):
    script, run_dir = tmp_path / "train.py", tmp_path / "runs"
    script.write_text(TRAINING)
    arguments = ("--cpu", "--nproc", "2", "--run-dir", str(run_dir), str(script), "/nowhere")
    job = Command("launch", *arguments)
    while not (run_dir / "a" / "goodput" / "rates.jsonl").exists():
        assert job.is_running()
    code, out, _ = run_command("report", str(run_dir))
    assert code == 0 and out.splitlines()[1].startswith("running: ")
    assert "The run is still going" in (run_dir / "report.html").read_text()
    pid = int(re.search(r'"pid": (\d+)', (run_dir / ".faccel" / "rank-00001.json").read_text())[1])
    os.kill(pid, signal.SIGKILL)
    job.wait()
    code, out, _ = run_command("report", str(run_dir))
    assert code == 0
    assert re.match(
        r"failed after .* s and [\d,]+ steps: rank 1 died: signal 9", out.splitlines()[1]
    )
