"""The page at /: what it is made of, and what it does in a browser, where there is one.

With PAGE_PICTURES=folder the tests leave pictures there, for people to look at: phone and desk, light and dark.

Index:  what it is made of · how it is served · runs · a run · a new run · writing · data · a first visit · states
"""

import contextlib
import html.parser
import itertools
import json
import os
import re
import shlex
import tempfile
import time
from pathlib import Path

import pytest
import torch
from browser import Browser
from machine import require_program
from runs import ALPHABET, run, write_config, write_corpus
from test_serve import ServerThread

import encoder as encoders
import model as models
from strawberry.config import to_dict
from strawberry.model_file import save_model
from strawberry.run_config import load_run
from strawberry.serving.app import PAGE_FOLDER
from strawberry.serving.runs import flatten

pytestmark = pytest.mark.slow
PICTURES = os.environ.get("PAGE_PICTURES")
INDEX = (PAGE_FOLDER / "index.html").read_text("utf-8")
OURS = {path.name: path.read_text("utf-8") for path in sorted(PAGE_FOLDER.iterdir())
        if not path.name.startswith("uPlot")}  # fmt: skip
SCRIPTS = {name: text for name, text in OURS.items() if name.endswith(".js")}

# ---- what it is made of --------------------------------------------------------------------------------------------


class Tags(html.parser.HTMLParser):
    """All tags, each with its attributes. Every one must be closed."""

    VOID = {"meta", "link", "input", "img", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.found = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}, line {self.getpos()[0]}"
        self.open.pop()


def test_nothing_comes_from_elsewhere_and_nothing_is_inserted_as_html():
    for name, text in OURS.items():
        code = re.sub(r"^\s*(//|/\*).*$", "", text, flags=re.M)
        assert not re.search(r"https?://|[\"'(]//\w|@import|url\(", code), name
        for word in ("innerHTML", "outerHTML", "AdjacentHTML", "document.write", "eval(", "Function(", "srcdoc"):
            assert word not in code, (name, word)
        assert name == "write_history.js" or "localStorage" not in code, "only what a person wrote is kept"
    assert "localStorage" not in SCRIPTS["api.js"]
    tags = Tags(INDEX)
    assert not tags.open
    for tag, attrs in tags.found:
        assert not [name for name in attrs if name.startswith("on") or name == "style"], attrs
        assert tag != "script" or attrs.get("src", "").startswith("/page/")
        assert tag != "style"


def test_the_chart_library_comes_with_its_licence_and_version():
    library = (PAGE_FOLDER / "uPlot.min.js").read_text("utf-8")
    assert library.startswith("/*! https://github.com/leeoniya/uPlot (v1.6.32) */") and len(library) < 60_000
    assert "The MIT License" in (PAGE_FOLDER / "uPlot.LICENSE").read_text("utf-8")
    docs = (PAGE_FOLDER.parents[2] / "docs" / "serving.md").read_text("utf-8")
    assert "uPlot 1.6.32" in docs


# ---- how it is served ----------------------------------------------------------------------------------------------

WORDS = "the cat sat on a mat and saw that it was good; then it went home to eat and to sleep. "
OPTIONS = ["--max_iters=40", "--eval_interval=20", "--checkpoints.interval=20", "--log_interval=2",
           "--sample_length=12"]  # fmt: skip
SMALL = {"eval_iters": 1, "compile": False, "model_hyperparams.n_layer": 1, "model_hyperparams.n_embd": 32,
         "model_hyperparams.n_qkv": 32, "model_hyperparams.n_head": 2, "model_hyperparams.block_size": 32}  # fmt: skip


@pytest.fixture(scope="module")
def runs_folder(tmp_path_factory):
    """Two runs of train.py, one with experts."""
    folder, before = tmp_path_factory.mktemp("runs"), os.getcwd()
    os.chdir(folder)
    try:
        Path("text.txt").write_text(ALPHABET)
        write_corpus("data.bin")
        write_config(model_hyperparams={"n_ffn_experts": 2, "a_ffn_experts": 1})
        run(*OPTIONS, "--model_path=out/experts.strawberry")
        write_config("tinystar")
        run(*OPTIONS, "--checkpoints.path=ck2", "--learning_rate=0.004", "--model_path=out/plain.tinystar")
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(scope="module")
def site(runs_folder, tmp_path_factory, forked_training):
    """A server with a key, runs of the command line and one model, which has seen nothing yet."""
    folder = tmp_path_factory.mktemp("page")
    torch.manual_seed(1)
    model = models.build({"arch": "strawberry", "n_qkv": 32, "vocab_size": 258, "block_size": 64, "n_layer": 1,
                          "n_head": 2, "n_embd": 32})  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            if p.size(0) == 258:
                p *= 8
                p[-2:] = 0
    save_model(folder / "untrained.strawberry", model, encoders.train(["x"], 258), {})
    server = ServerThread(folder, api_key=["first"], context=3000, runs=[str(runs_folder)])
    server.folder = folder
    yield server
    server.stop()


def key(site):
    return {"Authorization": f"Bearer {site.settings.api_key[0]}"}


def test_the_page_calls_only_routes_of_the_schema(site):
    schema = site.send("GET", "/openapi.json", **key(site))[2]["paths"]
    routes = {re.sub(r"\{\w+\}", "*", path) for path in schema}
    called = set()
    for text in SCRIPTS.values():
        paths = re.findall(r'["`](/v1/(?:[^"`?${]|\$\{[^}]*\})*)', text)
        called |= {re.sub(r"\$\{[^}]*\}", "*", path) for path in paths}
    assert len(called) >= 15 and called <= routes, called - routes


def test_the_page_is_served_without_inline_code(site):
    for path, kind in (("/", "html"), ("/page/style.css", "css"), ("/page/app.js", "javascript")):
        status, headers, data = site.send("GET", path, **key(site))
        assert status == 200 and headers["Content-Type"] == f"text/{kind}; charset=utf-8"
        assert "default-src 'none'; script-src 'self'" in headers["Content-Security-Policy"]
        assert site.send("GET", path)[0] == 401
    assert data.decode() == SCRIPTS["app.js"]


# ---- a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    program = require_program("chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        browser = Browser(program, folder)
        yield browser
        browser.stop()


class Page:
    """The browser at a site's page."""

    def __init__(self, browser, url):
        self.browser, self.url = browser, url

    def __getattr__(self, name):
        return getattr(self.browser, name)

    def go(self, address, ready="true"):
        """Open a view, anew even where it is shown already."""
        self.js(f"location.hash = '#/none'; location.hash = {json.dumps('#' + address)}")
        self.until(f"document.querySelector('main').children.length && ({ready})")

    def text(self, selector="main"):
        return self.js(f"document.querySelector({json.dumps(selector)}).innerText")

    def has(self, text, selector="main", seconds=30):
        """Wait until a text is there."""
        self.until(f"document.querySelector({json.dumps(selector)})?.innerText.includes({json.dumps(text)})", seconds)

    def find(self, name, within="main"):
        """JavaScript of the button or link with this text."""
        return (f"[...document.querySelectorAll({json.dumps(within + ' :is(button, a)')})]"
                f".find(e => e.checkVisibility() && e.textContent.startsWith({json.dumps(name)}))")  # fmt: skip

    def click(self, name, within="main"):
        self.until(f"!!{self.find(name, within)}")
        self.js(f"{self.find(name, within)}.click()")

    def control(self, label):
        return (f"document.getElementById([...document.querySelectorAll('label')]"
                f".find(e => e.textContent.trim() === {json.dumps(label)}).htmlFor)")  # fmt: skip

    def set(self, label, value):
        self.js(f"{{ const e = {self.control(label)}; e.value = {json.dumps(value)};"
                "for (const n of ['input', 'change']) e.dispatchEvent(new Event(n, { bubbles: true })); }")  # fmt: skip

    def pictures(self, name):
        sizes = ((390, 844), (1280, 800)) if PICTURES else ()
        for (width, height), scheme in itertools.product(sizes, ("light", "dark")):
            self.size(width, height, scheme)
            time.sleep(0.3)
            self.picture(Path(PICTURES, f"{name}-{width}-{scheme}.png"))


@pytest.fixture(scope="module")
def page(browser, site):
    """The browser itself asks for the key at first."""
    browser.size(1280, 900)
    browser.password = "first"
    browser.send("Fetch.enable", handleAuthRequests=True)
    browser.open(site.url)
    page = Page(browser, site.url)
    page.has("experts")
    assert browser.num_auth_requests == 1
    return page


def test_the_page_asks_for_a_key_and_keeps_it_in_the_tab_only(page, site):
    page.browser.password, page.browser.num_auth_requests = "", 0
    site.settings.api_key[:] = ["second"]
    page.go("/data")
    page.until("!document.getElementById('key-form').hidden && document.activeElement.id === 'key'")
    before = page.num_auth_requests
    for given in ("wrong", "second"):
        page.write("#key", given)
        page.press("Enter")
        page.until("/wrong/.test(document.getElementById('key-error').textContent)" if given == "wrong"
                   else "document.getElementById('key-form').hidden")  # fmt: skip
    page.has("Drop files here")
    assert page.num_auth_requests == before  # the browser itself asked no more once a key was given
    assert page.js("sessionStorage.getItem('key')") == "second"
    assert not page.js("Object.values(localStorage).some(text => text.includes('second'))")
    assert "second" not in page.js("location.href")


# ---- runs ----------------------------------------------------------------------------------------------------------

ROWS = "[...document.querySelectorAll('.runs tbody tr')].map(e => e.querySelector('.name').innerText)"
PLOT = "document.querySelector('.u-over')"


def test_runs_are_sorted_filtered_and_compared(page, site):
    page.size(1280, 900)
    page.go("/runs", f"{ROWS}.length === 2 && !!{PLOT}")
    assert page.js(ROWS) == ["plain", "experts"], "the newest first"
    row = page.js("document.querySelector('.runs tbody tr').innerText")
    for text in ("run.json", "learning_rate 0.004", "data.bin", "done", "40"):
        assert text in row
    page.click("Name", ".runs thead")
    assert page.js(ROWS) == ["experts", "plain"]
    page.click("Bits/byte", ".runs thead")
    found = {one["name"]: one["val_bpb"] for one in site.send("GET", "/v1/runs", **key(site))[2]["data"]}
    assert page.js(ROWS) == sorted(found, key=found.get)
    page.write("main input[type=search]", "rate 0.004")
    page.until(f"{ROWS}.join() === 'plain'")
    page.has("1 of 2 runs")
    page.write("main input[type=search]", "")
    page.js("document.querySelector('main input[type=search]').dispatchEvent(new Event('input'))")
    page.until(f"{ROWS}.length === 2")

    legend = "[...document.querySelectorAll('.legend button')].map(e => e.innerText)"
    assert len(page.js(legend)) == 2 and all("val" in text for text in page.js(legend))
    for metric in ("val_bpb", "lr", "grad_norm", "tokens_per_s", "routers"):
        for x in ("step", "tokens", "flops", "seconds"):
            page.js(f"""{{ const [metric, x] = document.querySelectorAll('.chart-controls select');
                metric.value = '{metric}'; metric.dispatchEvent(new Event('change'));
                x.value = '{x}'; x.dispatchEvent(new Event('change')) }}""")
            values = page.js("[...document.querySelectorAll('.legend .values')].map(e => e.innerText)")
            assert page.js(f"!!{PLOT}") and sum(map(bool, values)) == (1 if metric == "routers" else 2), (metric, x)
    page.js("""{ const [metric, x] = document.querySelectorAll('.chart-controls select');
        metric.value = 'loss'; metric.dispatchEvent(new Event('change'));
        x.value = 'step'; x.dispatchEvent(new Event('change')) }""")
    for box in ("log x", "log y"):
        page.js(f"[...document.querySelectorAll('.chart-controls label')].find(e => e.innerText === '{box}').click()")
        assert page.js(f"!!{PLOT}")
    page.js("document.querySelector('.chart-controls label.check:nth-of-type(4)')?.click()")


def test_the_chart_shows_values_at_the_mouse_zooms_and_hides_a_run(page, site):
    page.js("sessionStorage.removeItem('chart')")
    page.go("/runs", f"!!{PLOT}")
    box = page.js(f"(b => [b.left, b.top, b.width, b.height])({PLOT}.getBoundingClientRect())")
    at = lambda share: {"x": box[0] + share * box[2], "y": box[1] + box[3] / 2}  # noqa: E731
    before = page.text(".legend")
    page.send("Input.dispatchMouseEvent", type="mouseMoved", **at(0.2))
    page.until(f"document.querySelector('.legend').innerText !== {json.dumps(before)}")
    assert not page.js(f"!!{page.find('Whole range')}")
    page.send("Input.dispatchMouseEvent", type="mousePressed", button="left", clickCount=1, **at(0.2))
    page.send("Input.dispatchMouseEvent", type="mouseMoved", button="left", buttons=1, **at(0.6))
    page.send("Input.dispatchMouseEvent", type="mouseReleased", button="left", clickCount=1, **at(0.6))
    page.click("Whole range")
    page.until(f"!{page.find('Whole range')}")
    page.js("document.querySelector('.legend button').focus()")
    page.press("Enter")
    assert page.js("document.querySelector('.legend button').getAttribute('aria-pressed')") == "false"
    assert page.js("document.activeElement === document.querySelector('.legend button')")
    page.press("Enter")
    page.js("document.querySelector('.runs tbody input').click()")
    page.until("document.querySelectorAll('.legend button').length === 1")
    page.js("document.querySelector('.runs tbody input').click()")
    page.until("document.querySelectorAll('.legend button').length === 2")
    assert not page.problems()
    page.pictures("runs")


def test_chart_points_and_smoothing(page):
    """Evaluations have no seconds, a rollback does steps again, and averages begin at the first value."""
    got = page.js("""import('/page/chart_points.js').then(chart => {
      const lines = [{ step: 1, loss: 4, seconds: 1, tokens: 8 }, { step: 2, loss: 3, seconds: 2, tokens: 16 },
        { step: 2, val_loss: 3.5, tokens: 16 }, { step: 1, rollback: 1 }, { step: 2, loss: 2, seconds: 3, tokens: 16 },
        { step: 3, loss: null }];
      return [chart.points(lines, 'step', 'loss'), chart.points(lines, 'seconds', 'val_loss'),
              chart.points(lines, 'flops', 'val_loss', 10), chart.smooth([4, 2], 0.5), chart.smooth([4, 2], 0),
              chart.points([{ step: 1, routers: { a: [0.5, 0.5], b: [0.25, 0.75] } }], 'step', 'router')] })""")
    assert got == [[[1, 2], [4, 2]], [[2], [3.5]], [[160], [3.5]], [4, 8 / 3], [4, 2], [[1], [1.5]]]


def test_only_new_lines_of_a_run_are_asked_for(page, site):
    """Whatever was known, all lines are there in the end, and those of a run that went back are read anew."""
    page.go("/runs", f"{ROWS}.length === 2")
    got = page.js("""import('/page/api.js').then(async ({ get, metrics }) => {
      const { id } = (await get('/v1/runs')).data[0], all = await metrics(id, 40), parts = [];
      for (let n = 0; n <= all.length; n++) parts.push(await metrics(id, 40, all.slice(0, n)));
      parts.push(await metrics(id, 30, [...all, { step: 50 }]));
      return [all.length, parts.every(part => JSON.stringify(part) === JSON.stringify(all))] })""")
    assert got[0] > 20 and got[1]


# ---- a run ---------------------------------------------------------------------------------------------------------

def test_a_run_is_shown_whole_and_notes_stay_with_it(page, site):
    page.go("/runs", f"{ROWS}.length === 2")
    page.click("plain", ".runs")
    page.has("Checkpoints")
    page.until(f"!!{PLOT}")
    text = page.text()
    for part in ("step 40 of 40", "bits per byte in validation", "What is this run for?", "train.py --config run.json",
                 "--seed=5", "validation loss", "Text at each evaluation"):  # fmt: skip
        assert part in text or part in page.js("document.querySelector('main textarea').placeholder"), part
    keys = page.js("[...document.querySelectorAll('.keys tbody tr')].map(e => [...e.children].map(c => c.innerText))")
    assert ["learning_rate", "0.004", "0.003"] in keys and not [key for key in keys if key[0] == "batch_size"]
    page.js("document.querySelector('section[aria-label=Keys] input').click()")
    page.until("[...document.querySelectorAll('.keys tbody tr')].some(e => e.innerText.startsWith('batch_size'))")
    sample = page.js("document.querySelector('.samples .text').textContent")
    run_id = page.js("location.hash.split('/')[2]")
    assert sample == site.send("GET", f"/v1/runs/{run_id}", **key(site))[2]["samples"][0]["text"]
    page.write("section[aria-label=Notes] textarea", "<i>best</i> so far")
    page.click("Save the notes")
    page.has("Saved", "section[aria-label=Notes]")
    page.go(f"/runs/{run_id}", "document.querySelector('textarea')?.value === '<i>best</i> so far'")
    page.pictures("run")
    page.click("Write with it", "section[aria-label=Checkpoints]")
    page.until("document.querySelector('.writing select')?.value === 'plain-step-40.tinystar'")


# ---- a new run -----------------------------------------------------------------------------------------------------


def upload(page, folder, *files):
    """Put files into the page's field."""
    for name, text in files:
        (folder / name).write_text(text)
    found = page.send("Runtime.evaluate", expression="document.querySelector('main input[type=file]')")["result"]
    page.send("DOM.setFileInputFiles", files=[str(folder / name) for name, _ in files], objectId=found["objectId"])


def test_files_and_datasets_are_brought_shown_and_deleted(page, site, tmp_path):
    page.go("/data", "!!document.querySelector('.drop')")
    tag = "<img src=x onerror=alert(1)>.txt"  # a name that would be a tag if it were put in as HTML
    page.has("No files yet.")
    lines = (json.dumps({"text": WORDS}) + "\n") * 2 + json.dumps(WORDS * 80)
    upload(page, tmp_path, (tag, "short"), ("stories.jsonl", lines))
    page.until("document.querySelectorAll('section[aria-label=Files] li').length >= 2")
    assert tag in page.text()
    files = "section[aria-label=Files] ul.list > li"
    file = f"[...document.querySelectorAll('{files}')].find(e => e.innerText.includes('NAME'))"
    page.js(f"{file.replace('NAME', 'stories')}.querySelector('summary').click()")
    page.has("the cat sat on a mat", ".documents")
    question = page.click_and_answer(f"{file.replace('NAME', '<img')}.querySelector('button')", accept=True)
    assert question.startswith(f"Delete {tag}?")
    page.until(f"document.querySelectorAll('{files}').length === 1")
    upload(page, tmp_path, ("old.f90", "PRINT *, 'a kind that the server does not know'"))
    page.has("old.f90.txt", "section[aria-label=Files]")
    page.click_and_answer(f"{file.replace('NAME', 'f90')}.querySelector('button')", accept=True)
    page.until(f"document.querySelectorAll('{files}').length === 1")
    upload(page, tmp_path, ("film.mp4", "no text\0"))
    page.has("film.mp4 is not UTF-8 text", "section[aria-label=Files] .error")

    if page.js(f"document.querySelector('{files} [type=checkbox]').checked"):
        page.js(f"document.querySelector('{files} [type=checkbox]').click()")
    page.click("Build the dataset")
    page.has("Choose at least one file", "main form")
    page.js(f"document.querySelector('{files} [type=checkbox]').click()")
    page.set("Name", "mine")
    page.set("Tokens", "chars")
    page.click("Build the dataset")
    page.has("Bytes per token", "section[aria-label=Datasets]", 120)
    facts = page.text("section[aria-label=Datasets]")
    assert "mine" in facts and "1 equal to another" in facts and "1.00" in facts and "free" in facts
    page.js("document.querySelector('section[aria-label=Datasets] summary').click()")
    page.has("the cat sat", "section[aria-label=Datasets] .documents")
    page.pictures("data")

    # a file that is dropped on the page
    page.js("""{ const data = new DataTransfer(); data.items.add(new File(['dropped words'], 'dropped.txt'));
      document.querySelector('.drop').dispatchEvent(new DragEvent('drop', { dataTransfer: data, bubbles: true })) }""")
    page.has("dropped.txt", "section[aria-label=Files]")
    assert not page.problems()


def test_a_model_is_deleted_after_a_confirmation(page, site):
    """A dialog asks, No keeps it and Yes removes it, and a refusal is said in words."""
    (site.folder / "spare.strawberry").write_bytes((site.folder / "untrained.strawberry").read_bytes())
    row = "[...document.querySelectorAll('section[aria-label=Models] li')].find(e => e.innerText.startsWith('NAME'))"
    spare, used = row.replace("NAME", "spare"), row.replace("NAME", "untrained")
    page.go("/data", f"!!{spare}")
    size = (site.folder / "spare.strawberry").stat().st_size
    assert f"{size / 1000:.1f} kB" in page.js(f"{spare}.innerText")
    assert "spare.strawberry" in page.click_and_answer(f"{spare}.querySelector('button')", accept=False)
    assert (site.folder / "spare.strawberry").exists()
    page.click_and_answer(f"{spare}.querySelector('button')", accept=True)
    page.until(f"!{spare}")
    assert not (site.folder / "spare.strawberry").exists() and (site.folder / "untrained.strawberry").exists()
    page.js("""import('/page/api.js').then(api => { globalThis.stopped = new AbortController();
      api.complete({ model: 'untrained.strawberry', prompt: 'a', max_tokens: 2900, temperature: 0 },
        () => { globalThis.began = true }, stopped.signal).catch(() => {}) }); 0""")
    page.until("globalThis.began")
    page.click_and_answer(f"{used}.querySelector('button')", accept=True)
    page.has("generating", "section[aria-label=Models] .error")
    page.js("stopped.abort()")
    assert (site.folder / "untrained.strawberry").exists()


def test_a_run_is_planned_started_paused_resumed_stopped_and_deleted(page, site):
    page.size(1280, 900)
    page.go("/data", f"!!{page.find('Train on it')}")
    page.click("Train on it")
    page.has("Parameters", ".cost")
    page.set("max_iters", "15")
    page.has("preset: 480")
    page.has("the run ends during its warm-up", "section[aria-label=Cost]")
    page.set("learning_rate", "-1")
    page.has("learning_rate = -1", "section[aria-label=Cost]")
    assert page.js(f"{page.control('learning_rate')}.getAttribute('aria-invalid')") == "true"
    page.js("document.querySelector('[data-key=learning_rate] button').click()")
    page.until(f"{page.control('learning_rate')}.value === '0.01' && !{page.control('learning_rate')}.ariaInvalid")
    assert json.loads(page.js(f"{page.control('The keys that differ')}.value")) == {"max_iters": 15}
    endless = {**SMALL, "max_iters": 10**6, "log_interval": 20, "eval_interval": 10**5}
    page.js("[...document.querySelectorAll('summary')].find(e => e.textContent.startsWith('As JSON')).click()")
    cost = "document.querySelector('.cost dd').innerText"
    before = page.js(cost)
    page.set("The keys that differ", json.dumps(endless))
    page.until(f"{page.control('n_embd')}.value === '32'")
    page.has("10 keys differ", "section[aria-label=Cost]")
    page.set("Part of the model’s name", "endless")
    parameters = page.until(f"{cost} !== {json.dumps(before)} && {cost}")
    page.pictures("new")
    page.click("Start the run")
    page.until("location.hash.startsWith('#/runs/ftjob-')")
    run_id = page.js("location.hash.split('/')[2]")
    page.until("/step [1-9]/.test(document.querySelector('.facts').innerText)", 120)
    about = site.send("GET", f"/v1/runs/{run_id}", **key(site))[2]
    assert about["summary"]["changed"]["max_iters"] == 10**6 and about["values"]["model_hyperparams.n_embd"] == 32
    assert parameters.split(",")[0].replace("k", "") in f"{about['summary']['parameters'] / 1000:.3g}"
    # the command that repeats it, read as train.py does, has the run's keys
    argv = shlex.split(about["command"])[2:]
    again, values = flatten(to_dict(load_run(argv, models.CONFIGS))), about["values"]
    assert {key for key, value in values.items() if again[key] not in (value, "auto")} == set()
    assert (Path(site.settings.data).parent / again["dataset.path"]).is_file() and again["seed"] == values["seed"]
    first = page.text(".facts")
    page.until(f"document.querySelector('.facts').innerText !== {json.dumps(first)}")  # it is live
    for act, state in (("Pause", "paused"), ("Resume", "running"), ("Stop", "stopped")):
        page.until(f"!!{page.find(act)}")
        page.js(f"{page.find(act)}.focus()")
        page.press("Enter")
        page.has(state, ".top .chip", 120)
        assert page.js("document.activeElement !== document.body"), "the focus is lost"
    page.pictures("stopped")
    page.click("Duplicate with changes")
    page.has("10 keys differ", "section[aria-label=Cost]")
    assert page.js(f"{page.control('Train on')}.selectedOptions[0].text") == "mine"
    page.go(f"/runs/{run_id}", f"!!{page.find('Delete')}")
    assert "Delete the run tiny-endless-" in page.click_and_answer(page.find("Delete"), accept=False)
    assert page.js("location.hash").endswith(run_id)
    page.click_and_answer(page.find("Delete"), accept=True)
    page.until(f"location.hash === '#/runs' && {ROWS}.length === 2")
    assert site.send("GET", f"/v1/runs/{run_id}", **key(site))[0] == 404
    assert not page.problems()


def test_the_form_knows_every_key_and_its_range(page):
    got = page.js("""import('/page/schema.js').then(async form => {
      const schema = await (await import('/page/api.js')).get('/v1/presets');
      const keys = form.keysOf(schema.config_schema, 'palm');
      return { keys: [...keys.keys()], ranges: ['max_iters', 'dataset.data_division', 'model_hyperparams.n_layer',
               'seed', 'model_hyperparams.aft', 'model_hyperparams.dropout'].map(key => form.range(keys.get(key))),
               values: Object.keys(schema.data.find(one => one.id === 'palm-aft').values),
               nested: form.nest({ 'a.b': 1, 'a.c.d': null, e: [2] }),
               flat: form.flatten({ a: { b: 1, c: { d: null } }, e: [2] }) } })""")
    assert set(got["values"]) <= set(got["keys"]) and "model_hyperparams.d_rank" in got["keys"]
    assert got["ranges"] == ["at least 1", "above 0 to below 1", "1 to 4096", "at least 0", "", "0 to below 1"]
    assert got["nested"] == {"a": {"b": 1, "c": {"d": None}}, "e": [2]}
    assert got["flat"] == {"a.b": 1, "a.c.d": None, "e": [2]}


# ---- writing -------------------------------------------------------------------------------------------------------

EDITOR = "document.querySelector('.editor')"


def begin_writing(page, text="the ", **settings):
    page.js("localStorage.clear()")
    page.go("/write", "document.querySelector('.writing select')?.value === 'untrained.strawberry'")
    for label, value in {"Most tokens": 20, **settings}.items():
        page.set(label.replace("_", " "), str(value))
    page.js(f"{EDITOR}.focus()")
    page.send("Input.insertText", text=text)


def test_prompt_and_continuation_are_one_text_whose_tokens_show_their_probability(page, site):
    begin_writing(page, Seed=3, Temperature=0.8)
    page.press("Enter", modifiers=2)
    page.has("seed 3", ".writing")
    request = {"model": "untrained.strawberry", "prompt": "the ", "max_tokens": 20, "seed": 3, "temperature": 0.8,
               "logprobs": 5}  # fmt: skip
    same = site.send("POST", "/v1/completions", request, **key(site))[2]["choices"][0]
    assert page.js(f"{EDITOR}.textContent") == "the " + same["text"]
    assert "".join(page.js("[...document.querySelectorAll('.editor .token')].map(e => e.textContent)")) == same["text"]
    page.js(f"{EDITOR}.querySelector('.token').dispatchEvent(new MouseEvent('mouseover', {{ bubbles: true }}))")
    shown = page.text(".popover")
    own = 100 * 2.718281828459045 ** same["logprobs"]["token_logprobs"][0]
    assert re.search(r"([\d.]+) %", shown) and abs(float(re.search(r"([\d.]+) %", shown)[1]) - own) < 0.6
    assert page.js("document.querySelectorAll('.popover li').length") >= 5
    page.pictures("write")

    # an alternative takes the place of the token, and the model writes on from there
    page.js("document.querySelector('.popover li button').click()")
    page.until(f"{EDITOR}.textContent !== {json.dumps('the ' + same['text'])}")
    page.has("tokens in", ".writing")
    assert len(page.js(f"{EDITOR}.textContent")) > 10

    # the text can be changed by hand, and is written again from the same beginning
    page.click("Clear")
    page.js(f"{EDITOR}.focus()")
    page.send("Input.insertText", text="a mat")
    page.press("Enter", modifiers=2)
    page.has("20 tokens in", ".writing")
    first = page.js(f"{EDITOR}.textContent")
    page.set("Seed", "")
    page.click("Regenerate")
    page.until(f"{EDITOR}.textContent !== {json.dumps(first)} && !{EDITOR}.ariaBusy")
    assert page.js(f"{EDITOR}.textContent").startswith("a mat")
    page.click("Use this seed again")
    assert int(page.js(f"{page.control('Seed')}.value")) >= 0

    # history, kept in this browser
    page.js("[...document.querySelectorAll('.history button')].at(-1).click()")
    assert page.js(f"{EDITOR}.textContent") == "the " + same["text"]
    assert page.js("JSON.parse(localStorage.getItem('history')).length") >= 3
    assert not page.problems()


def test_tokens_are_cut_where_characters_are(page):
    """Offsets count code points from the prompt's begin; parts of characters are empty."""
    got = page.js("""import('/page/tokens.js').then(({ tokenElements }) => {
      const lp = offsets => ({ text_offset: offsets, token_logprobs: offsets.map(() => -1),
                               top_logprobs: offsets.map(() => ({})) });
      return [[ 'é€😀x', [7, 8, 9, 9, 10]], ['ab', [3, 4]], ['ab', [3]], ['abc', [0, 9]]].map(([text, offsets]) =>
        tokenElements(text, lp(offsets)).map(e => e.textContent)) })""")
    assert got == [["é", "€", "😀", "x"], ["a", "b"], ["ab"], ["abc"]]


def test_several_texts_are_written_side_by_side(page, site):
    begin_writing(page, Samples=2, Seed=5)
    page.js("document.querySelector('.others').closest('details').open = true")
    page.click("Write", ".writing")
    page.until("document.querySelectorAll('.choices button:not(:disabled)').length === 2")
    request = {"model": "untrained.strawberry", "prompt": "the ", "max_tokens": 20, "seed": 5, "n": 2,
               "temperature": 0.8}  # fmt: skip
    same = site.send("POST", "/v1/completions", request, **key(site))[2]["choices"]
    texts = page.js("[...document.querySelectorAll('.choices .text')].map(e => e.textContent)")
    assert texts == [choice["text"] for choice in same] and "seed 6" in page.text(".choices")
    assert page.js("document.activeElement.innerText") == "Write", "the focus is lost"
    page.pictures("samples")
    page.js("document.querySelectorAll('.choices button')[1].click()")
    assert page.js(f"{EDITOR}.textContent") == "the " + texts[1]
    assert not page.js("document.querySelector('.choices').children.length")

    # two models, of the same weights: the same seed writes the same text
    begin_writing(page, Seed=5)
    (site.folder / "twin.strawberry").write_bytes((site.folder / "untrained.strawberry").read_bytes())
    try:
        page.js("dispatchEvent(new Event('changed'))")
        page.until("!!document.querySelector('.others [value^=twin]')")
        page.js("document.querySelector('.others').closest('details').open = true;"
                "document.querySelector('.others [value^=twin]').click()")  # fmt: skip
        page.click("Write", ".writing")
        page.until("document.querySelectorAll('.choices button:not(:disabled)').length === 2")
        assert page.js("[...document.querySelectorAll('.choices .text')].map(e => e.textContent)") == [texts[0]] * 2
        assert "untrained.strawberry" in page.text(".choices") and "twin.strawberry" in page.text(".choices")
    finally:
        (site.folder / "twin.strawberry").unlink()


def test_stop_ends_a_text_and_an_error_keeps_what_was_written(page):
    begin_writing(page, **{"Most tokens": 2900, "Temperature": 0})
    page.press("Enter", modifiers=2)
    page.until(f"{EDITOR}.textContent.length > 30")
    assert page.js("document.activeElement.innerText") == "Stop"
    page.press("Enter")
    page.has("Stopped.", ".writing")
    assert page.js(f"document.activeElement === {EDITOR}"), "the focus is lost"
    page.set("Most tokens", "4000")
    page.click("Write", ".writing")
    page.has("max_tokens = 4000: ", ".writing .error")
    assert len(page.js(f"{EDITOR}.textContent")) > 30, "what was written is gone"


def test_the_stream_is_read_wherever_it_is_cut(page):
    text = 'data: {"a":"é€😀"}\n\ndata: two\r\n\r\n: comment\n\ndata: [DONE]\n\n'
    got = page.js("""import('/page/api.js').then(async ({ events }) => {
      const bytes = new TextEncoder().encode(TEXT), all = [];
      for (const n of [1, 2, 3, 5, 1000]) {
        const stream = new ReadableStream({ start(to) {
          for (let i = 0; i < bytes.length; i += n) to.enqueue(bytes.slice(i, i + n));
          to.close();
        } }), found = [];
        for await (const data of events(new Response(stream))) found.push(data);
        all.push(found);
      }
      return all })""".replace("TEXT", json.dumps(text)))
    assert got == [['{"a":"é€😀"}', "two", "[DONE]"]] * 5


# ---- a first visit -------------------------------------------------------------------------------------------------


def test_a_first_visit_ends_with_the_text_of_a_model(page, site, tmp_path):
    """A server with nothing: what is shown is how to train, and it ends with what the model writes."""
    page.size(1280, 900)
    empty = ServerThread(tmp_path / "models")
    try:
        page.open(empty.url + "/")
        page.has("Train your first model")
        page.pictures("first")
        page.js("import('/page/first.js').then(({ KEYS }) => Object.assign(KEYS, " + json.dumps(
            {**SMALL, "max_iters": 20, "eval_interval": 10, "log_interval": 2, "checkpoints.interval": 10,
             "warmup_iters": 2, "sample_length": 8}) + "))")  # fmt: skip
        upload(page, tmp_path, ("mine.txt", WORDS * 60))
        page.has("Watch it learn")
        page.has("loss", ".facts", 120)
        page.has("Look at the run", seconds=120)
        page.until("document.querySelector('.written').textContent.length > 0")
        page.pictures("first-done")
        page.go("/runs", f"{ROWS}.length === 1")
        assert page.js(ROWS)[0].startswith("tiny-first-")
        page.go("/write", "!!document.querySelector('.writing select')")
        assert not page.problems()
    finally:
        empty.stop()
        page.browser.password = site.settings.api_key[0]
        page.open(site.url)


# ---- states --------------------------------------------------------------------------------------------------------

VIEWS = ("/runs", "/runs/ID", "/new", "/write", "/data", "/first")


def views(page, site):
    run_id = site.send("GET", "/v1/runs", **key(site))[2]["data"][0]["id"]
    for view in VIEWS:
        is_loaded = "![...document.querySelectorAll('.loading')].some(e => e.checkVisibility())"
        page.go(view.replace("ID", run_id), is_loaded)
        yield view


def test_a_lost_server_is_reported_and_the_page_keeps_its_content(page, site):
    page.go("/runs", f"{ROWS}.length === 2")
    page.send("Network.enable")
    page.send("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    page.js("dispatchEvent(new Event('changed'))")
    page.until("document.getElementById('server-status').innerText.includes('does not answer')")
    assert len(page.js(ROWS)) == 2
    page.pictures("gone")
    page.go("/data", "/does not answer/.test(document.querySelector('.loading').innerText)")
    page.send("Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    page.has("Drop files here")
    page.until("!document.getElementById('server-status').innerText")
    page.go("/runs/run-" + "0" * 24, "/there is no run/.test(document.querySelector('main').innerText)")
    with contextlib.suppress(AssertionError):
        page.send("Network.disable")


def test_the_page_fits_a_phone_and_has_enough_contrast(page, site):
    for width, height in ((390, 844), (1280, 800)):
        for scheme in ("light", "dark"):
            page.size(width, height, scheme)
            for view in views(page, site):
                assert page.js("document.documentElement.scrollWidth") <= width, (view, width)
                worst = contrast(page)
                assert worst[0] >= 4.5, (view, scheme, worst)
                unlabelled = page.js("""[...document.querySelectorAll('input, select, textarea, [role=textbox]')]
                  .filter(e => e.checkVisibility() && !e.labels?.length && !e.ariaLabel).map(e => e.outerHTML)""")
                assert not unlabelled, (view, unlabelled)
    page.size(1280, 900)


def test_the_page_can_be_used_by_keyboard(page, site):
    for view in views(page, site):
        found = tab_through(page)
        assert len(found) >= 8 and all(at["outline"] and at["width"] > 0 for at in found), (view, found)
    page.go("/runs", f"{ROWS}.length === 2")
    page.js("document.querySelector('.skip').focus()")
    page.press("Enter")
    assert page.js("document.activeElement.id") == "view"


def tab_through(page):
    """What Tab comes to, from the top of the page to its end: [{what, outline, width}]."""
    page.js("document.querySelector('.skip').focus()")
    found, look = [], """(() => {
      const e = document.activeElement, box = e.getBoundingClientRect(), style = getComputedStyle(e);
      return { what: e.id || e.textContent.trim().slice(0, 30), tag: e.tagName, width: box.width,
               order: [...document.querySelectorAll('*')].indexOf(e),
               outline: style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2 } })()"""
    for _ in range(60):
        page.press("Tab")
        at = page.js(look)
        if at["tag"] == "BODY" or (found and at["order"] <= found[-1]["order"]):
            break
        found.append(at)
    return found


def contrast(page):
    """The least contrast of any text that is seen, by WCAG's formula, and where."""
    return page.js("""(() => {
      const light = c => { const f = x => (x /= 255) <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4;
                           return .2126 * f(c[0]) + .7152 * f(c[1]) + .0722 * f(c[2]); };
      const numbers = text => text.match(/[\\d.]+/g).map(Number);
      const rgb = text => numbers(text).map((n, i) => text.startsWith('color(srgb') && i < 3 ? 255 * n : n);
      const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
                                                               if (c.length < 4 || c[3] > .5) return c; } };
      let worst = [99, ''];
      for (const e of document.querySelectorAll('body *')) {
        const hasText = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
        if (!e.checkVisibility() || e.disabled || !hasText) continue;
        const [a, b] = [light(rgb(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
        const ratio = (a + .05) / (b + .05);
        if (ratio < worst[0]) worst = [ratio, e.id || e.tagName + ' ' + e.className + ' ' + e.textContent.slice(0, 30)];
      }
      return worst })()""")
