"""`python -m aprlab` is the command `aprlab`."""

from aprlab.cli.app import main

if __name__ == "__main__":
    main()
