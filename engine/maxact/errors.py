"""The errors that a user can mend: each is one line that says what is wrong, where, and what to do."""


class MaxactError(Exception):
    """A run that cannot go on. The command line prints the message alone and exits with `exit_code`."""

    exit_code = 1


class UsageError(MaxactError):
    """A setting or an argument that cannot be meant as it stands."""

    exit_code = 2


class OutOfMemory(MaxactError):
    """A batch did not fit into the memory of the device."""
