"""Exports of models of timm, whose dependency torchvision needs PyTorch with CUDA."""

import json

import pytest
import torch

import faccel
from faccel.testing import simulate

timm = pytest.importorskip(
    "timm", reason="timm and torchvision are in no extra", exc_type=ImportError
)


def make():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=10,
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
    )


@pytest.mark.parametrize("mesh", [None, "dp_replicate=2", "dp_shard=2"])
def test_timm_loads_an_exported_model(tmp_path, mesh):
    def export(ctx):
        model = faccel.wrap(make(), ctx)
        return faccel.checkpoint.export_model(model, tmp_path, ctx)

    results = simulate(export, 2 if mesh else 1, mesh=mesh)
    assert all(files == ["model.safetensors"] for files in results)
    assert (
        json.loads((tmp_path / "config.json").read_text())["architecture"] == "vit_tiny_patch16_224"
    )
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), make().eval()(images))
