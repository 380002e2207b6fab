# Sourced by the runs that train with many processes: flags, stages, and torchrun on one machine or on several.
#
#   options "$@"                       reads --NAME VALUE for the names in $flags, --tiny, --prepare and --help, before _setup.sh
#   stage TITLE MODULE FLAGS...        runs a script in one process, on the first machine
#   ranks TITLE MODULE FLAGS...        runs it on all GPUs of all machines; sourced after _setup.sh
# A stage that is finished says so and is skipped. A stage that fails ends the run with one sentence.
set -euo pipefail

gpus="" nodes=1 node=0 head="" restarts=0 tiny="" prepare="" stages=0

usage() { echo "error: $*: see --help" >&2; exit 2; }

whole() { case "$2" in '' | *[!0-9]*) usage "--$1 must be a whole number, and is '$2'" ;; esac; }

options() {
    local name
    while [ $# -gt 0 ]; do
        name="${1#--}"
        case "$1" in
            --tiny) tiny=yes; shift; continue ;;
            --prepare) prepare=yes; shift; continue ;;
            -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
        esac
        case " $flags " in *" $name "*) ;; *) usage "$1 is not an option of $0" ;; esac
        [ $# -ge 2 ] || usage "$1 needs a value"
        case "$name" in depth | gpus | nodes | node | restarts | vocab) whole "$name" "$2" ;; esac
        printf -v "${name//-/_}" '%s' "$2"
        shift 2
    done
    [ "$nodes" = 1 ] || [ -n "$head" ] || usage "--nodes $nodes needs --head HOST:PORT, the same on all of them"
    [ -z "$head" ] || [[ "$head" =~ ^[^:]+:[0-9]+$ ]] || usage "--head must be HOST:PORT, and is '$head'"
    [ "$node" -lt "$nodes" ] || usage "--node $node: they are numbered from 0 to $((nodes - 1))"
    export PYTHONUNBUFFERED=1 NANOCHAT_COMMAND=1
    trap : TERM                                    # SLURM tells every process of a job: wait for the one that is saving now
}

folder() { echo "${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"; }

run_stage() {                                      # run_stage TITLE COMMAND...: the last line, the JSON, is in result.json too
    local title="$1" code=0
    shift
    if [ "$node" = 0 ]; then printf '\n== %s\n' "$title"; fi
    "$@" < /dev/null | (trap '' TERM INT; exec sed '$d') || code=$?
    [ $code = 0 ] || die "$title ended with exit code $code: see the lines above; the same command goes on from here"
}

stage() {
    [ "$node" = 0 ] || return 0
    run_stage "$1" "$PYTHON" -m "nanochat.scripts.$2" "${@:3}"
}

# Otherwise torchrun keeps the list of addresses over a restart, and new workers call those that are gone (pytorch issue 135712)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

ranks() {
    local start=("$PYTHON" -m)                     # with --, torchrun leaves alone what looks like its own flags
    # A node that comes first waits for the others, for an hour at most. Node 0 keeps the book of who is there, whatever its name is:
    # when it is lost the others cannot restart, and end. Where only its silence tells them, TCP gives up after 15 minutes, on Linux
    if [ "$nodes" -gt 1 ]; then
        stages=$((stages + 1))                     # a port for each stage: the next one must not find what is left of the last
        start=("$PYTHON" -m torch.distributed.run "--nnodes=$nodes" "--nproc-per-node=$gpus" --rdzv-backend=c10d
               "--rdzv-endpoint=${head%:*}:$((${head##*:} + stages - 1))"
               "--rdzv-id=$tag-$2" "--rdzv-conf=is_host=$((node == 0)),join_timeout=3600,read_timeout=3600" "--max-restarts=$restarts" -m --)
    elif [ "$gpus" -gt 1 ]; then
        start=("$PYTHON" -m torch.distributed.run --standalone "--nproc-per-node=$gpus" "--max-restarts=$restarts" -m --)
    fi
    run_stage "$1" "${start[@]}" "nanochat.scripts.$2" "${@:3}"
}

count_gpus() { "$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))'; }

number() { grep -o "\"$2\": [0-9.]*" <<< "$1" | head -n 1 | grep -o '[0-9.]*$' || true; }       # number JSON NAME
