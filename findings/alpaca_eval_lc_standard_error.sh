#!/usr/bin/env bash
# alpaca_eval 0.6.6: `lc_standard_error` is no standard error of that win rate, and may be many times too small.
#
# `get_length_controlled_winrate` fits a regression to the judge's preferences, predicts each row's preference at equal lengths,
# and returns the mean of the predictions beside their standard error: standard deviation over the root of their number. But
# predictions differ only by the instruction's difficulty: that is how much instructions differ, not how sure the rate is. Where
# the judge's preferences hardly follow difficulty, all predictions are nearly equal, and the error is nearly 0, whatever the number
# of rows. The column stands beside `standard_error` in the leaderboards' tables, and reads like it.
#
# A bootstrap over the rows shows the real one, which is about that of the plain win rate.
#
# Seen: 400 rows, 100 bootstraps. Win rate 58.25, `standard_error` 2.47, bootstrap 2.62. At equal lengths 55.05,
# `lc_standard_error` 0.19, bootstrap 2.73.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet alpaca_eval==0.6.6 scikit-learn==1.7.2 pandas==2.3.3 2>/dev/null

cat >"$folder/error.py" <<'PYTHON'
import logging
import sys

import numpy as np
import pandas as pd
from alpaca_eval.metrics import glm_winrate

logging.disable(logging.WARNING)
ROWS, BOOTSTRAPS = 400, 100
rng = np.random.default_rng(0)
difficulty = rng.normal(size=ROWS)

# In the columns of the hub's file: two models that were told to answer briefly and at length, beside the baseline.
gamed = pd.concat(
    pd.DataFrame(
        {
            "model": name,
            "preference": rng.uniform(size=ROWS),
            "index": np.arange(ROWS),
            "std_delta_len": rng.normal(loc=shift, size=ROWS),
            "instruction_difficulty": difficulty,
            "not_gamed_baseline": False,
        }
    )
    for name, shift in (("concise", -1.0), ("verbose", 1.0))
)
gamed.to_csv(sys.argv[1], index=False)
glm_winrate.hf_hub_download = lambda **asked: sys.argv[1]

# Longer answers are liked; difficulty has a small effect.
longer = rng.integers(-300, 500, size=ROWS)
chance = 1 / (1 + np.exp(-(0.2 * difficulty + longer / 300)))
annotations = pd.DataFrame(
    {
        "index": np.arange(ROWS),
        "preference": 1.0 + (rng.uniform(size=ROWS) < chance),
        "output_1": ["x" * 500] * ROWS,
        "output_2": ["x" * (500 + int(more)) for more in longer],
        "generator_1": "baseline",
        "generator_2": "model",
        "annotator": "judge",
    }
)


def asked(rows):
    return glm_winrate.get_length_controlled_winrate(rows.reset_index(drop=True), save_weights_dir=None)


found = asked(annotations)
again = [asked(annotations.sample(ROWS, replace=True, random_state=number)) for number in range(BOOTSTRAPS)]
plain, controlled = (np.std([one[key] for one in again], ddof=1) for key in ("win_rate", "length_controlled_winrate"))
print(f"win rate {found['win_rate']:.2f}, standard_error {found['standard_error']:.2f}, bootstrap {plain:.2f}")
print(
    f"at equal lengths {found['length_controlled_winrate']:.2f}, lc_standard_error {found['lc_standard_error']:.2f}, "
    f"bootstrap {controlled:.2f}"
)
assert 0.8 < found["standard_error"] / plain < 1.25, "the plain error is one"
assert controlled > 4 * found["lc_standard_error"], "the other is not"
PYTHON
"$folder/venv/bin/python" "$folder/error.py" "$folder/df_gamed.csv"
