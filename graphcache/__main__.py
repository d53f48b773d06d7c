"""`python -m graphcache`."""

from graphcache.cli.main import main

if __name__ == "__main__":
    main()
