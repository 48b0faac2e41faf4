#!/usr/bin/env bash
# Install what the tests need and run them all; arguments go to pytest, as: bash launch/test.sh -m "not slow"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source launch/environment.sh
install_lumina -e ".[test]"
# Three at once, as two cores are not busy with two: tests of hosts and of hangs wait. In their order, or the long ones
# would come last.
python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
