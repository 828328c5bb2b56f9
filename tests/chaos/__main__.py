"""``python -m tests.chaos --kills 500``: what `make chaos` runs."""

if __name__ == "__main__":
    # Here, as the processes that it starts run this module too: each would import Ray first, and count as one that is slow to come back.
    from tests.chaos.play import main

    main()
