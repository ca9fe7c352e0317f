"""Options, images, tables, figures and files of trackers; what fails is reported once."""

import csv
import http.server
import io
import json
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

import faccel
from faccel import tracking
from faccel.errors import ConfigError
from faccel.testing import fake_context, simulate
from faccel.tracking import media
from faccel.tracking.server import Server
from faccel.tracking.tracker_table import TRACKERS, load_tracker

PIXELS = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)


def context(tmp_path, rank=0, world_size=1):
    return fake_context(rank, world_size, config={"run_dir": str(tmp_path)})


def read_png(data):
    """Return the pixels of a PNG file as Pillow reads them."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)))


def recording(rows, **kinds):
    """Return a tracker that appends what it records to a list."""

    def recorder(kind):
        return lambda state, *args: rows.append((kind, *args))

    functions = {kind: recorder(kind) for kind in kinds if kinds[kind]}
    return tracking.Tracker(
        lambda folder, config, *, level=0: (folder, level),
        recorder("log"),
        lambda state: None,
        name="memory",
        **functions,
    )


def test_no_service_is_imported_before_it_is_asked_for():
    services = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard")
    services += ("trackio", "wandb", "PIL", "matplotlib", "faccel.tracking.services")
    program = (
        "import sys, faccel.tracking\nfaccel.tracking.init_trackers, faccel.tracking.log_images\n"
        f"print([name for name in {services} if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert output.stdout == "[]\n", output.stderr


def test_the_module_of_each_row_imports_without_its_service():
    # the installed ones must stay out, too
    for name in TRACKERS:
        assert load_tracker(name).name == name
    assert not {"wandb", "mlflow", "aim", "clearml", "comet_ml", "dvclive"} & set(sys.modules)


def all_names():
    return sorted(TRACKERS)


def test_the_rows_are_those_of_accelerate_and_two_files():
    assert all_names() == [
        *("aim", "clearml", "comet_ml", "csv", "dvclive", "jsonl", "mlflow", "swanlab"),
        *("tensorboard", "trackio", "wandb"),
    ]


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64, np.bool_])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_of_every_dtype_and_layout_become_the_same_pixels(dtype, channels, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 4, channels)).astype(np.uint8)
    if dtype is np.bool_:
        pixels = np.where(pixels > 127, 255, 0).astype(np.uint8)
    values = pixels.astype(dtype)
    if np.issubdtype(dtype, np.floating):
        values = (pixels / 255.0).astype(dtype)
    tensor = torch.from_numpy(values)
    for images, layout in (
        (values, "HWC"),
        (tensor, "HWC"),
        (tensor.permute(0, 3, 1, 2), "CHW"),
        (list(tensor), "HWC"),
    ):
        assert np.array_equal(media.image_array(images, layout), pixels)
    for index in range(2):
        expected = pixels[index]
        if channels == 1:
            expected = expected[..., 0]
        assert np.array_equal(read_png(media.png(pixels[index])), expected)


def test_bfloat16_images_are_converted():
    images = torch.tensor([0.0, 0.5, 1.0], dtype=torch.bfloat16, requires_grad=True)
    assert media.image_array(images.reshape(1, 1, 3, 1)).ravel().tolist() == [0, 128, 255]


WRONG_IMAGES = {
    "three dimensions": (PIXELS[0], "HWC", "images[None]"),
    "two channels": (PIXELS[..., :2], "HWC", "channels"),
    "the other layout": (np.zeros((1, 3, 9, 7), np.uint8), "HWC", 'layout="CHW"'),
    "not the other layout": (np.zeros((1, 9, 7, 3), np.uint8), "CHW", 'layout="HWC"'),
    "0 to 255 as floats": (PIXELS.astype(np.float32), "HWC", "from 0 to 71"),
    "negative": (torch.full((1, 2, 2, 3), -0.5), "HWC", "from -0.5 to -0.5"),
    "nan": (torch.full((1, 2, 2, 3), float("nan")), "HWC", "nan"),
    "int64": (torch.zeros(1, 2, 2, 3, dtype=torch.int64), "HWC", "to(torch.uint8)"),
    "text": ("image.png", "HWC", "four dimensions"),
    "meta": (torch.zeros(1, 2, 2, 3, device="meta"), "HWC", "meta"),
}


@pytest.mark.parametrize("kind", WRONG_IMAGES)
def test_a_wrong_image_is_reported_once_and_the_others_are_recorded(kind, tmp_path, log_records):
    images, layout, words = WRONG_IMAGES[kind]
    good = PIXELS
    if layout == "CHW":
        good = PIXELS.transpose(0, 3, 1, 2)
    trackers = tracking.init_trackers("a", context(tmp_path))
    for step in range(2):
        values = {"before": good, "it": images, "after": good}
        tracking.log_images(values, trackers, step=step, layout=layout)
    tracking.finish(trackers)
    names = sorted(path.name for path in (tmp_path / "a" / "images").iterdir())
    expected = [(n, s, i) for n in ("after", "before") for s in range(2) for i in range(2)]
    assert names == [f"{name}-{step}-{index}.png" for name, step, index in expected]
    messages = [record.getMessage() for record in log_records()]
    assert len(messages) == 1
    assert "`it`" in messages[0]
    assert words in messages[0]


def test_jsonl_has_images_tables_and_files_next_to_the_numbers(tmp_path):
    (tmp_path / "model.txt").write_text("weights")
    for first in (0, 1):
        trackers = tracking.init_trackers("a", context(tmp_path))
        tracking.log({"loss": 0.5}, trackers, step=first)
        tracking.log_images({"../val/x": PIXELS}, trackers, step=first)
        tracking.log_table({"t": {"x": torch.arange(2), "y": ["a", None]}}, trackers, step=first)
        tracking.log_file(tmp_path / "model.txt", trackers, name="best")
        tracking.finish(trackers)
    folder = tmp_path / "a"
    lines = [json.loads(line) for line in (folder / "media.jsonl").read_text().splitlines()]
    assert [(x["kind"], x["name"], x.get("step")) for x in lines] == [
        *(("images", "../val/x", 0), ("table", "t", 0), ("file", "best", None)),
        *(("images", "../val/x", 1), ("table", "t", 1), ("file", "best", None)),
    ]
    for line in (lines[0], lines[3]):
        for path, pixels in zip(line["paths"], PIXELS, strict=True):
            assert np.array_equal(read_png((folder / path).read_bytes()), pixels)
    assert (lines[1]["columns"], lines[1]["rows"]) == (["x", "y"], [[0, "a"], [1, None]])
    assert (folder / lines[2]["path"]).read_text() == "weights"
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    outside = {"a", "model.txt"}
    assert {path.name for path in tmp_path.iterdir()} == outside


def test_a_line_that_was_killed_midway_does_not_spoil_the_next(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "lo')
    trackers = tracking.init_trackers("a", context(tmp_path))
    tracking.log({"loss": 0.5}, trackers, step=2)
    tracking.finish(trackers)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert lines[1] == '{"step": 1, "lo'
    assert json.loads(lines[2])["step"] == 2


def test_a_row_that_was_killed_midway_does_not_spoil_the_next(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "metrics.csv").write_bytes(b"step,name,value\r\n0,loss,1.0\r\n1,lo")
    trackers = tracking.init_trackers("a", context(tmp_path), trackers=("csv",))
    tracking.log({"loss": 0.5}, trackers, step=2)
    tracking.finish(trackers)
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[1:] == [["0", "loss", "1.0"], ["1", "lo"], ["2", "loss", "0.5"]]


TABLES = {
    "columns": {"x": [1, 2], "y": ["a", None]},
    "tensors": {"x": torch.tensor([1, 2]), "y": np.array(["a", None])},
    "rows": [{"x": 1, "y": "a"}, {"x": 2}],
}


@pytest.mark.parametrize("kind", [*TABLES, "pandas"])
def test_tables_of_every_type_become_the_same_rows(kind, tmp_path):
    if kind == "pandas":
        pandas = pytest.importorskip("pandas")
        table = pandas.DataFrame({"x": [1, 2], "y": ["a", None]}, dtype=object)
    else:
        table = TABLES[kind]
    assert media.table_rows(table) == (["x", "y"], [[1, "a"], [2, None]])
    trackers = tracking.init_trackers("a", context(tmp_path), trackers=("csv",))
    tracking.log_table({"t/u": table}, trackers, step=3)
    tracking.finish(trackers)
    with (tmp_path / "a" / "tables" / "t%2Fu-3.csv").open() as file:
        assert list(csv.reader(file)) == [["x", "y"], ["1", "a"], ["2", ""]]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (3, "named columns"),
        ("ab", "named columns"),
        ([[1, 2]], "named columns"),
        ({"x": [1], "y": [1, 2]}, "x: 1, y: 2"),
        ({"x": "ab"}, '"x": [value]'),
        ({"x": 1.0}, '"x": [value]'),
    ],
    ids=str,
)
def test_a_wrong_table_is_reported_once_and_the_others_are_recorded(
    table, words, tmp_path, log_records
):
    rows = []
    trackers = tracking.init_trackers(
        "a", context(tmp_path), trackers=(recording(rows, table=True),)
    )
    for step in range(2):
        tracking.log_table({"it": table, "good": {"x": [1]}}, trackers, step=step)
    assert rows == [("table", "good", ["x"], [[1]], step) for step in range(2)]
    messages = [record.getMessage() for record in log_records()]
    assert len(messages) == 1
    assert "`it`" in messages[0]
    assert words in messages[0]


class Figure:
    """Draws a PNG file as a figure of matplotlib does."""

    def savefig(self, file, format):
        assert format == "png"
        file.write(media.png(PIXELS[0]))


def test_a_figure_is_an_image_where_a_tracker_has_no_figures(tmp_path, log_records):
    figure, drawn, pictured = Figure(), [], []
    both = recording(drawn, figure=True, images=True)
    only_images = recording(pictured, images=True)
    for tracker in (both, only_images):
        trackers = tracking.init_trackers("a", context(tmp_path), trackers=(tracker,))
        tracking.log_figure({"curve": figure}, trackers, step=7)
    assert drawn == [("figure", "curve", figure, 7)]
    kind, name, image, step = pictured[0]
    assert (kind, name, step) == ("images", "curve", 7)
    assert np.array_equal(image[0, ..., :3], PIXELS[0])
    for _ in range(2):
        tracking.log_figure({"other": object()}, trackers, step=8)
    assert len(pictured) == 1
    assert ["`other`" in record.getMessage() for record in log_records()] == [True]


@pytest.mark.filterwarnings("ignore")  # from the imports of tensorboard
def test_tensorboard_reads_back_images_and_tables_of_a_resumed_run(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first in (0, 2):
        options = {"tensorboard": {"filename_suffix": ".mine", "max_queue": 1}}
        trackers = tracking.init_trackers(
            "a", context(tmp_path), trackers=("tensorboard",), options=options
        )
        for step in range(first, first + 2):
            tracking.log({"loss": 1 / 2**step}, trackers, step=step)
            tracking.log_images({"samples": PIXELS, "one": PIXELS[:1]}, trackers, step=step)
            tracking.log_table({"t": {"x": [1], "y": ["a|b"]}}, trackers, step=step)
        assert type(tracking.handle("tensorboard", trackers)).__name__ == "SummaryWriter"
        tracking.finish(trackers)
    events = EventAccumulator(str(tmp_path / "a"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        *((0, 1.0), (1, 0.5), (2, 0.25), (3, 0.125)),
    ]
    for tag, pixels in (("samples/0", PIXELS[0]), ("samples/1", PIXELS[1]), ("one", PIXELS[0])):
        images = events.Images(tag)
        assert [image.step for image in images] == [0, 1, 2, 3]
        assert np.array_equal(read_png(images[3].encoded_image_string), pixels)
    text = events.Tensors("t/text_summary")[3].tensor_proto.string_val[0].decode()
    assert text == "| x | y |\n| --- | --- |\n| 1 | a\\|b |"
    assert all(path.name.endswith(".mine") for path in (tmp_path / "a").glob("events*"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"json": {}}, r"`options`.*\n.*`jsonl`"),
        ({"wandb": {}}, "`options`"),
        ({"memory": {"lvel": 1}}, r"`memory`. Got 'lvel'.\nTo fix: use `level`"),
        ({"csv": {"delimiter": ";"}}, "`csv` has no options"),
        ({"csv": 3}, r"`options\[\"csv\"\]` must be a Mapping"),
        ("csv", "`options` must be a Mapping"),
    ],
    ids=str,
)
def test_an_unknown_option_is_an_error_on_every_rank(options, words, tmp_path):
    for rank in range(2):
        with pytest.raises(ConfigError, match=words):
            tracking.init_trackers(
                "a",
                context(tmp_path, rank, 2),
                trackers=("jsonl", "csv", recording([])),
                options=options,
            )
    assert not (tmp_path / "a").exists()


@pytest.mark.filterwarnings("ignore")  # from the imports of tensorboard
def test_an_unknown_option_of_a_library_is_an_error_where_it_opens(tmp_path):
    closed = []
    first = tracking.Tracker(lambda folder, config: 1, lambda *args: None, closed.append)
    with pytest.raises(ConfigError, match="use `log_dir`"):
        tracking.init_trackers(
            "a",
            context(tmp_path),
            trackers=(first, "tensorboard"),
            options={"tensorboard": {"logdir": "b"}},
        )
    assert closed == [1]  # what was open before is closed


@pytest.mark.filterwarnings("ignore")  # from the imports of tensorboard
def test_a_configuration_that_contains_itself_closes_no_tracker(tmp_path, log_records):
    config = {"lr": 0.1}
    config["parents"] = [config]
    names = ("jsonl", "csv", "tensorboard")
    trackers = tracking.init_trackers("a", context(tmp_path), trackers=names, config=config)
    tracking.finish(trackers)
    assert tuple(name for name, _, _ in trackers.opened) == names
    assert not log_records()


def test_a_custom_tracker_gets_its_options_and_has_its_name(tmp_path):
    tracker = recording([])
    trackers = tracking.init_trackers(
        "a", context(tmp_path), trackers=(tracker,), options={"memory": {"level": 3}}
    )
    assert tracking.handle("memory", trackers) == (tmp_path / "a", 3)


def test_a_handle_is_the_librarys_run_on_rank_0_and_none_elsewhere(tmp_path):
    def fn(ctx):
        trackers = tracking.init_trackers("a", ctx, trackers=("csv", "jsonl"))
        with pytest.raises(ConfigError, match="use `csv`"):
            tracking.handle("cvs", trackers)
        name = getattr(tracking.handle("csv", trackers), "name", None)
        tracking.finish(trackers)
        return name

    names = simulate(fn, 2, config={"run_dir": str(tmp_path)})
    assert names == (str(tmp_path / "a" / "metrics.csv"), None)


def test_a_script_that_records_nothing_has_no_handles():
    assert tracking.handle("wandb", tracking.Trackers()) is None


def test_the_handle_of_a_tracker_that_could_not_open_is_none(tmp_path, log_records):
    def fail(folder, config):
        raise OSError("no route to host")

    broken = tracking.Tracker(fail, lambda *args: None, lambda state: None, name="server")
    trackers = tracking.init_trackers("a", context(tmp_path), trackers=(broken, "jsonl"))
    assert tracking.handle("server", trackers) is None
    tracking.log({"loss": 0.5}, trackers, step=0)
    tracking.finish(trackers)
    assert len((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()) == 1
    assert ["no route to host" in record.getMessage() for record in log_records()] == [True]


def test_what_a_tracker_does_not_have_is_reported_once_per_name(tmp_path, log_records):
    (tmp_path / "file.txt").write_text("")
    trackers = tracking.init_trackers("a", context(tmp_path), trackers=(recording([]),))
    for step in range(2):
        tracking.log_images({"i": PIXELS}, trackers, step=step)
        tracking.log_table({"t": {"x": [1]}}, trackers, step=step)
        tracking.log_figure({"f": Figure()}, trackers, step=step)
        tracking.log_file(tmp_path / "file.txt", trackers)
        tracking.log_file(tmp_path / "missing.txt", trackers)
        tracking.log_file(tmp_path, trackers, name="folder")
    messages = [record.getMessage() for record in log_records()]
    expected = ["log_images", "log_table", "log_figure", "log_file", "does not exist", "a folder"]
    assert len(messages) == len(expected)
    for message, words in zip(messages, expected, strict=True):
        assert words in message


@pytest.mark.parametrize("kind", ["images", "table", "figure", "file"])
def test_a_failure_of_one_kind_is_reported_once_and_stops_nothing(kind, tmp_path, log_records):
    (tmp_path / "file.txt").write_text("")
    calls, rows = [], []

    def fail(*args):
        calls.append(args)
        raise OSError("quota exceeded")

    tracker = tracking.Tracker(
        lambda folder, config: None,
        lambda state, values, step: rows.append(values),
        lambda state: None,
        **{kind: fail},
    )
    trackers = tracking.init_trackers("a", context(tmp_path), trackers=(tracker,))
    write = {
        "images": lambda step: tracking.log_images({"i": PIXELS}, trackers, step=step),
        "table": lambda step: tracking.log_table({"t": {"x": [1]}}, trackers, step=step),
        "figure": lambda step: tracking.log_figure({"f": Figure()}, trackers, step=step),
        "file": lambda step: tracking.log_file(tmp_path / "file.txt", trackers),
    }
    for step in range(3):
        write[kind](step)
        tracking.log({"loss": 0.5}, trackers, step=step)
    assert len(calls) == len(rows) == 3
    assert ["quota exceeded" in record.getMessage() for record in log_records()] == [True]


@pytest.mark.parametrize(
    "call",
    [
        lambda trackers: tracking.log_images(trackers, {"i": PIXELS}, step=0),
        lambda trackers: tracking.log_images({"i": PIXELS}, 3, step=0),
        lambda trackers: tracking.log_images({}, trackers, step=0, layout="hwc"),
        lambda trackers: tracking.log_table(trackers, {}, step=0),
        lambda trackers: tracking.log_figure(trackers, {}, step=0),
        lambda trackers: tracking.log_file(trackers, "x"),
        lambda trackers: tracking.log_file("s3://bucket/x", trackers),
        lambda trackers: tracking.handle("csv", "csv"),
    ],
)
def test_a_wrong_argument_is_an_error_on_every_rank(call):
    with pytest.raises(ConfigError):
        call(tracking.Trackers())


def test_only_rank_0_converts_images(tmp_path):
    class Untouchable:
        def __array__(self, *args, **kwargs):
            raise AssertionError("converted")

    trackers = tracking.init_trackers("a", context(tmp_path, rank=1, world_size=2))
    tracking.log_images({"i": Untouchable()}, trackers, step=0)
    tracking.log_table({"t": {"x": Untouchable()}}, trackers, step=0)
    tracking.log_file(tmp_path / "missing", trackers)


def missing(name):
    import importlib.util

    return importlib.util.find_spec(name) is None


@pytest.mark.parametrize("name", [name for name in all_names() if missing(name)])
def test_a_service_that_is_not_installed_is_an_error_with_the_line_of_pip(name, tmp_path):
    if name in ("csv", "jsonl"):
        pytest.skip("needs no library")
    with pytest.raises(ConfigError, match=rf"`{name}` is not installed(.|\n)*pip install {name}"):
        tracking.init_trackers("a", context(tmp_path), trackers=(name,))


def test_a_folder_of_another_run_is_an_error(tmp_path):
    from faccel.tracking.service import same_run, write_run_id

    assert same_run(tmp_path, "wandb", {"id": "new"}, "id") is None
    write_run_id(tmp_path, "wandb", "first")
    assert same_run(tmp_path, "wandb", {}, "id") == "first"
    assert same_run(tmp_path, "wandb", {"id": "first"}, "id") == "first"
    with pytest.raises(ConfigError, match="belongs to another run of `wandb`") as caught:
        same_run(tmp_path, "wandb", {"id": "second"}, "id")
    assert "'second', and 'first'" in caught.value.got


class Unauthorized(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(401)

    def log_message(self, *args):
        pass


def test_a_server_that_is_down_is_left_alone_100_times_as_long_as_the_question_took():
    times = iter([0.0, 2.0, 201.9, 202.1])
    address = ("127.0.0.1", 0)
    with http.server.HTTPServer(address, Unauthorized, bind_and_activate=False) as real:
        real.server_bind()  # it has a port, and listens later
        url = f"http://user:secret@127.0.0.1:{real.server_port}/"
        server = Server(url, "/health", clock=times.__next__)
        with pytest.raises(ConnectionError, match="refused") as first:
            server.require()
        assert f"the server 127.0.0.1:{real.server_port} is down" in str(first.value)
        assert "secret" not in str(first.value)
        real.server_activate()
        thread = threading.Thread(target=real.serve_forever, args=(0.01,))
        thread.start()
        try:
            with pytest.raises(ConnectionError, match="refused"):
                server.require()
            server.ask()
            server.require()
        finally:
            real.shutdown()
            thread.join()


def test_a_server_that_accepts_and_never_answers_is_down():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        server = Server(f"http://127.0.0.1:{port}", "/health", timeout_s=0.1)
        with pytest.raises(ConnectionError, match=r"no answer in 0\.1 s"):
            server.ask()


def test_the_root_has_no_new_names():
    assert not {"log_images", "handle", "log_table"} & set(faccel.__all__)
