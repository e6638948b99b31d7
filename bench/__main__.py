"""``python -m superfine_bench ...`` is ``superfine bench ...``."""

import sys

from superfine.cli import app

if __name__ == "__main__":
    app(["bench", *sys.argv[1:]], prog_name="superfine")
