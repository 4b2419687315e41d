"""Recurrent layers as operations of a tape: short convolution, gated delta rule, Mamba-2.

What: each writes what stands before its output projection, and says which that is. What a layer does beside the
formulas of `layers/recurrent.py` is not written. Falcon-H1's multipliers go into the weights of the convolution and
into factors of the operations.
Source: `Lfm2ShortConv`, `Qwen3_5GatedDeltaNet`, `OlmoHybridGatedDeltaNet`, `GraniteMoeHybridMambaLayer`,
`FalconH1Mixer` in transformers.

Letters: M texts, W channels, J taps, H heads, G key heads or groups, N a state's rows, P its columns.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfbyte.layers.decoding import linears
from halfbyte.layers.decoding.linears import Unsupported
from halfbyte.layers.decoding.tape import Tape, Vectors
from halfbyte.layers.kernels.cpu.decoding import slots as s


@dataclass(frozen=True)
class Gate:
    """What a vector (M, G N) is multiplied by, group by group: silu or `sigmoid` of factor times z (M, ..), whose
    groups are `step` apart; `first`, before the norm."""

    z: Tensor
    step: int
    factor: float = 1.0
    sigmoid: bool = False
    first: bool = True


def gated(
    tape: Tape, x: Tensor, groups: int, to: Vectors, gate: Gate | None = None, norm: nn.Module | None = None,
    factor: float = 1.0,
) -> None:  # fmt: skip
    """x (M, G N) with gate and RMS norm of each group, times a factor -> to. In a group of its own."""
    width = x.shape[1] // groups
    numbers: dict[int, int | float] = {
        s.GATED_X: x.data_ptr(), s.GATED_X_ROW: x.stride(0), s.GATED_WIDTH: width, s.GATED_GROUPS: groups,
        s.GATED_PLAIN: to.plain.data_ptr(), s.GATED_TO_WIDTH: to.width, s.GATED_OUT_FACTOR: factor,
    }  # fmt: skip
    if gate is not None:
        numbers |= {
            s.GATED_GATE: gate.z.data_ptr(), s.GATED_GATE_ROW: gate.z.stride(0), s.GATED_STEP: gate.step,
            s.GATED_FACTOR: gate.factor, s.GATED_SIGMOID: int(gate.sigmoid), s.GATED_FIRST: int(gate.first),
        }  # fmt: skip
    if norm is not None:
        weight = norm.weight.detach().float()
        numbers |= {s.GATED_WEIGHT: tape.keep(weight), s.GATED_EACH: int(len(weight) == groups * width)}
        numbers[s.GATED_EPS] = float(norm.variance_epsilon)
    tape.needs("states", 0)
    tape.written_to[len(tape)] = to
    tape.add(s.GATED, tape.m, numbers)
    tape.then()


@dataclass
class MixerWriter:
    """Writes a recurrent layer.

    Args:
        x: what it reads. state: the memory of a state of this shape, of each text. positions: (M,) of the tokens.
        places: whose state each vector uses; None: its own. factor: of what the output projection reads.
    """

    tape: Tape
    module: nn.Module
    x: Vectors
    state: Callable[..., Tensor]
    positions: Tensor
    places: Tensor | None
    factor: float = 1.0

    def write(self) -> tuple[nn.Module, Vectors]:
        """The output projection, and what it reads."""
        module = self.module
        if type(getattr(module, "conv", None)) is nn.Conv1d:
            return self._short_conv()
        if getattr(module, "activation", "silu") != "silu":
            raise Unsupported(f"{type(module).__name__} with {module.activation}")
        if hasattr(module, "in_proj_qkv") or hasattr(module, "g_proj"):
            return self._delta()
        if hasattr(module, "ssm_state_size") and hasattr(module, "n_groups"):
            return self._state_space()
        raise Unsupported(f"{type(module).__name__}, a recurrent layer of no known kind")

    def _add(
        self, kind: int, x: Tensor, width: int, shape: tuple[int, ...], parts: int, numbers: dict[int, int | float]
    ) -> Tensor:
        """An operation on x (M, ..) and a state of this shape -> (M, width), of so many parts for a vector. In a group
        of its own."""
        tape, state = self.tape, self.state(*shape)
        out = tape.buffer(tape.m, width)
        tape.add(kind, parts if self.places is not None else tape.m * parts, numbers | {
            s.STATE: tape.keep(state), s.STATE_BYTES: 4 * state.stride(0), s.STATE_X: x.data_ptr(),
            s.STATE_X_ROW: x.stride(0), s.STATE_OUT: out.data_ptr(), s.STATE_OUT_ROW: out.stride(0),
            s.STATE_POSITIONS: self.positions.data_ptr(), s.STATE_PLACES: tape.keep(self.places),
        })  # fmt: skip
        tape.then()
        return out

    def _conv(
        self, conv: nn.Module, x: Tensor, factor: Tensor | None = None, gates: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """x (M, W), each channel times its factor, through the convolution, and SiLU; or, between gates, views with x's
        stride that x and what comes out are multiplied by, without it."""
        w = conv.weight.detach().float()
        if type(conv) is not nn.Conv1d or conv.groups != len(w) or w.shape[1] != 1 or w.shape[2] < 2:
            raise Unsupported(f"{type(conv).__name__}, no depthwise convolution")
        w = w[:, 0].T.flip(0)
        (taps, width), tape = w.shape, self.tape
        bias = w.new_zeros(width) if conv.bias is None else conv.bias.detach().float()
        before, after = (0, 0) if gates is None else (gate.data_ptr() for gate in gates)
        tape.needs("states", 0)
        return self._add(s.CONV, x, width, (taps - 1, width), -(-width // tape.recurrent.CHANNELS), {
            s.CONV_WIDTH: width, s.CONV_TAPS: taps, s.CONV_BIAS: tape.keep(bias.contiguous()),
            s.CONV_W: tape.keep((w if factor is None else w * factor).contiguous()),
            s.CONV_BEFORE: before, s.CONV_AFTER: after, s.CONV_SILU: int(gates is None),
        })  # fmt: skip

    def _scan(
        self, kind: int, x: Tensor, sizes: tuple[int, int, int, int], dt: Tensor, factor: float,
        more: dict[int, int | float],
    ) -> Tensor:  # fmt: skip
        """DELTA or SCAN, of sizes H, G, N, P -> (M, H P)."""
        heads, groups, rows, columns = sizes
        tape, module = self.tape, self.module
        if heads % groups or columns % tape.recurrent.LANES[tape.dtype.itemsize]:
            raise Unsupported(f"{heads} recurrent heads of {columns} numbers in {groups} groups")
        tape.needs("states", tape.recurrent.scratch_bytes(rows, columns))
        a, bias = -module.A_log.detach().float().exp(), module.dt_bias.detach().float()
        return self._add(kind, x, heads * columns, (heads, rows, columns), heads, more | {
            s.SCAN_HEADS: heads, s.SCAN_GROUPS: groups, s.SCAN_ROWS: rows, s.SCAN_COLUMNS: columns,
            s.SCAN_A: tape.keep(a), s.SCAN_BIAS: tape.keep(bias.contiguous()), s.SCAN_DT: dt.data_ptr(),
            s.SCAN_ROW: dt.stride(0), s.SCAN_FACTOR: factor,
        })  # fmt: skip

    def _projected(self, modules: list[nn.Module], widths: list[int]) -> tuple[Tensor, ...]:
        """x by projections of these widths, side by side."""
        tape = self.tape
        outs = tape.buffer(tape.m, sum(widths)).split(widths, 1)
        linears.write(tape, self.x, list(zip(modules, outs, strict=True)))
        return outs

    def _short_conv(self) -> tuple[nn.Module, Vectors]:
        tape, module = self.tape, self.module
        width = module.conv.weight.shape[0]
        (bcx,) = self._projected([module.in_proj], [3 * width])
        b, c, x = bcx.split(width, 1)
        out, to = self._conv(module.conv, x, gates=(b, c)), tape.vectors(width)
        tape.norm(out, to, None)
        tape.then()
        return module.out_proj, to

    def _delta(self) -> tuple[nn.Module, Vectors]:
        tape, m = self.tape, self.module
        heads, keys = m.num_v_heads, m.num_k_heads
        d, columns = m.head_k_dim, m.head_v_dim
        widths = [keys * d, keys * d, heads * columns, heads * columns, heads, heads]
        if hasattr(m, "in_proj_qkv"):
            modules = [m.in_proj_qkv, m.in_proj_z, m.in_proj_b, m.in_proj_a]
            widths = [sum(widths[:3]), *widths[3:]]
            norm, out_proj = m.norm, m.out_proj
        else:
            modules = [m.q_proj, m.k_proj, m.v_proj, m.g_proj, m.b_proj, m.a_proj]
            norm, out_proj = m.o_norm, m.o_proj
        first, *_, z, b, a = self._projected(modules, widths)
        qkv = self._conv(m.conv1d, first.as_strided((tape.m, m.conv1d.weight.shape[0]), first.stride()))
        factor = 2.0 if getattr(m, "allow_neg_eigval", False) else 1.0
        out = self._scan(s.DELTA, qkv, (heads, keys, d, columns), a, factor, {s.SCAN_BETA: b.data_ptr()})
        to = tape.vectors(heads * columns)
        gated(tape, out, heads, to, Gate(z, columns, first=False), norm, self.factor)
        return out_proj, to

    def _state_space(self) -> tuple[nn.Module, Vectors]:
        tape, m = self.tape, self.module
        heads, groups = m.num_heads, m.n_groups
        inner = m.intermediate_size
        if tuple(m.time_step_limit) != (0.0, float("inf")):
            raise Unsupported(f"time steps within {tuple(m.time_step_limit)}")
        (mixed,) = self._projected([m.in_proj], [inner + m.conv_dim + heads])
        z, xbc, dt = mixed.split([inner, m.conv_dim, heads], 1)
        factors = torch.ones(mixed.shape[1])
        if hasattr(m, "mup_vector"):
            if m.in_proj.bias is not None and m.ssm_in_multiplier != 1.0:
                raise Unsupported("multipliers of a projection with biases")
            factors = m.mup_vector.detach().float().flatten() * m.ssm_in_multiplier
        of_z, of_xbc, of_dt = factors.split([inner, m.conv_dim, heads])
        xbc, skip = self._conv(m.conv1d, xbc, of_xbc), m.D.detach().float().contiguous()
        sizes = heads, groups, m.ssm_state_size, inner // heads
        out = self._scan(s.SCAN, xbc, sizes, dt, float(of_dt[0]), {s.SCAN_SKIP: tape.keep(skip)})
        to, norm = tape.vectors(inner), None if isinstance(m.norm, nn.Identity) else m.norm
        gate = Gate(z, inner // groups, float(of_z[0]), first=not getattr(norm, "norm_before_gate", False))
        gated(tape, out, groups, to, gate, norm, self.factor)
        return m.out_proj, to
