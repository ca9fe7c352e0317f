"""Rewrites one script of Accelerate."""

from __future__ import annotations

import warnings

import attrs
import libcst as cst

from faccel.errors import ConfigError, short_text
from faccel.migration.imports import rewrite_imports
from faccel.migration.local_names import LocalNameRemover
from faccel.migration.loops import LoopRewriter
from faccel.migration.members import MemberRewriter
from faccel.migration.one_line import OneLineSplitter
from faccel.migration.placement import Placement
from faccel.migration.read_facts import read_facts
from faccel.migration.report import Report


@attrs.frozen
class Migration:
    """A rewritten script.

    Args:
        code: The new script; equal to the old one if it does not use accelerate.
        converted: Number of calls and attributes of accelerate that were replaced.
        unconverted: Number of those that stay, each with a comment `# faccel: not converted: ...`.
        notes: All comments that were added.
    """

    code: bytes
    converted: int
    unconverted: int
    notes: tuple[str, ...]


def migrate_script(source: bytes) -> Migration:
    """Rewrite a script of Accelerate to faccel.

    Effects: pure.

    Args:
        source: The script, in the encoding that it declares.

    Raises:
        libcst.ParserSyntaxError: It is no valid Python.
        ConfigError: The new script would be no valid Python.

    Examples:
        >>> script = b"accelerator = Accelerator(cpu=True)\\nprint(accelerator.device)\\n"
        >>> print(migrate_script(b"from accelerate import Accelerator\\n" + script).code.decode())
        import faccel
        ctx = faccel.init(device="cpu")
        print(ctx.device)
        <BLANKLINE>
    """
    module = cst.parse_module(source)
    facts = read_facts(module)
    report = Report()
    if not facts.imported and not facts.accelerators and not facts.accelerator_attributes:
        return Migration(source, 0, 0, ())
    module = module.visit(LocalNameRemover(facts))
    module = module.visit(OneLineSplitter(facts))
    # Loops first: what a call becomes depends on the loop around it.
    module = module.visit(LoopRewriter(facts, report))
    members = MemberRewriter(facts, report)
    module = module.visit(members)
    module = module.visit(Placement(facts, report, members.creation.scaler_arguments()))
    module = rewrite_imports(module, facts)
    _check_valid(source, module.bytes)
    return Migration(module.bytes, report.converted, report.unconverted, tuple(report.notes))


def _check_valid(source: bytes, code: bytes) -> None:
    """Raise if the new script does not compile, and the old one does.

    Raises:
        ConfigError: The new script would be no valid Python.
    """
    # libcst builds trees that the compiler refuses, such as two parameters with one name.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in the user's strings
        try:
            compile(code, "script", "exec", dont_inherit=True)
        except SyntaxError as error:
            compile(source, "script", "exec", dont_inherit=True)
            raise ConfigError(
                "the script cannot be rewritten: the result would be no valid Python",
                got=f"{error.msg} in line {error.lineno}: {short_text(error.text or '')}",
                fix="rename the variables in this line, and run `faccel migrate` again",
            ) from None
