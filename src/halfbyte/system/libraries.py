"""The libraries below, imported by the command line: quickly, and quiet from then on.

Cost: three thousand modules, three seconds of a core.
"""

import atexit
import gc
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading() -> Iterator[None]:
    """While they are imported. Python's collector rests: it would look through ever more objects, none of which can go,
    for a second in all; and afterwards it leaves those out.
    """
    gc.disable()
    try:
        _quiet()
        yield
    finally:
        gc.freeze()
        # or modules with a leak check of their own (triton's nanobind) say at the end that all of it leaked
        atexit.register(gc.unfreeze)
        gc.enable()


def _quiet() -> None:
    """No progress bars, warnings or advice between the lines of the command line. Called before they are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # bitsandbytes wraps its fallback functions in torch.compile; off, they run as written and no compiler is imported
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")  # the plan says it
    from transformers.utils import logging as their

    their.set_verbosity_error()
    their.disable_progress_bar()
