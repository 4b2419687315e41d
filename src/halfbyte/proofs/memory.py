"""Proofs of a start that are remembered, as they take seconds, and a second start of the same says the same again.

What: a file for each base and its settings. It holds the proofs that have succeeded, and all that they depend on: files
of base and adapter, halfbyte's code, the libraries, the processor with its flags, the threads. Where one of these has
changed, that is told, and all is proven anew.
Cost: hashes of halfbyte's files and the adapter's; of the base's weights sizes and times.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, Self

from halfbyte.proofs.setting import StartProof
from halfbyte.runs.folder import read_json
from halfbyte.system import files, libraries
from halfbyte.types import Document

# Of a start: every one is made; those of an earlier one are believed; or all are made, and remembered anew.
Proofs = Literal["every", "remembered", "again"]
MOST = 64  # files of some kB; the oldest go
FIRST = ("dequantised", "packing", "fused")  # proofs that others build on


@dataclass
class RememberedProofs:
    """`file` None: nothing is remembered. `changed`: names of what is not as it was when the proofs were made."""

    file: Path | None = None
    made_with: Document = field(default_factory=dict)
    proofs: dict[str, Document] = field(default_factory=dict)
    changed: tuple[str, ...] = ()

    @classmethod
    def of(cls, subject: Document, paths: Mapping[str, Path], threads: int, *, prove: bool = False) -> Self:
        """What is remembered of a subject, told by its settings. `paths`: folders and files that its proofs depend on,
        by what they are. `prove`: recall nothing."""
        name = hashlib.sha256(json.dumps(subject, sort_keys=True).encode()).hexdigest()[:24]
        made_with = {**libraries.surroundings(threads), **{what: files.state(path) for what, path in paths.items()}}
        memory = cls(files.cache_dir() / "proofs" / f"{name}.json", made_with)
        content = read_json(memory.file) if memory.file is not None and not prove else {}
        if files.SEAL in content and files.is_sealed(content):
            was = content["made_with"]
            memory.changed = tuple(sorted(n for n in {*was, *made_with} if was.get(n) != made_with.get(n)))
            memory.proofs = {} if memory.changed else content["proofs"]
        return memory

    def recall(self, name: str) -> StartProof | None:
        known = self.proofs.get(name)
        return None if known is None else replace(StartProof(**known), reason=f"{known['reason']} (proven before)")

    def keep(self, name: str, proof: StartProof) -> StartProof:
        """The proof, kept if it has succeeded; with one of the first that has failed all others are forgotten."""
        if name in FIRST and not proof.ok:
            self.proofs = {}
        self.write(name, asdict(proof) if proof.ok else None)
        return proof

    def write(self, name: str, proof: Document | None) -> None:
        """Remember what was proven under this name, None: nothing."""
        if self.file is None:
            return
        self.proofs = {n: p for n, p in self.proofs.items() if n != name} | ({} if proof is None else {name: proof})
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            files.write(self.file, files.as_json(files.seal({"made_with": self.made_with, "proofs": self.proofs})))
            every = sorted(self.file.parent.glob("*.json"), key=lambda path: path.stat().st_mtime)
            for old in every[:-MOST]:
                old.unlink()
