"""`python -m jaxgpt` is the same as `jaxgpt`."""

import sys

from jaxgpt.cli import main

sys.exit(main())
