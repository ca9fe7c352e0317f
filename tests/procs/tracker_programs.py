"""Programs of test_tracker_services.py: `record` a run with a service, `read` what is on disk.

`unreachable` records with MLflow and a server that does not answer.
"""

import csv
import glob
import http.server
import io
import json
import os
import socket
import sqlite3
import struct
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import yaml

IMAGES = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)


def record(service, options, first):
    """Record two steps in the run `a`, of which the first is `first`."""
    import faccel
    from faccel import tracking

    ctx = faccel.init(run_dir="runs", env={})
    config = {"lr": 0.5, "layers": [1, 2], "epochs": first}
    trackers = tracking.init_trackers(
        "a", ctx, trackers=(service,), config=config, options={service: options}
    )
    for step in range(first, first + 2):
        tracking.log({"val/loss": 1 / 2**step, "phase": "warm-up"}, trackers, step=step)
        tracking.log_images({"samples": IMAGES}, trackers, step=step)
        table = {"text": ["a", "b|c"], "score": [0.5, None]}
        tracking.log_table({"answers": table}, trackers, step=step)
    Path("notes.txt").write_text("notes")
    tracking.log_file("notes.txt", trackers)
    assert tracking.handle(service, trackers) is not None
    tracking.finish(trackers)
    faccel.shutdown(ctx)


def log_records(path):
    """Yield the records of a file of LevelDB's log format, in which wandb and SwanLab write."""
    data = Path(path).read_bytes()
    position = 7  # after the header of the file: 4 letters, 2 bytes of magic, a version
    parts = []
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:  # the rest of a block is empty
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # a complete record, or the last part of one
            yield b"".join(parts)
            parts = []


def pixels(data):
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).tolist()


def read_wandb():
    from wandb.proto.wandb_internal_pb2 import Record

    read = {"losses": {}, "runs": [], "images": {}, "tables": {}, "config": {}}
    for path in sorted(glob.glob("runs/a/wandb/offline-run-*/*.wandb")):
        folder = Path(path).parent / "files"
        for data in log_records(path):
            message = Record.FromString(data)
            if message.HasField("run"):
                read["runs"].append(message.run.run_id)
                for item in message.run.config.update:
                    read["config"][item.key] = json.loads(item.value_json)
            # `nested_key` is ["samples", "filenames"] for an item of a dict.
            items = {}
            for item in message.history.item:
                value = json.loads(item.value_json)
                if len(item.nested_key) > 1:
                    items.setdefault(item.nested_key[0], {})[item.nested_key[1]] = value
                else:
                    items[item.key or item.nested_key[0]] = value
            if "val/loss" not in items:
                continue
            step = items["_step"]
            read["losses"][step] = items["val/loss"]
            images = [folder / name for name in items["samples"]["filenames"]]
            read["images"][step] = [pixels(image.read_bytes()) for image in images]
            table = (folder / items["answers"]["path"]).read_text()
            read["tables"][step] = json.loads(table)["data"]
    read["runs"] = sorted(set(read["runs"]))
    return read


def read_trackio():
    read = {"losses": {}, "images": {}, "tables": {}}
    with sqlite3.connect("trackio/p.db") as database:
        rows = database.execute("select run_id, step, metrics from metrics order by id").fetchall()
        config = database.execute("select config from configs order by id desc").fetchone()[0]
    read["runs"] = sorted({row[0] for row in rows})
    read["config"] = json.loads(config)
    for _, step, text in rows:
        for name, value in json.loads(text).items():
            if name == "val/loss":
                read["losses"][step] = value
            elif name.startswith("samples"):
                data = Path("trackio/media", value["file_path"]).read_bytes()
                read["images"].setdefault(step, []).append(pixels(data))
            elif name == "answers":
                read["tables"][step] = [list(row.values()) for row in value["_value"]]
    return read


def read_mlflow():
    from mlflow import MlflowClient

    client = MlflowClient("sqlite:///mlflow.db")
    runs = client.search_runs(["0"])
    run_id = runs[0].info.run_id
    read = {"runs": [run.info.run_id for run in runs], "images": {}, "tables": {}}
    history = client.get_metric_history(run_id, "val/loss")
    read["losses"] = {metric.step: metric.value for metric in history}
    folder = Path("mlruns/0", run_id, "artifacts")
    read["config"] = json.loads((folder / "config.json").read_text())
    assert runs[0].data.params["lr"] == "0.5"
    assert runs[0].info.status == "FINISHED"
    for path in sorted(folder.glob("images/samples*.png")):
        step = int(path.name.split("+")[2])
        read["images"].setdefault(step, []).append(pixels(path.read_bytes()))
    for path in folder.glob("tables/answers-*.json"):
        read["tables"][int(path.stem.split("-")[1])] = json.loads(path.read_text())["data"]
    assert (folder / "files/notes.txt").read_text() == "notes"
    return read


def read_comet_ml():
    read = {"runs": [], "losses": {}, "images": {}, "tables": {}, "config": {}}
    for path in glob.glob("runs/a/*.zip"):
        read["runs"].append(Path(path).name.split("-")[0])
        archive = zipfile.ZipFile(path)
        for line in archive.read("messages.json").splitlines():
            payload = json.loads(line)["payload"]
            metric = payload.get("metric") or {}
            extra = payload.get("additional_params") or {}
            if metric.get("metricName") == "val/loss":
                read["losses"][metric["step"]] = metric["metricValue"]
            if payload.get("param"):
                read["config"][payload["param"]["paramName"]] = payload["param"]["paramValue"]
            if extra.get("figName", "").startswith("samples"):
                data = archive.read(payload["file_path"])
                read["images"].setdefault(extra["step"], []).append(pixels(data))
            if extra.get("fileName", "").startswith("answers"):
                text = archive.read(payload["file_path"]).decode()
                step = int(Path(extra["fileName"]).stem.split("-")[1])
                read["tables"][step] = list(csv.reader(io.StringIO(text)))[1:]
    read["runs"] = sorted(set(read["runs"]))
    return read


def read_aim():
    from aim import Repo, Run

    # Not read-only: the UI of Aim builds the index that a read-only run needs.
    repo = Repo("runs")
    runs = [Run(run_hash, repo=repo) for run_hash in repo.list_all_runs()]
    read = {"runs": [run.hash for run in runs], "losses": {}, "images": {}}
    for run in runs:
        read["config"] = run["config"]
        for metric in run.metrics():
            if metric.name == "val/loss":
                rows = metric.dataframe()
                read["losses"] = dict(zip(rows["step"], rows["value"], strict=True))
                context = metric.context
        sequence = run.get_image_sequence("samples", context)
        for step, images in zip(*sequence.values.sparse_list(), strict=True):
            stacked = [np.asarray(image.to_pil_image()).tolist() for image in images]
            read["images"][int(step)] = stacked
    return read


def read_clearml():
    read = {"runs": [], "losses": {}, "images": {}, "tables": {}, "config": {}}
    for path in sorted(glob.glob(".clearml/cache/offline/*/metrics.jsonl")):
        folder = Path(path).parent
        task = json.loads((folder / "task.json").read_text())
        read["runs"].append(task["name"])
        for item in task["hyperparams"]["General"].values():
            read["config"][item["name"]] = item["value"]
        for line in Path(path).read_text().splitlines():
            for event in json.loads(line):
                step = event["iter"]
                if event["variant"] == "loss":
                    read["losses"][step] = event["value"]
                elif event["metric"] == "samples":
                    data = Path(event["url"].removeprefix("file://")).read_bytes()
                    read["images"].setdefault(step, []).append(pixels(data))
                elif event["metric"] == "answers":
                    cells = json.loads(event["plot_str"])["data"][0]["cells"]["values"]
                    read["tables"][step] = [list(row) for row in zip(*cells, strict=True)]
    read["runs"] = sorted(set(read["runs"]))
    return read


def read_dvclive():
    folder = Path("runs/a/dvclive")
    read = {"runs": ["a"], "images": {}}
    with (folder / "plots/metrics/val/loss.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    read["losses"] = {int(row["step"]): float(row["loss"]) for row in rows}
    read["config"] = yaml.safe_load((folder / "params.yaml").read_text())
    for step in range(4):
        paths = [folder / f"plots/images/samples/{index}/{step}.png" for index in range(2)]
        read["images"][step] = [pixels(path.read_bytes()) for path in paths]
    assert json.loads((folder / "metrics.json").read_text())["step"] == 3
    return read


def read_swanlab():
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    read = {"runs": [], "losses": {}, "images": {}, "tables": {}, "config": {}}
    for path in sorted(glob.glob("runs/a/swanlog/run-*/*.swanlab")):
        folder = Path(path).parent
        read["runs"].append(Path(path).stem)
        for data in log_records(path):
            message = Record.FromString(data)
            if message.scalar.key == "val/loss":
                read["losses"][message.scalar.step] = message.scalar.value.number
            names = [item.filename for item in message.media.value.items]
            step = message.media.step
            if message.media.key == "samples":
                files = [folder / "media/image" / name for name in names]
                read["images"][step] = [pixels(file.read_bytes()) for file in files]
            elif message.media.key == "answers":
                table = json.loads((folder / "media/echarts" / names[0]).read_text())
                read["tables"][step] = [list(row.values()) for row in table["rowData"]]
        assert (folder / "files/notes.txt").read_text() == "notes"
        config = yaml.safe_load((folder / "files/config.yaml").read_text())
        read["config"] = {name: item["value"] for name, item in config.items()}
    read["runs"] = sorted(set(read["runs"]))
    return read


class FewAnswers(http.server.BaseHTTPRequestHandler):
    """Answers what MLflow asks until its first values, and nothing after them."""

    protocol_version = "HTTP/1.1"
    down = threading.Event()

    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.down.is_set():
            threading.Event().wait()
        info = {"run_id": "r", "experiment_id": "0", "status": "RUNNING"}
        run = {"info": {**info, "artifact_uri": Path("artifacts").resolve().as_uri()}, "data": {}}
        body = json.dumps({"run": run}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815

    def log_message(self, *args):
        pass


def unreachable(kind):
    """Record with MLflow and a server that is down from the start, or from the first values on."""
    import faccel
    from faccel import tracking

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FewAnswers)
    silent = socket.create_server(("127.0.0.1", 0))  # accepts, and never answers
    closed = socket.socket()  # bound, so that no other process listens there
    closed.bind(("127.0.0.1", 0))
    port = {"silent": silent, "closed": closed}.get(kind, server.socket).getsockname()[1]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ctx = faccel.init(run_dir="runs", env={})
    options = {"mlflow": {"tracking_uri": f"http://user:secret@127.0.0.1:{port}"}}
    trackers = tracking.init_trackers(
        "a", ctx, trackers=("mlflow", "jsonl"), config={"lr": 0.5}, options=options
    )
    print("OPENED", tracking.handle("mlflow", trackers) is not None)
    for step in range(3):
        tracking.log({"loss": 1 / 2**step}, trackers, step=step)
        tracking.log_images({"samples": IMAGES}, trackers, step=step)
        FewAnswers.down.set()
    tracking.finish(trackers)
    faccel.shutdown(ctx)


def same_names():
    """Record runs of one name in folders of one name, and continue the first; print the steps."""
    from faccel import tracking
    from faccel.testing import fake_context

    options = {"trackio": {"auto_log_cpu": False, "auto_log_gpu": False}}
    for step, parent in enumerate(("x", "y", "x")):
        ctx = fake_context(0, 1, config={"run_dir": f"{parent}/runs"})
        trackers = tracking.init_trackers("a", ctx, trackers=("trackio",), options=options)
        tracking.log({"loss": 0.5}, trackers, step=step)
        tracking.finish(trackers)
    steps = {}
    with sqlite3.connect("trackio/runs.db") as database:
        for run_id, step in database.execute("select run_id, step from metrics order by step"):
            steps.setdefault(run_id, []).append(step)
    print("STEPS", json.dumps(list(steps.values())))


def no_account(*services):
    """Record with services that need an account, without one."""
    from faccel import tracking
    from faccel.testing import fake_context

    ctx = fake_context(0, 1, config={"run_dir": "runs"})
    trackers = tracking.init_trackers("a", ctx, trackers=(*services, "jsonl"))
    tracking.log({"loss": 0.5}, trackers, step=0)
    tracking.finish(trackers)
    print("OPENED", *[name for name, _, _ in trackers.opened])


def main():
    command, service, *rest = sys.argv[1:]
    if command == "record":
        record(service, json.loads(rest[0]), int(rest[1]))
        return
    if command == "unreachable":
        unreachable(service)
        return
    if command == "no_account":
        no_account(service, *rest)
        return
    if command == "same_names":
        same_names()
        return
    read = globals()[f"read_{service}"]()
    for step, images in read["images"].items():
        read["images"][step] = np.array_equal(np.array(images), IMAGES)
    print("READ", json.dumps(read))
    sys.stdout.flush()
    os._exit(0)  # without the threads and exit handlers of the service


if __name__ == "__main__":
    main()
