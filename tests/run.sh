#!/usr/bin/env bash
# Lint, types and the CPU test suite; sets itself up in .venv on the first run.
#
#   ./tests/run.sh [--all] [pytest arguments]
#
# --all   the slow tests too
set -euo pipefail
export LC_ALL=C.UTF-8 OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
# shellcheck source=launch/environment.sh
source launch/environment.sh

marker=(-m "not slow")
if [[ ${1:-} == --all ]]; then
    marker=()
    shift
fi
ensure_environment "$root" dev
python=$MULTITURN_PYTHON

failed=()

# check NAME COMMAND...: runs the command; a failure is noted and the next check still runs.
check() {
    local name=$1
    shift
    say "== $name"
    "$@" </dev/null || failed+=("$name")
}

check "ruff check" "$python" -m ruff check .
check "ruff format" "$python" -m ruff format --check .
check "mypy" "$python" -m mypy
if command -v shellcheck >/dev/null; then
    check "shellcheck" shellcheck --external-sources launch/*.sh launch/*/*.sh launch/*.slurm \
        tests/run.sh .ci/run
else
    say "== shellcheck: not installed, left out"
fi
check "pytest" "$python" -m pytest ${marker[@]+"${marker[@]}"} "$@"

if ((${#failed[@]})); then
    die "failed: $(printf '%s, ' "${failed[@]}" | sed 's/, $//')"
fi
say "all checks passed"
