"""Recurrent layers of a tape beside their recurrences written out token by token in fp64; odd numbers of heads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from halfbyte.layers.decoding import linears
from halfbyte.layers.decoding.recurrent import MixerWriter
from halfbyte.layers.decoding.tape import Tape, isa
from tests import small_models

pytestmark = pytest.mark.skipif(isa(torch.float32) is None, reason="no kernels for this processor")
TOKENS = 40
# Sums of up to 128 products in fp32, a few in a row; what rounding leaves of a state fades with its decay.
CLOSE = 1e-5
Array = NDArray[np.float64]


def mixer(kind: str, name: str, **changes: Any) -> Any:
    model = small_models.build(kind, **changes)
    return next(module for module in model.modules() if type(module).__name__ == name)


def by_tape(module: Any, xs: torch.Tensor) -> Array:
    """Token after token; one before them is of another text, whose state is left."""
    tape, d = Tape(torch.float32, 1), xs.shape[1]
    source, x, positions = tape.buffer(1, d), tape.vectors(d), tape.buffer(1, dtype=torch.int64)
    tape.norm(source, x, None)
    tape.then()
    out_proj, to = MixerWriter(tape, module, x, tape.state, positions, None).write()
    y, rows = tape.buffer(1, d), []
    linears.write(tape, to, [(out_proj, y)])
    for t, row in [(0, xs[-1]), (1, xs[-2]), *enumerate(xs)]:
        source[0], positions[0] = row, t
        tape.run()
        rows.append(y[0].double().numpy().copy())
    return np.array(rows[2:])


def weights(module: Any) -> dict[str, Array]:
    return {name: p.detach().double().numpy() for name, p in module.named_parameters()}


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def softplus(x: Array) -> Array:
    return np.log1p(np.exp(x))


def convolved(x: Array, w: Array, bias: Array | float = 0.0) -> Array:
    """x (T, W) by taps (W, 1, J), the last of them for the token itself."""
    taps = w.shape[2]
    padded = np.concatenate([np.zeros((taps - 1, x.shape[1])), x])
    return sum(padded[j : j + len(x)] * w[:, 0, j] for j in range(taps)) + bias


def rms(x: Array, eps: float) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def short_conv(module: Any, x: Array) -> Array:
    w = weights(module)
    b, c, v = np.split(x @ w["in_proj.weight"].T + w["in_proj.bias"], 3, 1)
    return (c * convolved(b * v, w["conv.weight"], w["conv.bias"])) @ w["out_proj.weight"].T + w["out_proj.bias"]


def delta(module: Any, x: Array) -> Array:
    w, m = weights(module), module
    qkv = silu(convolved(x @ w["in_proj_qkv.weight"].T, w["conv1d.weight"]))
    z, b, a = (x @ w[f"in_proj_{name}.weight"].T for name in "zba")
    q, k, v = np.split(qkv, [m.key_dim, 2 * m.key_dim], 1)
    q, k = (each.reshape(len(x), m.num_k_heads, -1) for each in (q, k))
    q, k = (each / np.sqrt((each**2).sum(-1, keepdims=True) + 1e-6) for each in (q, k))
    v = v.reshape(len(x), m.num_v_heads, -1)
    beta, g = 1 / (1 + np.exp(-b)), -np.exp(w["A_log"]) * softplus(a + w["dt_bias"])
    state, out = np.zeros((m.num_v_heads, m.head_k_dim, m.head_v_dim)), np.zeros_like(v)
    for t in range(len(x)):
        for h in range(m.num_v_heads):
            key, query = k[t, h * m.num_k_heads // m.num_v_heads], q[t, h * m.num_k_heads // m.num_v_heads]
            state[h] *= np.exp(g[t, h])
            state[h] += np.outer(key, beta[t, h] * (v[t, h] - state[h].T @ key))
            out[t, h] = state[h].T @ query / m.head_k_dim**0.5
    y = rms(out, m.norm.variance_epsilon) * w["norm.weight"] * silu(z.reshape(out.shape))
    return y.reshape(len(x), -1) @ w["out_proj.weight"].T


def state_space(module: Any, x: Array) -> Array:
    w, m = weights(module), module
    mixed = x @ w["in_proj.weight"].T
    z, xbc, dt = np.split(mixed, [m.intermediate_size, m.intermediate_size + m.conv_dim], 1)
    xbc = silu(convolved(xbc, w["conv1d.weight"], w["conv1d.bias"]))
    n = m.n_groups * m.ssm_state_size
    u, b, c = np.split(xbc, [m.intermediate_size, m.intermediate_size + n], 1)
    u, (b, c) = u.reshape(len(x), m.num_heads, -1), (each.reshape(len(x), m.n_groups, -1) for each in (b, c))
    dt = softplus(dt + w["dt_bias"])
    state, y = np.zeros((m.num_heads, m.ssm_state_size, m.head_dim)), np.zeros_like(u)
    for t in range(len(x)):
        for h in range(m.num_heads):
            group = h // (m.num_heads // m.n_groups)
            state[h] = np.exp(-np.exp(w["A_log"][h]) * dt[t, h]) * state[h] + dt[t, h] * np.outer(b[t, group], u[t, h])
            y[t, h] = state[h].T @ c[t, group] + w["D"][h] * u[t, h]
    y = (y.reshape(len(x), -1) * silu(z)).reshape(len(x), m.n_groups, -1)
    y = rms(y, m.norm.variance_epsilon).reshape(len(x), -1) * w["norm.weight"]
    return y @ w["out_proj.weight"].T


HEADS = {
    "linear_num_key_heads": 3, "linear_num_value_heads": 9, "linear_key_head_dim": 20, "linear_value_head_dim": 24,
}  # fmt: skip
GROUPS = {"num_local_experts": 0, "mamba_n_groups": 2, "mamba_d_state": 12}
CASES: dict[str, tuple[Any, Any]] = {
    "two taps": (mixer("lfm2", "Lfm2ShortConv", conv_bias=True, conv_L_cache=2), short_conv),
    "seven taps": (mixer("lfm2", "Lfm2ShortConv", conv_bias=True, conv_L_cache=7), short_conv),
    "delta rule": (mixer("qwen3_5_text", "Qwen3_5GatedDeltaNet", **HEADS), delta),
    "state space": (mixer("granitemoehybrid", "GraniteMoeHybridMambaLayer", **GROUPS), state_space),
}


@pytest.mark.parametrize("case", CASES)
def test_a_recurrent_layer_is_its_recurrence(case: str) -> None:
    module, definition = CASES[case]
    if hasattr(module, "A_log"):
        module.A_log.data = torch.linspace(-5.0, 1.0, len(module.A_log))  # heads that forget differently fast
    xs = torch.randn(TOKENS, 64, generator=torch.Generator().manual_seed(0))
    wanted = definition(module, xs.double().numpy())
    got = by_tape(module, xs)
    assert np.linalg.norm(got - wanted) < CLOSE * np.linalg.norm(wanted)
    assert np.abs(got - wanted).max() < 10 * CLOSE * np.abs(wanted).max()
