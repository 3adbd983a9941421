#!/usr/bin/env bash
# Everything that only a GPU can show, unattended, in ten minutes: installation, kernels, attention, exactness, waits,
# speed and memory, a run from data to a merged model. Ends with one line, PASSED or FAILED, and its exit code.
#
#   scripts/gpu_check.sh [FOLDER] [--wheels DIR] [OPTIONS]     FOLDER (default ./gpu-check) gets the results
#   scripts/gpu_check.sh --collect DIR [--python 3.12] [--have FILE]
#
# The GPU's machine needs Python with a CUDA build of torch, and no network: what else is missing there is installed from
# the wheels in DIR, which --collect fills on a machine with a network. torch and its CUDA packages are never collected.
# --python: the version on the GPU's machine, by default this one's. --have: names of packages that are there, one a
# line (`pip list --format=freeze` does), which are left out.
#
# OPTIONS are those of benchmarks/gpu_check: --budget SECONDS (default 600, the installation of wheels counted), --only STAGE
# ..., --cpu for toy sizes without a GPU. UFT_GPU_CHECK_PYTHON=path/to/python is the Python to use, by default python3;
# UFT_QUICKSTART_MODEL=FOLDER is the quickstart's model, carried along.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
python=${UFT_GPU_CHECK_PYTHON:-python3}
run=("$python" "$here/benchmarks/gpu_check/wheels.py")

if [ "${1:-}" = --collect ]; then
  shift
  exec "${run[@]}" collect "$@"
fi

folder=gpu-check wheels='' options=()
case ${1:-} in ''|-*) ;; *) folder=$1; shift ;; esac
while [ $# -gt 0 ]; do
  case $1 in
    --wheels) wheels=${2:?--wheels needs a folder}; shift 2 ;;
    -h|--help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0"; exit 0 ;;
    *) options+=("$1"); shift ;;
  esac
done
mkdir -p "$folder"
export PYTHONPATH="$here:$here/benchmarks:$here/tests${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [ -n "$wheels" ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  # In front of what is installed, which stays as it is.
  "${run[@]}" install "$wheels" "$site" || echo "not all wheels could be installed; the stages say what is missing"
  export PYTHONPATH="$site:$PYTHONPATH"
fi
"$python" -m gpu_check "$folder" --spent "$SECONDS" ${options[@]+"${options[@]}"} &
child=$!
trap 'kill -TERM "$child" 2>/dev/null || true' INT TERM # or its stage would stay on the GPU
code=0
while kill -0 "$child" 2>/dev/null; do wait "$child" && code=0 || code=$?; done
exit "$code"
