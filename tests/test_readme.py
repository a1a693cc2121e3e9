"""What the README says and shows is so."""

import re
from pathlib import Path

import pytest
import torch

import model
from model import CONFIGS
from strawberry.config_docs import table
from strawberry.ops import cross_entropy

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def example() -> str:
    """The architecture that the README adds."""
    return re.search(r"```python\n(@dataclass\nclass MeanConfig.*?)```", README, re.S)[1]


def test_the_architecture_that_the_readme_adds_keeps_the_promises(monkeypatch):
    assert len(example().splitlines()) <= 30
    monkeypatch.setattr(model, "MODELS", dict(model.MODELS))
    scope = dict(vars(model))
    exec(compile(example(), "README.md", "exec"), scope)
    torch.manual_seed(0)
    mean = model.build(scope["MeanConfig"](vocab_size=29, n_embd=16)).double().eval()
    idx = torch.randint(29, (2, 40))
    full = mean(idx)[0]
    cache = mean.new_cache(2, 40)
    parts = [mean(part, cache=cache)[0] for part in idx.split([7, 1, 20, 12], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=0, atol=1e-9)
    other = idx.clone()
    other[:, 20:] = 0
    assert torch.equal(mean(other)[0][:, :20], full[:, :20])
    assert mean.generate(idx, 5).shape == (2, 45)
    whole = mean.train()(idx, idx)[1].item()
    monkeypatch.setattr(cross_entropy, "should_fuse", lambda x: True)
    logits, loss = mean(idx, idx)
    assert logits is None and loss.item() == pytest.approx(whole, rel=1e-12)


def test_the_table_of_keys_is_current():
    """`python -m strawberry.config_docs --table` prints what belongs there."""
    for row in table(CONFIGS).splitlines():
        command = "python -m strawberry.config_docs --table"
        assert row in README, f"the README lacks {row!r}: put the output of `{command}` there"


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+?)\)", README))))
def test_links_lead_somewhere(target):
    assert target.startswith("https://") or (ROOT / target).exists()
