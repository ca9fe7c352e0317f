"""Draws the pictures of the site from the functions that they show: `python -m docs.pictures`.

The SVG files in `docs/pictures` are committed, so that the pages show them without a build. A test
compares them with what this module draws.
"""

import html
import json
import os
import pathlib
import re
import sys
import tempfile
import types

import attrs
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

import faccel
from docs import curves
from docs.svg import FILLS, STYLE, arrow, box, document, line, rect, text
from faccel.config_file import ConfigFile
from faccel.config_sources import LAUNCH, resolve
from faccel.data.order import Order, ShardPlan
from faccel.parallel.pipeline_schedules import KINDS
from faccel.testing import simulate

FOLDER = pathlib.Path(__file__).parent / "pictures"
RESULTS = pathlib.Path(__file__).parents[1] / "benchmarks" / "results"
REPEAT = FILLS[7]


# --- the order of samples


def data_order(num_samples=22, batch_size=2, num_ranks=3):
    """Draw the order of an epoch, and the batches that each rank reads of it."""
    order = Order(num_samples, seed=0, epoch=0, shuffle=True)
    samples = order.samples(np.arange(num_samples)).tolist()
    plans = [ShardPlan(num_samples, batch_size, r, num_ranks, "pad") for r in range(num_ranks)]
    owners = owners_of(plans, order)
    cell, left, top = 27, 96, 56
    shapes = [
        text(0, 18, "The order of epoch 0, a function of the seed and the epoch", "title"),
        text(0, top + 19, "position", "small"),
    ]
    for i, sample in enumerate(samples):
        shapes.append(text(left + i * cell + cell / 2, top - 8, i, "small", "middle"))
        shapes.append(box(left + i * cell, top, cell - 3, 28, sample, FILLS[owners[sample]]))
    top += 66
    shapes.append(text(0, top, f"What each of {num_ranks} ranks reads, batch by batch", "title"))
    for rank, plan in enumerate(plans):
        y = top + 20 + 40 * rank
        shapes.append(text(0, y + 19, f"rank {rank}"))
        x = left
        for step, batch in enumerate(plan.batches(order, 0)):
            num_valid = plan.num_valid(0, step)
            for row, sample in enumerate(batch.tolist()):
                fill = FILLS[rank] if row < num_valid else REPEAT
                shapes.append(box(x + row * cell, y, cell - 3, 28, sample, fill))
            x += batch_size * cell + 34
    for step in range(plans[0].num_steps(0)):
        x = left + step * (batch_size * cell + 34)
        shapes.append(text(x, top + 36 + 40 * num_ranks, f"step {step}", "small"))
    y = top + 64 + 40 * num_ranks
    shapes += [
        rect(left, y - 12, 16, 16, REPEAT),
        text(left + 24, y, "a repeat: not in `num_valid`"),
    ]
    return document("The order of samples over ranks", left + num_samples * cell, y + 12, shapes)


def owners_of(plans, order):
    """Return the rank that reads each sample, repeats left out."""
    owners = {}
    for rank, plan in enumerate(plans):
        for step, batch in enumerate(plan.batches(order, 0)):
            for sample in batch.tolist()[: plan.num_valid(0, step)]:
                owners[sample] = rank
    return owners


# --- meshes


def mesh(spec_text="pp=2,dp_shard=2,tp=2"):
    """Draw the ranks of a mesh: color is the data that a rank reads, a frame a stage."""
    spec = faccel.MeshSpec.parse(spec_text)
    width, height, left = 100, 54, 150
    shapes = [text(0, 18, f'mesh="{spec_text}", {spec.size} ranks', "title")]
    for stage in range(spec.pp):
        x0 = left + stage * (2 * width + 60)
        shapes.append(text(x0, 48, f"pp={stage}: {('first', 'last')[stage]} layers"))
        shapes.append(rect(x0 - 10, 58, 2 * width + 20, 2 * height + 56))
        for index in range(spec.tp):
            x = x0 + index * width + width / 2 - 6
            shapes.append(text(x, 78, f"tp={index}", "small", "middle"))
    for index in range(spec.dp_shard):
        shapes.append(text(0, 122 + index * (height + 12), f"dp_shard={index}"))
        shapes.append(text(0, 138 + index * (height + 12), "same samples", "small"))
    for rank in range(spec.size):
        at = spec.coordinates(rank)
        x = left + at["pp"] * (2 * width + 60) + at["tp"] * width
        y = 90 + at["dp_shard"] * (height + 12)
        shapes.append(box(x, y, width - 12, height, f"rank {rank}", FILLS[spec.data_rank(rank)]))
    rows = [row.split(None, 2) for row in spec.table().splitlines()]
    for i, (name, size, groups) in enumerate(rows):
        y = 262 + i * 20
        shapes.append(text(0, y, name, "code"))
        shapes.append(text(90, y, size, "code"))
        shapes.append(text(120, y, groups, "code"))
    shapes.append(text(0, 240, "axis or view, its size, and its groups of ranks", "small"))
    return document(
        "The ranks of a mesh", left + 2 * (2 * width + 60), 270 + 20 * len(rows), shapes
    )


# --- pipelines


class _Recorded(nn.Linear):
    """A stage that records its forwards and backwards as they run."""

    def __init__(self):
        super().__init__(1, 1)
        self.events = []

    def forward(self, x):
        number = sum(event[0] == "F" for event in self.events)
        self.events.append(("F", number))
        return _RecordBackward.apply(super().forward(x), self.events)


class _RecordBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, events):
        ctx.events = events
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        number = sum(event[0] == "B" for event in ctx.events)
        ctx.events.append(("B", number))
        return grad, None


def recorded_actions(schedule, num_ranks, num_micro_batches):
    """Run a schedule with one stage on each rank; return its actions `(kind, stage, number)`."""

    def run(ctx):
        # A pipeline runs its first forward of a shape once more, to check shapes: warm up.
        stages = [_Recorded() for _ in range(num_ranks)]
        chain = tuple(str(i) for i in range(num_ranks))
        pipeline = faccel.parallel.PipelineConfig(chain=chain, schedule=schedule)
        model = faccel.wrap(nn.Sequential(*stages), ctx, plan=faccel.Plan(pipeline=pipeline))
        loader = faccel.shard(DataLoader(torch.ones(num_micro_batches * 2, 1), 1), ctx)
        scaler = faccel.init_scaler(ctx)
        for window in faccel.windows(loader, ctx, size=num_micro_batches):
            stages[ctx.rank].events.clear()
            _, scaler = faccel.forward_backward(
                lambda model, batch: model(batch.data).mean(), model, window, scaler, ctx
            )
        return [(kind, ctx.rank, number) for kind, number in stages[ctx.rank].events]

    return list(simulate(run, num_ranks, mesh=f"pp={num_ranks}"))


def planned_actions(schedule, num_ranks, num_micro_batches, stages_per_rank):
    """Return the actions that a schedule of several stages on each rank will run."""
    actions = []
    for rank in range(num_ranks):
        num_stages = num_ranks * stages_per_rank
        stages = [
            types.SimpleNamespace(
                stage_index=index,
                num_stages=num_stages,
                group_rank=rank,
                group_size=num_ranks,
                is_first=index == 0,
                is_last=index == num_stages - 1,
                submod=nn.Identity(),
            )
            for index in range(rank, num_stages, num_ranks)
        ]
        made = KINDS[schedule].make(stages, num_micro_batches, None, scale_grads=False)
        order = [action for action in made.pipeline_order[rank] if action is not None]
        pairs = [re.fullmatch(r"(\d+)([FBIW])(\d+)", str(action)) for action in order]
        actions.append([(pair[2], int(pair[1]), int(pair[3])) for pair in pairs if pair])
    return actions


# A backward computes gradients of inputs and of parameters, each as long as a forward.
DURATIONS = {"F": 1, "B": 2, "I": 1, "W": 1}


def start_times(actions, num_stages):
    """Return when each action starts, if each begins as soon as its input has arrived."""
    ends = {}
    clocks = [0] * len(actions)
    starts = [[] for _ in actions]
    while any(len(starts[rank]) < len(rows) for rank, rows in enumerate(actions)):
        for rank, rows in enumerate(actions):
            while len(starts[rank]) < len(rows):
                kind, stage, number = rows[len(starts[rank])]
                needs = needed(kind, stage, number, num_stages)
                if any(need not in ends for need in needs):
                    break
                start = max([clocks[rank], *(ends[need] for need in needs)])
                starts[rank].append(start)
                clocks[rank] = start + DURATIONS[kind]
                ends["B" if kind == "I" else kind, stage, number] = clocks[rank]
    return starts


def needed(kind, stage, number, num_stages):
    """Return the actions whose results an action needs."""
    if kind == "F":
        return [("F", stage - 1, number)] if stage else []
    if kind == "W":
        return [("B", stage, number)]
    if stage == num_stages - 1:
        return [("F", stage, number)]
    return [("F", stage, number), ("B", stage + 1, number)]


def pipeline_schedule(num_ranks=4, num_micro_batches=8):
    """Draw the timelines of three schedules."""
    rows = [
        ("gpipe", recorded_actions("gpipe", num_ranks, num_micro_batches), 1),
        ("1f1b", recorded_actions("1f1b", num_ranks, num_micro_batches), 1),
    ]
    name = "interleaved-zero-bubble"
    rows.append((name, planned_actions(name, num_ranks, num_micro_batches, 2), 2))
    left, shapes, y = 60, [], 18
    for name, actions, stages_per_rank in rows:
        starts = start_times(actions, num_ranks * stages_per_rank)
        # One unit is a forward of all layers of a rank, however many stages they are.
        unit = 18 / stages_per_rank
        ends = [
            max(start) + DURATIONS[rank[-1][0]] for start, rank in zip(starts, actions, strict=True)
        ]
        busy = sum(DURATIONS[action[0]] for rank in actions for action in rank)
        idle = 1 - busy / (num_ranks * max(ends))
        shapes.append(text(0, y, f'schedule="{name}"', "title"))
        shapes.append(text(330, y, f"ranks wait {idle:.0%} of the time", "small"))
        for rank, rank_actions in enumerate(actions):
            top = y + 12 + 24 * rank
            shapes.append(text(0, top + 15, f"rank {rank}", "small"))
            for (kind, _, number), start in zip(rank_actions, starts[rank], strict=True):
                width = DURATIONS[kind] * unit
                fill = FILLS[{"F": 0, "B": 1, "I": 1, "W": 2}[kind]]
                label = number if width >= 14 else ""
                shapes.append(box(left + start * unit, top, width - 1, 21, label, fill))
        y += 24 * num_ranks + 44
    for i, label in enumerate(("forward", "backward", "gradients of parameters")):
        shapes.append(rect(left + 150 * i, y - 22, 16, 16, FILLS[i]))
        shapes.append(text(left + 150 * i + 24, y - 9, label))
    shapes.append(
        text(left, y + 12, f"{num_micro_batches} micro-batches, numbered from 0", "small")
    )
    return document("Timelines of pipeline schedules", 760, y + 24, shapes)


# --- a save


_HOOKS = []  # Python cannot remove an audit hook: it calls what is in this list


def _audit(event, args):
    for hook in _HOOKS:
        hook(event, args)


@attrs.frozen
class FileEvent:
    """One change of the folder of checkpoints.

    Args:
        what: The change, in words.
        loads: The newest checkpoint that loads if the process ends just before it.
    """

    what: str
    loads: str


def file_events():
    """Save at step 10 and 20 with `keep=1`; return the changes of the second save in order."""
    events = []
    with tempfile.TemporaryDirectory() as folder, faccel.init(env={}) as ctx:

        def record(event, args):
            what = describe(event, args, folder)
            if what:
                events.append(FileEvent(what, newest_checkpoint(folder)))

        faccel.save({"x": torch.ones(4)}, folder, ctx, step=10, keep=1)
        sys.addaudithook(_audit)
        _HOOKS.append(record)
        try:
            faccel.save({"x": torch.ones(4)}, folder, ctx, step=20, keep=1)
        finally:
            _HOOKS.clear()
        return [*events, FileEvent("the save has ended", newest_checkpoint(folder))]


def newest_checkpoint(folder):
    """Return the name of the newest folder with a manifest."""
    paths = sorted(pathlib.Path(folder).glob("step-*/manifest.json"))
    return paths[-1].parent.name if paths else "nothing"


def describe(event, args, folder):
    """Return a change of a folder in words; an empty text for any other event."""
    path = str(args[0]) if args else ""
    if not path.startswith(folder):
        return ""
    name = re.sub(r"-\w{8}$", "-...", pathlib.Path(path).name)
    if event == "open" and args[2] & os.O_CREAT:
        return f"write and fsync {name}"
    if event == "os.rename":
        target = re.sub(r"-\w{8}$", "-...", pathlib.Path(args[1]).name)
        return f"rename {name} to {target}"
    verbs = {"os.mkdir": "make", "os.rmdir": "delete"}
    return f"{verbs[event]} {name}" if event in verbs else ""


def checkpoint_commit():
    """Draw the changes of a save, and what loads if the process ends before each of them."""
    events = [event for event in file_events() if "lock" not in event.what]
    top, height = 66, 34
    shapes = [
        text(0, 18, "save(state, path, ctx, step=20, keep=1), after a save at step 10", "title"),
        text(40, 48, "changes on the disk, in this order", "small"),
        text(520, 48, "a crash before it leaves this checkpoint", "small"),
    ]
    for i, event in enumerate(events):
        y = top + i * height
        is_new = event.loads.endswith("20")
        shapes.append(text(40, y + 17, event.what, "code"))
        shapes.append(box(520, y, 150, 25, event.loads, FILLS[2 if is_new else 0]))
        if i:
            shapes.append(arrow(20, y - height + 16, 20, y + 8))
            if is_new and not events[i - 1].loads.endswith("20"):
                shapes.append(text(690, y - 12, "commit", "title"))
                shapes.append(line(520, y - 5, 680, y - 5))
    return document("What a save writes", 760, top + len(events) * height, shapes)


# --- configuration


def precedence():
    """Draw how the sources of a field replace each other."""
    file = ConfigFile("training.yaml", {"grad_accum": 2})
    env = {"FACCEL_GRAD_ACCUM": "4"}
    flags = env | {LAUNCH: json.dumps({"grad_accum": 8})}
    rows = [
        ("default", "", resolve()),
        ("file", "grad_accum: 2", resolve(file=file)),
        ("environment", "FACCEL_GRAD_ACCUM=4", resolve(file=file, env=env)),
        ("flag of faccel launch", "--grad-accum 8", resolve(file=file, env=flags)),
        (
            "argument of init",
            "init(grad_accum=16)",
            resolve(overrides={"grad_accum": 16}, file=file, env=env),
        ),
    ]
    shapes = [
        text(0, 18, "The strongest source of a field wins", "title"),
        text(0, 48, "weakest", "small"),
        text(190, 48, "what is written", "small"),
        text(400, 48, "grad_accum", "small"),
        text(490, 48, "config.sources", "small"),
    ]
    for i, (name, written, config) in enumerate(rows):
        y = 62 + 38 * i
        shapes.append(text(0, y + 18, name))
        shapes.append(text(190, y + 18, written, "code"))
        shapes.append(box(410, y, 48, 27, config.grad_accum, FILLS[i]))
        shapes.append(text(490, y + 18, config.sources["grad_accum"], "small"))
    y = 62 + 38 * len(rows)
    shapes.append(text(0, y + 8, "strongest", "small"))
    shapes.append(text(190, y + 8, "a flag and an argument that differ are an error", "small"))
    return document("Precedence of the configuration", 860, y + 18, shapes)


# --- benchmarks


def median(file, row, name, unit):
    """Return a median of a result file."""
    result = json.loads((RESULTS / f"{file}.json").read_text())
    return result["results"][row][name][unit]["median"]


def benchmarks():
    """Draw medians of faccel and its peers, read from the result files."""
    steps = ["torch", "faccel", "accelerate", "fabric"]
    groups = [
        (
            "one step of a tiny model, read item by item: microseconds",
            [(name, median("step", "read item by item", name, "us")) for name in steps],
        ),
        (
            "gather a dict of 20 tensors, 2 processes: milliseconds",
            [(name, median("gather", "time per call", name, "us") / 1e3) for name in steps[1:]],
        ),
        (
            "load 400 MB: milliseconds (only faccel verifies every byte)",
            [
                (name, median("checkpoint", "load", call, "ms"))
                for name, call in (
                    ("torch", "torch's dcp.load"),
                    ("faccel", "faccel.load"),
                    ("accelerate", "accelerate load_state"),
                )
            ],
        ),
    ]
    shapes, y = [], 18
    for title, bars in groups:
        shapes.append(text(0, y, title, "title"))
        largest = max(value for _, value in bars)
        for i, (name, value) in enumerate(bars):
            top = y + 12 + 26 * i
            shapes.append(text(0, top + 15, name))
            fill = FILLS[2] if name == "faccel" else FILLS[7]
            shapes.append(rect(100, top, 500 * value / largest, 20, fill))
            shapes.append(text(108 + 500 * value / largest, top + 15, f"{value:.3g}", "small"))
        y += 26 * len(bars) + 46
    return document("Medians of the benchmarks", 680, y - 20, shapes)


PICTURES = {
    "benchmarks": benchmarks,
    "checkpoint-commit": checkpoint_commit,
    "data-order": data_order,
    "mesh": mesh,
    "order-sizes": curves.order_sizes,
    "pipeline-schedule": pipeline_schedule,
    "precedence": precedence,
}


def inline(name, title):
    """Return a picture as HTML for the site, whose colors its style sheet sets."""
    content = (FOLDER / f"{name}.svg").read_text().replace(f"<style>{STYLE}</style>\n", "")
    return f'<div class="picture" title="{html.escape(title)}">{content.strip()}</div>'


def main():
    """Draw all pictures into `docs/pictures`."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw())


if __name__ == "__main__":
    main()
