"""What can go wrong, one class per cause; every message names the value, the place and the remedy.

>>> issubclass(SpecError, S3Error) and issubclass(S3Error, ValueError)
True
"""


class S3Error(ValueError):
    """The base of every error that is raised by s3lab on purpose: catch it to catch them all."""


class SpecError(S3Error):
    """A specification that cannot be.

    Raised where a text cannot be read, a layout does not exist, a pattern does not fit a shape, or a mask breaks its
    pattern.
    """


class ShapeError(S3Error):
    """A tensor that does not fit what it is given to.

    Raised for another shape, dtype or device than expected, and for NaN and Inf.
    """


class SolveError(S3Error):
    """A solve that cannot go on.

    Raised for an unknown solver, options that cannot be, a missing second moment, and a factorisation that no damping
    saves.
    """


class PatternError(SolveError):
    """A pattern that a solver does not take, whatever the layer."""


class DataError(S3Error):
    """Text, a model or a file that is not there or is not right.

    Raised for a source that cannot be read, too little text, a model of an unknown build, and a run directory of
    other settings.
    """
