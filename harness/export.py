"""Exports a run as a Hugging Face folder: one model file, its architecture, our recipe, its log and evaluation.

    python -m harness.export --workdir=runs/apr --output=exported/apr
        --dtype=bfloat16     # half the size; parameters are rounded
        --shard_mb=15        # files of at most 15 MB (of 1,000,000 bytes each)
    python -m harness.export --workdir=runs/apr-1 --output=pretrained/evidence.zip    # config, log and evaluation alone

  1. Read the run's config and its best parameters.
  2. Write them as `harness.huggingface.save` says: whole and read back, or not at all.

`evaluate.py --workdir`, `--init` and sweeps take the folder in place of the run.
"""

from __future__ import annotations

import json
import pathlib

from absl import flags
from ml_collections import ConfigDict

from harness import huggingface
from harness.build import build
from harness.cli import UsageError, usage_errors
from harness.processes import launch
from harness.results import add_evidence
from harness.workdir import load_best, read_config
from protocols import stop_ids


def main(_: list[str]) -> None:
    """Exports as the flags say and prints what was written, as JSON on the last line."""
    args = flags.FLAGS
    if args.workdir is None or args.output is None:
        raise UsageError("say what to export and where to: --workdir=RUN --output=FOLDER")
    if args.output.endswith(".zip"):
        with usage_errors():
            names = add_evidence(pathlib.Path(args.workdir), pathlib.Path(args.output))
        print(json.dumps({"output": args.output, "added": names}))
        return
    recipe = read_config(args.workdir)
    with usage_errors():
        config = ConfigDict(recipe)
        config.mesh = ConfigDict(dict(data=1, fsdp=1, tensor=1))  # wherever it was trained, one device will do
        parts = build(config)
    params, result = load_best(args.workdir, parts.param_shapes())
    files = huggingface.save(
        args.output,
        params,
        recipe,
        parts.model.config,
        stop_ids(parts.domain.task),
        result,
        args.dtype,
        args.shard_mb and args.shard_mb * 1_000_000,
        pathlib.Path(args.workdir),
    )
    print(f"{args.workdir} (step {result['step']}): {parts.parameter_count():,} parameters as {args.dtype}")
    for name, size in files.items():
        print(f"  {size:>12,} bytes  {name}")
    print(json.dumps({"output": args.output, "files": len(files), "bytes": sum(files.values())}))


def define_flags() -> None:
    """The command line."""
    flags.DEFINE_string("workdir", None, "The run to export, or an exported folder to convert.")
    flags.DEFINE_string("output", None, "The folder to write: a new or an empty one; or a zip file to add evidence to.")
    dtypes = [kind.name for kind in huggingface.DTYPES.values()]
    flags.DEFINE_enum("dtype", "float32", dtypes, "How numbers are stored.")
    flags.DEFINE_integer("shard_mb", None, "Largest file of arrays, in MB (default: one file).", lower_bound=1)


if __name__ == "__main__":
    launch(define_flags, main)
