"""DeepSpeed: the only importer. What its version 0.19.8 does differently from its word is settled here.

- An omitted `gradient_clipping` means 1.0, so it is always written. At ZeRO 0 DeepSpeed clips without telling the
  norm, so there we clip ourselves and write 0.
- bf16 is `torch_autocast`: fp32 weights, bf16 operations, the same losses as `torch.autocast` at every stage, once
  gradients are kept from travelling in bf16 (`lower_precision_safe_modules`).
- fp16 at ZeRO 0 is `torch_autocast` with torch's GradScaler. At ZeRO 1 and 2 DeepSpeed would clip those gradients
  while they are still scaled, so there it is the `fp16` engine: half weights, fp32 masters.
- A JSON optimizer compiles FusedAdam for a minute and a half: torch's own fused AdamW is passed in instead.
- Initialisation broadcasts parameters, not buffers: codebooks are broadcast here.
- ZeRO 1 and 2 take the norm within the step, and skip a step whose norm is not finite: it is taken before, and told
  them as infinite where the step is refused. Their loss scale would then fall, and DeepSpeed raise where it cannot; so
  it hears of overflows alone.
- That an engine has `torch_autocast` is remembered for all later ones of the process: it is forgotten before each.
"""

import logging
import os
from typing import Any

import torch
from torch import Tensor, nn

# Said outright, DeepSpeed does not look for one, nor warn that it found none.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import torch_autocast
from deepspeed.utils import (
    logger,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)

from .. import distributed
from ..config import ConfigError
from ..settings import Optimizer

logger.setLevel(logging.WARNING)
# Only inference_all_reduce uses this kernel, and it would be compiled for 39 s on every new machine.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

MOMENTS = ("exp_avg", "exp_avg_sq")
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class Masters:
    """The fp32 weights that half ones are copies of, at ZeRO 1 and 2.

    parts: this rank's share of them, flat. What has the same shapes, such as averages of them, can be gathered and
    scattered like them: it stands in their place meanwhile, where DeepSpeed finds each parameter's fragment.
    """

    def __init__(self, parameters: list[nn.Parameter], parts: list[Tensor]) -> None:
        self.parameters = parameters
        self.parts = parts

    def gather(self, parts: list[Tensor]) -> list[Tensor]:
        """Such parts in full, fp32, by parameter. Collective."""
        kept = self._replace(parts)
        full = [safe_get_full_fp32_param(parameter) for parameter in self.parameters]
        self._replace(kept)
        return full

    def scatter(self, full: list[Tensor]) -> list[Tensor]:
        """This rank's parts of such weights."""
        kept = [part.detach().clone() for part in self.parts]
        for parameter, value in zip(self.parameters, full, strict=True):
            safe_set_full_fp32_param(parameter, value.to(parameter.device))
        return self._replace(kept)

    @torch.no_grad()
    def _replace(self, parts: list[Tensor]) -> list[Tensor]:
        """Returns what stood there."""
        kept = [part.detach().clone() for part in self.parts]
        torch._foreach_copy_(self.parts, parts)
        return kept


class Engine:
    """One module under one DeepSpeed engine with one AdamW; several may stand in one process.

    A step is `forward` and `backward` of each micro-batch, `micro_step` between them, then `norm`, and `apply` with the
    verdict on it.

    State is read and written a parameter at a time, in full and in fp32, so a checkpoint depends neither on the
    world size nor on the ZeRO stage. Nothing of it passes through pickle.
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
    ) -> None:
        """micro: images of a micro-batch on this rank; accumulation: micro-batches a step; passed: what else
        DeepSpeed is told. Raises ConfigError for fp16 weights on hardware without fp16."""
        self.module = module
        self.clip = optimizer.clip
        self.sharded = zero > 0
        self.parameters = dict(module.named_parameters())
        self.optimizer = torch.optim.AdamW(
            module.parameters(), optimizer.lr, optimizer.betas, weight_decay=optimizer.weight_decay, fused=True
        )
        told = deepspeed_config(precision, zero, optimizer.clip, micro, accumulation, passed or {})
        # DeepSpeed looks at the environment for a launcher unless a process group stands already.
        deepspeed.init_distributed(dist_init_required=False)
        torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
        self.deepspeed, *_ = deepspeed.initialize(
            model=module, optimizer=self.optimizer, config=told, dist_init_required=False
        )
        if distributed.world() == 1 and not self.sharded:
            # There is nobody to sum over, and all gradients would be copied into a bucket and back.
            self.deepspeed.enable_backward_allreduce = False
        for buffer in module.buffers():
            distributed.broadcast_(buffer)
        self.device = next(iter(self.parameters.values())).device
        if self.sharded:
            zero_optimizer = self.deepspeed.optimizer
            self._scaled_norm, zero_optimizer.scaled_global_norm = zero_optimizer.scaled_global_norm, self._judged_norm
            self._rescale, zero_optimizer._update_scale = zero_optimizer._update_scale, self._judged_rescale

    def forward(self, *inputs: Any) -> Any:
        return self.deepspeed(*inputs)

    def backward(self, loss: Tensor) -> None:
        self.deepspeed.backward(loss)

    def micro_step(self) -> None:
        """After each accumulated backward pass but the last."""
        self.deepspeed.step()

    def scaled(self, finite: Tensor) -> Tensor:
        """bool [], the same on all ranks: a gradient that is not finite would be the loss scale's doing. It is not if
        a loss is not finite itself, or if nothing is scaled: 1 is DeepSpeed's lowest scale. Collective with fp16; to be
        asked before `apply`. finite: bool [], whether this rank's losses are."""
        if scaler := self.deepspeed.torch_autocast_z0_gradscaler:
            scaled = scaler._scale > 1
        elif self.deepspeed.fp16_enabled():
            scaled = torch.tensor(self.deepspeed.optimizer.loss_scale > 1, device=self.device)
        else:
            return torch.zeros((), dtype=torch.bool, device=self.device)
        return scaled & (distributed.sum_((~finite).float()) == 0)

    def norm(self) -> Tensor:
        """fp32 []: the norm of the gradient over all ranks, before clipping and without the loss scale. To be asked
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
        """Clip, and move the weights once unless the step is refused; the gradients are gone afterwards.

        refused, overflow: bool [], the same on all ranks: the weights stay; and the loss scale is to fall, too.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.sharded:
            self._refused, self._overflow = refused, overflow
            self.deepspeed.step()
            return
        if self.clip:
            nn.utils.clip_grads_with_norm_(self.parameters.values(), self.clip, self._norm, foreach=True)
        # What a GradScaler does on overflow, without its host synchronisation: the fused optimiser leaves weights,
        # averages and step count alone. One NaN would otherwise stay in the weights for ever.
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
        """In place of DeepSpeed's own, with the loss scale: it skips a step whose norm is not finite."""
        return torch.where(self._refused, torch.inf, self._norm)

    def _judged_rescale(self, skipped: bool) -> None:
        """In place of DeepSpeed's own, which takes every step that is skipped for an overflow."""
        if not skipped or bool(self._overflow):
            self._rescale(skipped)

    def weights(self) -> dict[str, Tensor]:
        """Parameters in fp32 and buffers as they are, by name. Collective."""
        full = {name: self._master(p).detach() for name, p in self.parameters.items()}
        return full | self._buffers()

    def saved(self, steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What `weights` and `moments` give after so many steps of the optimiser, but without data."""
        with torch.device("meta"):
            full = {name: torch.empty(p.shape, dtype=torch.float32) for name, p in self.parameters.items()}
        moments = {f"{name}/{key}": p for name, p in full.items() for key in MOMENTS} if steps else {}
        return full | self._buffers(), moments

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        self.module.load_state_dict(weights)
        if self.sharded:
            for name, parameter in self.parameters.items():
                safe_set_full_fp32_param(parameter, weights[name].to(parameter.device))

    def masters(self) -> Masters | None:
        """None where the model's weights are fp32 themselves."""
        if not self.sharded or all(parameter.dtype == torch.float32 for parameter in self.parameters.values()):
            return None
        return Masters(list(self.parameters.values()), self.deepspeed.optimizer.single_partition_of_fp32_groups)

    def moments(self) -> dict[str, Tensor]:
        """AdamW's averages, "name/exp_avg" and "name/exp_avg_sq", fp32; {} before the first step. Collective."""
        if not self.optimizer_steps():
            return {}
        return {f"{name}/{key}": self._moment(p, key) for name, p in self.parameters.items() for key in MOMENTS}

    def load_moments(self, moments: dict[str, Tensor], steps: int) -> None:
        if not steps:
            return
        held = [group["params"][0] for group in self.optimizer.param_groups] if self.sharded else None
        for tensor in held or self.parameters.values():
            state = self.optimizer.state[tensor]
            state["step"] = torch.tensor(float(steps), device=tensor.device)
            for key in MOMENTS:
                state[key] = torch.zeros_like(tensor)
        if self.sharded:
            # DeepSpeed links the flat state to the parameters at its first step, which is yet to come.
            self.deepspeed.optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.parameters.items():
            for key in MOMENTS:
                value = moments[f"{name}/{key}"].to(parameter.device)
                if self.sharded:
                    safe_set_full_optimizer_state(parameter, value, key)
                else:
                    self.optimizer.state[parameter][key].copy_(value)

    def optimizer_steps(self) -> int:
        """Steps the optimiser has taken: fewer than the trainer's where gradients were not finite."""
        states = list(self.optimizer.state.values())
        return int(states[0]["step"]) if states else 0

    def scaler(self) -> dict[str, float]:
        """The loss scaler of fp16; {} for other precisions."""
        if scaler := self.deepspeed.torch_autocast_z0_gradscaler:
            return scaler.state_dict()
        if self.deepspeed.fp16_enabled():
            return {key: getattr(self.deepspeed.optimizer.loss_scaler, key) for key in SCALER}
        return {}

    def load_scaler(self, state: dict[str, float]) -> None:
        """A state of another precision or stage is left: the scale then finds itself again within some steps."""
        if state.keys() != self.scaler().keys():
            return
        if scaler := self.deepspeed.torch_autocast_z0_gradscaler:
            scaler.load_state_dict(state)
        elif self.deepspeed.fp16_enabled():
            for key in SCALER:
                setattr(self.deepspeed.optimizer.loss_scaler, key, state[key])

    def loss_scale(self) -> float | None:
        """None where losses are not scaled."""
        state = self.scaler()
        return state.get("scale", state.get("cur_scale"))

    def _buffers(self) -> dict[str, Tensor]:
        """Without those that the settings give, which are not persistent and cannot be loaded."""
        kept = self.module.state_dict()
        return {name: buffer for name, buffer in self.module.named_buffers() if name in kept}

    def _master(self, parameter: nn.Parameter) -> Tensor:
        return safe_get_full_fp32_param(parameter) if self.sharded else parameter

    def _moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        if self.sharded:
            return safe_get_full_optimizer_state(parameter, key)
        return self.optimizer.state[parameter][key]


def deepspeed_config(
    precision: str, zero: int, clip: float, micro: int, accumulation: int, passed: dict[str, Any]
) -> dict[str, Any]:
    """What deepspeed.initialize is told. Raises ConfigError for fp16 weights on hardware without fp16."""
    half_weights = precision == "fp16" and zero > 0
    if half_weights and not get_accelerator().is_fp16_supported():
        raise ConfigError(
            f"precision=fp16 with zero={zero} needs hardware with fp16: take zero=0, or precision=bf16 or fp32"
        )
    autocast = {
        "enabled": precision != "fp32" and not half_weights,
        "dtype": {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[precision],
        "lower_precision_safe_modules": [],
    }
    return {
        "steps_per_print": 2**62,  # we report ourselves
        **passed,
        "train_batch_size": micro * accumulation * distributed.world(),
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip if zero else 0.0,
        "zero_optimization": {**(passed.get("zero_optimization") or {}), "stage": zero},
        "torch_autocast": autocast,
        "fp16": {"enabled": half_weights},
    }
