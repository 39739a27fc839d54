"""`python -m export` is the same as `jaxgpt-export`."""

import sys

from jaxgpt_export.cli import main

sys.exit(main())
