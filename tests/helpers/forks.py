"""Runs Python scripts in forks of a process that has imported torch, which takes a script most of its start.

The process imports no module of this repository, or model.py only: a fork imports the others itself, from its script's
folder, and some of them read environment variables. This file as a script, with the rest of a command line of Python,
is the command: `python -S forks.py SOCKET train.py --help`. Its files 0, 1 and 2, environment and working directory are
the fork's. It forwards SIGINT and SIGTERM to the fork, which ends with it. Whatever else a test does to a process
(limits, SIGSTOP), it must do to the fork, or start Python itself.
"""

import atexit
import contextlib
import functools
import gc
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback

MODULES = ("torch._dynamo", "torch.utils.flop_counter", "matplotlib.backends.backend_agg", "matplotlib.figure",
           "pydantic.type_adapter", "pydantic.json_schema", "safetensors.torch", "tqdm")  # fmt: skip
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@functools.cache
def start(with_model: bool = False) -> list[str]:
    """The words that stand for `python` before a script: of the command, once the process that forks is ready.
    `with_model`: it has imported model.py of this repository too, for scripts of this repository."""
    if not hasattr(os, "pidfd_open"):
        return [sys.executable]
    folder = tempfile.mkdtemp()
    argv = [sys.executable, __file__, folder, *(["model"] if with_model else [])]
    server = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    atexit.register(shutil.rmtree, folder)
    atexit.register(server.communicate)  # the end of its input ends it
    assert server.stdout.readline() == b"ready\n"
    return [sys.executable, "-I", "-S", __file__, os.path.join(folder, "socket")]


def fork_command(words: list[str]) -> list[str]:
    """The command line of a script, `python SCRIPT …`, with a fork in the place of a new process."""
    return [*start(), *words[1:]]


def serve(folder: str, modules: list[str]) -> bool:
    """Fork for each command, until the input ends. Returns True in a fork, which then is the script."""
    if modules:
        sys.path.insert(1, ROOT)  # a fork's own folder takes the place of the first
    for module in (*modules, *MODULES):  # strawberry sets variables that torch reads when it is imported
        __import__(module)
    gc.freeze()  # what is imported: a fork need not look through it, nor copy its pages
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(os.path.join(folder, "socket"))
        listener.listen()
        print("ready", flush=True)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks below
        while listener in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                attend(connection)
                return True
            connection.close()
    return False


def attend(connection: socket.socket) -> None:
    """Fork the script and answer with its exit code. The fork returns."""
    message, files, _, _ = socket.recv_fds(connection, 1 << 20, maxfds=3)
    if child := os.fork():
        ended = os.pidfd_open(child)
        while ended not in select.select([ended, connection], [], [])[0]:
            os.kill(child, int(connection.recv(16) or signal.SIGKILL))  # no message: the command has ended
        with contextlib.suppress(OSError):  # nobody waits for it
            connection.send(b"%d" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        os._exit(0)
    connection.close()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")  # the parent's remember its files
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace")
    sys.argv, environment, folder = json.loads(message)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[0] = folder if sys.argv[0] == "-m" else os.path.dirname(os.path.abspath(sys.argv[0]))


def run_script() -> None:
    """Run the script or `-m MODULE` and its exit functions, and end without destroying torch's modules, which takes
    0.3 s."""
    code = 0
    try:
        if sys.argv[0] == "-m":
            del sys.argv[0]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        traceback.print_exc()
        code = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()  # waits for threads
    atexit._run_exitfuncs()
    for file in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            file.flush()
    os._exit(code)


def ask(path: str, argv: list[str]) -> int:
    """The exit code of a script that a fork runs. Where a signal ended the fork, it ends this process too."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(path)
        socket.send_fds(connection, [json.dumps((argv, dict(os.environ), os.getcwd())).encode()], (0, 1, 2))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: connection.send(b"%d" % number))
        code = int(connection.recv(16))
    if code < 0:
        if code != -signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    if not os.path.isdir(sys.argv[1]):
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
    if serve(sys.argv[1], sys.argv[2:]):
        run_script()
