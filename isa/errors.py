"""The one family of errors a user can cause: each message is one line with the rule, the value and the way out."""


class TypebarError(Exception):
    """Bad input or a bad state that the user can mend; commands print it as one line and exit non-zero."""
