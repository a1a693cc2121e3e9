"""The page at /: what it is made of, and what it does in a browser, where there is one.

The browser is Debian's chromium, without a window, told what to do over two pipes (Chrome DevTools Protocol). With
PAGE_PICTURES=folder the test leaves pictures there, for people to look at: phone and desk, light and dark.
"""

import base64
import contextlib
import html.parser
import itertools
import json
import os
import re
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from machine import require_program
from test_serve import Running

import encoder as encoders
import model as models
from strawberry.model_file import save_model
from strawberry.serving.app import PAGE_FILE

pytestmark = pytest.mark.slow
PAGE = PAGE_FILE.read_text("utf-8")
SCRIPT = re.search(r"<script>(.*)</script>", PAGE, re.S)[1]
PICTURES = os.environ.get("PAGE_PICTURES")

# ---- what it is made of --------------------------------------------------------------------------------------------


class Tags(html.parser.HTMLParser):
    """All tags, each with its attributes and those that it is within."""

    VOID = {"meta", "link", "input", "img", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.text = [], [], {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs), [*self.open], len(self.found)))
        if tag not in self.VOID:
            self.open.append((tag, len(self.found) - 1))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1:]}, line {self.getpos()[0]}"
        self.open.pop()

    def handle_data(self, data):
        for _, i in self.open:
            self.text[i] = self.text.get(i, "") + data.strip()


TAGS = Tags(PAGE)
IDS = [attrs["id"] for _, attrs, _, _ in TAGS.found if "id" in attrs]


def test_every_tag_is_closed_and_ids_are_unique():
    assert not TAGS.open
    assert len(IDS) == len(set(IDS))


def test_the_script_uses_what_is_there():
    used = set(re.findall(r'(?:\$|number)\("([\w-]+)"', SCRIPT)) | set(re.findall(r'"(\w+-item)"', SCRIPT))
    assert len(used) > 40 and used <= set(IDS), used - set(IDS)
    for _, attrs, _, _ in TAGS.found:
        for name in ("for", "aria-labelledby", "aria-describedby"):
            assert set(attrs.get(name, "").split()) <= set(IDS), attrs
    parts = {attrs["data-at"] for _, attrs, _, _ in TAGS.found if "data-at" in attrs}
    used = set(re.findall(r"\bat\.(\w+)", SCRIPT))
    assert len(used) > 10 and used <= parts, used - parts


def test_every_control_has_a_label():
    labelled = {attrs.get("for") for tag, attrs, _, _ in TAGS.found if tag == "label"}
    controls = 0
    for tag, attrs, within, i in TAGS.found:
        if tag in ("input", "select", "textarea"):
            assert (attrs.get("id") or "?") in labelled or any(outer == "label" for outer, _ in within), attrs
        elif tag in ("button", "a", "summary"):
            assert TAGS.text.get(i), attrs
        elif tag in ("progress", "nav"):
            assert attrs.get("aria-label"), attrs
        controls += tag in ("input", "select", "textarea", "button")
    assert controls > 30


def test_nothing_comes_from_elsewhere():
    """Nor is anything run or shown that the server did not write as a page."""
    assert not re.search(r"https?://|//\w+\.\w|@import|url\(", re.sub(r"^\s*//.*$", "", PAGE, flags=re.M))
    for word in ("innerHTML", "outerHTML", "AdjacentHTML", "document.write", "eval(", "localStorage", "Function("):
        assert word not in SCRIPT
    for tag, attrs, _, _ in TAGS.found:
        assert not [name for name in attrs if name.startswith("on") or name == "style"], attrs
        assert tag != "script" or not attrs


# ---- how it is served --------------------------------------------------------------------------------------------

KEY = {"Authorization": "Bearer first"}
WORDS = "the cat sat on a mat and saw that it was good; then it went home to eat and to sleep. "
HYPER = {
    "max_iters": 60, "eval_interval": 20, "log_interval": 2, "eval_iters": 1, "warmup_iters": 5, "batch_size": 8,
    "sample_length": 0, "compile": False, "learning_rate": 0.01, "checkpoints.interval": 1000,
    "model_hyperparams": {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32},
}  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A server with a key and one model, which has seen nothing yet."""
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
    running = Running(folder, api_key=["first"], context=3000)
    running.folder = folder
    yield running
    running.stop()


def test_the_page_calls_routes_that_there_are(site):
    schema = site.send("GET", "/openapi.json", **KEY)[2]["paths"]
    routes = {re.sub(r"\{\w+\}", "*", path) for path in schema}
    called = {re.sub(r"\$\{act\}", "pause", path) for path in re.findall(r'["`}](/(?:v1|openapi)[^"`?]*)', SCRIPT)}
    called = {re.sub(r"\$\{[^}]*\}", "*", path) for path in called} - {"/openapi.json"}
    assert len(called) >= 10 and called <= routes, called - routes


def test_it_is_served_as_a_page(site):
    status, headers, data = site.send("GET", "/", **KEY)
    assert status == 200 and data.decode() == PAGE and headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'self'" in headers["Content-Security-Policy"]


# ---- a browser -----------------------------------------------------------------------------------------------------


class Browser:
    """Chromium, and one page in it."""

    def __init__(self, program, folder):
        theirs_in, self.out = os.pipe()
        self.back, theirs_out = os.pipe()
        flags = ("--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --mute-audio "
                 f"--disable-background-networking --remote-debugging-pipe --user-data-dir={folder}")  # fmt: skip
        shell = f"exec {program} {flags} about:blank 3<&{theirs_in} 4>&{theirs_out}"
        self.process = subprocess.Popen(["bash", "-c", shell], pass_fds=(theirs_in, theirs_out),
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self.numbers, self.answers, self.told, self.session = itertools.count(1), {}, [], None
        self.password, self.asked = "", 0
        self.news, self.writing = threading.Condition(), threading.Lock()
        threading.Thread(target=self.listen, daemon=True).start()
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def listen(self):
        rest = b""
        while data := os.read(self.back, 1 << 16):
            *messages, rest = (rest + data).split(b"\0")
            with self.news:
                for message in map(json.loads, messages):
                    if "id" in message:
                        self.answers[message["id"]] = message
                    elif message["method"] == "Fetch.requestPaused":
                        self.post("Fetch.continueRequest", requestId=message["params"]["requestId"])
                    elif message["method"] == "Fetch.authRequired":  # what a person types where the browser asks
                        answer = {"response": "CancelAuth"}
                        if self.password:
                            answer = {"response": "ProvideCredentials", "username": "me", "password": self.password}
                        self.asked += 1
                        self.post("Fetch.continueWithAuth", requestId=message["params"]["requestId"],
                                  authChallengeResponse=answer)  # fmt: skip
                    else:
                        self.told.append(message)
                self.news.notify_all()

    def post(self, method, **params):
        n = next(self.numbers)
        more = {"sessionId": self.session} if self.session else {}
        with self.writing:
            os.write(self.out, json.dumps({"id": n, "method": method, "params": params, **more}).encode() + b"\0")
        return n

    def send(self, method, **params):
        n = self.post(method, **params)
        with self.news:
            assert self.news.wait_for(lambda: n in self.answers, 30), f"{method}: no answer"
        answer = self.answers.pop(n)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def js(self, expression):
        """What JavaScript says; a promise is awaited."""
        got = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in got, (expression, got["exceptionDetails"]["exception"]["description"])
        return got["result"].get("value")

    def until(self, expression, seconds=30):
        end = time.monotonic() + seconds
        while not (value := self.js(expression)):
            assert time.monotonic() < end, (expression, self.js("document.body.innerText"))
            time.sleep(0.05)
        return value

    def open(self, url):
        self.send("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && typeof begin === 'function'")

    def press(self, key, modifiers=0):
        codes = {"Tab": 9, "Enter": 13, " ": 32, "Escape": 27}
        told = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": codes.get(key, 0),
                "modifiers": modifiers}  # fmt: skip
        text = {"Enter": "\r", " ": " "}.get(key)
        more = {"text": text} if text and not modifiers else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", **told, **more)
        self.send("Input.dispatchKeyEvent", type="keyUp", **told)

    def click_and_answer(self, button, accept):
        """Clicks what asks a question, answers it, and gives the question."""
        with self.news:
            self.told = [m for m in self.told if m["method"] != "Page.javascriptDialogOpening"]
        self.post("Runtime.evaluate", expression=f"{button}.click()")
        asked = lambda: [m for m in self.told if m["method"] == "Page.javascriptDialogOpening"]  # noqa: E731
        with self.news:
            assert self.news.wait_for(asked, 10), f"{button} asks nothing"
            question = asked()[0]["params"]["message"]
        self.send("Page.handleJavaScriptDialog", accept=accept)
        return question

    def write(self, selector, text):
        """Types into a field that the keyboard is at after focus()."""
        self.js(f"document.querySelector({json.dumps(selector)}).focus()")
        self.js("document.activeElement.select?.()")
        self.send("Input.insertText", text=text)

    def size(self, width, height, scheme="light", reduced=True):
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 500)  # fmt: skip
        self.send("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce" if reduced else "no-preference"}])  # fmt: skip

    def picture(self, name):
        """The whole page, as high as it is."""
        width, height = self.js("[innerWidth, document.body.scrollHeight]")
        whole = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        data = self.send("Page.captureScreenshot", captureBeyondViewport=True, clip=whole)["data"]
        Path(PICTURES).mkdir(parents=True, exist_ok=True)
        Path(PICTURES, name).write_bytes(base64.b64decode(data))

    def problems(self):
        """What the browser has complained of."""
        with self.news:
            told = [m["params"] for m in self.told if m["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
        return [t for t in told if not re.search("status of 40[019]", t.get("entry", {}).get("text", ""))]

    def stop(self):
        self.session = None
        with contextlib.suppress(OSError):
            self.post("Browser.close")
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def browser():
    program = require_program("chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        browser = Browser(program, folder)
        yield browser
        browser.stop()


@pytest.fixture(scope="module")
def page(browser, site):
    """The browser at the site's page, for which the browser itself has asked for the key."""
    browser.password = "first"
    browser.send("Fetch.enable", handleAuthRequests=True)
    browser.open(site.url)
    browser.until("$('model').options.length === 1")
    assert browser.asked == 1
    return browser


def tab_through(browser):
    """What Tab comes to, from the top of the page to its end: [{what, x, y, outline}]."""
    browser.js("var h1 = document.querySelector('h1'); h1.tabIndex = -1; h1.focus(); h1.removeAttribute('tabindex')")
    found, look = [], """(() => {
      const e = document.activeElement, box = e.getBoundingClientRect(), style = getComputedStyle(e);
      return { what: e.id || e.dataset.at || e.textContent.trim().slice(0, 30), tag: e.tagName,
               order: [...document.querySelectorAll('*')].indexOf(e),
               width: box.width, outline: style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2 } })()"""
    for _ in range(200):
        browser.press("Tab")
        at = browser.js(look)
        if at["tag"] == "BODY" or (found and at["order"] <= found[-1]["order"]):
            break
        found.append(at)
    return found


def test_a_person_brings_data_trains_and_writes(page, site, tmp_path):
    """From the key to the text of a model that was trained here, with every answer on the page."""
    page.size(1200, 900)
    # a server that has another key now: the page asks for it, says that a wrong one is wrong, and keeps it in the tab
    page.password, page.asked = "", 0
    site.settings.api_key[:] = ["second"]
    page.js("go()")
    page.until("!$('key-form').hidden && document.activeElement === $('key')")
    for given in ("wrong", "second"):
        page.write("#key", given)
        page.press("Enter")
        page.until("/wrong/.test($('key-error').textContent)" if given == "wrong" else "$('key-form').hidden")
    page.until("$('base').options.length > 5")
    assert page.asked == 1  # the browser itself asked no more once a key was given
    assert page.js("sessionStorage.getItem('key')") == "second" and page.js("localStorage.length") == 0

    # a file, with a name that would be a tag if it were put in as HTML
    for name in ("<img src=x onerror=alert(1)>.txt", "stories.txt"):
        (tmp_path / name).write_text(WORDS * 200 + name)
    at = page.send("Runtime.evaluate", expression="$('upload')")["result"]["objectId"]
    page.send("DOM.setFileInputFiles", files=[str(path) for path in sorted(tmp_path.iterdir())], objectId=at)
    page.js("$('upload-button').click()")
    page.until("$('files').children.length === 2")
    assert "<img src=x onerror=alert(1)>.txt" in page.js("$('files').innerText")
    assert "Delete <img" in page.click_and_answer("parts($('files').children[1]).delete", accept=True)
    page.until("$('files').children.length === 1")

    # a dataset of what is left; of no file it is refused in words
    page.js("$('assemble').click()")
    page.until("/at least one file/.test($('dataset-error').textContent)")
    page.js("parts($('files').children[0]).chosen.focus()")
    page.press(" ")
    page.write("#dataset-name", "mine")
    page.js("$('encoder').value = 'chars'; $('assemble').click()")
    page.until("$('datasets').children.length === 1 && parts($('datasets').children[0]).state.innerText === 'done'")
    assert "tokens train" in page.js("$('datasets').innerText")
    page.js("parts($('datasets').children[0]).use.click()")
    assert page.js("$('training_file').value").startswith("ds-")

    # a run: what is no JSON, what the server refuses, and what trains, with curves
    page.js("$('base').value = 'tinystar-v0.1-baseline'")
    for text, told in (("{", "not JSON"), ('{"max_itres": 3}', "max_itres"), (json.dumps(HYPER, indent=2), "^$")):
        page.write("#hyperparameters", text)
        page.js("$('train').click()")
        page.until(f"/{told}/.test($('run-error').textContent)")
    page.until("$('runs').children.length === 1")
    page.until("!parts($('runs').children[0]).curves.hidden", 60)
    page.until("parts($('runs').children[0]).state.innerText === 'done'", 90)
    page.until("/until step 60/.test(parts($('runs').children[0]).curves.alt)")
    assert page.js("parts($('runs').children[0]).curves.naturalWidth") > 300
    assert "60/60" in page.js("parts($('runs').children[0]).events.innerText")

    # its model, which can be sampled at once, by keyboard
    page.js("parts($('runs').children[0]).sample.focus()")
    page.press("Enter")
    assert page.js("$('model').value").startswith("ft-tinystar-v0.1-baseline-")
    assert page.js("document.activeElement.id") == "prompt"
    page.write("#prompt", "the cat ")
    page.write("#text-seed", "3")
    page.js("$('prompt').focus()")
    page.press("Enter", modifiers=2)
    page.until("/context is full/.test($('text-status').textContent)")
    model = page.js("$('model').value")
    same = site.send("POST", "/v1/completions", {"model": model, "prompt": "the cat ", "max_tokens": 200, "seed": 3,
                                                 "temperature": 0.8}, Authorization="Bearer second")[2]  # fmt: skip
    assert page.js("$('written').textContent") == "the cat " + same["choices"][0]["text"]
    for field, text, told in (("stop", "\\n\nt", "came to its end"), ("max_tokens", "4", "^4 tokens in .*as many as")):
        page.write(f"#{field}", text)
        page.js("$('write').click()")
        page.until(f"/{told}/.test($('text-status').textContent)")
        page.write(f"#{field}", "") if field == "stop" else None
    page.write("#max_tokens", "200")
    page.js("$('write').click()")
    page.until("/context is full/.test($('text-status').textContent)")
    assert not page.problems()
    pictures(page, "done")


def pictures(page, name):
    for width, height, scheme in itertools.product((360, 1200), (740, 900), ("light", "dark")) if PICTURES else ():
        if (width, height) in ((360, 740), (1200, 900)):
            page.size(width, height, scheme)
            page.picture(f"{name}-{width}-{scheme}.png")


def test_the_stream_is_read_wherever_it_is_cut(page, site):
    text = 'data: {"a":"é€😀"}\n\ndata: two\r\n\r\n: comment\n\ndata: [DONE]\n\n'
    got = page.js("""(async () => {
      const bytes = new TextEncoder().encode(TEXT), all = [];
      for (const n of [1, 2, 3, 5, 1000]) {
        const stream = new ReadableStream({ start(to) {
          for (let i = 0; i < bytes.length; i += n) to.enqueue(bytes.slice(i, i + n));
          to.close();
        } }), found = [];
        for await (const data of events(new Response(stream))) found.push(data);
        all.push(found);
      }
      return all })()""".replace("TEXT", json.dumps(text)))
    assert got == [['{"a":"é€😀"}', "two", "[DONE]"]] * 5


def test_stop_ends_a_text_and_an_error_is_told(page, site):
    page.js("$('model').value = 'untrained.strawberry'")
    page.write("#max_tokens", "2900")
    page.write("#temperature", "0")
    page.js("$('write').focus()")
    page.press("Enter")
    page.until("$('written').textContent.length > 30")
    assert page.js("document.activeElement.id") == "stop-writing" and not page.js("$('write').checkVisibility()")
    page.press("Enter")
    page.until("$('text-status').textContent === 'Stopped.'")
    assert page.js("document.activeElement.id") == "write"
    page.write("#max_tokens", "4000")
    page.press("Enter")
    page.until("/^max_tokens = 4000: /.test($('text-error').textContent)")
    assert len(page.js("$('written').textContent")) > 30, "what was written is gone"
    page.write("#max_tokens", "40")


def test_a_run_is_paused_resumed_and_cancelled(page, site):
    endless = {**HYPER, "max_iters": 10**6, "eval_interval": 10**6, "log_interval": 50}
    if not page.js("$('training_file').options.length"):  # where this test is alone
        client = site.client.with_options(api_key=site.settings.api_key[0])
        client.files.create(file=("stories.txt", (WORDS * 200).encode()), purpose="fine-tune")
        page.js("$('base').value = 'tinystar-v0.1-baseline'; go()")
        page.until("$('training_file').options.length")
    page.write("#hyperparameters", json.dumps(endless))
    runs = page.js("$('runs').children.length")
    page.js("$('train').click()")
    page.until(f"$('runs').children.length === {runs + 1}")
    at = "parts($('runs').children[0])"
    facts = f"{at}.facts.innerText"
    first = page.until(f"/step \\d.* loss .* tokens.s .* left/.test({facts}) && {facts}")
    page.until(f"{facts} !== {json.dumps(first)}")  # it is live
    page.until(f"!{at}.curves.hidden && {at}.events.children.length > 1")
    pictures(page, "running")
    changes = [("pause", "paused", "resume"), ("resume", "running", "pause"), ("cancel", "cancelled", "resume")]
    for act, state, then in changes:
        page.js(f"{at}.{act}.focus()")
        page.press("Enter")
        page.until(f"{at}.state.innerText === '{state}'")
        assert page.js(f"{at}.{then}.checkVisibility()")
        assert page.js("document.activeElement !== document.body"), "the focus is lost"
    assert not page.js(f"{at}.sample.checkVisibility() || {at}.cancel.checkVisibility()")
    assert not page.problems()


def test_a_model_is_deleted_after_a_confirmation(page, site):
    """Its size on disk is shown, a dialog asks, No keeps it and Yes removes it, and a refusal is said in words."""
    page.size(1200, 900)
    (site.folder / "spare.strawberry").write_bytes((site.folder / "untrained.strawberry").read_bytes())
    page.js("go()")
    row = "[...$('models').children].find(e => e.dataset.id === 'spare.strawberry')"
    page.until(f"!!{row}")
    page.js("$('models-summary').focus()")
    page.press("Enter")
    size = (site.folder / "spare.strawberry").stat().st_size
    assert page.js(f"parts({row}).size.innerText") == f"{size / 1000:.1f} kB"
    suffixes = (".safetensors", *(f".{arch}" for arch in models.CONFIGS))
    total = sum(path.stat().st_size for path in site.folder.iterdir() if path.suffix in suffixes)
    assert f"on disk, {total / 1000:.1f} kB" in page.js("$('models-summary').innerText")

    def press_delete(accept, name="spare.strawberry"):
        page.send("Page.enable")
        asked = sum("javascriptDialogOpening" in m["method"] for m in page.told)
        at = row.replace("spare.strawberry", name)
        page.post("Runtime.evaluate", expression=f"parts({at}).delete.click()")
        with page.news:
            assert page.news.wait_for(
                lambda: sum("javascriptDialogOpening" in m["method"] for m in page.told) > asked, 10)
            message = [m for m in page.told if "javascriptDialogOpening" in m["method"]][-1]["params"]["message"]
        assert name in message
        page.send("Page.handleJavaScriptDialog", accept=accept)

    press_delete(accept=False)
    assert (site.folder / "spare.strawberry").exists() and page.js(f"!!{row}")
    press_delete(accept=True)
    page.until(f"!{row}")
    assert not (site.folder / "spare.strawberry").exists() and (site.folder / "untrained.strawberry").exists()
    assert page.js("document.activeElement.id") == "models-summary"
    assert "deleted" in page.js("$('models-status').textContent")
    assert not page.js("[...$('model').options].some(option => option.value === 'spare.strawberry')")

    page.js("$('model').value = 'untrained.strawberry'")
    page.write("#max_tokens", "2900")
    page.js("$('write').click()")
    page.until("$('written').textContent.length > 30")
    press_delete(accept=True, name="untrained.strawberry")
    page.until("/generating/.test($('models-error').textContent)")
    page.js("$('stop-writing').click()")
    page.until("$('text-status').textContent === 'Stopped.'")
    page.write("#max_tokens", "200")
    assert (site.folder / "untrained.strawberry").exists()
    page.js("$('models-details').open = false; say($('models-error'), '')")
    assert not page.problems()


def test_it_fits_a_phone_and_is_done_by_keyboard(page, site):
    for width, height in ((360, 740), (1200, 900)):
        for scheme in ("light", "dark"):
            page.size(width, height, scheme)
            assert page.js("document.documentElement.scrollWidth") <= width
            too_wide = page.js("""[...document.querySelectorAll('body *')].filter(e => e.checkVisibility()
              && e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.unseen'))
              .map(e => e.id || e.tagName)""")
            assert not too_wide
    found = tab_through(page)
    assert all(at["outline"] and at["width"] > 0 for at in found), found
    order = [at["what"] for at in found]
    expected = page.js("""[...document.querySelectorAll(
      'a[href], button, input, select, textarea, summary, [tabindex="0"]')]
      .filter(e => e.checkVisibility()).map(e => e.id || e.dataset.at || e.textContent.trim().slice(0, 30))""")
    assert len(order) > 25 and order == expected


def contrast(page):
    """The least contrast of any text that is seen, by WCAG's formula, and where."""
    return page.js("""(() => {
      const light = c => { const f = x => (x /= 255) <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4;
                           return .2126 * f(c[0]) + .7152 * f(c[1]) + .0722 * f(c[2]); };
      const rgb = text => text.match(/[\\d.]+/g).map(Number);
      const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
                                                               if (c.length < 4 || c[3] > 0) return c; } };
      let worst = [99, ''];
      for (const e of document.querySelectorAll('body *')) {
        if (!e.checkVisibility() || ![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
        const [a, b] = [light(rgb(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
        const ratio = (a + .05) / (b + .05);
        if (ratio < worst[0]) worst = [ratio, e.id || e.tagName + ' ' + e.textContent.slice(0, 30)];
      }
      return worst })()""")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(page, site, scheme):
    page.size(1200, 900, scheme)
    worst = contrast(page)
    assert worst[0] >= 4.5, worst


def test_runs_and_datasets_show_their_size_and_are_deleted_when_that_is_confirmed(page, site):
    import openai

    client = site.client.with_options(api_key=site.settings.api_key[0])
    file = client.files.create(file=("tales.md", (WORDS * 200).encode()), purpose="fine-tune").id
    make = {"files": [file], "encoder": "chars", "name": "to delete"}
    dataset = client.post("/datasets", body=make, cast_to=dict)["id"]
    endless = {**HYPER, "max_iters": 10**6, "eval_interval": 10**6}
    asked = {"model": "tinystar-v0.1-baseline", "training_file": dataset, "hyperparameters": endless}
    run = client.fine_tuning.jobs.create(**asked).id
    parts = {name: f"parts([...$('{name}').children].find(e => e.dataset.id === '{id}'))"
             for name, id in (("datasets", dataset), ("runs", run))}
    page.js("go()")
    page.until(f"[...$('runs').children].some(e => e.dataset.id === '{run}')")
    page.until(f"{parts['runs']}.state.innerText === 'running' && {parts['datasets']}.state.innerText === 'done'", 60)
    assert not page.js(f"{parts['runs']}.delete.checkVisibility()")

    # in use: the server's words are on the page
    page.click_and_answer(f"{parts['datasets']}.delete", accept=True)
    page.until(f"/needed by the fine-tuning job {run}, which is running/.test({parts['datasets']}.error.innerText)")
    page.js(f"{parts['runs']}.cancel.click()")
    page.until(f"{parts['runs']}.state.innerText === 'cancelled'")
    page.js(f"{parts['runs']}.details.open = true")
    page.until(f"{parts['runs']}.events.children.length > 1")
    pictures(page, "deleting")
    for name, path in (("runs", f"/fine_tuning/jobs/{run}"), ("datasets", f"/datasets/{dataset}")):
        size = client.get(path, cast_to=dict)["bytes"]
        assert size > 1000
        assert page.js(f"bytes({size})") + " on disk" in page.js(f"{parts[name]}.facts.innerText")
        title = page.js(f"{parts[name]}.title.innerText")
        assert page.click_and_answer(f"{parts[name]}.delete", accept=False).startswith(f"Delete {title}? ")
        assert client.get(path, cast_to=dict)["id"] in (run, dataset), "it was deleted though nobody confirmed it"
        page.click_and_answer(f"{parts[name]}.delete", accept=True)
        page.until(f"![...$('{name}').children].some(e => ['{run}', '{dataset}'].includes(e.dataset.id))")
        assert page.js("document.activeElement !== document.body"), "the focus is lost"
        with pytest.raises(openai.NotFoundError):
            client.get(path, cast_to=dict)
    client.files.delete(file)
    page.js("go()")
    assert not [problem for problem in page.problems() if not re.search("status of 40[49]", str(problem))]
