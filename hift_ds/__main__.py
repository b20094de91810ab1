"""``python -m hift_ds`` is ``hift-ds``."""

import sys

from hift_ds.cli.main import main

sys.exit(main())
