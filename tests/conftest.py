"""For every test: bitsandbytes as it is, so that what it quantises is a reference that does not come from us."""

from __future__ import annotations

import os

os.environ["HALFBYTE_BNB_KERNEL"] = "0"
