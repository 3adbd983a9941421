#!/usr/bin/env bash
# Smoke test on one GPU, unattended: installs into a fresh virtual environment, runs the quickstart in bfloat16 on
# one rank, and the kernels' and objectives' tests (on the CPU: they are the reference). Ends with one line, PASSED or FAILED, and its code.
#
#   bash scripts/one_gpu.sh [FOLDER]        FOLDER (default ./one-gpu) keeps the log and the run
#
# UFT_SMOKE_PYTHON=path/to/python uses an environment that is already there, UFT_SMOKE_DTYPE=float32 changes the type,
# UFT_SMOKE_ALLOW_CPU=1 runs without a GPU, UFT_SMOKE_OVERRIDES="train.steps=4" is passed on to the quickstart.
set -uo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-one-gpu}
mkdir -p "$out" && out=$(cd "$out" && pwd)
log=$out/log.txt
: >"$log"

fail() { echo "FAILED: $1 (see $log)"; tail -n 30 "$log"; exit 1; }

if [ -n "${UFT_SMOKE_PYTHON:-}" ]; then
  python=$UFT_SMOKE_PYTHON
else
  python3 -m venv "$out/venv" >>"$log" 2>&1 || fail "no virtual environment"
  python=$out/venv/bin/python
  "$python" -m pip install --quiet --upgrade pip >>"$log" 2>&1
  "$python" -m pip install --quiet torch >>"$log" 2>&1 || fail "torch could not be installed"
  "$python" -m pip install --quiet "$here[dev]" >>"$log" 2>&1 || fail "uft_ds could not be installed"
  "$python" -m pip install --quiet flash-attn --no-build-isolation >>"$log" 2>&1 || echo "no flash-attn: sdpa" | tee -a "$log"
fi

"$python" -c 'import torch; assert torch.cuda.is_available(), "no GPU"; print(torch.cuda.get_device_name())' \
  2>>"$log" || [ -n "${UFT_SMOKE_ALLOW_CPU:-}" ] || fail "torch sees no GPU"

cd "$out" || exit 1
# Exactness before the first step is demanded on a GPU too: if this fails, its kernels need
# reference.step_zero_tolerance, and the message says by how much.
"$python" -m uft_ds quickstart --folder "$out/runs" launch.ranks=1 deepspeed=zero3 \
  model.dtype="${UFT_SMOKE_DTYPE:-bfloat16}" ${UFT_SMOKE_OVERRIDES:-} 2>&1 | tee -a "$log"
[ "${PIPESTATUS[0]}" -eq 0 ] || fail "the quickstart"
"$python" -m pytest -q -m "not long" "$here/tests/kernels" "$here/tests/objectives" >>"$log" 2>&1 || fail "the tests"
echo "PASSED: results in $out/runs/quickstart/quickstart.json"
