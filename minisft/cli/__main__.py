"""`python -m minisft.cli` is the `minisft` command."""

from minisft.cli.entry import main

if __name__ == "__main__":
    main()
