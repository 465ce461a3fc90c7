"""The trace language: lossless lexicon, strict grammar."""

import json
import pathlib
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from countdown import language
from countdown.language import END_ID, PAD_ID, PHRASES, TEMPLATES, Line, Tokenizer, parse

REFERENCES = pathlib.Path(__file__).parents[1] / "reference_traces"
LEAF = "Exploring Operation: 5-4=1, Resulting Numbers: [1]\n1,12 unequal: No Solution\n"
LIMITS = (10, 100, 512, 1000)


def render(lines):
    """Text of a trace: the inverse of `parse`."""
    fields = [{**vars(line), "numbers": list(line.numbers), "operations": list(line.operations)} for line in lines]
    return "".join(TEMPLATES[line.kind].format(**values) for line, values in zip(lines, fields, strict=True))


def texts_of(trace):
    """Every text of a reference trace: contexts of the main calls, and those of the children."""
    if isinstance(trace, str):
        return [trace]
    below = [text for spawn in trace["sub_calls"] for child in spawn for text in texts_of(child)]
    return [*trace["main_calls"], *below]


def reference_texts():
    for name in ("sos", "sosp", "apr"):
        problems = json.loads((REFERENCES / f"{name}.json").read_text())
        assert len(problems) == 30
        yield from (text for problem in problems for text in texts_of(problem["trace"]))


numbers = st.one_of(st.integers(0, 2000), st.integers(0, 10**30))
nodes = st.lists(st.integers(0, 2000), max_size=3).map(lambda path: ",".join(map(str, [0, *path])))
operations = st.tuples(numbers, st.sampled_from("+-*/"), numbers, numbers).map(lambda o: f"{o[0]}{o[1]}{o[2]}={o[3]}")
FIELDS = {
    "number": numbers,
    "target": numbers,
    "level": numbers,
    "node": nodes,
    "operation": operations,
    "numbers": st.lists(numbers, min_size=1, max_size=4).map(tuple),
    "operations": st.lists(operations, max_size=3).map(tuple),
}


@st.composite
def traces(draw):
    """Lines of a trace: an optional prefix, whole lines, and maybe the bare failure."""
    inner = [kind for kind in TEMPLATES if not kind.endswith("budget") and kind != "bare_fail"]
    kinds = draw(st.lists(st.sampled_from(inner), max_size=8))
    kinds = draw(st.sampled_from([[], ["token_budget"], ["sub_call_budget"]])) + kinds
    kinds += draw(st.sampled_from([[], ["bare_fail"]]))
    return [Line(k, **{f: draw(FIELDS[f]) for f in re.findall(r"\{(\w+)\}", TEMPLATES[k])}) for k in kinds]


@settings(max_examples=150, deadline=None)
@given(traces(), st.sampled_from(LIMITS))
def test_any_trace_survives_both_ways(lines, limit):
    text = render(lines)
    assert parse(text) == lines
    ids = Tokenizer(limit).encode(text)
    assert Tokenizer(limit).decode(ids) == text
    assert not {PAD_ID, END_ID} & set(ids)


def test_reference_traces_survive_both_ways():
    tokenizers = [Tokenizer(limit) for limit in LIMITS]
    for text in reference_texts():
        assert render(parse(text)) == text
        for t in tokenizers:
            assert t.decode(t.encode(text)) == text


@settings(max_examples=50, deadline=None)
@given(st.text("0123456789", min_size=1, max_size=30), st.sampled_from(LIMITS))
def test_any_digits_are_lossless(digits, limit):
    t = Tokenizer(limit)
    assert t.decode(t.encode(f"Moving to Node #0,{digits}\n")) == f"Moving to Node #0,{digits}\n"


def test_numbers_are_split_from_the_left():
    def pieces(text, limit):
        t = Tokenizer(limit)
        return [t.decode([i]) for i in t.encode(text)]

    assert pieces("1216", 10) == ["1", "2", "1", "6"]
    assert pieces("1216", 1000) == ["121", "6"]
    assert pieces("511", 512) == ["511"]
    assert pieces("512", 512) == ["51", "2"]
    assert pieces("007", 1000) == ["0", "0", "7"]


def test_leaf_costs_13_tokens():
    assert len(Tokenizer(100).encode(LEAF)) == 13


def test_concatenation_at_line_starts_changes_no_ids():
    """The runtime encodes prompts, blocks and joins apart and puts the ids together."""
    t = Tokenizer(100)
    for text in list(reference_texts())[::7]:
        assert [i for line in text.splitlines(keepends=True) for i in t.encode(line)] == t.encode(text)


def test_phrases_end_with_newlines_only():
    assert all("\n" not in phrase[:-1] for phrase in PHRASES)
    assert len(set(PHRASES)) == len(PHRASES)


def test_every_id_decodes_alone_and_encodes_back():
    t = Tokenizer(100)
    assert t.decode([PAD_ID]) == "" and t.decode([END_ID]) == "<|end|>"
    for i in range(2, t.vocab_size):
        assert t.encode(t.decode([i])) == [i] == [t.id(t.decode([i]))]
    assert t.vocab_size == 2 + 100 + len(PHRASES)


@pytest.mark.parametrize(
    ("text", "offset"), [("5+4=9?", 5), ("<|end|>", 0), ("7\n<Calling Sub", 2), ("٣", 0), ("0x", 1)]
)
def test_unknown_text_is_an_error_with_its_offset(text, offset):
    with pytest.raises(ValueError, match=f"offset {offset}:"):
        Tokenizer(100).encode(text)


def test_number_limit_below_ten_is_refused():
    with pytest.raises(ValueError, match="from 10.*not 9"):
        Tokenizer(9)


def test_parse_reads_fields():
    state, leaf, *_ = parse("Token Budget: 512 Current State: 31:[7, 38], Operations: ['2*19=38']\n" + LEAF)[1:]
    assert state == Line("state", target=31, numbers=(7, 38), operations=("2*19=38",))
    assert leaf == Line("explore", operation="5-4=1", numbers=(1,))
    spawned = parse("<Calling Sub Searches>\n<Start Sub Search 2 at level 1> Moving to Node #0,3\n")
    assert spawned == [Line("call"), Line("start", number=2, level=1, node="0,3")]


@pytest.mark.parametrize(
    "line",
    [
        "Moving to Node #1\n",
        "Moving to Node #0,01\n",
        "Moving to Node #0",
        "Moving to Node #0,\n",
        "Current State: 31:[7,38], Operations: []\n",
        "Current State: 31:[], Operations: []\n",
        "Current State: 31:[7], Operations: ['2**3=8']\n",
        "Exploring Operation: 7//2=3, Resulting Numbers: [3]\n",
        "Exploring Operation: -1+2=1, Resulting Numbers: [1]\n",
        "Exploring Operation: 1.5*4=6, Resulting Numbers: [6]\n",
        "Exploring Operation: 1+1٣=14, Resulting Numbers: [14]\n",
        "31,31 equal: No Solution\n",
        "Token Budget: 512 Moving to Node #0\n",
        "No solution found.Moving to Node #0\n",
        "\n",
        f"{'9' * 5000},1 unequal: No Solution\n",
    ],
)
def test_parse_refuses_the_rest_and_names_the_line(line):
    with pytest.raises(ValueError, match="line 2 is not in the trace language") as error:
        parse("Moving to Node #0\n" + line)
    assert line.strip()[:20] in str(error.value)


def test_rendered_kinds_are_distinct():
    """No line can be read as two kinds: the first alternative that matches is the only one."""
    for text in reference_texts():
        for line in set(text.splitlines(keepends=True)):
            matching = [kind for kind in TEMPLATES if re.fullmatch(language._pattern(kind), line)]
            assert len(matching) == 1
