"""Every parameter of a checkpoint whose weights stay in a GGUF file: its blocks as they lie there, or its values.

What: `FileParameters` finds them; `FileSource` reads their values as those of any other source, for what merges and
exports. Nothing is written.
Cost: the file's header; of what is read its values, one parameter at a time.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from halfbyte.base.store.reading import Source, SourceTensor, read_tensor
from halfbyte.errors import SourceError, typed
from halfbyte.models import tensors
from halfbyte.models.gguf import blocks
from halfbyte.models.gguf.convert import shapes_of
from halfbyte.models.gguf.header import read_header
from halfbyte.models.gguf.layouts import TURNED, ParameterSource, parameter_sources
from halfbyte.models.gguf.reader import GgufError, GgufReader
from halfbyte.models.sources.checkpoint import Checkpoint
from halfbyte.models.structure import meta_model
from halfbyte.quant import gguf_blocks
from halfbyte.quant.number_format import torch_dtypes
from halfbyte.types import Config


class FileParameters:
    """Every parameter of a checkpoint that a GGUF file stands for, by the checkpoint's names. Raises SourceError: the
    file was changed after its manifest was written."""

    def __init__(self, checkpoint: Checkpoint, config: Config) -> None:
        header = read_header(checkpoint.blocks[0])
        self.file, self.model = GgufReader(header), meta_model(config)
        self.shapes = shapes_of(self.model)
        prefix, layers = self.model.base_model_prefix, config.get_text_config().num_hidden_layers
        try:
            self.sources = parameter_sources(header, config.model_type, self.shapes, prefix, layers)
        except GgufError as error:
            file = checkpoint.blocks[0]
            what = f"{file} is not what it was when its manifest was written: {error}"
            raise SourceError(what, fix=f"touch {typed(file)}, and it is read anew") from error
        self.values_of = config.to_dict()

    def spec(self, name: str) -> tensors.TensorSpec:
        spec = tensors.spec_of(name, self.shapes[name], "BF16", self.values_of)
        return replace(spec, blocks=blocks.types_of(self.sources[name], self.file))

    def values(self, name: str, dtype: torch.dtype) -> Tensor:
        """A parameter made of its values, rounded once."""
        source, shape = self.sources[name], self.shapes[name]
        out = torch.empty(shape, dtype=dtype)
        flat, done = out.view(-1), 0
        kind = self.file.tensors[source.name].type
        if source == ParameterSource(source.name) and kind in blocks.BLOCKS and len(shape) == 2:
            gguf_blocks.write(torch.from_numpy(self.file.rows(source.name)), kind, out)
            return out
        for piece in source.pieces(self.file):
            flat[done : done + piece.size] = torch.from_numpy(piece).view(-1)
            done += piece.size
        return out

    def matrix(self, source: ParameterSource) -> dict[str, Tensor]:
        """The parts of a matrix that lies in the file as one tensor."""
        tensor, transform = self.file.tensors[source.name], source.transform
        codes = self.file.rows(source.name)
        if source.expert is not None:
            codes = codes.reshape(tensor.shape[0], -1, codes.shape[1])[source.expert]
        rows = self.file.places(transform.order, source.name, len(codes))
        columns = self.file.places(transform.columns, source.name, tensor.shape[-1])
        return gguf_blocks.parts_of([codes], (tensor.type,), rows, columns)

    def stack(self, sources: Iterable[ParameterSource]) -> dict[str, Tensor] | None:
        """The parts of all experts of a layer; None where they are not all held in blocks. `sources`: in the order in
        which their numbers follow each other."""
        every = list(sources)
        if not all(blocks.types_of(source, self.file) for source in every):
            return None
        names = list(dict.fromkeys(name for source in every for name in source.parts or (source.name,)))
        codes, types = [self.file.rows(name) for name in names], tuple(self.file.tensors[name].type for name in names)
        return gguf_blocks.parts_of(codes, types, turned=every[0].compose in TURNED)


class FileSource(Source):
    """The values of a file's parameters, in bf16, and in fp32 where the file has that, under the checkpoint's names."""

    def __init__(self, checkpoint: Checkpoint, config: Config) -> None:
        self.parameters = FileParameters(checkpoint, config)
        self._last: tuple[str, Tensor] | None = None
        super().__init__(checkpoint.blocks)

    def _index(self) -> None:
        for name, shape in self.parameters.shapes.items():
            tensor = self.parameters.file.tensors[self.parameters.sources[name].name]
            dtype = "F32" if tensor.type == "F32" else "BF16"
            nbytes = torch.Size(shape).numel() * torch_dtypes()[dtype].itemsize
            self.tensors[name] = SourceTensor(name, dtype, shape, nbytes, tensor.file, tensor.start)

    def read(self, tensor: SourceTensor, offset: int, into: memoryview) -> None:
        if self._last is None or self._last[0] != tensor.name:
            self._last = tensor.name, self.parameters.values(tensor.name, torch_dtypes()[tensor.dtype])
        read_tensor(self._last[1], offset, into)
