"""Chromium without a window, controlled through two pipes (Chrome DevTools Protocol), and one page in it."""

import base64
import contextlib
import itertools
import json
import os
import re
import subprocess
import threading
import time
from pathlib import Path


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
        self.numbers, self.answers, self.events, self.session = itertools.count(1), {}, [], None
        self.password, self.num_auth_requests = "", 0
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
                        self.num_auth_requests += 1
                        self.post("Fetch.continueWithAuth", requestId=message["params"]["requestId"],
                                  authChallengeResponse=answer)  # fmt: skip
                    else:
                        self.events.append(message)
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
        self.until("document.readyState === 'complete'")

    def press(self, key, modifiers=0):
        codes = {"Tab": 9, "Enter": 13, " ": 32, "Escape": 27}
        stroke = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": codes.get(key, 0),
                  "modifiers": modifiers}  # fmt: skip
        text = {"Enter": "\r", " ": " "}.get(key)
        more = {"text": text} if text and not modifiers else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", **stroke, **more)
        self.send("Input.dispatchKeyEvent", type="keyUp", **stroke)

    def click_and_answer(self, button, accept):
        """Clicks what asks a question, answers it, and gives the question."""
        with self.news:
            self.events = [m for m in self.events if m["method"] != "Page.javascriptDialogOpening"]
        self.post("Runtime.evaluate", expression=f"{button}.click()")
        dialogs = lambda: [m for m in self.events if m["method"] == "Page.javascriptDialogOpening"]  # noqa: E731
        with self.news:
            assert self.news.wait_for(dialogs, 10), f"{button} asks nothing"
            question = dialogs()[0]["params"]["message"]
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

    def picture(self, path, height=None):
        """A picture of the whole page, as high as it is, or of its first `height` pixels."""
        width, whole = self.js("[innerWidth, document.documentElement.scrollHeight]")
        height = min(height or whole, whole)
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        data = self.send("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(base64.b64decode(data))

    def problems(self):
        """What the browser has complained of."""
        with self.news:
            found = [m["params"] for m in self.events if m["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
        return [t for t in found if not re.search("status of 40[0149]", t.get("entry", {}).get("text", ""))]

    def stop(self):
        self.session = None
        with contextlib.suppress(OSError):
            self.post("Browser.close")
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
