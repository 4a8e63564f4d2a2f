"""The version of the package, for records, saved files and the command line."""

__version__ = "0.1.0"
