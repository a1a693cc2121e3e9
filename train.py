"""Train a language model: reads a token file and a JSON config, writes one model file.

    python train.py --config tiny.json                        # from scratch
    python train.py --config tiny.json --init_from=resume     # resume from the newest valid checkpoint
    python train.py --config tiny.json --check                # check the run in seconds, without writing anything
    python train.py --config tiny.json --quiet                # print only warnings and errors
    torchrun --nproc_per_node=2 train.py --config tiny.json   # divide each batch among two processes
    python train.py --help                                    # every key

Each step is a pure function of the weights, the optimizer state, the seed and the step's number: batches and dropout
are drawn from (seed, step). On a CPU, a resumed run is therefore bitwise equal to an uninterrupted run.

Output files:  checkpoints.path/step_…         checkpoints to resume from
               checkpoints.path/metrics.jsonl  every logged step and every evaluation, one JSON object per line
               checkpoints.path/record.json    what the run is: its keys, its command, its size
               img_path/*.png                  the curves, redrawn at each evaluation
               model_path                      the trained model, after the last step
A run from scratch moves the files of an earlier run in checkpoints.path to its subdirectory earlier_1, earlier_2, ….

Exit codes:  0 all steps done · 2 user error, nothing changed · 3 the loss or the gradient was not finite, the weights
were not updated · 4 another process of this run was lost · 130 SIGINT, 143 SIGTERM: the step was finished and saved. A
second signal ends the process immediately.

Index:  the trainer, whose take_steps is the training loop · the command. Its components are in strawberry/training:
        setup · step · cuda_graph · distributed · checkpointing · evaluation · memory · metrics · console · signals
"""

import signal

from strawberry import startup  # before torch: the package sets an environment variable that OpenMP reads

if __name__ == "__main__":
    startup.exit_on(signal.SIGINT, signal.SIGTERM)

import contextlib
import functools
import os
import secrets
import sys
import time
import weakref

import torch
from tqdm import tqdm

from model import CONFIGS, build
from optimizer import build_optimizer
from strawberry import ops, status_file
from strawberry.common import UserError, is_first_to_report, run_cli
from strawberry.device import choose_device
from strawberry.ops import float8
from strawberry.run_config import load_run, parse_arguments
from strawberry.training import cuda_graph, distributed, evaluation, memory, setup
from strawberry.training.checkpointing import Checkpointer
from strawberry.training.console import STATUS, DiskFullSafeStream, warn
from strawberry.training.evaluation import Evaluator
from strawberry.training.lock import Lock
from strawberry.training.loggers import make_loggers
from strawberry.training.memory import MemoryPlanner
from strawberry.training.preflight import check_run
from strawberry.training.signals import Interrupted, Signals
from strawberry.training.state import TrainState
from strawberry.training.step import TrainStep

MAX_ROLLBACKS = 3


# ---- the trainer ---------------------------------------------------------------------------------------------------


class Trainer(TrainState):
    """A run, from its configuration to its model file: complete(), close()."""

    def __init__(self, run, signals: Signals, config: str | None = None, quiet: bool = False):
        super().__init__(run, signals, config, quiet)
        state = weakref.proxy(self)  # no reference cycle: without close(), memory and lock are still freed immediately
        self.steps = TrainStep(state)
        self.checkpoints = Checkpointer(state, self.steps)
        self.evaluator = Evaluator(state)
        self.memory_planner = MemoryPlanner(state, self.steps)

    def prepare(self) -> None:
        """Prepare the first step: set up, warm up, capture. Changes no file until all of it has succeeded."""
        self.set_up()
        self.steps.warm_up(setup.should_compile(self.run, self.device))
        self.steps.capture()
        self.ranks.start_heartbeat(self.on_loss)
        with self.signals.deferred():
            self.checkpoints.claim_directory()

    def complete(self) -> None:
        """The whole run, from set-up to the model file."""
        self.prepare()
        self.train()
        self.checkpoints.save_model_file()

    def set_up(self) -> None:
        """Create in memory all that the first step needs: ranks, data, model, optimizer."""
        run = self.run
        setup.check_paths(run, self.root, self.config)
        self.device = choose_device(run.device)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32
        self.dtype = setup.choose_dtype(run.dtype, self.device)
        self.ranks = distributed.join_processes(self.device, run.parallel)
        if self.ranks.main and self.root.is_dir():
            self.lock = Lock(self.root)
        if self.ranks.main:
            self.metrics.loggers = make_loggers(self)
        self.encoder, self.corpus = setup.load_data(run)
        self.objective = setup.choose_objective(run, self.encoder, self.corpus)
        found = self.checkpoints.find() if run.init_from == "resume" else None
        if run.seed == "auto":
            run.seed = self.ranks.broadcast_object(found.meta["run"]["seed"] if found else secrets.randbits(31))
        if self.ranks.world == 1:  # several share what they hold, or run on several machines
            with torch.device("meta"):
                memory.refuse_large_model(build(run.model_hyperparams), run, self.device)
        torch.manual_seed(run.seed)
        model = build(run.model_hyperparams)
        setup.load_initial_weights(run, model, self.encoder)
        ops.prepare_weights(model, "float8" if run.dtype == "float8" else None, self.device)
        self.model = self.ranks.place_model(model, self.device, self.dtype).train()
        self.forward = self.model
        self.loads = [router.load for router in self.model.routers().values()]
        hyper = run.optimizer_hyperparams
        self.optimizer = build_optimizer(self.model, hyper, run.learning_rate, self.device.type, self.ranks)
        self.lengths = evaluation.byte_lengths(self.encoder, run.model_hyperparams.vocab_size).to(self.device)
        if run.batch_size == "auto" and found:
            run.batch_size = found.meta["run"]["batch_size"]
        if found:
            self.checkpoints.resume(found)
        self.memory_planner.choose_batch_size()
        self.memory_planner.refuse_large_batch()
        if run.dtype == "float8" and self.ranks.main and not float8.has_eligible_weight(self.model):
            warn(f'dtype = "float8": this model has no matrix (m, n) with m · n ≥ {float8.MIN_DIM} · (m + n), so that '
                 'it trains as with "bfloat16"')  # fmt: skip
        setup.print_summary(self)

    def train(self) -> None:
        # sharded ranks must save together, and GPUs must launch the same steps, so a signal is deferred until all ranks
        # know of it
        held = self.signals.deferred() if self.ranks.stops_together else contextlib.nullcontext()
        with self.ranks.detect_peer_loss(), held:
            if self.run.on_nan == "rollback" and self.saved < 0:
                self.save()  # so that a rollback is possible before the first interval ends
            while self.progress.step < self.run.max_iters:
                try:
                    self.take_steps()
                except cuda_graph.NonFinite as error:
                    self.roll_back(error)
            self.stop_together()

    def take_steps(self) -> None:
        """The training loop, up to the last step. Raises NonFinite at a step whose loss is not finite."""
        run = self.run
        if self.progress.step and self.due(run.eval_interval) and self.evaluated != self.progress.step:
            self.evaluate()  # a signal interrupted the run before the evaluation
        self.steps.capture()  # again, after a rollback
        with self.progress_bar() as bar, self.batches() as loader:
            while self.progress.step < run.max_iters:
                with self.signals.deferred():  # a step is atomic
                    # next batch: this rank's part of each micro-batch
                    start = time.perf_counter()
                    micro_batches = next(loader)
                    # forward and backward, clip, update the weights: eager, compiled or one CUDA graph
                    for completed in self.steps.take(micro_batches, start):
                        # log: the bar at each step, a line every log_interval
                        self.log(bar, *completed)
                # a signal that one rank received stops all ranks here
                self.stop_together()
                # once in a while: losses on both splits, a sample, the curves
                if self.due(run.eval_interval):
                    self.evaluate()
                # once in a while: a checkpoint, written to a temporary directory, synced, renamed
                if self.due(run.checkpoints.interval) or (self.save_failed and self.due(run.log_interval)):
                    self.save()

    def evaluate(self) -> None:
        self.evaluator.evaluate()

    def save(self) -> None:
        self.checkpoints.save()

    def stop_together(self) -> None:
        """If ranks must stop together, a signal that one of them received stops all of them after the same step."""
        if self.ranks.stops_together and (number := self.ranks.max_signal(self.signals.received or 0)):
            self.signals.raise_remote(number)

    def roll_back(self, error: cuda_graph.NonFinite) -> None:
        """Restore the last valid checkpoint, skip all data up to the current position, and halve the learning rate.

        Raises the error again if `on_nan` is not "rollback", or after MAX_ROLLBACKS rollbacks. The checkpoint is saved
        again and includes the rollback, so that a resumed run repeats it.
        """
        reached = self.progress
        number = len(reached.rollbacks) + 1
        if self.run.on_nan != "rollback" or number > MAX_ROLLBACKS:
            raise error
        with self.signals.deferred():
            self.optimizer.zero_grad()
            self.checkpoints.load(self.checkpoints.find())
            for load in self.loads:  # checkpoints do not include the routers' counts since the last update
                load.zero_()
            step = self.progress.step
            about = {"rollback": number, "from_step": reached.step + 1, "lr_factor": 0.5**number, "why": str(error)}
            self.progress.skipped = reached.position + 1 - step
            self.progress.rollbacks = [*reached.rollbacks, {"step": step, **about}]
            self.checkpoints.rewind_metrics(step)  # synchronizes: every rank has loaded the checkpoint
            if self.ranks.main:
                warn(
                    f"{error}; going back to step {step:,}, past the data since then, with the learning rate times "
                    f"{0.5**number:g} (rollback {number} of at most {MAX_ROLLBACKS})"
                )
                self.metrics.add(step=step, tokens=self.progress.tokens, **about)
            self.saved = -1
            self.checkpoints.save()

    def progress_bar(self) -> tqdm:
        self.logged = (self.progress.tokens, self.progress.seconds)
        return self.console.start(self.progress.step, self.run.max_iters, hidden=not self.ranks.main)

    def log(self, bar: tqdm, step: int, loss: float, grad_norm: float, lr: float) -> None:
        """Update the progress bar at every step; write a line to metrics.jsonl and to the console at each log_interval
        and at the first step. A CUDA graph's steps complete some steps late, but a line is written only when no step is
        pending."""
        p = self.progress
        tokens, seconds = p.tokens - self.logged[0], p.seconds - self.logged[1]  # since the last line
        speed = tokens / max(seconds, 1e-9)
        bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
        bar.update()
        if p.step == step and (self.due(self.run.log_interval) or step == 1):
            rates = {"lr": lr, "grad_norm": grad_norm, "tokens_per_s": speed, "seconds": p.seconds}
            self.logged = (p.tokens, p.seconds)
            if routers := self.model.routers():
                rates["routers"] = {name: [round(x, 4) for x in router.share.tolist()]
                                    for name, router in routers.items()}  # fmt: skip
            if self.ranks.main:
                self.metrics.add(step=p.step, tokens=p.tokens, loss=loss, **rates)
                self.console.print_step(step, self.run.max_iters, loss, lr, grad_norm, speed)

    def close(self) -> None:
        if self.graph_step:
            self.graph_step.graph = None  # otherwise NCCL waits for it
        self.ranks.close()
        self.release()

    def release(self) -> None:
        self.metrics.loggers.close(finished=self.progress.step >= self.run.max_iters)
        if self.lock:
            self.lock.release()
            self.lock = None


def main(argv: list[str], last: bool = False) -> int:
    """Run the command line, and return the exit code. `last`: the process ends afterwards."""
    with contextlib.ExitStack() as streams:
        talks = os.environ.get("RANK", "0") == "0" and "--quiet" not in argv  # only rank 0
        out = sys.stdout if talks else streams.enter_context(open(os.devnull, "w"))
        streams.enter_context(contextlib.redirect_stdout(DiskFullSafeStream(out)))
        streams.enter_context(contextlib.redirect_stderr(DiskFullSafeStream(sys.stderr)))
        return run_command(argv, last)


def train(run, signals: Signals | None = None, config: str | None = None, quiet: bool = False) -> Trainer:
    """Train the run `run`, from set-up to the model file. The returned Trainer has model, encoder and progress."""
    trainer = Trainer(run, signals or Signals(), config, quiet)
    try:
        with save_after_errors(trainer):
            trainer.complete()
    finally:
        trainer.close()
    return trainer


@contextlib.contextmanager
def save_after_errors(trainer: Trainer):
    """A context in which signals raise Interrupted, and in which a checkpoint is saved after a UserError.

    Too little memory raises UserError. After Interrupted, PeerLost and NonFinite nothing is saved yet.
    """
    try:
        with trainer.signals:
            yield
    except UserError as error:
        trainer.checkpoints.save_on_exit()
        STATUS.update(error=str(error)[: status_file.MAX_LENGTH])
        raise
    except BrokenPipeError:  # the reader of stdout exited: `train.py … | head`
        if not trainer.ranks.sharded:  # sharded ranks must save together, and the other ranks have no error
            trainer.checkpoints.save_on_exit()
        raise
    except Exception as error:  # out of memory may interrupt an update: the state is not saved
        if memory.is_out_of_memory(error):
            raise UserError(trainer.memory_planner.out_of_memory_advice(trainer.checkpoints.status())) from error
        raise


def explain_non_finite(trainer: Trainer, error: cuda_graph.NonFinite) -> str:
    """The message of a run that has ended with NonFinite."""
    tried = f" {MAX_ROLLBACKS} rollbacks did not help." if trainer.progress.rollbacks else ""
    return f"{error}; {trainer.checkpoints.status()}.{tried} {cuda_graph.NON_FINITE_ADVICE}"


def run_command(argv: list[str], last: bool) -> int:
    checking, argv = "--check" in argv, [word for word in argv if word != "--check"]
    words = [word for word in argv if word != "--quiet"]
    run = load_run(words, CONFIGS)
    trainer = Trainer(run, Signals(), parse_arguments(words)[0], quiet="--quiet" in argv)
    trainer.command = setup.command_line(argv, resume=False)
    if last:
        trainer.on_loss = functools.partial(end_without_main_thread, trainer, argv)
    for message in run.warnings() if os.environ.get("RANK", "0") == "0" and not checking else ():
        warn(message)
    try:
        with save_after_errors(trainer):
            check_run(trainer) if checking else trainer.complete()
        return 0
    except (Interrupted, distributed.PeerLost) as stop:
        code = exit_gracefully(trainer, stop, argv)
        if last:
            trainer.release()
            trainer.ranks.hard_exit(code)
        return code
    except cuda_graph.NonFinite as error:
        message = f"error: {explain_non_finite(trainer, error)}"
        if trainer.saved > 0:
            message += f"\n    {setup.command_line(argv, resume=True)}"
        if is_first_to_report(message):
            print(message, file=sys.stderr)
        return 3
    finally:
        trainer.close()


def end_without_main_thread(trainer: Trainer, argv: list[str], stop: distributed.PeerLost) -> None:
    """End the process on the thread that has detected the loss of another: the main thread waits for the device."""
    trainer.ranks.can_save = False  # weights could be read only after the step
    code = exit_gracefully(trainer, stop, argv)
    trainer.release()
    trainer.ranks.hard_exit(code)


def exit_gracefully(trainer: Trainer, stop: Interrupted | distributed.PeerLost, argv: list[str]) -> int:
    """After a signal or the loss of another process: save, print how to resume, and return the exit code."""
    number = trainer.signals.received  # torchrun signals all processes when it has lost one
    saved = trainer.checkpoints.save_on_exit()
    message = f"\n{signal.Signals(number).name}" if number else f"error: {stop}"
    out = sys.stdout if number and not trainer.console.quiet else sys.stderr
    print(f"{message}: {trainer.checkpoints.status()}; to {'go on' if saved else 'start again'}:", file=out)
    print(f"    {setup.command_line(argv, resume=saved)}", file=out, flush=True)
    return 128 + number if number else 4


if __name__ == "__main__":
    run_cli(functools.partial(main, last=True), handles_signals=True)
