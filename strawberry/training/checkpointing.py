"""Checkpoints of a run: find and load one to resume from, claim the directory, save, and write the model file."""

import contextlib
import os
from pathlib import Path

import torch
from torch import Tensor

from strawberry.common import UserError
from strawberry.config import to_dict
from strawberry.model_file import save_model, unique_tensors, write_model
from strawberry.run_config import update_old_keys
from strawberry.sharding import to_local
from strawberry.training import checkpoint, cuda_graph, distributed, memory, setup
from strawberry.training.checkpoint import Checkpoint, archive_run, find_latest, save_checkpoint, write_state
from strawberry.training.console import STATUS, warn
from strawberry.training.lock import Lock
from strawberry.training.loggers import FOLDERS
from strawberry.training.metrics import METRICS
from strawberry.training.record import NOTES, RECORD, write_record
from strawberry.training.state import Progress


class Checkpointer:
    """Writes and reads a run's checkpoints, truncates its metrics on resume, and writes its model file at the end."""

    def __init__(self, state, steps):
        self.state, self.steps = state, steps

    def find(self) -> Checkpoint:
        """The newest valid checkpoint. Raises UserError if its encoder or data differ, or if ranks find different
        checkpoints."""
        found = find_latest(self.state.root)
        if self.state.ranks.broadcast_object(found.path.name) != found.path.name:
            raise UserError(
                f"checkpoints.path = {self.state.root}: the processes of this run find different ones there; "
                "give them one that all of them see"
            )
        run = found.meta.get("run")
        if not isinstance(run, dict) or not all(type(run.get(key)) is int for key in ("seed", "batch_size")):
            raise UserError(
                f"{found.path / checkpoint.MANIFEST} is not one that train.py wrote; start with --init_from=scratch"
            )
        now = {
            "encoder": ("encoder_path", self.state.encoder.fingerprint),
            "dataset": ("dataset", self.state.corpus.fingerprint),
        }
        for what, (key, fingerprint) in now.items():
            if (then := found.meta.get(what)) != fingerprint:
                raise UserError(
                    f"{key}: the {what} has changed since {found.path}: it was {str(then)[:12]}…, and is now "
                    f"{fingerprint[:12]}…; bring the old one back, or start with --init_from=scratch"
                )
        return found

    def resume(self, found: Checkpoint) -> None:
        then = found.meta["run"]
        update_old_keys(then)
        changed = setup.changed_keys(then, to_dict(self.state.run) | {"init_from": then.get("init_from")})
        try:
            self.load(found)
        except UserError as error:
            shape = [line for line in changed if line.startswith("model_hyperparams.")]
            raise UserError(f"{error}; a resumed run keeps its model ({'; '.join(shape) or 'none changed'})") from error
        print("\n    ".join([f"resuming {found.path}" + (", with changed keys:" if changed else ""), *changed]))

    def load(self, found: Checkpoint) -> None:
        self.steps.release_graph()  # the optimizer's state gets new addresses
        found.load_weights(self.state.model)
        state = found.load_state()
        try:
            progress = Progress(**state["progress"])
            self.state.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            if memory.is_out_of_memory(error):
                raise
            raise UserError(f"{found.path / checkpoint.STATE} has no state that this program wrote") from error
        self.state.progress = progress
        self.state.saved = found.step
        self.state.val_loss = found.val_loss

    def claim_directory(self) -> None:
        """Claim checkpoints.path for this run: a run from scratch moves another run's files to earlier_…, a resumed run
        continues its own."""
        if self.state.ranks.main:
            try:
                self.state.root.mkdir(parents=True, exist_ok=True)
                Path(self.state.run.model_path).parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot make {error.filename}: {error.strerror}; name another path") from error
            self.state.lock = self.state.lock or Lock(self.state.root)
            if self.state.run.init_from != "resume":
                aside = archive_run(self.state.root)
                if aside:
                    print(f"the checkpoints of an earlier run are now in {aside}")
                    for name in (METRICS, RECORD, NOTES, *FOLDERS):
                        with contextlib.suppress(FileNotFoundError):
                            os.replace(self.state.root / name, aside / name)
            write_record(self.state)
        self.rewind_metrics(self.state.progress.step if self.state.run.init_from == "resume" else -1)
        self.state.claimed = True

    def rewind_metrics(self, step: int) -> None:
        """Truncate metrics.jsonl after a step, and restore the validation loss if that step was evaluated."""
        self.state.evaluated = -1
        for line in self.state.metrics.rewind(step) if self.state.ranks.main else ():
            if line["step"] == step and "val_loss" in line:
                self.state.evaluated, self.state.val_loss = step, line["val_loss"]
        self.state.evaluated, self.state.val_loss = self.state.ranks.broadcast_object(
            [self.state.evaluated, self.state.val_loss]
        )

    def save(self) -> None:
        """Save a checkpoint of this step, if there is none yet. A failure gives a warning, and a retry at the next log
        interval. Raises NonFinite if a weight is not finite."""
        self.steps.synchronize()
        step = self.state.progress.step
        if not self.state.run.checkpoints.create_checkpoints or self.state.saved == step:
            return
        self.check_weights()
        tensors, optimizer = (
            self.state.ranks.gather(unique_tensors(self.state.model)),
            self.state.ranks.gather(self.state.optimizer.state_dict()),
        )
        if self.state.ranks.main:
            self.write(step, tensors, optimizer)
        else:
            self.state.saved, self.state.save_failed = step, False
        if self.state.ranks.sharded:  # so that all ranks retry together after a failure
            self.state.saved, self.state.save_failed = self.state.ranks.broadcast_object(
                [self.state.saved, self.state.save_failed]
            )

    def write(self, step: int, tensors: dict[str, Tensor], optimizer: dict) -> None:
        """Write a checkpoint from whole tensors."""
        fingerprints = {"dataset": self.state.corpus.fingerprint, "encoder": self.state.encoder.fingerprint}
        state = {"optimizer": optimizer, "progress": vars(self.state.progress)}
        files = {
            checkpoint.MODEL: write_model(self.state.model, self.state.encoder, self.training_record(), tensors),
            checkpoint.STATE: write_state(state),
        }
        val_loss = self.state.val_loss if self.state.evaluated == step else None
        keep = self.state.run.checkpoints.keep
        with self.state.signals.deferred(), self.state.ranks.host_work():
            try:
                save_checkpoint(
                    self.state.root, step, files, val_loss, keep, {**fingerprints, "run": to_dict(self.state.run)}
                )
                self.state.saved, self.state.save_failed = step, False
            except UserError as error:
                self.state.save_failed = True
                warn(f"{error}; trying again later")
        STATUS.update(step=step, saved=self.state.saved)

    def check_weights(self) -> None:
        with self.state.ranks.device_step():
            found = torch.stack([(~torch.isfinite(to_local(p))).any() for p in self.state.model.parameters()]).tolist()
        if self.state.ranks.sharded:
            found = self.state.ranks.sum_numbers(*found)
        if any(found):
            bad = ", ".join(name for (name, _), n in zip(self.state.model.named_parameters(), found, strict=True) if n)
            raise cuda_graph.NonFinite(
                f"step {self.state.progress.step:,}: these weights are not finite, and are not saved: {bad}"
            )

    def training_record(self) -> dict:
        """The training record of a model file."""
        p = self.state.progress
        about = {"step": p.step, "tokens": p.tokens, "seconds": round(p.seconds, 3), "val_loss": self.state.val_loss}
        about |= {"rollbacks": p.rollbacks, "dataset": self.state.corpus.fingerprint, "torch": torch.__version__}
        return about | {"run": to_dict(self.state.run)}

    def save_model_file(self) -> None:
        """Write the model file, after the last step."""
        self.check_weights()
        tensors = self.state.ranks.gather(unique_tensors(self.state.model))
        if not self.state.ranks.main:
            return
        with self.state.signals.deferred():
            save_model(self.state.run.model_path, self.state.model, self.state.encoder, self.training_record(), tensors)
        p = self.state.progress
        print(
            f"{p.step:,} steps, {p.tokens:,} tokens in {p.seconds:,.0f} s; the model is in {self.state.run.model_path}"
        )

    def save_on_exit(self) -> bool:
        """Save a checkpoint before the process exits. Returns whether there is a checkpoint to resume from."""
        self.state.signals.caught = True
        if self.state.claimed and self.state.ranks.can_save:
            # a step that was not finite does not affect earlier checkpoints
            for work in (self.steps.synchronize, self.save):
                try:
                    if self.state.ranks.can_save:
                        work()
                except (cuda_graph.NonFinite, distributed.PeerLost) as error:
                    warn(str(error))
        return self.state.claimed and self.state.saved >= 0

    def status(self) -> str:
        """The state of the checkpoints on disk, for the run's last message."""
        if not self.state.claimed:
            return "nothing was changed"
        if self.state.saved < 0:
            return "there is no checkpoint yet"
        return f"step {self.state.saved:,} is saved in {self.state.root}"
