"""A first half hour on a GPU: every speed and promise that only a GPU can show; see `__main__`."""
