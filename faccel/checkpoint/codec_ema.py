"""Codec of `EmaState`: averages are stored by name, in the layout of each rank."""

from __future__ import annotations

from collections.abc import Mapping

from faccel.checkpoint.codec import Codec, Decoder, Encoder, Node, Restore, mismatch, restore_all
from faccel.checkpoint.tensor_names import child_name, name_difference
from faccel.training.ema import EmaState, Lineage, check_current
from faccel.tree import Tree


def _is_ema(value: object) -> bool:
    return isinstance(value, EmaState)


def _encode_ema(value: EmaState, path: str, encoder: Encoder) -> Node:
    # Inside `ema_weights` the model would be stored with the averages as its parameters.
    check_current(value)
    averages = encoder.encode(dict(value.averages), path)
    options = {"decay": value.decay, "warmup": value.warmup, "buffers": value.buffers}
    return {"!": "ema", "v": averages, "num_updates": value.num_updates, "options": options}


def _decode_ema(node: Node, target: Tree, path: str, decoder: Decoder) -> Restore:
    if not isinstance(target, EmaState):
        got = f"averages in the checkpoint, {type(target).__name__} in the state"
        raise mismatch(path, got, "pass the result of `faccel.parallel.init_ema(model, ctx)`")
    nodes: Mapping[str, Node] = node["v"]
    averages = target.averages
    # In a pipeline the checkpoint has the parameters of all stages.
    if decoder.is_pipeline:
        unknown = nodes.keys() - averages.keys()
        decoder.unexpected |= {child_name(path, name) for name in unknown}
    is_known = decoder.is_pipeline or nodes.keys() <= averages.keys()
    if not (averages.keys() <= nodes.keys() and is_known):
        got = name_difference(nodes.keys(), averages.keys())
        raise mismatch(path, got, "average the same parameters of the model that was saved")
    restores: dict[str, Restore] = {}
    for name, average in averages.items():
        stored = decoder.stored(child_name(path, name))
        if stored.shape != average.shape:
            got = f"{list(stored.shape)} in the checkpoint, {list(average.shape)} in the state"
            raise mismatch(child_name(path, name), got, "build the model that was saved")
        restores[name] = decoder.decode(nodes[name], average, child_name(path, name))
    num_updates: int = node["num_updates"]
    options: dict[str, Tree] = node["options"]

    def restore() -> EmaState:
        return EmaState(
            averages=restore_all(restores),
            num_updates=num_updates,
            lineage=Lineage(num_updates),
            **options,
        )

    return restore


EMA = Codec(("ema",), _is_ema, _encode_ema, _decode_ema, is_strict=True)
