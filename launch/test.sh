#!/usr/bin/env bash
# Install what the tests need and run them all; arguments go to pytest, as: bash launch/test.sh -m "not slow"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source launch/environment.sh
install_lumina -e ".[test]"
# Two at once, as tests of many ranks take two cores as it is; in their order, or the long ones would come last.
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
