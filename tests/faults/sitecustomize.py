"""Read by every Python that is started with this folder on its path: count what all of them do to files."""

import os

from count import Count

Count(os.environ["COUNT_ROOT"], os.environ["COUNT_TALLY"], int(os.environ["COUNT_AT"]))
