"""Tokenizer: the closed lexicon of the trace language, lossless.

The language of the traces (see `solver.py`) has a few dozen phrases and numbers,
so the vocabulary is written down, not learned:

  1. A phrase ("Exploring Operation: ", " unequal: No Solution\\n") is one token.
     A phrase may end with a newline but never spans one: every boundary the
     runtime cuts at (prompt, spawn block, join block) is the start of a line, so
     texts cut there can be encoded apart and the ids put together.
  2. Numbers below `number_limit` are one token each (10: digit by digit); longer
     strings of digits are split from the left into the longest such pieces.
  3. `encode` is one compiled regular expression, longest phrase first; a text
     has exactly one encoding, and text outside the language is an error.

Deviation from the paper, which uses the 32k vocabulary of Llama 2: this one has
about 50 phrases, so that a trace costs a fifth of the tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

PAD = 0  # fills rows; decodes to nothing
END = 1  # ends a thread; no text encodes to it

CALL = "<Calling Sub Searches>\n"  # opens a spawn block
SPAWN = "<End Calling Sub Searches>\n"  # closes it: the spawn token

PHRASES = (
    # punctuation of numbers, operations, nodes and states
    *("+", "-", "*", "/", "=", ",", ", ", ":", ":[", ": ", " ", "\n"),
    *("]\n", "], Operations: []\n", "], Operations: ['", "', '", "']\n", "] Operation: "),
    # search
    *("Current State: ", "Moving to Node #0", "Exploring Operation: ", ", Resulting Numbers: [", "Generated Node #0"),
    *(" equal: Goal Reached\n", " unequal: No Solution\n", "No solution found.\n", "No solution found."),
    # search in place (SoS+)
    *("Start Sub Search at level ", ": Moving to Node #0", "Exit Sub Search at level "),
    "No solution found in sub search\n",
    # spawn
    *(CALL, "<Start Sub Search ", " at level ", "> Moving to Node #0", " at level 1> Moving to Node #0", SPAWN),
    # join
    *("<Sub Searches>\n", "<No Solution in Sub Search ", "<Goal Reached in Sub Search "),
    *(" at Node #0", " at level 1 at Node #0", ">\n", "<End Sub Searches>\n"),
    # conditioning prefixes
    *("Token Budget: ", "Sub Call Budget: "),
)


class Tokenizer:
    """Text of the trace language to ids and back.

    Ids: `PAD`, `END`, the numbers 0 .. number_limit - 1, the phrases.
    """

    def __init__(self, number_limit: int):
        """Numbers below `number_limit` are one token; raises ValueError if it is below 10 (digits are needed)."""
        if number_limit < 10:
            raise ValueError(f"number_limit must be at least 10 (every digit is a token), not {number_limit}")
        self._texts = ["", "<|end|>", *map(str, range(number_limit)), *PHRASES]
        self._ids = {text: i for i, text in enumerate(self._texts) if i > END}
        self._widest = len(str(number_limit - 1))
        phrases = sorted(PHRASES, key=len, reverse=True)
        self._pattern = re.compile("|".join(["[0-9]+", *map(re.escape, phrases)]))

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
            return [self._ids[piece] for piece in pieces]
        except KeyError:  # a long number: split it
            return [i for piece in pieces for i in ((self._ids[piece],) if piece in self._ids else self._split(piece))]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of any sequence of ids of the vocabulary."""
        return "".join([self._texts[i] for i in ids])

    def _split(self, digits: str) -> list[int]:
        """Ids of a string of digits, longest piece first, from the left."""
        ids = []
        while digits:
            width = next(w for w in range(self._widest, 0, -1) if digits[:w] in self._ids)
            ids.append(self._ids[digits[:width]])
            digits = digits[width:]
        return ids

    def _complaint(self, text: str) -> str:
        offset = 0
        while match := self._pattern.match(text, offset):
            offset = match.end()
        return f"not in the trace language at offset {offset}: {text[offset : offset + 40]!r}"
