"""The role of each parameter, which decides its initialization and its optimizer."""

import pytest
from cases import CASES

from model import build

# roles by the ending of the name; all others are hidden matrices
RESIDUAL = {"strawberry": (".out",), "strawberry-v0": (".w_out", "compaction.wt"),
            "strawberry-silia": (".attn2.w_out.weight",), "tinystar": (".wo.weight", ".w2.weight")}  # fmt: skip
SPECIAL = {"tao": ".tao", "router": ("router.weight", "depth.weight"), "position": (".aft.a", ".aft.b", "aft.kernel",
           "mixer.a", "mixer.b", "mixer.kernel", "positions.weight"), "tau": (".attn1.tau", ".attn2.tau")}  # fmt: skip


def expected_role(arch: str, name: str, tied: bool) -> str:
    for role, ends in SPECIAL.items():
        if name.endswith(ends):
            return role
    if name == "embed.weight":
        return "embedding" if tied else "input"
    if name.startswith("unembed"):
        return "head"
    if name.endswith((".bias", "skip.shift", "add_to_values.gate", "mixer.sink_k", "mixer.sink_v", ".query",
                      "memory.w_gates", "memory.gate_bias", "memory.taps")):
        return "bias"
    if name.endswith("add_to_values.table"):
        return "embedding"
    if "norm" in name or name.endswith("skip.scale"):
        return "norm"
    return "residual" if name.endswith(RESIDUAL.get(arch, "-")) else "matrix"


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_has_its_role(case):
    model = build(CASES[case])
    arch = model.config.arch
    tied = arch != "palm" and getattr(model.config, "tie_embeddings", True)
    assert model.roles() == {name: expected_role(arch, name, tied) for name, _ in model.named_parameters()}
