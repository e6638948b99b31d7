"""``python -m superfine``: the same as the ``superfine`` command."""

from superfine.cli import main

if __name__ == "__main__":
    main()
