"""Values that the commands' parsers must refuse, generated for every option of every command.

The parsers are walked, so that a new option is covered at once: numbers by their bounds, choices, switches, options
that lack their value, misspelt names. All is refused before anything is opened, loaded or said. Texts, whose
meaning the parsers do not know, are in `test_bad_paths.py`.
"""

import argparse
import inspect
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from types import ModuleType
from typing import NamedTuple

import pytest

import detect
import export
import serve
import train
import val

SCRIPTS = (train, val, detect, export, serve)
FEWEST_CASES = 700  # a generator that goes empty shall be noticed
LONGEST_READ = 4300  # digits: Python reads no longer ones as a whole number
LARGEST_INT = 2**31 - 1  # what options without a maximum take: libraries overflow beyond
LARGEST_FLOAT = Decimal("1.7e308")

NUMBERS = {
    "nan": "nan",
    "infinite": "inf",
    "minus infinite": "-inf",
    "minus one": "-1",
    "zero": "0",
    "beyond integers": "1e99",
    "beyond floats": "1e999",
    "a fraction": "1.5",
    "hexadecimal": "0x10",
    "a word": "many",
    "empty": "",
    "blank": " ",
    "with a unit": "640px",
    "a percentage": "50%",
    "decimal comma": "0,5",
    "two in one": "640 640",
    "full-width digits": "９９９９９９９９９９９",
    "a null byte": "1\0",
    "5,000 digits": "9" * 5000,
    "5,000 letters": "n" * 5000,
}


class Bounds(NamedTuple):
    """What a number option takes."""

    kind: type
    minimum: float | None
    maximum: float | None
    besides: frozenset[str] = frozenset()  # texts that it takes, too


class Case(NamedTuple):
    """A command line to be refused, and what the message must name."""

    kind: str
    script: ModuleType
    label: str
    arguments: tuple[str, ...]
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.script.__name__}{self.label}"


# Types that are not made by `utils.cli.number`: what they take is told here.
OWN_TYPES = {int: Bounds(int, None, None), train._batch_size: Bounds(int, 1, LARGEST_INT, frozenset({"-1"}))}


def bounds_of(action: argparse.Action) -> Bounds:
    """What an option with a type takes, as it was declared."""
    if action.type in OWN_TYPES:
        return OWN_TYPES[action.type]
    declared = inspect.getclosurevars(action.type).nonlocals if inspect.isfunction(action.type) else {}
    assert {"kind", "minimum", "maximum"} <= set(declared), f"{flag(action)}: tell in OWN_TYPES what its type takes"
    return Bounds(declared["kind"], declared["minimum"], declared["maximum"])


def is_legal(text: str, bounds: Bounds) -> bool:
    """The rule by which values are left out: a decimal number in the option's bounds is to be taken.

    Digits of other scripts are digits, as for Python: `８` typed in full width means 8. -1 means "as much as fits"
    where the option says so, and "never" where its minimum is -1.
    """
    digits = unicodedata.normalize("NFKC", text)
    if digits in bounds.besides:
        return True
    form = r"-?\d+" if bounds.kind is int else r"-?\d+(\.\d+)?(e-?\d+)?"
    if not re.fullmatch(form, digits) or (bounds.kind is int and len(digits) > LONGEST_READ):
        return False
    value = Decimal(digits)
    above = bounds.minimum is None or value >= Decimal(str(bounds.minimum))
    return above and value <= (LARGEST_FLOAT if bounds.maximum is None else Decimal(str(bounds.maximum)))


def actions_of(script: ModuleType) -> list[argparse.Action]:
    return [action for action in script.build_parser()._actions if action.dest != "help"]


def flag(action: argparse.Action) -> str:
    return action.option_strings[0]


def is_switch(action: argparse.Action) -> bool:
    return action.nargs == 0


def around(bounds: Bounds) -> Iterator[tuple[str, str]]:
    """Values just outside the bounds."""
    step = 1 if bounds.kind is int else 0.001
    if bounds.minimum is not None:
        yield "below its minimum", str(bounds.minimum - step)
    if bounds.maximum is not None:
        yield "above its maximum", str(bounds.maximum + step)


def typed(option: str, text: str) -> tuple[str, ...]:
    """An option and its value; joined where the value would pass for another option."""
    return (f"{option}={text}",) if text.startswith("-") else (option, text)


def number_texts(action: argparse.Action) -> dict[str, str]:
    return {**NUMBERS, **dict(around(bounds_of(action)))}


def numbers(script: ModuleType, action: argparse.Action) -> Iterator[Case]:
    """All numbers that the option must refuse; where it takes several, behind a good one as well."""
    if action.type is None:
        return
    bounds = bounds_of(action)
    for label, text in number_texts(action).items():
        if is_legal(text, bounds):
            continue
        yield Case("numbers", script, f" {flag(action)} {label}", typed(flag(action), text), (flag(action),))
        if action.nargs == "+":
            named = text if text == "-inf" else flag(action)  # argparse takes it for an option of its own
            line = (flag(action), str(bounds.minimum), text)
            yield Case("numbers", script, f" {flag(action)} good and {label}", line, (named,))


def choices(script: ModuleType, action: argparse.Action) -> Iterator[Case]:
    """Words that are none of the option's; the message lists those that are."""
    if not action.choices:
        return
    known = list(action.choices)
    wrong = {"empty": "", "a word": "best", "two": ",".join(known[:2]), "a number": "1", "5,000 letters": "n" * 5000}
    wrong |= {f"{choice} in the other case": choice.swapcase() for choice in known}
    wrong |= {f"{choice} and a letter": f"{choice}x" for choice in known}
    wrong |= {f"{choice} and a blank": f"{choice} " for choice in known}
    for label, text in wrong.items():
        if text not in known:
            line = (flag(action), text)
            yield Case("choices", script, f" {flag(action)} {label}", line, (flag(action), *map(str, known)))


def switches(script: ModuleType, action: argparse.Action) -> Iterator[Case]:
    """Values for options that take none."""
    if not is_switch(action):
        return
    for label, text in {"true": "True", "zero": "0", "empty": ""}.items():
        yield Case("switches", script, f" {flag(action)}={label}", (f"{flag(action)}={text}",), (flag(action),))


def missing_values(script: ModuleType, action: argparse.Action) -> Iterator[Case]:
    """The option alone, at the end and before another one, where it must have a value."""
    if is_switch(action) or action.nargs == "?":
        return
    for label, rest in {"alone": (), "before another option": ("--half",)}.items():
        yield Case("missing values", script, f" {flag(action)} {label}", (flag(action), *rest), (flag(action),))


def misspelt(script: ModuleType, action: argparse.Action) -> Iterator[Case]:
    """The option with two letters exchanged: the message names it and the right one."""
    name = flag(action)
    places = [at for at in range(2, len(name) - 1) if name[at] != name[at + 1]]
    wrong = next(name[:at] + name[at + 1] + name[at] + name[at + 2 :] for at in reversed(places))
    options = [option for each in actions_of(script) for option in each.option_strings]
    if action.help == argparse.SUPPRESS or any(option.startswith(wrong) for option in options):
        return  # for launchers, not for people; or what is left is a short form of another option
    yield Case("misspelt names", script, f" {wrong}", (wrong,), (wrong, "Did you mean", f"'{name}'"))


KINDS = (numbers, choices, switches, missing_values, misspelt)
CASES = [case for script in SCRIPTS for action in actions_of(script) for kind in KINDS for case in kind(script, action)]


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    return tmp_path_factory.mktemp("empty")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_refused_in_words_before_anything_else(case, command, empty, monkeypatch):
    monkeypatch.chdir(empty)
    known = () if case.kind == "misspelt names" else ("--weights", "gone.pt")
    outcome = command(case.script, *known, *case.arguments)
    assert outcome.status == 2, outcome.said
    outcome.assert_refused(*case.words)
    assert outcome.said.startswith(f"{outcome.prog}: error: "), "something was done before"
    assert f"See {outcome.prog} --help" in outcome.said
    assert not os.listdir(empty)


def test_every_option_of_every_command_is_covered():
    """A text option that nothing is generated for here is refused without its value; its values are elsewhere."""
    assert len(CASES) >= FEWEST_CASES, Counter(case.kind for case in CASES)
    said = {(case.script, case.words[0]) for case in CASES if case.kind != "misspelt names"}
    options = {(script, flag(action)) for script in SCRIPTS for action in actions_of(script)}
    only_optional = {(train, "--resume")}  # stands alone or with a file: no parser can refuse either
    assert options - said == only_optional
    assert {case.kind for case in CASES} == {"numbers", "choices", "switches", "missing values", "misspelt names"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_what_the_rule_leaves_out_is_taken(script):
    """Else the rule could hide a refusal that people would meet."""
    taken = 0
    for action in actions_of(script):
        if action.type is None:
            continue
        bounds = bounds_of(action)
        inside = {str(edge) for edge in (bounds.minimum, bounds.maximum) if edge is not None}
        for text in sorted({*number_texts(action).values(), *inside}):
            if is_legal(text, bounds):
                options = script.build_parser().parse_args([*typed(flag(action), text)])
                value = getattr(options, action.dest)
                number = value[0] if isinstance(value, list) else value
                assert isinstance(number, bounds.kind)
                assert number == pytest.approx(float(unicodedata.normalize("NFKC", text)))
                taken += 1
    assert taken > 10
