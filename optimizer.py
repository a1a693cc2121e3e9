"""The optimizer, AdamW for all parameters, or Muon for the hidden matrices and AdamW for the rest; and the learning
rate schedule.

    lr_at            the learning rate at a step
    newton_schulz    orthogonalizes a stack of matrices, the core of Muon
    Muon             the optimizer for hidden matrices
    AdamW            torch's, with a scheduled weight decay
    build_optimizer  builds AdamW and Muon as one object, with parameters grouped by the model's roles

Each process has its own optimizer. AdamW updates the process's shard of each parameter. Muon needs whole matrices, so
it passes `newton_schulz`, which accepts any part of a stack, to `distribute` of strawberry/training/distributed.py. The
format of the state does not depend on the number of processes.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from strawberry.common import UserError
from strawberry.ops import muon as ops
from strawberry.ops.triton.common import HALF_DTYPES
from strawberry.sharding import shard_like, shard_of, to_dtensor, to_local

# ROLES are all roles of parameters. DECAYED have weight decay, HIDDEN may be optimized by Muon.
DECAYED = {"matrix", "residual", "embedding", "input"}
HIDDEN = {"matrix", "residual"}
ROLES = ("matrix", "residual", "embedding", "input", "head", "router", "position", "norm", "bias", "tao", "tau")
# role → the option for AdamW's learning rate of these parameters; the other roles have `learning_rate`
RATES = {"embedding": "embedding_lr", "input": "embedding_lr", "head": "head_lr"}
RATES |= dict.fromkeys(("norm", "bias", "tao", "tau"), "scalar_lr")
ROW_MOMENT = "row_moment"  # key in Muon's state: the second moment of each row, (rows, 1)

# ---- learning rate ---------------------------------------------------------------------------------------------------


def lr_at(step: int, run) -> float:
    """The learning rate of the step numbered `step`, the first being 0.

    Linear warmup over `warmup_iters`, then `learning_rate` until max(warmup_iters, (1 - cooldown_frac)·lr_decay_iters),
    then half a cosine down to `min_lr` at `lr_decay_iters`, and `min_lr` after that. Without `decay_lr` it stays at
    `learning_rate`. `cooldown_frac` 1 is the usual warmup with cosine decay.

    With learning_rate 1, min_lr 0, warmup_iters 3, lr_decay_iters 10 and cooldown_frac 0.4:
    steps 0 … 6 have 0.25, 0.5, 0.75, 1, 1, 1, 1, step 8 has 0.5, and from step 10 on it is 0.
    """
    if step < run.warmup_iters:
        return run.learning_rate * (step + 1) / (run.warmup_iters + 1)
    start = max(run.warmup_iters, (1 - run.cooldown_frac) * run.lr_decay_iters)
    if not run.decay_lr or step < start:
        return run.learning_rate
    if step >= run.lr_decay_iters:
        return run.min_lr
    progress = (step - start) / (run.lr_decay_iters - start)
    return run.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (run.learning_rate - run.min_lr)


# ---- Muon ------------------------------------------------------------------------------------------------------------


JORDAN = ((3.4445, -4.7750, 2.0315),) * 5  # https://kellerjordan.github.io/posts/muon/
MIN_GRAM_ROWS = 512  # for `map_by_gram`: with fewer rows, its launches take longer than the operations that it saves


def newton_schulz(stack: Tensor) -> Tensor:
    """Orthogonalize a stack of matrices (n, rows, cols): returns approximately the nearest orthogonal matrix of each,
    in the same dtype.

    With G = U S Vᵀ the result is U p(S) Vᵀ. Each singular value is divided by the Frobenius norm and then mapped five
    times by Keller Jordan's quintic p(s) = a·s + b·s³ + c·s⁵, which has a large slope at zero: singular values end
    between 0.68 and 1.20, unless they were under 0.15 % of the norm, and do not converge to 1. A zero matrix stays
    zero.
    """
    tall = stack.shape[1] > stack.shape[2]
    x = stack.mT if tall else stack  # so that the Gram matrix has the smaller side
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    if x.shape[2] >= 2 * x.shape[1] and x.shape[1] >= MIN_GRAM_ROWS and x.dtype in HALF_DTYPES:
        x = map_by_gram(x.half()).to(stack.dtype)
        return x.mT if tall else x
    for a, b, c in JORDAN:
        gram = ops.symmetric_product(x, x)  # (n, rows, rows)
        update = ops.symmetric_product(gram, gram, gram, alpha=c, beta=b)
        x = torch.baddbmm(x, update, x, beta=a)
    return x.mT if tall else x


def map_by_gram(x: Tensor) -> Tensor:
    """The polynomials of a wide stack (n, rows, cols), by fewer products that have its long side: for a matrix four
    times as wide as high, 60 % of the operations.

    p(x) = Q x with Q = a I + b G + c G² and G = x xᵀ, and the Gram matrix of p(x) is Q G Q, since Q and G commute. So
    the Qs are multiplied first, and then x. Rounding errors of G grow from each polynomial to the next. Therefore the
    last three begin with the Gram matrix of their own x, and half types are float16, which has 3 bits more than
    bfloat16, and range enough: all singular values are below 2.
    """
    for part in (JORDAN[:2], JORDAN[2:]):
        gram, total = ops.symmetric_product(x, x), None
        for i, (a, b, c) in enumerate(part):
            q = ops.symmetric_product(gram, gram, gram, alpha=c, beta=b)  # Q − a I
            if total is None:
                total = q.clone()
                total.diagonal(dim1=1, dim2=2).add_(a)
            else:
                total = ops.symmetric_product(q, total, total, beta=a)
            if i + 1 < len(part):
                half = ops.symmetric_product(q, gram, gram, beta=a)  # Q G
                gram = ops.symmetric_product(half, q, half, beta=a)  # Q G Q
        x = torch.bmm(total, x)
    return x


def map_stacks(stacks, shapes, work):
    """`ranks.distribute` for a single process."""
    return map(work, stacks)


class Muon(torch.optim.Optimizer):
    """Orthogonalized momentum, for matrices inside a network, never for embeddings, heads or vectors.

        m ← μ m + (1 − μ) g              momentum
        u ← NS(μ m + (1 − μ) g)          Nesterov momentum, then Newton–Schulz
        w ← (1 − lr·λ) w − lr · 0.2·√max(rows, cols) · u

    The factor gives the update the usual RMS of AdamW's (Moonlight, arXiv 2502.16982, section 2.2), so AdamW's learning
    rate and weight decay also work here. μ grows from 0.85 to `momentum` over the first `warmup` steps. Parameters of
    equal shape are orthogonalized as one stack, in bfloat16 on CUDA, in float32 elsewhere, or in `ns_dtype`. After the
    warmup it equals torch.optim.Muon with adjust_lr_fn="match_rms_adamw". With several processes, each orthogonalizes
    its share (`ranks.distribute`). No parameter changes before that has finished, so if a process is lost, the others
    are left with complete steps.

    `beta2`: the decay rate of NorMuon's second moment (`_normalize_rows`); 0: no such normalization. `decay_schedule`:
    see `decay_rate`.
    """

    def __init__(self, params, lr=1e-3, weight_decay=0.1, momentum=0.95, warmup=300, ns_dtype=None, ranks=None,
                 beta2=0.0, decay_schedule="constant"):  # fmt: skip
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "warmup": warmup, "step": 0}
        super().__init__(params, defaults | {"base_lr": lr})
        self.ns_dtype, self.ranks, self.beta2, self.decay_schedule = ns_dtype, ranks, beta2, decay_schedule
        self.found_inf: Tensor | None = None  # 1.0: skip the update; torch's optimizers have the same name
        self.lerp: Tensor | None = None  # 1 − μ on the device, for CUDA graphs
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(f"Muon optimizes matrices only, not a parameter of shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient. Parameters without one are not decayed either, as in torch's
        AdamW."""
        stacks = defaultdict(list)
        for i, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is not None:
                    stacks[i, p.shape, p.dtype, p.device].append(p)
        groups = [self.param_groups[i] for i, *_ in stacks]
        momenta = (self._nesterov_momentum(params, momentum_at(group))
                   for group, params in zip(groups, stacks.values(), strict=True))  # fmt: skip
        shapes = [shape for _, shape, *_ in stacks]
        distribute = map_stacks if self.ranks is None else self.ranks.distribute
        updates = distribute(momenta, shapes, newton_schulz)
        if self.beta2:
            updates = self._normalize_rows(stacks.values(), updates)
        for group, params, update in zip(groups, stacks.values(), updates, strict=True):
            self._update(params, update, group, momentum_at(group))
        for group in self.param_groups:
            group["step"] += 1

    def _nesterov_momentum(self, params: list[Tensor], momentum: float) -> Tensor:
        """The Nesterov momentum of parameters of one shape, (n, rows, cols), before orthogonalization; for sharded
        parameters, this rank's rows. With found_inf, this also updates the momentum."""
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        grads = [to_local(p.grad) for p in params]
        buffers = [to_local(self.state[p]["momentum_buffer"]) for p in params]
        dtype = self.ns_dtype or (torch.bfloat16 if grads[0].is_cuda else torch.float32)
        if self.found_inf is None:
            moved = torch._foreach_lerp(buffers, grads, 1 - momentum)
            return torch.stack(torch._foreach_lerp(grads, moved, momentum)).to(dtype)
        return ops.move_and_look_ahead(grads, buffers, self.lerp, self.found_inf, dtype)

    def _update(self, params: list[Tensor], update: Tensor, group: dict, momentum: float) -> None:
        """Update the parameters of one shape and, without found_inf, their momentum."""
        lr = group["lr"]  # a float or a tensor of one element
        if self.found_inf is None:
            buffers = [to_local(self.state[p]["momentum_buffer"]) for p in params]
            torch._foreach_lerp_(buffers, [to_local(p.grad) for p in params], 1 - momentum)
        else:
            lr = lr * (1 - self.found_inf)
        step = -lr * 0.2 * math.sqrt(max(params[0].shape))  # 2502.16982, equation 4
        ops.decay_and_add([to_local(p) for p in params], update, step, decay_rate(lr, group, self.decay_schedule))

    def _normalize_rows(self, stacks: Iterable[list[Tensor]], updates: Iterable[Tensor]) -> Iterator[Tensor]:
        """NorMuon (2510.05491, Algorithm 1): divide each row of an update by the root of the running mean of its
        squares, then give the matrix back its Frobenius norm.

        A row has the weights of one output. With sharded parameters each rank has the moments of its rows, and the
        norms are summed over ranks, before any parameter changes.
        """
        found = ((update, *self._row_scales(params, update)) for params, update in zip(stacks, updates, strict=True))
        if self.ranks is not None and self.ranks.sharded:
            found = list(found)
            self.ranks.all_reduce_([squares for *_, squares in found])
        for update, scale, (before, after) in found:
            yield update * (scale * (before / after.clamp(min=1e-30)).sqrt())

    def _row_scales(self, params: list[Tensor], update: Tensor) -> tuple[Tensor, Tensor]:
        """(the factor of each row (n, rows, 1), the squared norms of the matrices before and after, divided by the
        number of columns (2, n, 1, 1)). Updates the moments: v ← β₂ v + (1 − β₂) mean(u²)."""
        for p in params:
            if ROW_MOMENT not in self.state[p]:
                self.state[p][ROW_MOMENT] = to_dtensor(torch.zeros_like(to_local(p)[:, :1]), p)
        moments = [to_local(self.state[p][ROW_MOMENT]) for p in params]
        norms = torch.linalg.vector_norm(update, dim=2, keepdim=True, dtype=params[0].dtype)
        squares = norms.square() / update.size(2)
        weight = 1 - self.beta2 if self.found_inf is None else (1 - self.beta2) * (1 - self.found_inf)
        moment = torch.lerp(torch.stack(moments), squares, weight)
        torch._foreach_copy_(moments, list(moment.unbind()))
        scale = moment.clamp(min=1e-10).rsqrt()
        return scale, torch.stack((squares, squares * scale.square())).sum(dim=2, keepdim=True)


def momentum_at(group: dict) -> float:
    """The momentum of the group's next step: linear from 0.85 to its `momentum` over the first `warmup` steps."""
    if group["step"] >= group["warmup"]:
        return group["momentum"]
    first = min(0.85, group["momentum"])
    return first + (group["momentum"] - first) * group["step"] / group["warmup"]


# ---- weight decay ----------------------------------------------------------------------------------------------------


def decay_rate(lr: float | Tensor, group: dict, schedule: str) -> float | Tensor:
    """r of decoupled weight decay, w ← w − r·w, at the learning rate `lr`: lr·λ with the schedule "constant"; lr²·λ /
    peak with "lr", where λ too is proportional to the learning rate."""
    rate = lr * group["weight_decay"]
    return rate if schedule == "constant" else rate * (group["lr"] / group["base_lr"])


class AdamW(torch.optim.AdamW):
    """torch's AdamW, with the schedule "lr" of weight decay."""

    @torch.no_grad()
    def step(self) -> None:
        decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            if group["weight_decay"]:
                self._decay(group)
            group["weight_decay"] = 0.0  # for torch
        super().step()
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = decay

    def _decay(self, group: dict) -> None:
        rate = decay_rate(group["lr"], group, "lr")
        if (found_inf := getattr(self, "found_inf", None)) is not None:
            rate = rate * (1 - found_inf)
        if params := [p for p in group["params"] if p.grad is not None and p.numel()]:
            torch._foreach_mul_(params, 1 - rate)


# ---- both behind one object ------------------------------------------------------------------------------------------


def build_optimizer(model: nn.Module, hyper, learning_rate: float, device_type: str, ranks=None) -> "Optimizer":
    """Build the optimizer of "optimizer_hyperparams", with parameters grouped by `model.roles()`.

    Weight decay applies to matrices and embeddings only. With `use_muon`, Muon optimizes the two-dimensional parameters
    of the roles matrix and residual, and AdamW the rest. `ranks`: the processes among which Muon's work is distributed.
    Raises RuntimeError if roles() does not name each parameter once.
    """
    named = parameters_by_role(model)
    groups, updated = defaultdict(list), {}
    for name, (role, p) in named.items():
        kind = "muon" if hyper.use_muon and role in HIDDEN and p.ndim == 2 else "adamw"
        updated[name] = p if kind == "muon" else local_tensor(p)
        rate = choose_rate(kind, role, hyper, learning_rate)
        groups[kind, hyper.weight_decay if role in DECAYED else 0.0, rate].append(updated[name])

    def groups_of(wanted: str) -> list[dict]:
        return [
            {"params": params, "lr": rate, "base_lr": rate, "weight_decay": decay}
            for (kind, decay, rate), params in groups.items()
            if kind == wanted
        ]

    parts, schedule = {}, hyper.weight_decay_schedule
    if muon := groups_of("muon"):  # first, since its step communicates and may raise PeerLost
        parts["muon"] = Muon(muon, momentum=hyper.momentum, ranks=ranks, beta2=hyper.muon_beta2,
                             decay_schedule=schedule)  # fmt: skip
    if adamw := groups_of("adamw"):
        fused = device_type in ("cuda", "cpu", "mps")  # where torch has the fused kernel
        settings = {"lr": learning_rate, "betas": (hyper.beta1, hyper.beta2), "eps": hyper.eps, "fused": fused}
        parts["adamw"] = (torch.optim.AdamW if schedule == "constant" else AdamW)(adamw, **settings)
    return Optimizer(parts, named, updated, fused_clipping=device_type == "cuda")


def choose_rate(kind: str, role: str, hyper, learning_rate: float) -> float:
    """The peak learning rate of a parameter: the option for its optimizer or role, or `learning_rate` if that is
    null."""
    option = "muon_lr" if kind == "muon" else RATES.get(role)
    chosen = getattr(hyper, option) if option else None
    return learning_rate if chosen is None else chosen


def local_tensor(p: nn.Parameter) -> Tensor:
    """The parameter, or this rank's shard of it in the same memory. AdamW, which is elementwise, updates it instead of
    a DTensor, since an operation on a few hundred DTensors takes more time on the host than on the GPU."""
    return p if to_local(p) is p else to_local(p).detach()


def parameters_by_role(model: nn.Module) -> dict[str, tuple[str, nn.Parameter]]:
    """Name → (role, parameter), with every parameter once. Raises RuntimeError otherwise, since that is a bug in the
    model."""
    named = dict(model.named_parameters(remove_duplicate=False))  # a tied parameter may be named either way
    roles = model.roles()
    if others := sorted(roles.keys() - named.keys()):
        raise RuntimeError(f"roles() of {type(model).__name__} names what is no parameter: {', '.join(others)}")
    if unknown := [f"{name}: {role}" for name, role in roles.items() if role not in ROLES]:
        raise RuntimeError(f"{type(model).__name__} has unknown roles: {', '.join(unknown)}")
    names_of = defaultdict(list)
    for name in roles:
        names_of[id(named[name])].append(name)
    if twice := [" = ".join(names) for names in names_of.values() if len(names) > 1]:
        raise RuntimeError(f"roles() of {type(model).__name__} names a parameter twice: {', '.join(twice)}")
    if missing := [name for name, p in model.named_parameters() if id(p) not in names_of]:
        raise RuntimeError(f"roles() of {type(model).__name__} leaves out: {', '.join(missing)}")
    return {name: (role, named[name]) for name, role in roles.items()}


class Optimizer:
    """AdamW and Muon as one optimizer: `set_lr`, `step`, `zero_grad`, and a state that is restored bitwise.

    `groups` is a list of dicts, one per role and optimizer; `table()` is the same as text.
    """

    def __init__(self, parts: dict[str, torch.optim.Optimizer], named: dict[str, tuple[str, nn.Parameter]],
                 updated: dict[str, Tensor], fused_clipping: bool = False):
        """`named`: name → (role, parameter). `updated`: name → the tensor that AdamW or Muon updates, the parameter
        itself or this rank's shard in the same memory. `fused_clipping`: AdamW's fused kernel clips the gradients when
        it reads them, which saves a pass on a GPU."""
        self.parts, self._updated, self._fused_clipping = parts, updated, fused_clipping
        self._params = {name: p for name, (_, p) in named.items()}
        self._shards = [(p, updated[name]) for name, p in self._params.items() if updated[name] is not p]
        self._kind_of = {id(p): kind for kind, part in parts.items() for g in part.param_groups for p in g["params"]}
        self.groups = self._summarize_groups({id(updated[name]): about for name, about in named.items()})

    def _summarize_groups(self, named: dict[int, tuple[str, nn.Parameter]]) -> list[dict]:
        rows = {}
        for kind, part in self.parts.items():
            for group in part.param_groups:
                for mine in group["params"]:
                    role, p = named[id(mine)]
                    about = {"role": role, "optimizer": kind}
                    about |= {"lr": group["base_lr"], "weight_decay": group["weight_decay"]}
                    row = rows.setdefault((about["role"], kind), about | {"tensors": 0, "parameters": 0})
                    row["tensors"] += 1
                    row["parameters"] += p.numel()
        return sorted(rows.values(), key=lambda row: ROLES.index(row["role"]))

    def table(self) -> str:
        """The groups as text, one line each."""
        lines = [f"{'role':<10} {'optimizer':<9} {'lr':>8} {'decay':>6} {'tensors':>7} {'parameters':>13}"]
        for row in self.groups:
            text = f"{row['role']:<10} {row['optimizer']:<9} {row['lr']:>8g} {row['weight_decay']:>6g}"
            lines.append(f"{text} {row['tensors']:>7} {row['parameters']:>13,}")
        return "\n".join(lines)

    def set_lr(self, factor: float) -> None:
        """Set every group's learning rate to `factor` times its base rate; factor = lr_at(step, run) /
        run.learning_rate."""
        for part in self.parts.values():
            for group in part.param_groups:
                lr = group["base_lr"] * factor
                if isinstance(group["lr"], Tensor):  # a captured step reads this tensor
                    group["lr"].fill_(lr)
                else:
                    group["lr"] = lr

    def to_device(self, found_inf: Tensor) -> None:
        """Make steps independent of the host, as a CUDA graph requires: learning rates and momentum become device
        tensors, which `set_lr` and `count` fill, and a step changes nothing if found_inf () is 1.0."""
        for kind, part in self.parts.items():
            part.found_inf = found_inf
            for group in part.param_groups:
                group["lr"] = torch.tensor(float(group["lr"]), device=found_inf.device)
                if kind == "adamw":
                    group["capturable"] = True
        if muon := self.parts.get("muon"):
            muon.lerp = torch.ones((), device=found_inf.device)

    def to_host(self) -> None:
        """Undo `to_device`."""
        for kind, part in self.parts.items():
            part.found_inf = None
            for group in part.param_groups:
                group["lr"] = float(group["lr"])
                if kind == "adamw":
                    group["capturable"] = False

    def count(self, steps: int) -> None:
        """Add `steps` graph replays to Muon's step count, which is on the host (negative for steps that were skipped),
        and copy the next step's momentum to the device."""
        if muon := self.parts.get("muon"):
            for group in muon.param_groups:
                group["step"] += steps
                muon.lerp.fill_(1 - momentum_at(group))

    @torch.no_grad()
    def clip(self, norm: Tensor, limit: float) -> None:
        """Scale the gradients to the norm `limit` if their norm () exceeds it; 0 is no limit. With `fused_clipping`,
        AdamW's gradients are scaled in `step`."""
        if not limit:
            return
        self._assign_shard_grads()
        for kind, part in self.parts.items():
            if kind == "adamw" and self._fused_clipping:  # the fused kernel divides by grad_scale, as with GradScaler
                part.grad_scale = ((norm + 1e-6) / limit).clamp(min=1.0).float()
                continue
            grads = [to_local(p.grad) for group in part.param_groups for p in group["params"] if p.grad is not None]
            if grads := [grad for grad in grads if grad.numel()]:
                torch._foreach_mul_(grads, (limit / (norm + 1e-6)).clamp(max=1.0))  # torch's clip_grads_with_norm_

    def _assign_shard_grads(self) -> None:
        for p, mine in self._shards:
            mine.grad = None if p.grad is None else to_local(p.grad)

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        self._assign_shard_grads()
        for part in self.parts.values():
            part.step()

    def zero_grad(self) -> None:
        """Set all gradients to None."""
        for part in self.parts.values():
            part.zero_grad(set_to_none=True)
            part.grad_scale = None
        for p, _ in self._shards:
            p.grad = None

    # ---- saving and restoring

    def state_dict(self) -> dict:
        """Tensors and numbers only: {"kinds": {name: "adamw" | "muon"}, "state": {name: {…}}, "muon_step": int}.

        The tensors are references, not copies. Values from the JSON file (learning rates, decay, betas) are not
        included: a resumed run uses its own JSON file, and its schedule sets the learning rate.
        """
        state = {name: dict(self._part(name).state.get(mine, {})) for name, mine in self._updated.items()}
        for name, p in self._params.items():
            if self._updated[name] is not p:
                state[name] = {key: to_dtensor(t, p) for key, t in state[name].items()}
        kinds = {name: self._kind_of[id(mine)] for name, mine in self._updated.items()}
        muon_step = self.parts["muon"].param_groups[0]["step"] if "muon" in self.parts else 0
        return {"kinds": kinds, "state": state, "muon_step": muon_step}

    def load_state_dict(self, saved: dict) -> None:
        """Restore a state from `state_dict`. Raises UserError, before any change, if it belongs to another model or
        another choice of optimizers."""
        self._check(saved)
        name_of = {id(mine): name for name, mine in self._updated.items()}
        for part in self.parts.values():
            order = [p for group in part.param_groups for p in group["params"]]  # torch numbers them in this order
            state = {i: saved["state"][name_of[id(p)]] for i, p in enumerate(order)}
            state = {i: {key: self._to_local_state(t, name_of[id(order[i])]) for key, t in s.items()}
                     for i, s in state.items()}  # fmt: skip
            groups = part.state_dict()["param_groups"]
            part.load_state_dict({"state": {i: s for i, s in state.items() if s}, "param_groups": groups})
        if "muon" in self.parts:
            self.parts["muon"].param_groups[0]["step"] = saved["muon_step"]

    def _part(self, name: str) -> torch.optim.Optimizer:
        return self.parts[self._kind_of[id(self._updated[name])]]

    def _to_local_state(self, whole: Tensor, name: str) -> Tensor:
        """This rank's shard of a state tensor, in the form that the parameter's optimizer uses: DTensor or tensor."""
        p = self._params[name]
        if self._updated[name] is p or not whole.ndim:
            return shard_like(whole, p)
        return shard_of(whole, p).to(p.device, copy=True)

    def _check(self, saved: dict) -> None:
        if not isinstance(saved, dict) or saved.keys() != {"kinds", "state", "muon_step"}:
            raise UserError("the saved optimizer state is not one that this program wrote")
        if differing := sorted(self._params.keys() ^ saved["kinds"].keys()):
            raise UserError(f"the optimizer state is of another model: only one of the two has {differing[0]}")
        for name, p in self._params.items():
            now, then = self._kind_of[id(self._updated[name])], saved["kinds"][name]
            if now != then:
                fix = "set optimizer_hyperparams.use_muon as it was"
                raise UserError(f"{name} was trained with {then} and would continue with {now}: {fix}")
            for key, tensor in saved["state"][name].items():
                if tensor.ndim and tensor.shape != ((len(p), 1) if key == ROW_MOMENT else p.shape):
                    shapes = f"{tuple(tensor.shape)}, the parameter {tuple(p.shape)}"
                    raise UserError(f"the optimizer state of {name} has shape {shapes}: it is of another model")
