"""`python -m qgraph`: the command line."""

from qgraph.cli import main

if __name__ == "__main__":
    main()
