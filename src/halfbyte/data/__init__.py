"""From a file of examples to optimiser steps: read rows, render and tokenise them, pack them, lay them end to end.

One module for each concern, used in this order; all but `collate` are free of torch. Import from the modules.
"""

from __future__ import annotations

__all__ = ["collate", "pack", "read", "render", "template"]
