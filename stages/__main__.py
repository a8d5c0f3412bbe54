"""`python -m stages`, for torchrun and for machines without the script on the path."""

from stages.cli import main

if __name__ == "__main__":
    main()
