"""Runs of other libraries are continued by faccel with the losses that the library reaches."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import faccel
from faccel.testing import fake_context
from tests.command_line import run_command
from tests.procs import accelerate_run as peer
from tests.world.test_imports import net, trained

pytestmark = pytest.mark.slow
ONE = fake_context(0, 1)


def run_accelerate(kind, folder):
    if importlib.util.find_spec("accelerate") is None:
        pytest.skip("accelerate is not installed; it writes the folder")
    script = [sys.executable, "-m", "tests.procs.accelerate_run", kind, str(folder)]
    output = subprocess.run(script, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def fresh(optimizer_of=peer.optimizer_of, *, is_tied=True):
    torch.manual_seed(99)  # other values than those of the run that is continued
    net = peer.Net()
    if not is_tied:
        net.tied.weight = torch.nn.Parameter(net.tied.weight.detach().clone())
    model = faccel.wrap(net, ONE)
    opt = faccel.wrap_optimizer(optimizer_of(model), model, ONE)
    return {
        "model": model,
        "optimizer": opt,
        "scheduler": peer.schedule_of(opt),
        "scaler": faccel.init_scaler(ONE),
        "rng": faccel.rng_state(ONE),
        "custom_0": peer.Counter(),
    }


def losses_of(state, cursor):
    """Return the losses of the rest of the epoch, in faccel."""
    loader = faccel.shard(DataLoader(peer.dataset(), 4), ONE)
    batches = list(loader.resume(cursor))
    faccel.set_rng_state(state["rng"])
    losses, scaler = [], state["scaler"]
    for x, y in batches:
        loss = F.mse_loss(state["model"](x), y)
        scaler = faccel.scaled_backward(loss, scaler, ONE)
        _, scaler = faccel.optimizer_step(state["optimizer"], scaler, ONE)
        if "scheduler" in state:
            state["scheduler"].step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", ["safetensors", "pickles"])
def test_a_run_of_accelerate_continues_with_its_losses(tmp_path, kind):
    expected = run_accelerate(kind, tmp_path / "theirs")
    options = ["--epoch", "0", "--samples", str(4 * peer.SAVE_AT), "--json"]
    code, output, errors = run_command(
        "checkpoints", "import", str(tmp_path / "theirs"), str(tmp_path / "ours"), *options
    )
    assert code == 0, errors
    report = json.loads(output)
    assert report["step"] == peer.SAVE_AT
    assert report["left_out"] == {}
    state = fresh() | {"cursor": faccel.Cursor(), "step": 0}
    state = faccel.load(state, tmp_path / "ours", ONE)
    assert state["custom_0"].best == 0.25
    assert state["step"] == peer.SAVE_AT
    assert losses_of(state, state["cursor"]) == expected
    # The same without a copy on the disk.
    state = faccel.load(fresh(), tmp_path / "theirs", ONE, format="accelerate")
    assert losses_of(state, faccel.Cursor(0, 4 * peer.SAVE_AT)) == expected


@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_a_run_of_accelerate_with_fsdp_continues_with_its_losses(tmp_path, kind):
    expected = run_accelerate(kind, tmp_path / "theirs")
    code, _, errors = run_command(
        "checkpoints", "import", str(tmp_path / "theirs"), str(tmp_path / "ours")
    )
    assert code == 0, errors
    for path, name in ((tmp_path / "ours", "faccel"), (tmp_path / "theirs", "auto")):
        # Names of parameters are stored, so the order of the optimizer does not matter.
        state = fresh(
            lambda model: torch.optim.AdamW([*model.parameters()][::-1], lr=0.5), is_tied=False
        )
        del state["scheduler"], state["custom_0"]
        state = faccel.load(state, path, ONE, format=name)
        losses = losses_of(state, faccel.Cursor(0, 4 * peer.SAVE_AT))
        torch.testing.assert_close(losses, expected)


FABRIC = """
import sys, torch, lightning_fabric
from tests.world.test_imports import trained
model, opt = trained()
state = {"model": model, "optimizer": opt, "epoch": 4, "hist": [0.5]}
state["scheduler"] = torch.optim.lr_scheduler.StepLR(opt, 3)
state["means"] = {"x": torch.ones(2), "count": 3}
lightning_fabric.Fabric(accelerator="cpu", devices=1).save(sys.argv[1], state)
"""


def test_a_file_of_fabric_is_loaded_with_its_values(tmp_path):
    # In another process, because the import changes the environment.
    if importlib.util.find_spec("lightning_fabric") is None:
        pytest.skip("lightning-fabric is not installed; it writes the file")
    path = tmp_path / "run.ckpt"
    subprocess.run([sys.executable, "-c", FABRIC, str(path)], check=True, capture_output=True)
    code, _, errors = run_command(
        "checkpoints", "import", str(path), str(tmp_path / "imported"), "--step", "17"
    )
    assert code == 0, errors
    model = net(seed=9)
    opt = torch.optim.AdamW(model.parameters(), lr=0.5)
    state = {"model": model, "optimizer": opt, "epoch": None, "hist": None, "means": {"count": 0}}
    state["scheduler"] = torch.optim.lr_scheduler.StepLR(opt, 9)
    state = faccel.load(state, tmp_path / "imported", ONE, step=17)
    assert state["scheduler"].step_size == 3
    assert (state["epoch"], state["hist"], state["means"]) == (4, [0.5], {"count": 3})
    expected, expected_opt = trained()
    assert all(map(torch.equal, model.parameters(), expected.parameters()))
    momentum = [expected_opt.state[param]["exp_avg"] for param in expected.parameters()]
    assert all(map(torch.equal, [opt.state[p]["exp_avg"] for p in model.parameters()], momentum))
