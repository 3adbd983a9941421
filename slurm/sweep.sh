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
# A sweep as an array of jobs, a point of the grid each, its stages one after the other; and a last job that writes the
# table, whatever became of the others:
#
#   bash slurm/sweep.sh SWEEP [key=value ...]                          a sweep's file, or the name of a shipped one
#   bash slurm/sweep.sh my.yaml --grid 'train.lr=[1e-5,3e-5]' --grid 'objective.beta=[0.01,0.03,0.1]'
#
# Tokens and the reference's log-probs are shared through the caches of the user's home. The same command again runs what
# is not done. A setting besides those of launch.sh: UFT_SWEEP_PARALLEL, jobs at a time [4]
set -uo pipefail

if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    original=$(scontrol show job -o "$SLURM_JOB_ID" | grep -oE ' Command=[^ ]*' | cut -d= -f2)
    # shellcheck source=slurm/launch.sh
    . "$(dirname "$original")/launch.sh" || { echo "no launch.sh beside $original" >&2; exit 2; }
    for recipe in "$1/$SLURM_ARRAY_TASK_ID"/*.yaml; do
        train "$recipe" || exit $?
    done
    exit 0
fi

here=$(cd "$(dirname "$0")" && pwd)
if [ -f "$here/site.env" ]; then set -a; . "$here/site.env"; set +a; fi
if [ -n "${UFT_VENV:-}" ]; then export PATH="$UFT_VENV/bin:$PATH"; fi
recipes=$PWD/.uft-sweep-$(date +%Y%m%d-%H%M%S)-$$
points=$(${UFT_EXEC:-} python -m uft_ds sweep "$@" --recipes "$recipes") || { rm -rf "$recipes"; exit 2; }
count=$(wc -l <<<"$points")
# shellcheck disable=SC2086
array=$(sbatch --parsable ${UFT_SBATCH:-} --array="0-$((count - 1))%${UFT_SWEEP_PARALLEL:-4}" "$here/sweep.sh" "$recipes") ||
    exit 1
array=${array%%;*}
table=$(printf '%q ' ${UFT_EXEC:-} "$(command -v python)" -m uft_ds sweep "$@" --table)
partition=$(scontrol show job -o "${array}_0" 2>/dev/null | grep -oE ' Partition=[^ ]*' | head -n 1 | cut -d= -f2)
last=$(sbatch --parsable --dependency="afterany:$array" --job-name=uft-table --ntasks=1 --time=00:15:00 \
    ${partition:+--partition="$partition"} --output=%x-%j.out --wrap "$table") || exit 1
echo "$count jobs: array $array; then the table: job ${last%%;*}, uft-table-${last%%;*}.out"
