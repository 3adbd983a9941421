#!/usr/bin/env bash
# rich 15.0.0: a progress bar whose steps take longer than 30 s never knows the time left; it shows -:--:-- to the end.
#
# `Progress` estimates the speed from the steps of the last `speed_estimate_period` seconds (30 by default), and needs two
# of them. A task that advances every 40 s has one at most. The bar itself moves, so it looks as if the end were unknown.
#
# It surprises whoever shows long steps: training large models, downloads of large files, batches of a queue. A longer
# `speed_estimate_period`, or a column of one's own from the mean time of a step, mends it; uft_ds does the latter.
#
# Seen, after 5 of 10 steps: at 10 s a step 50 s are left; at 40 s nothing is known, and with a period of an hour 200 s.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet rich==15.0.0 2>/dev/null

cat >"$folder/bar.py" <<'PYTHON'
from rich.progress import Progress


def left(seconds_a_step: float, **options: float) -> float | None:
    now = [0.0]
    bar = Progress(disable=True, get_time=lambda: now[0], **options)
    task = bar.add_task("training", total=10)
    for step in range(1, 6):
        now[0] += seconds_a_step
        bar.update(task, completed=step)
    return bar.tasks[0].time_remaining


found = (left(10), left(40), left(40, speed_estimate_period=3600))
print("10 s a step: {}   40 s: {}   40 s, period of an hour: {}".format(*found))
raise SystemExit(0 if found == (50, None, 200) else "this has changed")
PYTHON
"$folder/venv/bin/python" "$folder/bar.py"
