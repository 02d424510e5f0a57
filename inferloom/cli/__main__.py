"""`python -m inferloom.cli`."""

from inferloom.cli import main

if __name__ == "__main__":
    main()
