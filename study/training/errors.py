"""Errors that the command line shows as one line."""


class RunError(Exception):
    """A run cannot start or continue, for a reason that the user can fix; the exit status is 2."""
