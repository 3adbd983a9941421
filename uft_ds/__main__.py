"""`python -m uft_ds` is the same as `uft`."""

from uft_ds.cli import main

if __name__ == "__main__":
    main()
