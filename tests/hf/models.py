"""Small models of transformers, built from configurations, and one training loop for all."""

import attrs
import torch
import transformers as hf

import faccel
from tests.training import full

VOCABULARY, LENGTH = 32, 8
SIZE = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
WIDE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
WIDE |= {"max_position_embeddings": 16}


def gpt2(**options):
    """Tied weights, transposed linear layers (`Conv1D`) and a position table."""
    sizes = {"n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 4}
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(**SIZE | sizes | dict.fromkeys(DROPOUTS, 0.0) | options)
    )


DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


def llama(**options):
    """Rotary positions, grouped queries, a `tp_plan`."""
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZE | WIDE | {"num_key_value_heads": 2} | options))


def qwen3(**options):
    """Norms per head: each tensor-parallel rank computes a part of their gradients."""
    sizes = {"num_key_value_heads": 2, "head_dim": 4}
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZE | WIDE | sizes | options))


def mixtral(**options):
    """Experts that are parameters of three dimensions."""
    sizes = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return hf.MixtralForCausalLM(hf.MixtralConfig(**SIZE | WIDE | sizes | options))


def bert(**options):
    """A classifier. Its embeddings are a separate FSDP2 unit."""
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return hf.BertForSequenceClassification(hf.BertConfig(**SIZE | WIDE | dropouts | options))


BUILD = {build.__name__: build for build in (bert, gpt2, llama, mixtral, qwen3)}


def build(name, dtype=None, **options):
    torch.manual_seed(0)
    return BUILD[name](**options).to(
        dtype or (torch.float32 if name == "mixtral" else torch.float64)
    )


def batch_of(name, rows=8, seed=5):
    ids = torch.randint(
        2, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(seed)
    )
    mask = torch.ones_like(ids)
    mask[1::2, LENGTH - 2 :] = 0  # of every second row the end is padding
    labels = ids.sum(1) % 2 if name == "bert" else ids
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


BERT_TENSOR_PLAN = {
    "bert.encoder.layer.*.attention.self.query": "colwise",
    "bert.encoder.layer.*.attention.self.key": "colwise",
    "bert.encoder.layer.*.attention.self.value": "colwise",
    "bert.encoder.layer.*.attention.output.dense": "rowwise",
    "bert.encoder.layer.*.intermediate.dense": "colwise",
    "bert.encoder.layer.*.output.dense": "rowwise",
}
BERT_CHAIN = ("bert.embeddings", "bert.encoder.layer.*", "bert.pooler", "dropout", "classifier")


@attrs.frozen(eq=False)
class Trained:
    losses: list
    norms: list
    params: dict
    out: object
    model: faccel.WrappedModel


def train(ctx, net, name, plan=None, steps=2):
    """Train on global batches that do not depend on the mesh."""
    model = faccel.wrap(net, ctx, plan=plan)
    opt = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, foreach=False
    )
    opt, scaler = faccel.wrap_optimizer(opt, model, ctx), faccel.init_scaler(ctx)
    losses, norms, out = [], [], None
    for step in range(steps):
        out = model(**faccel.split(batch_of(name, seed=step), ctx))
        losses.append(faccel.reduce(out.loss.detach(), ctx, op="mean").item())
        scaler = faccel.scaled_backward(out.loss, scaler, ctx)
        info, scaler = faccel.optimizer_step(opt, scaler, ctx, clip_norm=0.1)
        norms.append(info.grad_norm.item())
    return Trained(losses, norms, {n: full(p) for n, p in model.named_parameters()}, out, model)


def assert_same_training(got, expected, atol=1e-6):
    """Compare losses, gradient norms and parameters of two runs.

    `atol` is not 1e-12: some models compute parts in fp32 in any dtype, and the first update of
    Adam is `lr * grad / abs(grad)`, which magnifies the rounding of small gradients.
    """
    values = zip(got.losses + got.norms, expected.losses + expected.norms, strict=True)
    assert max(abs(a - b) for a, b in values) < atol
    assert got.params.keys() == expected.params.keys()
    for name, param in expected.params.items():
        assert (got.params[name] - param).abs().max() < atol, name
