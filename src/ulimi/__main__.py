"""`python -m ulimi` is `ulimi`."""

from ulimi.cli import main

if __name__ == "__main__":
    main()
