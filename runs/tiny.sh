#!/usr/bin/env bash
# From nothing to a conversation on two CPU cores: data, tokenizer, pretraining, fine-tuning, exam, report card, a first chat.
#
#   bash runs/tiny.sh                    the whole thing: about twelve minutes after installation, and 2 GB of memory
#   bash runs/tiny.sh --small            the same stages with a smaller dial: under three minutes; what the tests run
#   bash runs/tiny.sh --data FOLDER      pretrain on your own .txt .md .jsonl .json .parquet files instead (also as .gz);
#                                        it ends with bits per byte on held-out files, because the exam is about the tiny world
#   bash runs/tiny.sh --tag NAME         keep this run beside others; default tiny, or small, or the folder's name
#
# Run it again: finished stages are skipped, an interrupted one goes on where it was. Everything lands in NANOCHAT_BASE_DIR,
# by default ~/.cache/nanochat.
set -euo pipefail

data=tinyworld tag="" small=""
while [ $# -gt 0 ]; do
    case "$1" in
        --small) small=yes; shift ;;
        --data | --tag)
            [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; }
            if [ "$1" = --data ]; then data="$2"; else tag="$2"; fi
            shift 2 ;;
        -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
        *) echo "error: $1 is not an option of runs/tiny.sh: see --help" >&2; exit 2 ;;
    esac
done
if [ "$data" != tinyworld ]; then                  # before _setup.sh goes to another folder
    [ -e "$data" ] || { echo "error: --data $data: there is no such file or folder" >&2; exit 1; }
    data="$(cd "$(dirname "$data")" && pwd)/$(basename "$data")"
    [ -n "$tag" ] || tag="$(basename "$data" | cut -d. -f1)"
fi
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
export PYTHONUNBUFFERED=1

if [ -n "$small" ]; then
    tag="${tag:-small}" docs=6000 vocab=1024 exam=0.2
    base=(--depth 2 --max-len 256 --tokens 800000 --batch-tokens 2048 --save-every 100)
    sft=(--n 4000 --epochs 3 --batch-tokens 2048 --save-every 100)
else
    tag="${tag:-tiny}" docs=60000 vocab=2048 exam=1
    base=(--depth 3 --max-len 512 --tokens 1300000 --batch-tokens 2048 --save-every 100)
    sft=(--n 12000 --epochs 2 --batch-tokens 2048 --save-every 100)
fi

stage() {                                          # stage TITLE MODULE FLAGS...: run it; its last line, the JSON, is in result.json too
    printf '\n== %s\n' "$1"
    "$PYTHON" -m "nanochat.scripts.$2" "${@:3}" | sed '$d'
}
start=$SECONDS
if [ "$data" = tinyworld ]; then
    stage "text"     data       prepare --name "$tag" --docs $docs
else
    stage "text"     data       prepare --source "$data" --name "$tag"
fi
stage "tokenizer"    tok_train  --data "$tag" --tag "$tag" --vocab-size $vocab
stage "pretraining"  base_train --data "$tag" --tag "$tag" "${base[@]}"
if [ "$data" = tinyworld ]; then
    stage "fine-tuning" chat_sft  --tag "$tag" "${sft[@]}"
    stage "exam"        chat_eval --tag "$tag" --share $exam
fi
stage "report card"  report     --tag "$tag"

folder="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
sed -n '3,$p' "$folder/report/$tag/report.md"
if [ "$data" = tinyworld ]; then
    printf '\n== a first conversation\n'
    for question in 'Who are you?' 'What is the capital of France?' 'What is 37 * 24?'; do
        printf '> %s\n' "$question"
        "$PYTHON" -m nanochat.scripts.chat_cli --tag "$tag" -p "$question"
    done
    printf '\nGo on chatting:  %s -m nanochat.scripts.chat_cli --tag %s\n' "${PYTHON#"$PWD"/}" "$tag"
fi
printf 'Report card:     %s\nThis took %d min %02d s.\n' "$folder/report/$tag/report.md" $(((SECONDS - start) / 60)) $(((SECONDS - start) % 60))
