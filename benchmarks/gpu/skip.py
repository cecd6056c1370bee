"""What a part raises that cannot be run here."""


class Skip(Exception):
    """Says why."""
