"""`push_to_hub` up to the requests, against a server of this process with the paths of the Hub."""

import base64
import http.server
import json
import sys
import threading
from typing import ClassVar

import pytest
from torch import nn

import faccel
from faccel.errors import CheckpointError, ConfigError
from faccel.testing import fake_context, simulate

huggingface_hub = pytest.importorskip("huggingface_hub")
STORED = ["README.md", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the Hub does for a repository with the files `STORED`."""

    requests: ClassVar = []

    def do_GET(self):
        files = [{"type": "file", "path": name, "size": 1, "oid": "x"} for name in STORED]
        self.answer(files if "/tree/" in self.path else {})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.requests.append((self.path, self.headers["Authorization"], body))
        address = f"{huggingface_hub.constants.ENDPOINT}/user/net"
        if self.path.endswith("repos/create"):
            self.answer({"url": address, "id": "1", "name": "user/net"})
        elif "preupload" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer({"files": [{"path": name, **modes} for name in names]})
        else:
            self.answer({"commitUrl": f"{address}/commit/abc", "commitOid": "abc"})

    def answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(Hub, "requests", [])
        yield Hub.requests
        server.shutdown()


def exported(folder, ctx):
    model = faccel.wrap(nn.Linear(4, 2), ctx)
    faccel.checkpoint.export_model(model, folder, ctx)
    return str(folder)


def commit_of(requests):
    """The entries of the commit by kind and path."""
    ((path, _, body),) = [request for request in requests if "/commit/" in request[0]]
    entries = [json.loads(line) for line in body.splitlines()]
    return path, {(entry["key"], entry["value"].get("path")): entry["value"] for entry in entries}


def test_an_export_is_one_commit_that_replaces_older_weights(hub, tmp_path):
    ctx = fake_context(0, 1)
    folder = exported(tmp_path / "export", ctx)
    address = faccel.checkpoint.push_to_hub(
        folder, "user/net", ctx, private=True, revision="dev", message="step 7", token="hf_secret"
    )
    assert address.endswith("/user/net/commit/abc")
    assert {token for _, token, _ in hub} == {"Bearer hf_secret"}
    created = json.loads(hub[0][2])
    assert (created["organization"], created["name"]) == ("user", "net")
    path, entries = commit_of(hub)
    assert path.partition("?")[0].endswith("/models/user/net/commit/dev")
    assert entries["header", None]["summary"] == "step 7"
    assert {key for key in entries if key[0] == "deletedFile"} == {
        ("deletedFile", name) for name in STORED[1:]
    }
    content = base64.b64decode(entries["file", "model.safetensors"]["content"])
    assert content == (tmp_path / "export" / "model.safetensors").read_bytes()


def test_rank_0_alone_uploads(hub, tmp_path):
    def run(ctx):
        return faccel.checkpoint.push_to_hub(exported(tmp_path, ctx), "user/net", ctx, token="t")

    first, second = simulate(run, 2)
    assert first.endswith("/commit/abc")
    assert second is None
    assert len([path for path, _, _ in hub if "/commit/" in path]) == 1


def test_what_cannot_be_uploaded_is_an_error(hub, tmp_path, monkeypatch):
    ctx = fake_context(0, 1)
    folder = exported(tmp_path / "export", ctx)
    push = faccel.checkpoint.push_to_hub
    with pytest.raises(CheckpointError, match="did not accept the upload to `bad name!`"):
        push(folder, "bad name!", ctx, token="t")
    with pytest.raises(CheckpointError, match="has no exported model"):
        push(tmp_path, "user/net", ctx)
    with pytest.raises(CheckpointError, match="has no exported model") as caught:
        push(tmp_path / "missing", "user/net", ctx)
    assert "FileNotFoundError" in caught.value.got
    with pytest.raises(ConfigError, match="`repo_id`"):
        push(folder, ctx, ctx)
    assert hub == []
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="needs the package huggingface_hub"):
        push(folder, "user/net", ctx)
