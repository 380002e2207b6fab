#!/usr/bin/env bash
# A grid of depths and budgets of FLOPs: at each budget small models see much text and large models little, and one of them is best.
#
#   bash runs/scaling_laws.sh                  depths 8 to 20 at four budgets from 1e18 to 1e19 FLOPs
#   bash runs/scaling_laws.sh --tiny           two very small models on a CPU in a minute; what the tests run
#
#   --depths "N N ..."    layers of each model                                 (8 10 12 14 16 18 20)
#   --flops "X X ..."     budgets, each for all depths                         (1e18 2.15e18 4.64e18 1e19)
#   --vocab N             of the tokenizer that all share                      (32768)
#   --data NAME           climbmix, fineweb-edu, or a folder that `data prepare` has made, or tinyworld   (climbmix)
#   --precision P         bf16, fp8, ...: see base_train --help                (bf16)
#   --gpus N              processes                                            (the GPUs that this machine has)
#   --tag NAME            of the grid; its runs are NAME-d8-1e18, ...          (scaling)
#   --ratios "LOW HIGH"   runs with fewer or more tokens for each parameter are left out   (1 100)
#   --max-len N           longest sequence, in tokens                          (2048)
#   --dial NAME=VALUE,... other numbers of the recipe, as for base_train
#   --restarts N          how often torchrun starts again by itself after a crash       (0)
#
# At the end nanochat.scripts.laws fits the loss as a function of parameters and tokens, and page 80 of the book draws it. Run it again:
# finished runs are skipped, an interrupted one goes on. Add depths or budgets later: only the new ones are trained.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_stages.sh"

depths="" flops="" vocab="" data="" precision="" ratios="" max_len="" dial="" tag=scaling
flags="depths flops vocab data precision gpus tag restarts ratios max-len dial"
options "$@"
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh" ""
source runs/_series.sh

if [ -n "$tiny" ]; then depths="${depths:-1 2}" flops="${flops:-2e10}" ratios="${ratios:-0.01 100}"; fi
depths="${depths:-8 10 12 14 16 18 20}" flops="${flops:-1e18 2.15e18 4.64e18 1e19}"

needs="$("$PYTHON" -m nanochat.scripts.laws --plan --depths "$depths" --flops "$flops" --vocab-size "$vocab" --max-len "$max_len" --data "$data" \
    --ratios "${ratios:-1 100}" "${dial[@]}")" || die "there is no plan for this grid: see the line above"
printf '== plan\n%s\n' "$(sed '$d' <<< "$needs")"
fetch_text "$(number "$needs" shards)"
while read -r _ depth budget _; do member "$tag-d$depth-$budget" "$depth" --flops "$budget"; done < <(grep '^run ' <<< "$needs")
stage "law" laws --series "$tag"
