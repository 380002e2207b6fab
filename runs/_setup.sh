# Sourced by the other scripts: `source runs/_setup.sh [extras]`. Goes to the top folder of the checkout, finds a Python, makes
# .venv, and installs this package and its extras there (such as dev,browser) when pyproject.toml changed since the last time.
# Afterwards $PYTHON is the interpreter to use.
set -euo pipefail

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras="${1:-}"

usable() { "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in "${NANOCHAT_PYTHON:-}" python3.12 python3.11 python3.10 python3; do
        if [ -n "$candidate" ] && usable "$candidate"; then echo "$candidate"; return; fi
    done
    die "no Python 3.10, 3.11 or 3.12 with its venv module was found: install one (on Debian: apt install python3-venv)," \
        "or set NANOCHAT_PYTHON to its path"
}

venv_python() {                                   # Windows keeps it in another folder
    local path
    for path in .venv/bin/python .venv/Scripts/python.exe; do
        if [ -x "$path" ]; then echo "$PWD/$path"; return; fi
    done
}

PYTHON="$(venv_python)"
if [ -z "$PYTHON" ] || ! usable "$PYTHON"; then
    base="$(find_python)"
    say "setup: making .venv with $("$base" -V 2>&1)"
    "$base" -m venv --clear .venv || die ".venv could not be made: see the lines above"
    PYTHON="$(venv_python)"
fi

# One line per finished install: the hash of pyproject.toml, and the extras. Any install holds the package itself.
stamp=.venv/nanochat-installed
hash="$("$PYTHON" -c 'import hashlib; print(hashlib.sha256(open("pyproject.toml", "rb").read()).hexdigest())')"
if ! grep -qs "^$hash ${extras:+$extras\$}" "$stamp"; then
    what=".${extras:+[$extras]}"
    say "setup: installing $what into .venv (minutes, the first time)"
    "$PYTHON" -m pip install --disable-pip-version-check -e "$what" >&2 || die "pip could not install $what: see the lines above"
    grep -s "^$hash " "$stamp" > "$stamp.new" || true          # lines of another pyproject.toml are void
    echo "$hash $extras" >> "$stamp.new"
    mv "$stamp.new" "$stamp"
fi
unset extras base stamp hash what
