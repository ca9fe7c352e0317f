"""Answer a list of prompts on all processes, and collect the answers in order.

python examples/inference.py
torchrun --nproc-per-node 2 examples/inference.py
"""

import torch
from torch import nn

import faccel

PROMPTS = [f"{a}+{b}=" for a in range(7) for b in range(7)]  # 49: not divisible by 2 or 3 ranks


def solution(prompt):
    return eval(prompt.rstrip("="))


class Model(nn.Module):
    """Stands for a language model: its answers have different lengths."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def generate(self, prompts):
        """Return `int64[n, longest]` character codes, padded with 0."""
        answers = [str(int(solution(prompt) * self.weight)) for prompt in prompts]
        codes = [torch.tensor(list(answer.encode())) for answer in answers]
        return nn.utils.rnn.pad_sequence(codes, batch_first=True)


def main(ctx):
    model = faccel.wrap(Model(), ctx)
    model.eval()

    # Each process takes its slice of the prompts. `pad=True` would make all slices equally long.
    prompts = faccel.split(PROMPTS, ctx)
    with torch.no_grad():
        codes = model.call("generate", prompts)

    # The slices differ in rows, the answers in length: pad the length, then gather the rows.
    codes = faccel.comm.pad_across(codes, ctx, dim=1)
    all_codes = faccel.gather(codes, ctx, ragged=True)
    answers = [bytes(row[row > 0].tolist()).decode() for row in all_codes]

    # Python objects travel without tensors.
    reports = faccel.gather_objects(f"process {ctx.rank} answered {len(prompts)}", ctx)
    for report in reports:
        faccel.print(report, ctx=ctx)

    num_correct = 0
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        num_correct += answer == str(solution(prompt))
    faccel.print(f"accuracy {num_correct / len(PROMPTS):.4f}", ctx=ctx)


if __name__ == "__main__":
    with faccel.init() as ctx:
        main(ctx)
