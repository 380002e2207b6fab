#!/usr/bin/env bash
# From nothing to a chat model on one machine with 8 H100: plan, text, tokenizer, pretraining in fp8, evaluation, fine-tuning, report card.
#
#   bash runs/speedrun.sh                      depth 24: under three hours and about $56, counted at 29% of the fp8 peak
#   bash runs/speedrun.sh --plan h100          what that needs and costs on 8 such GPUs; nothing is trained or written
#   bash runs/speedrun.sh --prepare            only plan, text and tokenizer: the rest then needs no network
#   bash runs/speedrun.sh --tiny               the same stages on a CPU in a minute, with two processes; what the tests run
#
#   --depth N             layers: the dial                                     (24)
#   --tokens-per-param X  length of pretraining                                (10.5)
#   --vocab N             of the tokenizer                                     (32768)
#   --data NAME           climbmix, fineweb-edu, or a folder that `data prepare` has made, or tinyworld   (climbmix)
#   --precision P         fp8, bf16, ...: see base_train --help                (fp8)
#   --gpus N              processes on this machine                            (the GPUs that it has; with --plan, 8)
#   --tag NAME            keep this run beside others                          (d and the depth)
#   --restarts N          how often torchrun starts again by itself after a crash, from the newest checkpoint       (0)
#   --nodes N --node I --head HOST:PORT   several machines: run this on each, with its number I from 0, the HOST of number 0, and a
#                         NANOCHAT_BASE_DIR that all of them see. runs/slurm.sbatch and runs/sky.yaml do it
#
# Run it again: finished stages are skipped, an interrupted one goes on where it was. Everything lands in NANOCHAT_BASE_DIR,
# by default ~/.cache/nanochat. When one of several machines is lost, the others end with an error, at once or, where only its silence
# tells them, within half an hour; with --restarts they first wait an hour for it to come back, unless it was number 0, where they meet.
# The same lines again, on all machines, go on from the newest checkpoint.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_stages.sh"

depth="" tokens_per_param="" vocab="" data="" precision="" tag="" plan=""
flags="depth tokens-per-param vocab data precision gpus tag plan nodes node head restarts"
options "$@"
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh" ""

if [ -n "$tiny" ]; then
    depth="${depth:-1}" vocab="${vocab:-512}" data="${data:-tinyworld}" precision="${precision:-fp32}" gpus="${gpus:-2}" tag="${tag:-speedrun-tiny}"
    len=64 docs=(--docs 1500 --val-docs 60) text=() base=(--batch-tokens 1024 --eval-every 50 --save-every 50) exam=0.02 device=(--device cpu)
    sft=(--n 200 --batch-tokens 1024)
    tokens_per_param="${tokens_per_param:-0.5}"
else
    depth="${depth:-24}" vocab="${vocab:-32768}" data="${data:-climbmix}" precision="${precision:-fp8}" tag="${tag:-d$depth}"
    len=2048 docs=() text=(--max-bytes 1000000000 --max-memory 64000000000) base=(--eval-every 250 --save-every 1000 --compiled) exam=1 device=()
    sft=()
fi
if [ -n "$plan" ]; then
    gpus="${gpus:-8}" device=(--device "$plan")
else
    gpus="${gpus:-$(count_gpus)}"
fi

horizon=()
if [ -n "$tokens_per_param" ]; then horizon=(--tokens-per-param "$tokens_per_param"); fi
shape=(--depth "$depth" --max-len "$len" "${horizon[@]}")
code=0
needs="$("$PYTHON" -m nanochat.scripts.plan "${shape[@]}" --data "$data" --vocab-size "$vocab" --gpus $((gpus * nodes)) --tag "$tag" \
    --precision "$precision" --efficiency 0.29 "${device[@]}" $([ -z "$tiny" ] || echo --batch-tokens 1024))" || code=$?
[ $code = 0 ] || die "there is no plan for this: see the line above"
if [ "$node" = 0 ]; then printf '== plan\n%s\n' "$(sed '$d' <<< "$needs" | sed '/^run it/,$d')"; fi
[ -z "$plan" ] || exit 0
case "$needs" in *'"fits": false'*) die "depth $depth does not fit on these GPUs: pass a smaller --depth" ;; esac
rows="$(number "$needs" device_batch)" shards="$(number "$needs" shards)"

case "$data" in
    climbmix | fineweb-edu)
        stage "download" data fetch --source "$data" --shards "$shards"
        stage "text"     data prepare --source "$data" --shards "$shards" ;;
    tinyworld)
        stage "text"     data prepare --source tinyworld --name "$tag" "${docs[@]}"
        data="$tag" world=yes ;;
esac
stage "tokenizer" tok_train --data "$data" --tag "$tag" --vocab-size "$vocab" "${text[@]}"
[ -n "$tiny" ] || stage "tokens" data tokenize --name "$data" --tokenizer "$tag"
chats=tinyworld
if [ -z "${world:-}" ]; then
    stage "conversations" data fetch --source smoltalk --shards all
    stage "conversations" data prepare --source smoltalk
    chats="$(folder)/data/smoltalk/train.jsonl"
fi
if [ -n "$prepare" ]; then say "prepared: run the same command without --prepare on the GPUs"; exit 0; fi

ranks "pretraining" base_train --data "$data" --tag "$tag" "${shape[@]}" --device-batch "$rows" --precision "$precision" "${base[@]}" "${device[@]}"
ranks "evaluation"  base_eval  --tag "$tag" "${device[@]}"
[ -n "$tiny" ] || sft=(--batch-tokens $((gpus * nodes * rows * len)))
ranks "fine-tuning" chat_sft   --tag "$tag" --data "$chats" "${sft[@]}" "${device[@]}"
if [ -n "${world:-}" ]; then stage "exam" chat_eval --tag "$tag" --share $exam "${device[@]}"; fi
stage "report card" report --tag "$tag"
if [ "$node" = 0 ]; then
    printf '\nReport card:   %s\nTalk to it:    %s -m nanochat.scripts.chat_cli --tag %s\n' "$(folder)/report/$tag/report.md" "${PYTHON#"$PWD"/}" "$tag"
fi
