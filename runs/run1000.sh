#!/usr/bin/env bash
# The run of about a thousand dollars: runs/speedrun.sh with a larger dial. Depth 40 takes about 46 hours on one machine with 8 H100,
# counted at 29% of the fp8 peak, and torchrun starts it again by itself after a crash, three times at most.
#
#   bash runs/run1000.sh                       the whole thing
#   bash runs/run1000.sh --plan h100           what it needs and costs on 8 such GPUs; nothing is trained or written
#   bash runs/run1000.sh --tiny                the same stages on a CPU in a minute; what the tests run
#
# Every flag of runs/speedrun.sh is one of this run too: --depth, --gpus, --data, --tag, --precision, --prepare, --nodes, ...
# Run it again: finished stages are skipped, an interrupted one goes on where it was.
set -euo pipefail

dial=(--depth 40 --tag run1000 --restarts 3)
for flag in "$@"; do
    case "$flag" in
        -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
        --tiny) dial=(--depth 2 --tag run1000-tiny --restarts 3) ;;
    esac
done
exec bash "$(dirname "${BASH_SOURCE[0]}")/speedrun.sh" "${dial[@]}" "$@"        # a flag that is given twice: the last one counts
