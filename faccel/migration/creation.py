"""`Accelerator(...)` with its arguments becomes `faccel.init(...)` and arguments of other calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import libcst as cst

from faccel.migration.facts import Facts
from faccel.migration.fp8_options import transformer_engine_code
from faccel.migration.report import Report
from faccel.migration.syntax import arguments, call_code, callee_name, text_of

# Arguments of `Accelerator` without an equal, and where the docs have what replaces them.
_ELSEWHERE = {
    "deepspeed_plugin": '`faccel.init(strategy="deepspeed")`; see docs/deepspeed.md',
    "deepspeed_plugins": '`faccel.init(strategy="deepspeed")`; see docs/deepspeed.md',
    "dynamo_backend": '`faccel.Plan(compile="whole")`; see docs/parallelism.md',
    "dynamo_plugin": '`faccel.Plan(compile="whole")`; see docs/parallelism.md',
    "fsdp_plugin": '`faccel.init(mesh="dp_shard=-1")`; see docs/parallelism.md',
    "megatron_lm_plugin": '`faccel.init(mesh="tp=2,pp=2")`; see docs/parallelism.md',
    "parallelism_config": '`faccel.init(mesh="tp=2")`; see docs/parallelism.md',
    "torch_tp_plugin": '`faccel.init(mesh="tp=2")`; see docs/parallelism.md',
}
_RENAMED = {
    "device_placement": "device_placement",
    "gradient_accumulation_steps": "grad_accum",
    "mixed_precision": "mixed_precision",
    "project_dir": "run_dir",
}
# These change nothing here: `log_with` is read where the trackers start, and the others are
# arguments of other calls, or of a kind that faccel does not need.
_READ_ELSEWHERE = (
    "dataloader_config",
    "dispatch_batches",
    "even_batches",
    "kwargs_handlers",
    "log_with",
    "rng_types",
    "split_batches",
    "step_scheduler_with_optimizer",
)
# Records whose options are arguments of `wrap` and `init_scaler`.
_CONVERTED_HANDLERS = ("DistributedDataParallelKwargs", "GradScalerKwargs", "TERecipeKwargs")
_LOADER_OPTIONS = ("split_batches", "dispatch_batches", "even_batches")
_EVEN_BATCHES = (
    '`tail="pad"` repeats fewer samples than `even_batches=True`, so the last batch is shorter; '
    'pass `tail="full"` for batches of one size'
)
_NO_DIFFERENCE = ("use_seedable_sampler", "use_stateful_dataloader")


class Creation:
    """Reads the arguments of `Accelerator`.

    Args:
        facts: About the script.
        report: Counts.
    """

    def __init__(self, facts: Facts, report: Report) -> None:
        self._facts = facts
        self._report = report
        self._converters: dict[str, Callable[[cst.BaseExpression], list[str]]] = {
            "cpu": self._cpu,
            "gradient_accumulation_plugin": self._accumulation,
            "kwargs_handlers": self._handlers,
            "project_config": self._project,
        }

    def init_call(self, call: cst.Call) -> str:
        """Return the code of `faccel.init` for a call of `Accelerator`."""
        args: list[str] = []
        options = arguments(call, ("device_placement", "split_batches", "mixed_precision"))
        for name, arg in options.items():
            args += self._init_argument(name, arg)
        self._report.convert()
        return call_code("faccel.init", args)

    def _init_argument(self, name: str, arg: cst.Arg) -> list[str]:
        code = text_of(arg.value)
        if name in _RENAMED:
            return [f"{_RENAMED[name]}={code}"]
        if name in self._converters:
            return self._converters[name](arg.value)
        if name.startswith("*"):
            self._report.refuse("`Accelerator` with `**` arguments", "docs/configuration.md")
        elif name not in _READ_ELSEWHERE:
            fix = _ELSEWHERE.get(name, "docs/configuration.md")
            self._report.refuse(f"`{name}={code}`", fix)
        return []

    def _cpu(self, value: cst.BaseExpression) -> list[str]:
        code = text_of(value)
        if code == "True":
            return ['device="cpu"']
        return [f'device="cpu" if {code} else None']

    def _record(self, value: cst.BaseExpression) -> Mapping[str, cst.Arg] | None:
        """Return the arguments of a record of Accelerate, also through a variable."""
        params = ("num_steps",) if "ccumulation" in text_of(value) else ("project_dir",)
        if isinstance(value, cst.Call):
            return arguments(value, params)
        assigned = self._facts.assigned.get(text_of(value), ())
        for other in assigned:
            if isinstance(other, cst.Call):
                if callee_name(other).endswith("Plugin"):
                    params = ("num_steps",)
                return arguments(other, params)
        return None

    def _accumulation(self, value: cst.BaseExpression) -> list[str]:
        record = self._record(value)
        if record is None or "num_steps" not in record:
            self._report.refuse("`gradient_accumulation_plugin`", "docs/accumulation.md")
            return []
        for name in record:
            if name != "num_steps":
                self._report.refuse(f"`{name}` of the plugin", "docs/accumulation.md")
        return [f"grad_accum={text_of(record['num_steps'].value)}"]

    def _project(self, value: cst.BaseExpression) -> list[str]:
        record = self._record(value)
        if record is None:
            self._report.refuse("`project_config`", "docs/logging.md")
            return []
        folder = record.get("logging_dir") or record.get("project_dir")
        return [] if folder is None else [f"run_dir={text_of(folder.value)}"]

    def _handlers(self, value: cst.BaseExpression) -> list[str]:
        args: list[str] = []
        for name, record in self._handler_records(value).items():
            if name == "InitProcessGroupKwargs" and "timeout" in record:
                args.append(f"timeout_s=({text_of(record['timeout'].value)}).total_seconds()")
            elif name not in _CONVERTED_HANDLERS:
                self._report.refuse(f"`{name}`", "docs/training-loop.md#mixed-precision")
        return args

    def _handler_records(
        self, value: cst.BaseExpression | None = None
    ) -> dict[str, Mapping[str, cst.Arg]]:
        """Return the arguments of each record in `kwargs_handlers`, by its class."""
        if value is None and "kwargs_handlers" in self._facts.creation:
            value = self._facts.creation["kwargs_handlers"].value
        if not isinstance(value, cst.List | cst.Tuple):
            return {}
        records: dict[str, Mapping[str, cst.Arg]] = {}
        for element in value.elements:
            for call in [element.value, *self._facts.assigned.get(text_of(element.value), ())]:
                if isinstance(call, cst.Call):
                    records[callee_name(call)] = arguments(call, ("timeout",))
        return records

    def plan_argument(self) -> str:
        """Return `, plan=...` for `wrap`, from the options of DDP and fp8; "" without them."""
        records = self._handler_records()
        args: list[str] = []
        ddp = self._ddp_options(records.get("DistributedDataParallelKwargs", {}))
        if ddp:
            args.append(f"ddp=faccel.parallel.DdpConfig({', '.join(ddp)})")
        if "TERecipeKwargs" in records:
            args.append(f"fp8={transformer_engine_code(records['TERecipeKwargs'], self._report)}")
        if not args:
            return ""
        return f", plan=faccel.Plan({', '.join(args)})"

    def _ddp_options(self, options: Mapping[str, cst.Arg]) -> list[str]:
        args: list[str] = []
        for name, arg in options.items():
            code = text_of(arg.value)
            is_hook = name in ("comm_hook", "comm_wrapper")
            hook = code.rpartition("DDPCommunicationHookType.")[2].lower()
            if is_hook and hook == "no":
                continue
            is_constant = name == "comm_hook" and "DDPCommunicationHookType." in code
            if is_constant:
                args.append(f'comm_hook="{hook}"')
            elif is_hook or name.startswith(("*", "comm_state")):
                self._report.refuse(f"`{name}={code}` of DDP", "docs/parallelism.md")
            else:
                args.append(f"{name}={code}")
        return args

    def scaler_arguments(self) -> str:
        """Return `, init_scale=...` for `init_scaler`; "" without `GradScalerKwargs`."""
        options = self._handler_records().get("GradScalerKwargs", {})
        return "".join(f", {name}={text_of(arg.value)}" for name, arg in options.items())

    def loader_arguments(self) -> str:
        """Return the options of loaders for `shard`: `, split_batches=True` and others."""
        options: dict[str, str] = {}
        for name, arg in self._facts.creation.items():
            if name in _LOADER_OPTIONS:
                options[name] = text_of(arg.value)
        config = self._facts.creation.get("dataloader_config")
        record = None if config is None else self._record(config.value)
        for name, arg in (record or {}).items():
            options[name] = text_of(arg.value)
        return "".join(self._loader_argument(name, code) for name, code in options.items())

    def _loader_argument(self, name: str, code: str) -> str:
        if name in ("split_batches", "non_blocking"):
            return f", {name}={code}"
        if name == "data_seed":
            return f", seed={code}"
        if name in _NO_DIFFERENCE or code in ("None", "project_dir"):
            return ""
        if (name, code) == ("even_batches", "True"):
            # No `tail` is Accelerate's on every number of processes: it repeats nothing on one, as
            # "pad", and fills batches on several, as "full". `gather` leaves repeats out of both.
            self._report.note(_EVEN_BATCHES)
        values = {("even_batches", "False"): 'tail="uneven"', ("even_batches", "True"): ""}
        values[("dispatch_batches", "True")] = 'mode="dispatch"'
        values[("dispatch_batches", "False")] = ""
        argument = values.get((name, code))
        if argument is None:
            self._report.refuse(f"`{name}={code}` of the loaders", "docs/data.md")
        return f", {argument}" if argument else ""

    def tracker_names(self) -> str:
        """Return the code of `trackers=` for `init_trackers`."""
        log_with = self._facts.creation.get("log_with")
        if log_with is None:
            return "()"
        value = log_with.value
        code = text_of(value)
        if isinstance(value, cst.SimpleString):
            return '("jsonl", "csv", "tensorboard")' if code.strip("\"'") == "all" else f"({code},)"
        if isinstance(value, cst.List | cst.Tuple):
            return code
        self._report.note(f'`{code}` must be a tracker of faccel, such as "tensorboard"')
        return f"[{code}]"
