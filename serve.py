"""An OpenAI-compatible HTTP server for text, datasets and training, in one process.

    python serve.py                                           models of bin/ at http://127.0.0.1:8000; /docs explains
    python serve.py --models bin/ --data data/ --port 8000
    STRAWBERRY_API_KEY=… python serve.py --host 0.0.0.0       other machines can connect; this requires a key

The code is in strawberry/serving: settings.py has the options, app.py the routes, engine.py the batching of requests,
and jobs.py the training jobs. Models are loaded and text is generated as in sample.py; train.py runs as a child
process.
"""

import signal

from strawberry import startup

if __name__ == "__main__":
    startup.exit_on(signal.SIGINT)

import sys

from strawberry.command_line import format_help
from strawberry.common import run_cli
from strawberry.config import declared
from strawberry.device import choose_device
from strawberry.inference.loading import check_can_compile
from strawberry.run_config import asks_for_help
from strawberry.serving.app import create_app
from strawberry.serving.server import Server, check_free, make_server_config
from strawberry.serving.settings import KEY_VARIABLE, Settings, check_folders, read_command


def main(argv: list[str]) -> None:
    if asks_for_help(argv, declared(Settings)):
        print(format_help("serve.py", Settings, f"{KEY_VARIABLE} in the environment holds keys too."))
        return
    settings = read_command(argv)
    check_folders(settings)
    if settings.compile == "true":
        check_can_compile(choose_device(settings.device, "--device {}").type, "--compile true")
    check_free(settings.host, settings.port)
    app = create_app(settings)
    server = Server(make_server_config(app, settings), app.state.service)
    app.state.service.job_service.claim()
    server.run()
    if not server.started:
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
