"""The functional core: training as pure functions over values."""

from faccel.func.compile import compiled
from faccel.func.curvature import hessian_vector_product, sam, sharpness
from faccel.func.ensembles import ensemble, stack, unstack
from faccel.func.functional_call import functional_call
from faccel.func.gradient_function import value_and_grad
from faccel.func.gradient_transformation import (
    GradientTransformation,
    Role,
    Updates,
    apply_updates,
    chain,
)
from faccel.func.maml import adapt, maml
from faccel.func.masking import frozen, masked, partition
from faccel.func.matrix_optimizers import adafactor, muon
from faccel.func.optimizers import adagrad, adam, adamw, rmsprop, sgd
from faccel.func.per_sample import clip_per_sample, dp_sgd, per_sample_grads
from faccel.func.replay import replay
from faccel.func.rollback import History, is_nonfinite, rollback
from faccel.func.schedules import cosine, exponential, join_schedules, linear
from faccel.func.spike import SpikeState, detect_spike, init_spike
from faccel.func.train_state import TrainState, init_state, merge
from faccel.func.train_step import make_step
from faccel.func.transforms import (
    accumulate,
    clip_by_global_norm,
    clip_by_value,
    ema,
    ema_params,
    global_norm,
    scale_by_schedule,
    skip_nonfinite,
)

__all__ = [
    "GradientTransformation",
    "History",
    "Role",
    "SpikeState",
    "TrainState",
    "Updates",
    "accumulate",
    "adafactor",
    "adagrad",
    "adam",
    "adamw",
    "adapt",
    "apply_updates",
    "chain",
    "clip_by_global_norm",
    "clip_by_value",
    "clip_per_sample",
    "compiled",
    "cosine",
    "detect_spike",
    "dp_sgd",
    "ema",
    "ema_params",
    "ensemble",
    "exponential",
    "frozen",
    "functional_call",
    "global_norm",
    "hessian_vector_product",
    "init_spike",
    "init_state",
    "is_nonfinite",
    "join_schedules",
    "linear",
    "make_step",
    "maml",
    "masked",
    "merge",
    "muon",
    "partition",
    "per_sample_grads",
    "replay",
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
