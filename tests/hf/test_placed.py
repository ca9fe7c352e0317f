"""Models of transformers that are read from disk: outputs, generation, training afterwards."""

import pytest
import torch
import transformers as hf

from faccel.checkpoint import export_model
from faccel.inference import materialize, on_meta, place, placement_for
from faccel.testing import fake_context
from tests.hf import models

IDS = torch.tensor([[3, 7, 9, 4], [5, 5, 2, 8]])


def llama(*, tied):
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(**models.SIZE | models.WIDE, num_key_value_heads=2, tie_word_embeddings=tied)
    )


MODELS = {
    "llama": lambda: llama(tied=False),
    "tied llama": lambda: llama(tied=True),
    "gpt2": models.gpt2,
}


def generated(model):
    return model.generate(
        IDS,
        attention_mask=torch.ones_like(IDS),
        min_new_tokens=6,
        max_new_tokens=6,
        do_sample=False,
    )


def placed_model(name, folder):
    """Return a plain model, and its copy of which the blocks are on disk."""
    torch.manual_seed(0)
    plain = MODELS[name]().eval()
    ctx = fake_context(0, 1)
    export_model(plain, folder, ctx)
    with on_meta():
        empty = MODELS[name]().eval()
    placement = placement_for(empty, {"cpu": "1MB", "disk": "1MB"})
    for unit in placement.units:
        placement = placement.with_device(unit.name, "disk")
    sample = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    return plain, place(empty, folder, ctx, placement=placement, sample=sample)


@pytest.mark.parametrize("name", MODELS)
def test_generation_from_disk_equals_that_of_the_plain_model(name, tmp_path):
    plain, placed = placed_model(name, tmp_path)
    with torch.no_grad():
        assert torch.equal(placed(IDS).logits, plain(IDS).logits)
    assert torch.equal(generated(placed.module), generated(plain))
    assert torch.equal(
        placed.call("generate", IDS, max_length=6), plain.generate(IDS, max_length=6)
    )


@pytest.mark.parametrize("name", MODELS)
def test_training_after_materialize_equals_that_of_the_plain_model(name, tmp_path):
    plain, placed = placed_model(name, tmp_path)
    generated(placed.module)
    losses = {}
    for key, model in {"plain": plain, "placed": materialize(placed)}.items():
        opt = torch.optim.AdamW(model.parameters(), lr=0.01)
        losses[key] = []
        for _ in range(4):
            loss = model(IDS, labels=IDS).loss
            opt.zero_grad()
            loss.backward()
            opt.step()
            losses[key].append(loss.item())
    assert losses["placed"] == losses["plain"]
    assert losses["plain"][-1] < losses["plain"][0]
