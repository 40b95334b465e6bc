"""The one exception for bad input."""


class UserError(ValueError):
    """Input that cannot be used as given.

    The message is one line that says what is wrong, where, and what to do about it. Every console command prints it
    as it is and exits with status 2; nothing else in the project turns into a one-line message.
    """
