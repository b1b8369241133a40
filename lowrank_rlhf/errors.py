"""The one exception that means "your input, not our bug"."""


class UserError(Exception):
    """Bad input, told in words: names the file, row or key, what is wrong with it, and the fix.

    The command line prints the message alone and exits with status 2; every other exception keeps its traceback.
    """
