# shellcheck shell=bash
# Sourced by the other scripts: finds a Python, makes .venv and installs.
#
#   ensure_environment ROOT base|dev     sets MULTITURN_PYTHON to the interpreter to run
#   installed_python ROOT                prints the one to run; makes and installs nothing
#   has_module PYTHON MODULE             whether it can be imported there
#   require_torch PYTHON                 ends with the remedy if PyTorch is missing
#
# MULTITURN_PYTHON set beforehand names an interpreter to use as it is: nothing is made and
# nothing is installed (a container with its own torch and Megatron, for instance).

# say TEXT...: a line for the reader, not for the program that called us.
say() { printf '%s\n' "$*" >&2; }

die() {
    say "$*"
    exit 1
}

# The interpreter that MULTITURN_PYTHON names, or that of ROOT/.venv, or PATH's python3.
installed_python() {
    if [[ -n ${MULTITURN_PYTHON:-} ]]; then
        printf '%s\n' "$MULTITURN_PYTHON"
    elif [[ -x $1/.venv/bin/python ]]; then
        printf '%s\n' "$1/.venv/bin/python"
    else
        printf 'python3\n'
    fi
}

has_module() {
    "$1" -c "import importlib.util as u; raise SystemExit(u.find_spec('$2') is None)" 2>/dev/null
}

require_torch() {
    has_module "$1" torch || die "$1 has no PyTorch. Name one that has in MULTITURN_PYTHON, or" \
        "install: ./launch/quickstart.sh makes .venv, which these scripts take"
}

# Whether $1 runs, is Python 3.12 or later and can make virtual environments.
is_usable_python() {
    "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 12))' \
        </dev/null >/dev/null 2>&1
}

# Prints the first usable Python of PATH and of pyenv's versions.
find_python() {
    local name candidate home=~
    for name in python3.12 python3.13 python3 python python3.14; do
        while read -r candidate; do
            if is_usable_python "$candidate"; then
                printf '%s\n' "$candidate"
                return 0
            fi
        done < <(type -ap "$name")
    done
    for candidate in "${PYENV_ROOT:-$home/.pyenv}"/versions/3.1[2-9]*/bin/python; do
        if is_usable_python "$candidate"; then
            printf '%s\n' "$candidate"
            return 0
        fi
    done
    return 1
}

explain_missing_python() {
    say "No Python 3.12 or later with the venv module was found in PATH or among pyenv's versions."
    say "Install one, for example:"
    say "  Ubuntu 24.04 or later, Debian 13 or later:  sudo apt-get install python3 python3-venv"
    say "  any Linux, with pyenv:                      pyenv install 3.12"
    say "  with conda:                                 conda create -n py312 python=3.12 && conda activate py312"
    say "  with uv:                                    uv python install 3.12"
    say "or name one that you have: MULTITURN_PYTHON=/path/to/python (used as it is, nothing is installed)."
}

# What an installation depends on, as one line: reinstalled when it changes.
environment_stamp() {
    local root=$1
    cat "$root/setup.py" "$root/pyproject.toml" "$root/megatron_multiturn/_version.py" \
        | cksum | tr '\n' ' '
    printf '%s\n' "$root"
}

# run_quietly LOG COMMAND...: the command's output goes to LOG, its end to the terminal on failure.
run_quietly() {
    local log=$1 status=0
    shift
    "$@" >>"$log" 2>&1 </dev/null || status=$?
    if ((status != 0)); then
        say "failed with exit code $status: $*"
        say "--- the last lines of $log"
        tail -n 25 "$log" >&2
        return "$status"
    fi
}

# install_into VENV ROOT base|dev
install_into() {
    local venv=$1 root=$2 extra=$3 target=$2 log=$1/install.log
    if [[ $extra == dev ]]; then
        target="${root}[dev]"
    fi
    say "installing into .venv (torch and Megatron: some minutes and 5 GB; log: $log)"
    : >"$log"
    rm -f "$venv"/installed.*
    run_quietly "$log" "$venv/bin/python" -m pip install --disable-pip-version-check \
        --no-input --editable "$target" || return
    environment_stamp "$root" >"$venv/installed.base"
    if [[ $extra == dev ]]; then
        environment_stamp "$root" >"$venv/installed.dev"
    fi
}

ensure_environment() {
    local root=$1 extra=$2 venv=$1/.venv python
    if [[ -n ${MULTITURN_PYTHON:-} ]]; then
        is_usable_python "$MULTITURN_PYTHON" \
            || die "MULTITURN_PYTHON=$MULTITURN_PYTHON is not a Python 3.12 or later; unset it or name another."
        export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
        return
    fi
    if ! is_usable_python "$venv/bin/python"; then
        if ! python=$(find_python); then
            explain_missing_python
            exit 1
        fi
        say "making .venv with $python ($("$python" --version 2>&1))"
        rm -rf "$venv"
        "$python" -m venv "$venv" || die "$python -m venv $venv failed."
    fi
    if [[ $(environment_stamp "$root") != "$(cat "$venv/installed.$extra" 2>/dev/null)" ]]; then
        install_into "$venv" "$root" "$extra" || die "The installation failed; run again to retry."
    fi
    MULTITURN_PYTHON=$venv/bin/python
}
