"""The data pipeline on real rows: speed of preparation, packing, tokens forwarded, memory at a million rows.

    python benchmarks/data.py [--data FOLDER] [--rows 500000] [--only prepare,packing,tokens,million]

    prepare  examples/s from a jsonl file to tokens that are ready to train on, beside TRL's own preparation of the
             same file; rounds alternate, medians; CPU time is that of all processes, their start included
    packing  micro-steps above the bound, fill, and how even ranks are, on steps of real lengths
    tokens   forwarded per response, beside rows that are padded as peers pad them, and with prompts shared
    million  memory and time of a long source, and of a tenth of it; --rows 1000000 takes 12 minutes

Needs real data (--data, or UFT_TEST_DATA) and a real tokenizer: Qwen2.5's, from a package of the package index, or
else the one of the quickstart's model. TRL comes with the extra `bench`; without it that half is left out, and said.
About 20 minutes on two cores. Times on a shared machine mean little, ratios within a run
more. Exits with 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from bars import report
from data_million import long_source, report_million
from data_packing import report_packing
from data_preparation import release, report_preparation
from data_rows import tokenizer_folder
from data_tokens import report_tokens
from real_rows import real_rows_folder
from rich.console import Console

from uft_ds.data.tokens.tokenize import load_tokenizer

ROWS = 500_000

PARTS = {
    "prepare": report_preparation,
    "packing": report_packing,
    "tokens": report_tokens,
    "million": report_million,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=real_rows_folder(), help="the folder of real rows (default: UFT_TEST_DATA)"
    )
    parser.add_argument("--rows", type=int, default=ROWS, help=f"of `million` (default: {ROWS})")
    parser.add_argument("--prepare-rows", type=int, default=10_000, help="of `prepare`, a fourth for pairs")
    parser.add_argument("--rounds", type=int, default=3, help="of `prepare` (default: 3)")
    parser.add_argument("--steps", type=int, default=20, help="packed for each setting (default: 20)")
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    parts = options.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only: {', '.join(sorted(unknown))}, expected some of {', '.join(PARTS)}")
    if not options.data.is_dir():
        parser.error(f"no real data at {options.data}; set UFT_TEST_DATA")
    if options.one:
        print(json.dumps(long_source(options.data, options.one)))
        return 0
    warnings.filterwarnings("ignore")  # TRL's configuration warns of its own defaults
    console = Console(width=150, highlight=False)
    folder = tokenizer_folder()
    packages = ("trl", "datasets", "transformers", "tokenizers", "numpy")
    console.print(", ".join(f"{name} {release(name)}" for name in packages) + f"; tokenizer {folder.name}")
    chat, bars = load_tokenizer(str(folder)), []
    for part in parts:
        with tempfile.TemporaryDirectory() as name:
            bars += PARTS[part](console, options.data, chat, Path(name), options)
    return 1 if report(console, bars, held="OK") else 0


if __name__ == "__main__":
    sys.exit(main())
