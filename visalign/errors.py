"""What a user can mend: printed as one line, exit code 2."""


class UserError(ValueError):
    """Bad input. The message says what, where, what was expected and what to do."""
