"""The only module that imports DeepSpeed. It works around these properties of version 0.19.8:

- An omitted `gradient_clipping` means 1.0, so we always set it. At ZeRO 0 DeepSpeed clips without reporting the norm,
  so there we clip ourselves and set it to 0.
- bf16 is `torch_autocast`: fp32 weights, bf16 operations. Its losses equal those of `torch.autocast` at every stage if
  gradients are not reduced in bf16 (`lower_precision_safe_modules`).
- fp16 at ZeRO 0 is `torch_autocast` with torch's GradScaler. At ZeRO 1 and 2 DeepSpeed would clip those gradients
  while they are still scaled, so there we use the `fp16` engine: fp16 weights, fp32 masters.
- An optimizer in the JSON config compiles FusedAdam, which takes a minute and a half: we pass in torch's fused AdamW.
- At ZeRO 0 gradients would be averaged after the backward pass: average.py does so during it.
- Its throughput timer, on by default, waits for the device twice in each micro-batch: we turn it off.
- Initialisation broadcasts parameters but not buffers: we broadcast the buffers, codebooks among them.
- ZeRO 1 and 2 have no reduce-scatter, even with `reduce_scatter`: they all-reduce every bucket, ZeRO 2 in every
  micro-batch. With `use_multi_rank_bucket_allreduce: false` they reduce each part to the rank that owns it. That sends
  half as much and gives the same bits on two ranks, but takes at least a collective per rank, so it is not the default.
- ZeRO 1 and 2 compute the norm inside the step and skip a step whose norm is not finite. We compute the norm before,
  and report it as infinite if the guard refuses the step. DeepSpeed would then lower the loss scale, and raise an error
  if it cannot go lower; so we report only real overflows to the loss scaler.
- `torch_autocast` of one engine stays on for all later engines of the process: we reset it before each.
"""

import logging
import os
from typing import Any

import torch
from torch import Tensor, nn

# If this is set, DeepSpeed neither searches for an accelerator nor warns that it found none.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import torch_autocast
from deepspeed.utils import logger

from .. import distributed
from ..config import ConfigError
from ..interfaces import Tensors
from ..lifecycle.checkpoint import Read
from ..settings import Optimizer
from .average import Average, averages
from .gather import Masters, Shards, on_host

logger.setLevel(logging.WARNING)
# Only inference_all_reduce uses this kernel, and compiling it takes 39 s on every new machine.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MOMENTS = ("exp_avg", "exp_avg_sq")
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class Engine:
    """One module in one DeepSpeed engine with one AdamW. A process may have several engines.

    A step is `forward` and `backward` for each micro-batch with `micro_step` between them, then `norm`, then `apply`
    with the guard's verdict.

    State is saved unsharded and in fp32, so a checkpoint depends neither on the world size nor on the ZeRO stage. It
    never passes through pickle.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        precision: str,
        zero: int,
        micro: int = 1,
        accumulation: int = 1,
        passed: dict[str, Any] | None = None,
        name: str = "model",
    ) -> None:
        """micro: images per micro-batch on this rank; accumulation: micro-batches per step; passed: further DeepSpeed
        settings; name: of its files in a checkpoint, one word. Raises ConfigError for fp16 weights on hardware without
        fp16."""
        self.name = name
        self.module = module
        self.clip = optimizer.grad_clip
        self.sharded = zero > 0
        self.parameters = dict(module.named_parameters())
        self.trained = {name: p for name, p in self.parameters.items() if p.requires_grad and p.numel()}
        self.optimizer = torch.optim.AdamW(
            parameter_groups(list(self.trained.values()), optimizer), optimizer.lr, optimizer.betas, fused=True
        )
        self.precision = PRECISIONS[precision]
        settings = deepspeed_config(precision, zero, optimizer.grad_clip, micro, accumulation, passed or {})
        # Without an existing process group DeepSpeed would look for a launcher in the environment.
        deepspeed.init_distributed(dist_init_required=False)
        torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
        self.deepspeed, *_ = deepspeed.initialize(
            model=module, optimizer=self.optimizer, config=settings, dist_init_required=False
        )
        self.average: Average | None = None
        if averages(zero, passed) or (not self.sharded and distributed.world() == 1):
            # One rank needs no reduction, which would copy all gradients into a bucket and back.
            self.deepspeed.enable_backward_allreduce = False
            if distributed.world() > 1:
                self.average = Average(list(self.trained.values()), self.deepspeed.is_gradient_accumulation_boundary)
        for buffer in module.buffers():
            distributed.broadcast_(buffer)
        self.device = next(iter(self.parameters.values())).device
        self._unscaled = torch.zeros((), dtype=torch.bool, device=self.device)
        if self.sharded:
            self.shards = Shards(list(self.trained.values()))
            zero_optimizer = self.deepspeed.optimizer
            self._scaled_norm, zero_optimizer.scaled_global_norm = zero_optimizer.scaled_global_norm, self._judged_norm
            self._rescale, zero_optimizer._update_scale = zero_optimizer._update_scale, self._judged_rescale

    def forward(self, *inputs: Any) -> Any:
        return self.deepspeed(*inputs)

    def autocast(self) -> torch.autocast:
        """Returns the context for calls of the module itself, without DeepSpeed's hooks. `torch.autograd.grad` needs
        such a call: through the output of `forward` it raises an error, or at ZeRO 1 gives a wrong result."""
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)

    def backward(self, loss: Tensor) -> None:
        """loss: of the output of `forward`, or of a call within `autocast`."""
        self.deepspeed.backward(loss)
        if self.average and self.average.last():
            self.average.finish()

    def micro_step(self) -> None:
        """Called after the backward pass of each micro-batch except the last."""
        self.deepspeed.step()

    def scaled(self, losses: Tensor) -> Tensor:
        """Returns bool [], the same on all ranks: whether a non-finite gradient would be caused by the loss scale.

        That is False if any loss is not finite itself, or if losses are not scaled (1 is DeepSpeed's lowest scale).
        losses: fp32 [M] of this rank's micro-batches. Call it before `apply`. Collective with fp16.
        """
        if scaler := self.deepspeed.torch_autocast_z0_gradscaler:
            scaled = scaler._scale > 1
        elif self.deepspeed.fp16_enabled():
            scaled = torch.tensor(self.deepspeed.optimizer.loss_scale > 1, device=self.device)
        else:
            return self._unscaled
        return scaled & (distributed.sum_((~losses.isfinite()).sum()) == 0)

    def norm(self) -> Tensor:
        """Returns fp32 []: the norm of the gradient over all ranks, before clipping and without the loss scale. Call it
        once, after the last backward pass. Collective."""
        if self.sharded:
            zero = self.deepspeed.optimizer
            zero._wait_for_offload_copies()
            self._norm = self._scaled_norm()
            return (self._norm / zero.loss_scale).float()
        if scaler := self.deepspeed.torch_autocast_z0_gradscaler:
            scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        self._norm = nn.utils.get_total_norm(gradients, foreach=True)
        return self._norm

    def apply(self, lr: float, refused: Tensor, overflow: Tensor) -> None:
        """Clips the gradient, updates the weights unless the step is refused, and frees the gradients.

        refused, overflow: bool [], the same on all ranks: keep the weights; lower the loss scale as well.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.sharded:
            self._refused, self._overflow = refused, overflow
            self.deepspeed.step()
            return
        if self.clip:
            nn.utils.clip_grads_with_norm_(self.parameters.values(), self.clip, self._norm, foreach=True)
        # With found_inf set, the fused optimiser leaves weights, moments and step count alone. A GradScaler does the
        # same on overflow, but synchronises with the host. Otherwise one NaN would stay in the weights for ever.
        scaler = self.deepspeed.torch_autocast_z0_gradscaler
        if not scaler:
            self.optimizer.found_inf = refused.float()  # type: ignore[attr-defined]
            self.deepspeed.step()
            return
        for found in scaler._found_inf_per_device(self.optimizer).values():
            found.copy_(refused.float())
        state = (scaler._scale, scaler._growth_tracker)
        before = [tensor.clone() for tensor in state]
        self.deepspeed.step()
        for tensor, old in zip(state, before, strict=True):
            tensor.copy_(torch.where(refused & ~overflow, old, tensor))

    def _judged_norm(self, *arguments: Any) -> Tensor:
        """Replaces DeepSpeed's `scaled_global_norm`: infinite, so that DeepSpeed skips the step, if it is refused."""
        return torch.where(self._refused, torch.inf, self._norm)

    def _judged_rescale(self, skipped: bool) -> None:
        """Replaces DeepSpeed's `_update_scale`, which takes every skipped step for an overflow."""
        if not skipped or bool(self._overflow):
            self._rescale(skipped)

    def tensors(self) -> dict[str, Tensors]:
        """Returns a checkpoint's tensors by file: weights and moments, copied to rank 0's host memory. The other ranks
        have none. Collective."""
        return {self.name: self.weights(), self._prefixed("optimizer"): self.moments()}

    def state(self) -> dict[str, Any]:
        """Returns the engine's entries of state.json."""
        return {self._prefixed("optimizer_steps"): self.optimizer_steps(), self._prefixed("scaler"): self.scaler()}

    def load(self, read: Read, state: dict[str, Any]) -> None:
        """Restores what `tensors` and `state` returned. Raises CheckpointError if the tensors do not fit."""
        steps = state[self._prefixed("optimizer_steps")]
        weights, moments = self.saved(steps)
        weights, moments = read(self.name, weights), read(self._prefixed("optimizer"), moments)
        self.load_weights(weights)
        self.load_moments(moments, steps)
        self.load_scaler(state[self._prefixed("scaler")])

    def _prefixed(self, part: str) -> str:
        """The names of the model's own parts are those of checkpoints written before there were several engines."""
        return part if self.name == "model" else f"{self.name}_{part}"

    def weights(self) -> dict[str, Tensor]:
        """Returns copies of the parameters in fp32 and of the buffers in their own type, by name, in rank 0's host
        memory; {} on the other ranks. Collective."""
        if not self.sharded:
            return on_host(self.parameters | self._buffers())
        frozen = on_host({name: p for name, p in self.parameters.items() if name not in self.trained})
        masters = zip(self.trained, self.shards.on_host(self._shards()), strict=False)
        return {**{name: p.float() for name, p in frozen.items()}, **dict(masters), **on_host(self._buffers())}

    def saved(self, steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Returns the tensors of `weights` and `moments` after `steps` optimiser steps, but on the meta device (buffers
        excepted)."""
        with torch.device("meta"):
            full = {name: torch.empty(p.shape, dtype=torch.float32) for name, p in self.parameters.items()}
        moments = {f"{name}/{key}": full[name] for name in self.trained for key in MOMENTS} if steps else {}
        return full | self._buffers(), moments

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        self.module.load_state_dict(weights)
        if self.sharded:
            self.shards.scatter([weights[name] for name in self.trained], self._shards())

    def masters(self) -> Masters | None:
        """Returns the fp32 masters; None if the model's own weights are fp32."""
        if not self.sharded or all(parameter.dtype == torch.float32 for parameter in self.parameters.values()):
            return None
        return Masters(self.shards, self._shards(), [name in self.trained for name in self.parameters])

    def moments(self) -> dict[str, Tensor]:
        """Returns copies of AdamW's moments in fp32, by "name/exp_avg" and "name/exp_avg_sq", in rank 0's host memory;
        {} on the other ranks and before the first step. Frozen parameters have none. Collective."""
        if not self.optimizer_steps():
            return {}
        moments: dict[str, Tensor] = {}
        for key in MOMENTS:
            if self.sharded:
                full = self.shards.on_host(self._sharded_moments(key))
                moments |= {f"{name}/{key}": value for name, value in zip(self.trained, full, strict=False)}
            else:
                moments |= on_host({f"{name}/{key}": self._moment(p, key) for name, p in self.trained.items()})
        return moments

    def load_moments(self, moments: dict[str, Tensor], steps: int) -> None:
        if not steps:
            return
        for tensor in self._shards() if self.sharded else self.trained.values():
            state = self.optimizer.state[tensor]
            state["step"] = torch.tensor(float(steps), device=tensor.device)
            for key in MOMENTS:
                state.setdefault(key, torch.zeros_like(tensor))
        for key in MOMENTS:
            full = [moments[f"{name}/{key}"] for name in self.trained]
            if self.sharded:
                self.shards.scatter(full, self._sharded_moments(key))
                continue
            for parameter, value in zip(self.trained.values(), full, strict=True):
                self.optimizer.state[parameter][key].copy_(value)

    def optimizer_steps(self) -> int:
        """Returns the number of steps that updated the weights: the trainer's steps less the skipped ones."""
        # A parameter that has had no gradient since the run was resumed still has the count of then.
        counts = [state["step"] for state in self.optimizer.state.values()]
        return int(torch.stack(counts).max()) if counts else 0

    def scaler(self) -> dict[str, float]:
        """Returns the state of the fp16 loss scaler; {} for other precisions."""
        if scaler := self.deepspeed.torch_autocast_z0_gradscaler:
            return scaler.state_dict()
        if self.deepspeed.fp16_enabled():
            return {key: getattr(self.deepspeed.optimizer.loss_scaler, key) for key in SCALER}
        return {}

    def load_scaler(self, state: dict[str, float]) -> None:
        """Restores the loss scaler. The state of another precision or ZeRO stage is ignored: the scale adapts again
        within some steps."""
        if state.keys() != self.scaler().keys():
            return
        if scaler := self.deepspeed.torch_autocast_z0_gradscaler:
            scaler.load_state_dict(state)
        elif self.deepspeed.fp16_enabled():
            for key in SCALER:
                setattr(self.deepspeed.optimizer.loss_scaler, key, state[key])

    def loss_scale(self) -> float | None:
        """Returns the loss scale; None if losses are not scaled."""
        state = self.scaler()
        return state.get("scale", state.get("cur_scale"))

    def _buffers(self) -> dict[str, Tensor]:
        """Returns the persistent buffers. The others follow from the settings and cannot be loaded."""
        kept = self.module.state_dict()
        return {name: buffer for name, buffer in self.module.named_buffers() if name in kept}

    def _shards(self) -> list[Tensor]:
        """Returns this rank's shard of the fp32 masters of each parameter group, flat, which replaces the parameters in
        the optimiser."""
        return [group["params"][0] for group in self.optimizer.param_groups]

    def _sharded_moments(self, key: str) -> list[Tensor]:
        return [self.optimizer.state[shard][key] for shard in self._shards()]

    def _moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        """A parameter that has never had a gradient has no state yet."""
        state = self.optimizer.state.get(parameter)
        return state[key] if state else torch.zeros_like(parameter)


def parameter_groups(parameters: list[nn.Parameter], optimizer: Optimizer) -> list[dict[str, Any]]:
    """Returns the parameters in groups of AdamW with one weight decay each."""
    if optimizer.decay_vectors or not optimizer.weight_decay:
        return [{"params": parameters, "weight_decay": optimizer.weight_decay}]
    matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim < 2]
    groups = [(matrices, optimizer.weight_decay), (vectors, 0.0)]
    return [{"params": group, "weight_decay": decay} for group, decay in groups if group]


def deepspeed_config(
    precision: str, zero: int, clip: float, micro: int, accumulation: int, passed: dict[str, Any]
) -> dict[str, Any]:
    """Returns the config for deepspeed.initialize. Raises ConfigError for fp16 weights on hardware without fp16."""
    half_weights = precision == "fp16" and zero > 0
    if half_weights and not get_accelerator().is_fp16_supported():
        raise ConfigError(
            f"precision=fp16 with zero_stage={zero} needs hardware with fp16: use zero_stage=0, or precision=bf16 or "
            f"fp32"
        )
    autocast = {
        "enabled": precision != "fp32" and not half_weights,
        "dtype": str(PRECISIONS[precision]).removeprefix("torch."),
        "lower_precision_safe_modules": [],
    }
    return {
        "steps_per_print": 2**62,  # never: we report ourselves
        "timers": {"throughput": {"enabled": False}},
        **passed,
        "train_batch_size": micro * accumulation * distributed.world(),
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip if zero else 0.0,
        "zero_optimization": {**(passed.get("zero_optimization") or {}), "stage": zero},
        "torch_autocast": autocast,
        "fp16": {"enabled": half_weights},
    }
