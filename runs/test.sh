#!/usr/bin/env bash
# Everything that is checked, in one command: `bash runs/test.sh [arguments for pytest]`
# The small run of the whole pipeline comes first; the notebooks, the lessons and the tests then find its results. Tests that take
# minutes are left out: `bash runs/test.sh -m slow` runs those.
#   NANOCHAT_TEST_BASE_DIR  keep the results of the small run there; otherwise a temporary folder, removed at the end
#   NANOCHAT_SHARED_DATA    real files for the tests that want some; ../shared/data when that folder is there
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh" dev,browser

if [ -n "${NANOCHAT_TEST_BASE_DIR:-}" ]; then
    export NANOCHAT_BASE_DIR="$NANOCHAT_TEST_BASE_DIR"
else
    NANOCHAT_BASE_DIR="$(mktemp -d)"
    export NANOCHAT_BASE_DIR
    trap 'rm -rf "$NANOCHAT_BASE_DIR"' EXIT
fi
if [ -z "${NANOCHAT_SHARED_DATA:-}" ] && [ -d ../shared/data ]; then
    NANOCHAT_SHARED_DATA="$(cd ../shared/data && pwd)"
    export NANOCHAT_SHARED_DATA
fi

need_chromium() { [ "${CI:-}" = true ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! command -v chromium >/dev/null; }
if need_chromium; then
    say "test: installing chromium"
    { apt-get update -qq && apt-get install -y -qq chromium; } >/dev/null 2>&1 || say "test: no chromium, so the browser tests will be skipped"
fi

failed=""
part() {                                          # part NAME COMMAND...: run it, say how long it took, remember a failure
    local name="$1" start=$SECONDS code=0
    shift
    "$@" || code=$?
    say "test: $name took $((SECONDS - start)) s$([ $code = 0 ] || echo ", FAILED with exit code $code")"
    [ $code = 0 ] || failed="$failed $name"
}

part "small-run" bash runs/tiny.sh --small
part "pytest" "$PYTHON" -m pytest -q -n 2 -m "not slow" "$@"
say "test: all took $SECONDS s"
[ -z "$failed" ] || die "failed:$failed"
