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
"""


def test_the_collector_rests_while_libraries_are_imported() -> None:
    """It found nothing, in ever longer passes: a second of the four that imports take."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    collections, enabled, frozen = json.loads(done.stdout)
    assert len(collections) == 0 and enabled and frozen > 100_000
