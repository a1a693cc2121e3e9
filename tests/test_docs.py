"""What README.md and docs/ say and show is so."""

import os
import re
import subprocess
from pathlib import Path

import forks
import pytest
import torch

import model
import prepare
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


KERNEL = f"""
import ast, asyncio, sys
sys.path.append({str(ROOT)!r})

async def run_cell(text):  # as a kernel does: under a running loop, the last expression's value is displayed
    *lines, last = ast.parse(text).body
    scope = {{"__name__": "__main__"}}
    exec(compile(ast.Module(lines, []), "cell", "exec"), scope)
    return scope, eval(compile(ast.Expression(last.value), "cell", "eval"), scope)

scope, shown = asyncio.run(run_cell(sys.stdin.read()))
assert "matplotlib.pyplot" not in sys.modules
open("shown.png", "wb").write(shown._repr_png_())
print(scope["run"], scope["faster"], [text.get_text() for text in shown.axes[0].get_legend().get_texts()])
"""


@pytest.mark.slow
def test_the_lines_of_the_notebook_page_run_in_a_kernel(tmp_path, monkeypatch):
    """In a process that has imported nothing of the repository, in another folder than the repository's, with other
    data than prepare.py's default."""
    lines = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "notebook.md").read_text(encoding="utf-8"), re.S)[1]
    assert len(lines.splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    pages = [str(ROOT / page) for page in PAGES]
    assert not prepare.main(["--input", *pages, "--output", "data/webtext.bin", "--encoder", "bin/cl8k.bin",
                             "--vocab_size", "300"])  # fmt: skip
    Path("kernel.py").write_text(KERNEL, encoding="utf-8")
    ran = subprocess.run([*forks.start(), "kernel.py"], input=lines, capture_output=True, text=True,
                         env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    shown = ran.stdout.splitlines()
    losses, last = next(line for line in shown if re.fullmatch(r"[\d.]+ [\d.]+", line)).split(), shown[-1]
    assert all(0 < float(loss) < 6 for loss in losses)
    assert any(line.startswith("def close(self):") for line in shown) and any(" parameters" in line for line in shown)
    assert re.fullmatch(r"(<run tiny: strawberry, 40 of 40 steps, validation loss [\d.]+> ?){2} "
                        r"\['learning_rate 0.01', 'learning_rate 0.02'\]", last), last  # fmt: skip
    assert Path("shown.png").read_bytes().startswith(b"\x89PNG")
    assert Path("bin/tiny.strawberry").exists() and Path("bin/ck_tiny/earlier_1/metrics.jsonl").exists()
    assert ran.stderr == ""


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
