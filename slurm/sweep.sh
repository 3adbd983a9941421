#!/usr/bin/env bash
#SBATCH --job-name=uft-sweep
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --wait-all-nodes=1
#SBATCH --output=%x-%A_%a.out
#
# Run a sweep as a job array: one job per point of the grid, which runs its stages one after the other. A last job,
# table.sh, writes the table, even if other jobs failed:
#
#   bash slurm/sweep.sh SWEEP [key=value ...]                          a sweep's file, or the name of a shipped one
#   bash slurm/sweep.sh my.yaml --grid 'train.lr=[1e-5,3e-5]' --grid 'objective.beta=[0.01,0.03,0.1]'
#
# Tokens and reference log-probs are shared through the caches in the user's home. The same command again runs only what
# is not done. Settings in addition to those of launch.sh:
#   UFT_SWEEP_PARALLEL   jobs at a time                                        [4]
#   UFT_TABLE_SBATCH     options of sbatch for the table's job                 [UFT_SBATCH, without GPUs, 15 minutes]
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ ! -f "$here/launch.sh" ]; then
    original=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\(.*\.sh\).*/\1/p' | head -n 1)
    here=$(dirname "$original")
fi
# shellcheck source=slurm/launch.sh
. "$here/launch.sh" || { echo "$here: no launch.sh; it must lie beside the script that is submitted" >&2; exit 2; }

if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    for recipe in "$1/$SLURM_ARRAY_TASK_ID"/*.yaml; do
        train "$recipe" || exit $?
    done
    exit 0
fi

recipes=$PWD/.uft-sweep-$(date +%Y%m%d-%H%M%S)-$$
points=$(_uft sweep "$@" --recipes "$recipes") || { rm -rf "$recipes"; exit 2; }
count=$(wc -l <<<"$points")
# shellcheck disable=SC2086
array=$(sbatch --parsable ${UFT_SBATCH:-} --array="0-$((count - 1))%${UFT_SWEEP_PARALLEL:-4}" "$here/sweep.sh" "$recipes") ||
    { rm -rf "$recipes"; exit 1; }
array=${array%%;*}
# shellcheck disable=SC2086
last=$(sbatch --parsable ${UFT_TABLE_SBATCH:-${UFT_SBATCH:-} --gpus-per-node=0 --nodes=1 --time=15} \
    --dependency="afterany:$array" "$here/table.sh" "$recipes" "$@") ||
    { echo "the array $array is submitted; its table: uft sweep $* --table" >&2; exit 1; }
echo "$count jobs: array $array; then the table: job ${last%%;*}, uft-table-${last%%;*}.out"
