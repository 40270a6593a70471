"""``python -m lilliput``, which is also how torchrun starts a run."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
