"""What can go wrong, one class per cause; every message names the value, the place and the remedy.

>>> issubclass(SpecError, S3Error) and issubclass(S3Error, ValueError)
True
"""


class S3Error(ValueError):
    """The base of every error that s3lab raises on purpose."""


class SpecError(S3Error):
    """A specification that cannot be: its text, its layout, or a mask that breaks it."""


class ShapeError(S3Error):
    """A tensor that does not fit what it is given to."""


class SolveError(S3Error):
    """A solve that cannot go on."""


class DataError(S3Error):
    """Text, a model or a file that is not there or is not right."""
