"""The words that the glossary replaces, over code and Markdown."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FOLDERS = ("faccel", "tests", "examples", "benchmarks", "docs")

# A pattern, and what to write instead. `_` counts as a space: names of tests are read, too.
BANNED = {
    r"machines?\b(?! learning)": "node",
    r"data sets?": "dataset",
    r"(go|goes|going|went|gone) on": "continue, resume",
    r"(some|no|every|any)body": "a rank, each rank, the other ranks",
    r"whoever|whatever it is": "the rank that ...",
    r"say|says|said|saying|tell|tells|told|telling|hear|hears|heard": "raise, report, print, log",
    r"knows|wants|wanted|wishes": "stores, expects, requires",
    r"saw": "got",
    r"mend|mends|mended": "fix",
    r"of (ours|theirs|yours|its own|your own|their own|a rank's own)": "the library's, the user's",
    r"(torch|pytorch|ddp|gloo|fsdp|fsdp2|deepspeed)'s own": "PyTorch's",
    r"recompute[sd]?|computed again|computes again": "activation checkpointing",
    r"whereabouts": "call site",
    r"(come|comes|coming|came) together": "rendezvous",
    r"cannot be(?=[.,;:`\"')]|$)": "is invalid, is unsupported",
    r"(is|are|was|were) not there|not there(?=[.,;:`\"')]|$)": "is missing, is not installed",
    r"behind": "after",
    r"alike": "replicated, equally, in the same way",
    r"meant": "intended, stands for",
    r"no such thing": "unknown",
    r"(shares?|shared|sharing) (its |their |the |all )?parameters": "sharded parameters",
    r"spread over": "sharded over",
    r"(lies|lie|lay) (on|as|in|over|there|here)": "is stored",
    r"is given by|is that of": "must be, expects",
    r"in whole|as a whole": "full",
    r"nothing happens": "state what raises or returns",
    r"lets go|let go": "releases, drops",
    r"hands? (over|out|down)": "passes",
    r"walks? (over|through)": "iterates",
}
# Names of other libraries.
ALLOWED = ("platform.machine", "num_machines", "machine_rank", "LOCAL_MACHINE", "PREFER_RECOMPUTE")
ALLOWED += tuple(  # flags of Megatron-LM
    f"recompute{mark}{name.replace('_', mark)}"
    for name in ("activations", "granularity", "method", "num_layers")
    for mark in "-_"
)


def texts():
    for folder in FOLDERS:
        for suffix in ("*.py", "*.md"):
            yield from sorted((ROOT / folder).rglob(suffix))
    yield from sorted(ROOT.glob("*.md"))


@pytest.mark.parametrize("word", BANNED)
def test_the_glossary_replaces(word):
    pattern = re.compile(rf"\b({word})\b" if word[-1] not in ")$" else rf"\b({word})", re.I)
    hits = []
    for path in texts():
        if path == pathlib.Path(__file__):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for name in ALLOWED:
                line = line.replace(name, "")
            if pattern.search(line.replace("_", " ")):
                hits.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not hits, f"write {BANNED[word]!r} instead:\n" + "\n".join(hits)
