"""``python -m vitup_fast.cli``."""

import sys

from vitup_fast_start import main

sys.exit(main())
