"""`python -m edgekv`: the same as the `edgekv` command."""

from edgekv.cli.app import main

if __name__ == "__main__":
    main()
