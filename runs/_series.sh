# Sourced by miniseries.sh and scaling_laws.sh, after _stages.sh and _setup.sh: what the runs of a series share.
#
#   fetch_text SHARDS                  text and the tokenizer that all runs share
#   member NAME DEPTH FLAGS...         trains one model
set -euo pipefail

if [ -n "$tiny" ]; then
    vocab="${vocab:-512}" data="${data:-tinyworld}" precision="${precision:-fp32}" gpus="${gpus:-1}" max_len="${max_len:-64}" tag="$tag-tiny"
    dial="${dial:-batch_tokens=1024}" shape=(--eval-every 0 --save-every 0 --device cpu) docs=(--docs 1500 --val-docs 60) text=()
else
    vocab="${vocab:-32768}" data="${data:-climbmix}" precision="${precision:-bf16}" gpus="${gpus:-$(count_gpus)}" max_len="${max_len:-2048}"
    shape=(--eval-every 250 --save-every 1000 --compiled) docs=() text=(--max-bytes 1000000000 --max-memory 64000000000)
fi
if [ -n "$dial" ]; then dial=(--dial "$dial"); else dial=(); fi

fetch_text() {
    case "$data" in
        climbmix | fineweb-edu)
            stage "download" data fetch --source "$data" --shards "$1"
            stage "text"     data prepare --source "$data" --shards "$1" ;;
        tinyworld)                                 # a corpus of its own size, under the name of the series
            stage "text"     data prepare --source tinyworld --name "$tag" "${docs[@]}"
            data="$tag" ;;
    esac
    stage "tokenizer" tok_train --data "$data" --tag "$tag" --vocab-size "$vocab" "${text[@]}"
    [ -n "$tiny" ] || stage "tokens" data tokenize --name "$data" --tokenizer "$tag"
}

member() {
    ranks "$1" base_train --data "$data" --tokenizer "$tag" --tag "$1" --depth "$2" --max-len "$max_len" --precision "$precision" "${shape[@]}" "${dial[@]}" "${@:3}"
}
