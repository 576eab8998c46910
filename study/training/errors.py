"""What the command line shows as one line."""


class RunError(Exception):
    """A run that cannot start or go on for a reason that its user can mend; the program's exit status is 2."""
