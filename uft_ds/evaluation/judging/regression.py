"""A program of its own: alpaca_eval's regression, which takes the effect of length out of a win rate.

    python -P regression.py DF_GAMED.csv < ANNOTATIONS.json > NUMBERS.json

It is a process of its own because alpaca_eval switches a setting of scikit-learn for the whole process, reads
environment files at import, and takes `df_gamed.csv` from the hub alone: here its download gives the named file.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys


def main(gamed: str) -> None:
    """Read annotations from standard input, and print the regression's win rate, in percent."""
    annotations = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        pandas = importlib.import_module("pandas")
        regression = importlib.import_module("alpaca_eval.metrics.glm_winrate")
        regression.hf_hub_download = lambda **asked: gamed  # type: ignore[attr-defined]
        # save_weights_dir: otherwise it writes into the package's own folder.
        found = regression.get_length_controlled_winrate(pandas.DataFrame(annotations), save_weights_dir=None)
    print(json.dumps({"length_controlled_winrate": float(found["length_controlled_winrate"])}))


if __name__ == "__main__":
    main(sys.argv[1])
