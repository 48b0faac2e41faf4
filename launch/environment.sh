# Sourced by the scripts beside it: a virtual environment, made once, with Lumina in it.

PYTHON=${PYTHON:-python3}
LUMINA_VENV=${LUMINA_VENV:-.venv}

# install_lumina ARGUMENTS…: what pip is asked to install, from the top of the clone.
install_lumina() {
    if ! "$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; then
        echo "Lumina needs Python 3.11, 3.12 or 3.13, and $PYTHON is $("$PYTHON" --version); name one with PYTHON=…" >&2
        exit 2
    fi
    if [ ! -x "$LUMINA_VENV/bin/python" ]; then
        "$PYTHON" -m venv "$LUMINA_VENV"
    fi
    # shellcheck disable=SC1091
    source "$LUMINA_VENV/bin/activate"
    python -m pip install --quiet --disable-pip-version-check "$@"
}
