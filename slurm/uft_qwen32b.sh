#!/usr/bin/env bash
#SBATCH --job-name=uft
#SBATCH --nodes=1                    # any number
#SBATCH --ntasks-per-node=1          # one launcher a node, which starts a process a GPU
#SBATCH --gpus-per-node=8            # nodes without GPUs: sbatch --gpus-per-node=0
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600          # ten minutes before the limit: checkpoint, requeue, go on
#SBATCH --requeue
#SBATCH --open-mode=append           # a requeued job keeps its log
#SBATCH --wait-all-nodes=1
#SBATCH --output=%x-%j.out
#
# Fine-tune Qwen2.5-32B as the recipe uft_qwen32b says, or by any other recipe:
#
#   sbatch slurm/uft_qwen32b.sh [RECIPE] [key=value ...]
#   sbatch --nodes=4 --partition=h100 --account=me --time=12:00:00 slurm/uft_qwen32b.sh my.yaml train.lr=1e-5
#   bash slurm/uft_qwen32b.sh my.yaml        submits itself, with the SBATCH_* of site.env
#
# Submit it from where relative paths of the recipe begin. The same command goes on with a run that has ended on the way.
set -uo pipefail

if [ -z "${SLURM_JOB_ID:-}" ]; then
    here=$(cd "$(dirname "$0")" && pwd)
    if [ -f "$here/site.env" ]; then set -a; . "$here/site.env"; set +a; fi
    # shellcheck disable=SC2086
    exec sbatch ${UFT_SBATCH:-} "$here/$(basename "$0")" "$@"
fi
# Slurm runs a copy of this file: the folder of the original is what the job was submitted with.
original=$(scontrol show job -o "$SLURM_JOB_ID" | grep -oE ' Command=[^ ]*' | cut -d= -f2)
# shellcheck source=slurm/launch.sh
. "$(dirname "$original")/launch.sh" || { echo "no launch.sh beside $original" >&2; exit 2; }

recipe=uft_qwen32b
case ${1:-} in
    '' | *=*) ;;
    *) recipe=$1; shift ;;
esac
train "$recipe" "$@"
