"""What README.md and docs/ say and show is so."""

import re
from pathlib import Path

import pytest
import torch

import model
from model import CONFIGS
from strawberry.config_docs import options_page
from strawberry.ops import cross_entropy

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in ROOT.glob("docs/**/*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def example() -> str:
    """The architecture that the README adds."""
    return re.search(r"```python\n(class Mean.*?)```", README, re.S)[1]


def test_the_architecture_that_the_readme_adds_keeps_the_promises(monkeypatch):
    assert len(example().splitlines()) <= 25
    monkeypatch.setattr(model, "MODELS", dict(model.MODELS))
    monkeypatch.setattr(model, "CONFIGS", dict(model.CONFIGS))
    exec(compile(example(), "README.md", "exec"), dict(vars(model)))
    model.CONFIGS["mean"] = model.MODELS["mean"].Config
    torch.manual_seed(0)
    mean = model.build({"arch": "mean", "vocab_size": 29, "n_embd": 16}).double().eval()
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


def test_the_page_of_options_is_current():
    written = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert written == options_page(CONFIGS), "run: python -m strawberry.config_docs --options"


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


LINKS = sorted({(page, target) for page in PAGES
                for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text(encoding="utf-8"))})  # fmt: skip


@pytest.mark.parametrize("page,target", LINKS)
def test_links_lead_somewhere(page, target):
    if target.startswith("https://"):
        return
    path, _, anchor = target.partition("#")
    file = (ROOT / page).parent / path if path else ROOT / page
    assert file.exists(), f"{page} links to {target}, which is not there"
    assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), f"{page}: {target} has no such heading"
