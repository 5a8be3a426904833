"""The exception for mistakes that the user can correct: shown as one sentence, exit code 2."""


class UserError(Exception):
    """A mistake in the user's input. Its message says what is wrong, where, and how to fix it."""
