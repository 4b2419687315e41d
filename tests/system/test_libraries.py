"""The libraries below, as the command line imports them."""

import json
import subprocess
import sys

CODE = """
import gc, json
begun = []
gc.callbacks.append(lambda phase, info: begun.append(info["generation"]) if phase == "start" else None)
from halfbyte.system import libraries
before = len(begun)
with libraries.loading():
    import halfbyte.finetune
print(json.dumps([begun[before:], gc.isenabled(), gc.get_freeze_count()]))
import atexit
atexit._run_exitfuncs()
print(gc.get_freeze_count())
"""


def test_the_collector_rests_while_libraries_are_imported() -> None:
    """It found nothing, in ever longer passes: a second of the four that imports take."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    seen, at_the_end = done.stdout.splitlines()
    collections, enabled, frozen = json.loads(seen)
    assert len(collections) == 0 and enabled and frozen > 100_000
    assert at_the_end == "0", "what cannot go by then is told as leaked by libraries that check"
