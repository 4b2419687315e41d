"""Keep the libraries below quiet: no progress bars, warnings or advice between the lines of the command line."""

import logging
import os
import warnings


def quiet() -> None:
    """Call it before they are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # bitsandbytes wraps its fallback functions in torch.compile; off, they run as written and no compiler is imported
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
