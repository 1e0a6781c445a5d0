"""`python -m tokgen` is `tokgen`."""

import sys

from tokgen.cli import main

sys.exit(main())
