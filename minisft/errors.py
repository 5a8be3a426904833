"""The one exception that means "you can mend this": shown as one sentence, exit code 2."""


class UserError(Exception):
    """A mistake in what the user gave: its message says what is wrong, where, and how to mend it."""
