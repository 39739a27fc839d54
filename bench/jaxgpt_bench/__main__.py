"""`python -m jaxgpt_bench` is the same as `jaxgpt-bench`."""

import sys

from jaxgpt_bench.cli import main

sys.exit(main())
