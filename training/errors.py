"""What those errors have in common that are the user's to mend."""


class ExplainedError(Exception):
    """Its message says what is wrong and what would be right; a command line prints no more."""
