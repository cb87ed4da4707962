"""`python -m orion_iscsifs` is the command."""

from orion_iscsifs.cli.main import main

if __name__ == "__main__":
    main()
