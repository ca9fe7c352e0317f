"""Answer a list of prompts on every process, and put the answers back in order.

python examples/inference.py
torchrun --nproc-per-node 2 examples/inference.py
"""

import torch
from torch import nn

import faccel

PROMPTS = [f"{a}+{b}=" for a in range(7) for b in range(7)]  # 49: divides by nothing
LENGTH = 5  # characters of an answer, longest case


class Model(nn.Module):
    """Stands for one that generates: its answers have different lengths."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def generate(self, prompts):
        """Return `int64[n, longest]` character codes, padded with 0."""
        answers = [str(int(eval(p.rstrip("=")) * self.weight)) for p in prompts]
        return nn.utils.rnn.pad_sequence(
            [torch.tensor(list(a.encode())) for a in answers], batch_first=True
        )


def main(ctx):
    model = faccel.wrap(Model(), ctx)
    model.eval()

    # Each process takes its slice; `pad=True` would even them out with repeats.
    mine = faccel.split(PROMPTS, ctx)
    with torch.no_grad():
        codes = model.call("generate", mine)

    # Slices differ in rows, answers in length: pad the length, gather whatever number of rows there is.
    codes = faccel.comm.pad_across(codes, ctx, dim=1)
    everything = faccel.gather(codes, ctx, ragged=True)
    answers = [bytes(row[row > 0].tolist()).decode() for row in everything]

    # Text needs no tensor at all.
    told = faccel.gather_objects([f"process {ctx.rank} answered {len(mine)}"], ctx)
    for (line,) in told:
        faccel.print(line, ctx=ctx)
    right = sum(
        answer == str(eval(p.rstrip("="))) for p, answer in zip(PROMPTS, answers, strict=True)
    )
    faccel.print(f"accuracy {right / len(PROMPTS):.4f}", ctx=ctx)


if __name__ == "__main__":
    with faccel.init() as ctx:
        main(ctx)
