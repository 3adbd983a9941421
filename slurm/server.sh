# shellcheck shell=bash
# A job of which one node serves answers and the others train; sourced, with launch.sh.
#
#   train_online RECIPE [key=value ...]     as train, on all nodes but the first one, where a vLLM server answers
#
# The server runs in the batch shell, not in a job step: signals for the steps do not reach it, and it ends with the job.
#
# Settings in addition to those of launch.sh:
#   UFT_VLLM             vLLM's virtual environment, or the command that takes `serve MODEL ...`   [it must be given]
#   UFT_VLLM_FLAGS       more flags of `vllm serve`; of two the last one counts                    []
#   UFT_VLLM_MINUTES     most minutes until the server is ready                                    [30]
#   UFT_VLLM_RESTARTS    most restarts of the server within one start of the job                   [5]

# shellcheck source=slurm/launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/launch.sh" || return 1

train_online() {
    local recipe=$1 words
    shift
    _listen
    _find_vllm || return 2
    [ "${SLURM_NNODES:-1}" -ge 2 ] || {
        echo "--nodes=${SLURM_NNODES:-1}: online.sh needs 2 or more, because the first one is the server's" >&2
        return 2
    }
    mapfile -t _hosts < <(_job_hosts)
    [ "${#_hosts[@]}" = "$SLURM_NNODES" ] || { echo "no host names for $SLURM_JOB_NODELIST" >&2; return 1; }
    _server_host=${_hosts[0]}
    _server_port=$(_free_port "$_server_host") || return 1
    set -- "$@" generator.by=vllm "generator.url=http://$_server_host:$_server_port"
    words=$(_uft recipe server "$recipe" "$@") || return $?
    mapfile -t _server_words <<<"$words"
    _server_words+=(--port "$_server_port")
    [ "${SLURM_GPUS_ON_NODE:-0}" = 0 ] || _server_words+=(--tensor-parallel-size "$SLURM_GPUS_ON_NODE")
    # shellcheck disable=SC2206
    _server_words+=(${UFT_VLLM_FLAGS:-})
    _server_key=$(_uft recipe show "$recipe" "$@" --key generator.key_env) || return $?

    _hosts=("${_hosts[@]:1}")
    _on=(--nodes="${#_hosts[@]}" --ntasks="${#_hosts[@]}" --nodelist="$(IFS=,; echo "${_hosts[*]}")")
    _prepare "$recipe" "$@" || return $?
    _start_server || return $?
    _launch "$recipe" "$@"
    _end_server
    _decide
}

# _vllm becomes the command before `serve`.
_find_vllm() {
    [ -n "${UFT_VLLM:-}" ] || {
        echo "UFT_VLLM is not given: vLLM's virtual environment, or its command (slurm/site.env.example)" >&2
        return 1
    }
    if [ -d "$UFT_VLLM" ]; then
        _vllm=("$UFT_VLLM/bin/vllm")
    else
        read -ra _vllm <<<"$UFT_VLLM"
    fi
    command -v "${_vllm[0]}" >/dev/null || { echo "UFT_VLLM=$UFT_VLLM: ${_vllm[0]} is no program" >&2; return 1; }
}

# Start the server and wait for it. If it does not return 0, no server is left, and its code is the job's.
_start_server() {
    local begin=$SECONDS why=
    _server_log=$PWD/uft-vllm-$_job.log
    _server_ready=$PWD/.uft-server-is-ready-$_job     # a file, because the shell that keeps the server looks for it
    rm -f "$_server_ready"
    echo "=== server on $_server_host port $_server_port, its log is $_server_log $(date -Is)"
    _keep_server &
    _keeper=$!
    until _is_healthy; do
        if [ "$_asked" = 1 ] || [ "$_ending" = 1 ]; then
            _end_server
            _come_back 85
            return $?
        fi
        kill -0 "$_keeper" 2>/dev/null || why="has ended before it was ready"
        [ $((SECONDS - begin)) -lt $((60 * ${UFT_VLLM_MINUTES:-30})) ] ||
            why="is not ready after ${UFT_VLLM_MINUTES:-30} minutes (UFT_VLLM_MINUTES)"
        if [ -n "$why" ]; then
            _end_server
            tail -n 60 "$_server_log" | sed 's/^/server: /'
            echo "=== the server $why; the end of $_server_log is above; nothing was trained" >&2
            return 1
        fi
        sleep 2 &
        wait $!
    done
    touch "$_server_ready"
    echo "=== the server is ready after $((SECONDS - begin)) s"
}

# By the name that the training nodes use: it must not be reached as localhost only.
_is_healthy() {
    # shellcheck disable=SC2016
    timeout 10 bash -c '
        exec 3<>"/dev/tcp/$1/$2" && printf "GET /health HTTP/1.0\r\nHost: %s\r\n\r\n" "$1" >&3 &&
            read -r status <&3 && [[ $status == HTTP/*" 200"* ]]
    ' health "$_server_host" "$_server_port" 2>/dev/null
}

# Run in a background shell: start the server, and start it again whenever it ends. The run waits for it meanwhile and
# gives it the adapter again. If it has ended too often, the run is asked to save, as before the time limit.
_keep_server() {
    local ends=0 most=${UFT_VLLM_RESTARTS:-5} over=0 code
    trap '' USR1
    trap over=1 TERM
    # What is meant for uft_ds, and for the processes of its ranks.
    unset PYTHONPATH PYTHONHOME VIRTUAL_ENV MASTER_ADDR MASTER_PORT OMP_NUM_THREADS TORCH_EXTENSIONS_DIR TRITON_CACHE_DIR
    [ ! -d "$UFT_VLLM" ] || export PATH=$UFT_VLLM/bin:$PATH
    export VLLM_ALLOW_RUNTIME_LORA_UPDATING=True VLLM_NO_USAGE_STATS=${VLLM_NO_USAGE_STATS:-1}
    [ "$_server_key" = None ] || export VLLM_API_KEY=${!_server_key:-}
    while [ "$over" = 0 ]; do
        echo "=== $(date -Is) ${_vllm[*]} serve ${_server_words[*]}" >>"$_server_log"
        setsid "${_vllm[@]}" serve "${_server_words[@]}" >>"$_server_log" 2>&1 &     # a process group of its own
        _server=$!
        while [ "$over" = 0 ]; do
            wait "$_server" 2>/dev/null     # without the shell's own words on it
            code=$?
            kill -0 "$_server" 2>/dev/null || break
        done
        _kill_server     # also workers that outlive it: they hold the GPUs
        [ "$over" = 0 ] || break
        [ -e "$_server_ready" ] || { echo "=== the server has ended with exit code $code"; exit 1; }
        if [ "$ends" -ge "$most" ]; then
            echo "=== the server has ended with exit code $code after $ends restarts (UFT_VLLM_RESTARTS): the run is ended"
            kill -USR1 $$     # the batch shell
            exit 1
        fi
        ends=$((ends + 1))
        echo "=== the server has ended with exit code $code; restart $ends of $most $(date -Is)"
        sleep 5 &
        wait $!
    done
}

# End the server's whole process group, which has half a minute. It may not have one yet.
_kill_server() {
    local tries
    kill -TERM -- "-$_server" 2>/dev/null
    for tries in {1..60}; do
        kill -0 -- "-$_server" 2>/dev/null || kill -TERM "$_server" 2>/dev/null || return 0
        [ "$tries" = 60 ] || sleep 0.5
    done
    kill -KILL -- "-$_server" 2>/dev/null
}

# The signal is repeated: one that comes just before a `wait` does not end it.
_end_server() {
    while kill -TERM "$_keeper" 2>/dev/null; do
        sleep 0.5 &
        wait -n "$_keeper" $!
    done
    rm -f "$_server_ready"
}
