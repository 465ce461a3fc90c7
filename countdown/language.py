"""The trace language: its lexicon (text <-> ids) and its grammar (text <-> lines).

Lexicon. The language has a few dozen phrases and numbers, so the vocabulary is
written down, not learned:

  1. A phrase ("Exploring Operation: ", " unequal: No Solution\\n") is one token.
     A phrase may end with a newline but never spans one: every boundary the
     runtime cuts at (prompt, spawn block, join block) is the start of a line, so
     texts cut there can be encoded apart and the ids put together.
  2. Numbers below `number_limit` are one token each (10: digit by digit); longer
     strings of digits are split from the left into pieces that are.
  3. `encode` is one compiled regular expression, longest phrase first; a text
     has exactly one encoding, and text outside the language is an error. Ids that a
     model drew may decode to text with another encoding, or with none.

Grammar. A trace is a sequence of lines, each an instance of one template. `parse`
and `render` are inverse to each other and strict: what a model wrote either is a
sequence of such lines, to the byte, or is refused.

Deviation from the paper, which uses the 32k vocabulary of Llama 2: this one has
about 50 phrases, so that traces are several times shorter.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable

MAX_NUMBER_LIMIT = 100_000
PAD_ID = 0  # fills rows; decodes to nothing
END_ID = 1  # ends a thread; no text encodes to it

CALL_TEXT = "<Calling Sub Searches>\n"  # opens a spawn block
SPAWN_TEXT = "<End Calling Sub Searches>\n"  # closes it: the spawn token
JOIN_TEXT = "<Sub Searches>\n"  # opens a join block: the join token
GOAL_TEXT = " equal: Goal Reached\n"

PHRASES = (
    # punctuation of numbers, operations, nodes and states
    *("+", "-", "*", "/", "=", ",", ", ", ":", ":[", ": ", " ", "\n"),
    *("]\n", "], Operations: []\n", "], Operations: ['", "', '", "']\n", "] Operation: "),
    # search
    *("Current State: ", "Moving to Node #0", "Exploring Operation: ", ", Resulting Numbers: [", "Generated Node #0"),
    *(GOAL_TEXT, " unequal: No Solution\n", "No solution found.\n", "No solution found."),
    # search in place (SoS+)
    *("Start Sub Search at level ", ": Moving to Node #0", "Exit Sub Search at level "),
    "No solution found in sub search\n",
    # spawn
    *(CALL_TEXT, "<Start Sub Search ", " at level ", "> Moving to Node #0", " at level 1> Moving to Node #0"),
    SPAWN_TEXT,
    # join
    *(JOIN_TEXT, "<No Solution in Sub Search ", "<Goal Reached in Sub Search "),
    *(" at Node #0", " at level 1 at Node #0", ">\n", "<End Sub Searches>\n"),
    # conditioning prefixes
    *("Token Budget: ", "Sub Call Budget: "),
)


class Tokenizer:
    """Text of the trace language to ids and back.

    Ids: `PAD_ID`, `END_ID`, the numbers 0 .. number_limit - 1, the phrases.
    """

    def __init__(self, number_limit: int):
        """Numbers below `number_limit` are one token; raises ValueError unless it is from 10 to `MAX_NUMBER_LIMIT`."""
        if not 10 <= number_limit <= MAX_NUMBER_LIMIT:
            allowed = f"from 10 (every digit is a token) to {MAX_NUMBER_LIMIT}"
            raise ValueError(f"number_limit must be {allowed}, not {number_limit}")
        self.number_limit = number_limit
        self._texts = ["", "<|end|>", *map(str, range(number_limit)), *PHRASES]
        self._ids = {text: i for i, text in enumerate(self._texts) if i > END_ID}
        width = len(str(number_limit - 1))
        phrases = sorted(PHRASES, key=len, reverse=True)
        self._pattern = re.compile("|".join(["0", f"[1-9][0-9]{{0,{width - 1}}}", *map(re.escape, phrases)]))

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self._texts)

    def id(self, text: str) -> int:
        """Id of one phrase or number; KeyError if there is none."""
        return self._ids[text]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; raises ValueError with the offset of the first piece that is not in the language."""
        pieces = self._pattern.findall(text)
        if sum(map(len, pieces)) != len(text):
            raise ValueError(self._complaint(text))
        try:
            return list(map(self._ids.__getitem__, pieces))
        except KeyError:  # numbers of as many digits as the limit, but not below it: all but their last digit is below
            split = [[piece] if piece in self._ids else [piece[:-1], piece[-1]] for piece in pieces]
            return [self._ids[piece] for pieces in split for piece in pieces]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of any sequence of ids of the vocabulary."""
        return "".join([self._texts[i] for i in ids])

    def _complaint(self, text: str) -> str:
        offset = 0
        while match := self._pattern.match(text, offset):
            offset = match.end()
        return f"not in the trace language at offset {offset}: {text[offset : offset + 40]!r}"


NUMBER = "(?:0|[1-9][0-9]{0,999})"  # the bound keeps int() and str() within Python's 4,300 digits
OPERATION = f"{NUMBER}[-+*/]{NUMBER}={NUMBER}"
# One template per kind of line. The prefixes share the first line with what follows them; the bare failure is how
# SoS breadth-first ends.
TEMPLATES = {
    "token_budget": "Token Budget: {number} ",
    "sub_call_budget": "Sub Call Budget: {number} ",
    "move": "Moving to Node #{node}\n",
    "state": "Current State: {target}:{numbers}, Operations: {operations}\n",
    "explore": "Exploring Operation: {operation}, Resulting Numbers: {numbers}\n",
    "generate": "Generated Node #{node}: {target}:{numbers} Operation: {operation}\n",
    "goal": "{number},{target}" + GOAL_TEXT,
    "miss": "{number},{target} unequal: No Solution\n",
    "fail": "No solution found.\n",
    "bare_fail": "No solution found.",
    "enter": "Start Sub Search at level {level}: Moving to Node #{node}\n",
    "exit": "Exit Sub Search at level {level}\n",
    "exit_failed": "No solution found in sub search\n",
    "call": CALL_TEXT,
    "start": "<Start Sub Search {number} at level {level}> Moving to Node #{node}\n",
    "spawn": SPAWN_TEXT,
    "join": JOIN_TEXT,
    "child_failed": "<No Solution in Sub Search {number} at level {level} at Node #{node}>\n",
    "child_reached": "<Goal Reached in Sub Search {number} at level {level} at Node #{node}>\n",
    "joined": "<End Sub Searches>\n",
}
FIELDS = {
    "number": NUMBER,
    "target": NUMBER,
    "level": NUMBER,
    "node": f"0(?:,{NUMBER})*",
    "operation": OPERATION,
    "numbers": rf"\[{NUMBER}(?:, {NUMBER})*\]",
    "operations": rf"\[(?:'{OPERATION}'(?:, '{OPERATION}')*)?\]",
}


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a trace; `kind` is a key of `TEMPLATES`, which says what fields it has."""

    kind: str
    number: int = 0  # a leaf, a budget, or the index of a sub search
    target: int = 0
    level: int = 0
    node: str = ""
    operation: str = ""
    numbers: tuple[int, ...] = ()
    operations: tuple[str, ...] = ()


def _pattern(kind: str) -> str:
    """Regular expression of a kind of line; the group of a field is named kind_field."""
    pieces = re.split(r"\{(\w+)\}", TEMPLATES[kind])
    for i, piece in enumerate(pieces):
        pieces[i] = f"(?P<{kind}__{piece}>{FIELDS[piece]})" if i % 2 else re.escape(piece)
    return f"(?P<{kind}>{''.join(pieces)})" + (r"\Z" if kind == "bare_fail" else "")


_LINE = re.compile("|".join(map(_pattern, TEMPLATES)))
_FIELDS_OF = {kind: re.findall(r"\{(\w+)\}", template) for kind, template in TEMPLATES.items()}
_CONVERT: dict[str, Callable[[str], object]] = {
    "numbers": lambda text: tuple(int(number) for number in text[1:-1].split(", ")),
    "operations": lambda text: tuple(text[2:-2].split("', '")) if len(text) > 2 else (),
    **dict.fromkeys(("operation", "node"), str),
    **dict.fromkeys(("number", "target", "level"), int),
}


def short(text: object, limit: int = 60) -> str:
    """`text`, cut for a message."""
    return str(text) if len(str(text)) <= limit else f"{str(text)[:limit]}..."


def parse(text: str) -> list[Line]:
    """Lines of a trace; raises ValueError with the number and text of the first line that is none."""
    lines = []
    offset = 0
    while offset < len(text):
        match = _LINE.match(text, offset)
        kind = match.lastgroup if match else None
        if match is None or kind is None or (kind.endswith("budget") and offset):
            number = text.count("\n", 0, offset) + 1
            line = text[text.rfind("\n", 0, offset) + 1 :].partition("\n")[0]
            raise ValueError(f"line {number} is not in the trace language: {short(line)!r}")
        values = {field: _CONVERT[field](match[f"{kind}__{field}"]) for field in _FIELDS_OF[kind]}
        lines.append(Line(kind, **values))  # type: ignore[arg-type]
        offset = match.end()
    return lines
