"""The functional core: training as pure functions over values."""

from faccel.func.call import call
from faccel.func.compiling import compiled
from faccel.func.curvature import hessian_vector_product, sam, sharpness
from faccel.func.ensembles import ensemble, stack, unstack
from faccel.func.gates import (
    accumulate,
    averages,
    clip_by_global_norm,
    clip_by_value,
    ema,
    global_norm,
    scale_by_schedule,
    skip_nonfinite,
)
from faccel.func.grad import value_and_grad
from faccel.func.history import History, is_nonfinite, rollback
from faccel.func.meta import adapt, meta
from faccel.func.optimizers import adafactor, adagrad, adam, adamw, muon, rmsprop, sgd
from faccel.func.per_sample import clip_per_sample, dp_sgd, per_sample_grads
from faccel.func.schedules import cosine, exponential, join, linear
from faccel.func.state import TrainState, init_state, merge
from faccel.func.step import make_step
from faccel.func.transform import (
    GradientTransformation,
    Updates,
    apply_updates,
    chain,
    frozen,
    masked,
    partition,
)

__all__ = [
    "GradientTransformation",
    "History",
    "TrainState",
    "Updates",
    "accumulate",
    "adafactor",
    "adagrad",
    "adam",
    "adamw",
    "adapt",
    "apply_updates",
    "averages",
    "call",
    "chain",
    "clip_by_global_norm",
    "clip_by_value",
    "clip_per_sample",
    "compiled",
    "cosine",
    "dp_sgd",
    "ema",
    "ensemble",
    "exponential",
    "frozen",
    "global_norm",
    "hessian_vector_product",
    "init_state",
    "is_nonfinite",
    "join",
    "linear",
    "make_step",
    "masked",
    "merge",
    "meta",
    "muon",
    "partition",
    "per_sample_grads",
    "rmsprop",
    "rollback",
    "sam",
    "scale_by_schedule",
    "sgd",
    "sharpness",
    "skip_nonfinite",
    "stack",
    "unstack",
    "value_and_grad",
]
