"""`python -m lumina`, as launchers call it."""

import sys

from lumina.cli import main

sys.exit(main())
