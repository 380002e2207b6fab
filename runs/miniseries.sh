#!/usr/bin/env bash
# One recipe at several depths, one run after the other: does the next model of the series keep its promise?
#
#   bash runs/miniseries.sh                    depths 10 to 20 in steps of two, each with 10.5 tokens for each parameter
#   bash runs/miniseries.sh --tiny             two very small models on a CPU in a minute; what the tests run
#
#   --depths "N N ..."    layers of each model                                 (10 12 14 16 18 20)
#   --tokens-per-param X  length of each run                                   (10.5)
#   --vocab N             of the tokenizer that all share                      (32768)
#   --data NAME           climbmix, fineweb-edu, or a folder that `data prepare` has made, or tinyworld   (climbmix)
#   --precision P         bf16, fp8, ...: see base_train --help                (bf16)
#   --gpus N              processes                                            (the GPUs that this machine has)
#   --tag NAME            of the series; its runs are NAME-d10, NAME-d12, ...  (miniseries)
#   --max-len N           longest sequence, in tokens                          (2048)
#   --dial NAME=VALUE,... other numbers of the recipe, as for base_train
#   --restarts N          how often torchrun starts again by itself after a crash       (0)
#
# At the end nanochat.scripts.laws makes a table of the series, and page 80 of the book fits and draws it. Run it again: finished runs
# are skipped, an interrupted one goes on. Add depths later: only the new ones are trained.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_stages.sh"

depths="" tokens_per_param="" vocab="" data="" precision="" max_len="" dial="" tag=miniseries
flags="depths tokens-per-param vocab data precision gpus tag restarts max-len dial"
options "$@"
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh" ""
source runs/_series.sh

if [ -n "$tiny" ]; then depths="${depths:-1 2}" tokens_per_param="${tokens_per_param:-0.2}"; fi
depths="${depths:-10 12 14 16 18 20}"
horizon=()
if [ -n "$tokens_per_param" ]; then horizon=(--tokens-per-param "$tokens_per_param"); fi

largest="$(tr ' ' '\n' <<< "$depths" | sort -n | tail -n 1)"
needs="$("$PYTHON" -m nanochat.scripts.plan --depth "$largest" --data "$data" --vocab-size "$vocab" --max-len "$max_len" \
    "${horizon[@]}" "${dial[@]}")" || die "--depths '$depths': there is no plan for the largest, see the line above"
fetch_text "$(number "$needs" shards)"
for depth in $depths; do member "$tag-d$depth" "$depth" "${horizon[@]}"; done
stage "series" laws --series "$tag"
