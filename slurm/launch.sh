# What the batch scripts beside this one share; sourced, not run.
#
#   train RECIPE [key=value ...]     train on all nodes of this job, going on with what the output holds
#
# It returns 0 once the run is done (its folder holds DONE), 2 for a recipe or data that cannot be as they are, 3 where a
# check refused to go on; those are never started again. A run that was asked to stop (time limit, pre-emption) and one
# that crashed (a rank killed, a node lost) are: the job is requeued, and goes on from its newest checkpoint.
#
# Settings, by environment or in site.env beside this file (site.env.example shows one):
#   UFT_VENV             virtual environment with uft_ds                       [the one that is active]
#   UFT_EXEC             put before each command, such as a container's       []
#   UFT_RANKS_PER_NODE   processes a node                                      [its GPUs; 2 without any]
#   UFT_NODE_TMP         folder on each node's own disk, for built kernels    [$TMPDIR, or /tmp]
#   UFT_MAX_RESTARTS     of a job, for whatever reason                         [50]
#   UFT_MAX_CRASHES      in a row without a new checkpoint                     [3]
#   UFT_OFFLINE          1: models and data come from local caches only        [1]
#   UFT_SBATCH           options of sbatch, where `bash slurm/...` submits     []

UFT_SLURM=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ -f "$UFT_SLURM/site.env" ]; then
    set -a
    # shellcheck source=/dev/null
    . "$UFT_SLURM/site.env"
    set +a
fi
if [ -n "${UFT_VENV:-}" ]; then
    [ -x "$UFT_VENV/bin/python" ] || { echo "UFT_VENV=$UFT_VENV: no bin/python there" >&2; exit 2; }
    export PATH="$UFT_VENV/bin:$PATH"
fi

_step=-1            # number of the newest step of this job: each srun is one
_asked=0            # 1 once the batch shell has got USR1
trap '_asked=1; echo "=== USR1: the time limit is near $(date -Is)"' USR1
trap 'echo "=== TERM $(date -Is)"' TERM     # Slurm signals the steps itself; this shell only outlives it

_run() { ${UFT_EXEC:-} "$@"; }
_uft() { _run python -m uft_ds "$@"; }
_job_field() { scontrol show job -o "$SLURM_JOB_ID" | grep -oE "(^| )$1=[^ ]*" | head -n 1 | cut -d= -f2; }
_newest_checkpoint() { find "$1/checkpoints" -maxdepth 1 -name 'step-*[0-9]' 2>/dev/null | sort | tail -n 1; }

# Runs a step and waits for it, whatever signals this shell gets meanwhile. Once asked to stop it asks the step's
# processes, and again until they have ended: one that has just been started does not listen yet.
_step_of_job() {
    local code
    _step=$((_step + 1))
    srun "$@" &
    local srun_pid=$!
    while :; do
        code=0
        if [ "$_asked" = 1 ]; then
            scancel --signal=USR1 "$SLURM_JOB_ID.$_step" 2>/dev/null
            sleep 10 &
            wait -n "$srun_pid" $! || code=$?
        else
            wait "$srun_pid" || code=$?
        fi
        kill -0 "$srun_pid" 2>/dev/null || break
    done
    wait "$srun_pid" 2>/dev/null     # its own code, where a signal ended the wait before
    code=$?
    [ "$code" = 127 ] && code=0      # it has been waited for above
    return "$code"
}

# Every node answers, sees its GPUs, the environment and the caller's folder, and can write to its own disk: in seconds,
# before the minutes of a start.
_check_nodes() {
    # shellcheck disable=SC2016
    timeout 300 srun --ntasks-per-node=1 --kill-on-bad-exit=1 --label bash -c '
        bad() { echo "$SLURMD_NODENAME: $*"; exit 1; }
        if [ "$1" -gt 0 ]; then
            command -v nvidia-smi >/dev/null || bad "$1 GPUs are granted, and there is no nvidia-smi"
            [ "$(nvidia-smi -L | wc -l)" -ge "$1" ] || bad "nvidia-smi sees fewer than the $1 GPUs that are granted"
        fi
        [ -d "$2" ] || bad "$2 is not there: is the file system shared?"
        probe=$3/.uft-$SLURM_JOB_ID-$SLURM_PROCID
        mkdir -p "$3" && touch "$probe" && rm "$probe" || bad "$3 cannot be written (UFT_NODE_TMP)"
        ${UFT_EXEC:-} python -c "import uft_ds" || bad "uft_ds cannot be imported by $(command -v python) (UFT_VENV)"
    ' check "${SLURM_GPUS_ON_NODE:-0}" "$PWD" "${UFT_NODE_TMP:-${TMPDIR:-/tmp}}"
    local code=$?
    _step=$((_step + 1))
    return "$code"
}

_log_environment() {
    echo "=== job $SLURM_JOB_ID restart ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST $(date -Is)"
    echo "=== master $MASTER_ADDR:$MASTER_PORT, $SLURM_NNODES nodes x $1 ranks"
    echo "=== $(_uft --version), git $(git -C "$UFT_SLURM" describe --always --dirty --abbrev=40 2>/dev/null || echo none)"
    env | grep -E '^(SLURM_JOB|SLURM_NNODES|SLURM_GPUS|CUDA|NCCL|GLOO|TORCH|TRITON|HF_|TRANSFORMERS|OMP|UFT)' |
        grep -viE 'token|key|secret|password' | sort
}

train() {
    local recipe=$1 run ranks code outcome before
    shift
    run=$(_uft recipe show "$recipe" "$@" --key output) || return 2
    ranks=${UFT_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}
    [ "$ranks" -gt 0 ] || ranks=2

    # Never localhost: each node would train by itself.
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    [ -n "$MASTER_ADDR" ] || { echo "no host name for $SLURM_JOB_NODELIST" >&2; return 1; }
    # This shell is on the first node, where the port must be free.
    MASTER_PORT=$(_run python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
    export MASTER_ADDR MASTER_PORT
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((${SLURM_CPUS_ON_NODE:-1} > ranks ? SLURM_CPUS_ON_NODE / ranks : 1))}
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN} TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
    export PYTHONFAULTHANDLER=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
    if [ "${UFT_OFFLINE:-1}" = 1 ]; then export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1; fi
    # New at each start, on the node's own disk: a build that is killed half-way leaves a lock that hangs every later
    # start (pytorch#189245), and nodes that share a folder race for it.
    UFT_NODE_CACHE=${UFT_NODE_TMP:-${TMPDIR:-/tmp}}/uft-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
    export UFT_NODE_CACHE TORCH_EXTENSIONS_DIR=$UFT_NODE_CACHE/torch TRITON_CACHE_DIR=$UFT_NODE_CACHE/triton

    _log_environment "$ranks"
    echo "=== recipe $recipe $*"
    _uft recipe show "$recipe" "$@" || return 2
    _check_nodes || { echo "=== a node is not fit (above); nothing was started" >&2; return 1; }

    before=$(_newest_checkpoint "$run")
    # Ignored until a rank listens, and by the launcher for good: it must outlive what Slurm sends to all processes, and
    # not cut a pre-emption's grace to its own 30 seconds.
    # shellcheck disable=SC2016
    _step_of_job --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}" --kill-on-bad-exit=1 --wait=60 --label \
        bash -c '
            trap "" USR1 TERM
            ranks=$1; shift
            mkdir -p "$UFT_NODE_CACHE"
            exec ${UFT_EXEC:-} python -m torch.distributed.run --nnodes="$SLURM_NNODES" --nproc-per-node="$ranks" \
                --node-rank="$SLURM_NODEID" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" \
                --max-restarts=0 --signals-to-handle=SIGINT,SIGHUP,SIGQUIT -m uft_ds.train "$@" --resume
        ' train "$ranks" "$recipe" "$@"
    code=$?
    srun --ntasks-per-node=1 --overlap bash -c 'rm -rf "$UFT_NODE_CACHE"' 2>/dev/null
    _step=$((_step + 1))
    _decide "$run" "$code" "$before"
}

# How the run ended decides, not srun: it has been seen to return 0 for a job that had lost a node, and launchers turn
# all codes into 1.
_decide() {
    local run=$1 code=$2 before=$3 outcome state
    if [ -e "$run/DONE" ]; then
        echo "=== done: $run"
        return 0
    fi
    outcome=1
    if [ -d "$run" ]; then
        _uft status "$run"
        outcome=$?
    fi
    state=$(_job_field JobState)
    echo "=== outcome $outcome, srun $code, job $state $(date -Is)"
    case $outcome in 2 | 3) return "$outcome" ;; esac
    # COMPLETING: Slurm has decided (scancel, a lost node, its own requeue). A requeue now would undo a scancel.
    [ "$state" = RUNNING ] || return "$outcome"
    if [ "$outcome" != 85 ] && [ "$_asked" = 0 ] && ! _is_preempted; then
        _may_follow_a_crash "$run" "$before" || return 1
    fi
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "${UFT_MAX_RESTARTS:-50}" ]; then
        echo "=== restarted ${SLURM_RESTART_COUNT} times (UFT_MAX_RESTARTS): giving up; sbatch it again to go on"
        return "$outcome"
    fi
    echo "=== requeued"
    scontrol requeue "$SLURM_JOB_ID" && sleep 600     # Slurm ends this shell
    return "$outcome"
}

_is_preempted() {
    local preempted started
    preempted=$(_job_field PreemptTime)
    started=$(_job_field StartTime)
    [ -n "$preempted" ] && [ "$preempted" != None ] && [[ ! $preempted < $started ]]
}

# A crash before there is a run folder is no accident of training: it is not repeated.
_may_follow_a_crash() {
    local run=$1 before=$2 crashes=0
    if [ ! -d "$run" ]; then
        echo "=== it ended before the run began (see above): not started again"
        return 1
    fi
    if [ "$(_newest_checkpoint "$run")" = "$before" ] && [ -f "$run/slurm-crashes" ]; then
        crashes=$(cat "$run/slurm-crashes")
    fi
    crashes=$((crashes + 1))
    echo "$crashes" >"$run/slurm-crashes"
    echo "=== crash $crashes without a new checkpoint in between (UFT_MAX_CRASHES=${UFT_MAX_CRASHES:-3})"
    [ "$crashes" -lt "${UFT_MAX_CRASHES:-3}" ]
}
