"""Whether the paper's released runtime, driven by an exported model of ours, writes what ours writes.

    git clone https://github.com/Parallel-Reasoning/APR ../APR
    pip install -e ".[interop]"
    python -m benchmarks.agreement --released=../APR --problems=40

  1. Our runtime and sampler solve held-out problems with the run in --workdir, greedily.
  2. transformers loads the same folder as a Llama. The released `src/eval/eval_apr.py` is imported as it is. Its
     `call_search` solves the same problems. Only its function `generate` is replaced, which asked a server.
  3. Every call of every thread is compared as text, and every verdict.

Our vocabulary asks for two adaptations: a prefix that ends within a line gets its newline, and the token that ends a
spawn block stops a call. The context is the model's. Prints one JSON object and exits with status 1 on a difference.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import pathlib
import sys
import tempfile
import types
import typing
from collections.abc import Callable, Iterator, Sequence

from ml_collections import ConfigDict

from countdown.language import END_ID, SPAWN_TEXT, Tokenizer
from harness.build import build
from harness.huggingface import holds_model
from harness.rollouts import RolloutPool
from harness.workdir import PRETRAINED, load_best, read_config
from records import Rollout, Thread

CODE, ENTRY = "https://github.com/Parallel-Reasoning/APR", "src/eval/eval_apr.py"


def text_of(ids: Sequence[int], language: Tokenizer) -> str:
    """Text without the token that ends a thread."""
    return language.decode(i for i in ids if i != END_ID)


def calls_of(thread: Thread, language: Tokenizer) -> list[str]:
    """Context and text of every call of our thread."""
    ids: list[int] = []
    texts = []
    for call in thread.calls:
        ids = ids[: call.keep] + call.injected + call.sampled
        texts.append(text_of(ids, language).removesuffix("\n"))
    return texts


def released_calls(trace: dict[str, typing.Any]) -> Iterator[list[str]]:
    """The same of every thread of theirs, parents before their children."""
    yield trace["main_calls"]
    for children in trace.get("sub_calls", []):
        for child in children:
            yield from released_calls(child)


def import_released(folder: pathlib.Path, data: pathlib.Path) -> types.ModuleType:
    """Their module. It reads the command line and a tokenizer when it is imported, and names packages not used here."""
    import transformers

    def stand_in(name: str, **members: object) -> None:
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = module = types.ModuleType(name)
            vars(module).update(members)

    stand_in("litellm", text_completion=None, APIError=type("APIError", (Exception,), {}))
    stand_in("termcolor", colored=lambda text, *_, **__: text)
    stand_in("tqdm", tqdm=iter)
    tokenizer = types.SimpleNamespace(bos_token="", eos_token="")
    transformers.AutoTokenizer = types.SimpleNamespace(from_pretrained=lambda *_, **__: tokenizer)  # type: ignore
    sys.path.insert(0, str(folder))
    sys.argv = [ENTRY, f"--data={data}", "--disable_parallel_inference"]
    return importlib.import_module("src.eval.eval_apr")


def generator(workdir: pathlib.Path, language: Tokenizer) -> Callable[..., tuple[str, types.SimpleNamespace]]:
    """What replaces their `generate`: the exported model in transformers, one call at a time."""
    import torch
    import transformers

    torch.set_num_threads(1)  # the fastest for a model this small
    model = transformers.LlamaForCausalLM.from_pretrained(workdir)
    stops, context = [END_ID, language.id(SPAWN_TEXT)], model.config.max_position_embeddings

    def generate(prefix: str, **_: object) -> tuple[str, types.SimpleNamespace]:
        text = prefix if prefix.endswith("\n") else prefix + "\n"
        ids = torch.tensor([language.encode(text)])
        with torch.no_grad():
            mask = torch.ones_like(ids)
            new = model.generate(
                ids, attention_mask=mask, do_sample=False, max_length=context, eos_token_id=stops, pad_token_id=0
            )
        choice = types.SimpleNamespace(matched_stop=None)
        return text_of(new[0].tolist(), language), types.SimpleNamespace(choices=[choice])

    return generate


def compare(released: types.ModuleType, rollouts: list[Rollout], language: Tokenizer) -> dict[str, int]:
    """Counts of calls and of verdicts, and of those that agree."""
    names = ("parent_calls", "child_calls", "released_calls", "same_calls", "problems", "same_verdicts", "right")
    counts = dict.fromkeys(names, 0)
    for number, rollout in enumerate(rollouts):
        prefix, _ = released.get_prefix(released.val_data, number)
        solution, trace = released.call_search(prefix, 0.0)
        right = solution is not None and released.check_solution(prefix, solution)
        ours = [calls_of(thread, language) for thread in rollout.threads()]
        theirs = list(released_calls(trace))
        counts["parent_calls"] += len(ours[0])
        counts["child_calls"] += sum(map(len, ours[1:]))
        pairs = [pair for both in zip(ours, theirs, strict=False) for pair in zip(*both, strict=False)]
        counts["same_calls"] += sum(a == b for a, b in pairs)
        counts["released_calls"] += sum(map(len, theirs))
        counts["problems"] += 1
        counts["same_verdicts"] += right == rollout.grade.correct
        counts["right"] += rollout.grade.correct
    return counts


def main() -> None:
    """Compares, prints the counts, and exits with status 1 on a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--released", type=pathlib.Path, required=True, help="checkout of the released code")
    parser.add_argument("--workdir", type=pathlib.Path, default=PRETRAINED, help="exported run (default: shipped APR)")
    parser.add_argument("--problems", type=int, default=40, help="how many held-out problems")
    args = parser.parse_args()
    if not (args.released / ENTRY).is_file():
        parser.error(f"--released={args.released} has no {ENTRY}: clone {CODE} there")
    if not holds_model(args.workdir):
        parser.error(f"--workdir={args.workdir} holds no exported model: run `python -m harness.export` first")
    config = ConfigDict(read_config(args.workdir))
    config.sampler.temperature = 0.0
    parts = build(config)
    params, _ = load_best(args.workdir, parts.param_shapes())
    problems, language = parts.domain.problems("heldout", args.problems), Tokenizer(config.number_limit)
    rollouts = RolloutPool(parts).solve(params, problems)
    with tempfile.TemporaryDirectory() as folder:
        data = pathlib.Path(folder) / "problems.json"
        data.write_text(json.dumps([{"nums": list(p.numbers), "target": p.target} for p in problems]))
        released = import_released(args.released.resolve(), data)
    released.generate = generator(args.workdir, language)  # type: ignore[attr-defined]
    counts = compare(released, rollouts, language)
    print(json.dumps(counts))
    same = counts["same_calls"] == counts["parent_calls"] + counts["child_calls"] == counts["released_calls"]
    sys.exit(0 if same and counts["same_verdicts"] == counts["problems"] else 1)


if __name__ == "__main__":
    main()
