"""`python -m anyfabric`: the command where its script is not on the path."""

from anyfabric.cli import main

if __name__ == "__main__":
    main()
