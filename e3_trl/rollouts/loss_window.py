"""The micro-steps of the loss: what is computed in one of them, and logged of all of a window together."""

import math

import torch

from ..method.importance import importance_sampling_ratio
from .micro_batches import planned_steps, shared_steps
from .scoring import is_planned, loss_mask, needs_old_logps, score_rows


# What TRL logs per micro-batch as a mean over its tokens, of which rows that are left out have the value 0.
TOKEN_MEANS = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "cispo_clip_ratio", "kl")


class LossWindow:
    """
    What the loss needs beside TRL's, micro-step by micro-step, and what is to be logged, over the tokens of a whole
    window: micro-batches of a plan have rows of different lengths, so the mean of their means is no mean.

    Args:
        trainer ([`E3GRPOTrainer`]): the trainer.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self._inputs: dict | None = None  # of the micro-step, until its forward pass is observed
        self._scale = 1.0
        # Per micro-step: rows, tokens, sum of entropies, of -log-probs.
        self._trained: list[torch.Tensor] = []
        self._left_out: list[torch.Tensor] = []
        self._differences: list[torch.Tensor] = []
        self._ratios: list[torch.Tensor] = []

    def begin(self, inputs: dict) -> bool:
        """Begin a micro-step: score the rows that are in it for the log alone. Whether there are others."""
        if "left_out" in inputs:
            self._score_left_out(inputs["left_out"])
        self._inputs, self._scale = inputs, inputs.get("loss_scale", 1.0)
        return "completion_ids" in inputs

    def _score_left_out(self, rows: dict) -> None:
        """Those of an optimizer step after the first are compared with no engine: the policy is another by then."""
        mask = loss_mask(rows)
        if self.trainer.args.entropy_estimator == "sampled" and "sampling_per_token_logps" in rows:
            logps = torch.nan_to_num(rows["sampling_per_token_logps"])
            entropies = torch.zeros_like(logps)
        else:
            logps, entropies = score_rows(self.trainer, rows)
            self._compare(rows, logps)
        self._left_out.append(_sums(mask, logps, entropies))

    def observe(self, logps: torch.Tensor, entropies: torch.Tensor) -> None:
        """Take the log-probs and entropies of shape `(B, T)` that the loss has just computed, and is made of next."""
        inputs = self._inputs
        if inputs is None:
            return
        self._inputs = None
        logps, entropies = logps.detach(), entropies.detach()
        self._trained.append(_sums(loss_mask(inputs), logps, entropies))
        if not is_planned(self.trainer) or "old_per_token_logps" not in inputs:
            self.remember(inputs, logps)

    def remember(self, inputs: dict, logps: torch.Tensor) -> None:
        """
        Note the log-probs of rows under the policy that sampled them: for later steps, once it has changed, and for
        the importance of what vLLM sampled, which TRL computes from a forward pass of its own.
        """
        if needs_old_logps(self.trainer) and is_planned(self.trainer):
            inputs["old_per_token_logps"] = logps
        self._compare(inputs, logps)

    def _compare(self, inputs: dict, logps: torch.Tensor) -> None:
        """How far the engine's log-probs of the rows are from the policy's, if it is still the one that sampled."""
        trainer = self.trainer
        if "sampling_per_token_logps" not in inputs or "importance_sampling_ratio" in inputs:
            return
        if trainer.model.training and trainer.state.global_step != trainer.sampled_step:
            return  # after an update, the policy is another one than sampled
        mask, sampling_logps = loss_mask(inputs), inputs["sampling_per_token_logps"]
        self._differences.append((logps - sampling_logps).abs()[mask.bool()])
        if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
            ratio = inputs["importance_sampling_ratio"] = importance_sampling_ratio(
                logps,
                sampling_logps,
                mask,
                trainer.vllm_importance_sampling_mode,
                trainer.vllm_importance_sampling_clip_min,
                trainer.vllm_importance_sampling_clip_max,
            )
            self._ratios.append(ratio[mask.bool()] if ratio.shape == mask.shape else ratio.flatten())

    def end(self, loss: torch.Tensor | None) -> torch.Tensor:
        """
        End the micro-step, the window's last with what is logged.

        Args:
            loss (`torch.Tensor`, *optional*): a mean over the micro-step's rows. `None` = it has none.

        Returns:
            `torch.Tensor`: the loss as if the micro-step had as many rows as TRL's.
        """
        trainer, self._inputs = self.trainer, None
        steps = planned_steps(trainer), shared_steps(trainer)
        ends_window, ends_step = ((trainer.window_step + 1) % number == 0 for number in steps)
        # A window that was planned before `micro_batching` changed may have no rows yet: they come.
        ends_window = ends_window and bool(self._trained)
        if not trainer.model.training:
            ends_window = ends_step = True
        elif ends_window:
            self._log()
        if ends_window:
            self._trained, self._left_out = [], []
        if ends_step:  # also where TRL's micro-batches stay: the largest of all is not the mean of each one's largest
            _log_engine_health(trainer, self._differences, self._ratios)
            self._differences, self._ratios = [], []
        if loss is None:  # its backward pass reaches no parameter; it has one, which DeepSpeed asks for
            return torch.zeros((), device=trainer.accelerator.device, requires_grad=True).clone()
        return loss if self._scale == 1 else loss * self._scale

    def _log(self) -> None:
        trainer = self.trainer
        metrics = trainer._metrics["train"]
        num_trained = len(self._trained)
        sums = trainer.accelerator.reduce(torch.stack(self._trained + self._left_out), reduction="sum")
        rows, tokens, entropies, negative_logps = sums.cpu().double().T
        if len(sums) > 1:
            weights = rows if trainer.importance_sampling_level == "sequence" else tokens
            for name in TOKEN_MEANS:
                if name in metrics:
                    weight = tokens if name == "kl" else weights
                    values = weight.new_tensor(metrics[name][-num_trained:])
                    mean = (values * weight[:num_trained]).sum() / weight.sum().clamp(min=1)
                    metrics[name][-num_trained:] = [mean.item()]
            if "clip_ratio/low_min" in metrics:
                zeros = [0.0] * bool(tokens[num_trained:].any())  # NaN is of rows without tokens
                for name, extreme in (("clip_ratio/low_min", min), ("clip_ratio/high_max", max)):
                    values = [value for value in metrics[name][-num_trained:] if not math.isnan(value)]
                    metrics[name][-num_trained:] = [extreme(values + zeros, default=math.nan)]
        sampled = trainer.args.entropy_estimator == "sampled"
        if len(sums) > 1 or sampled:
            mean = (negative_logps if sampled else entropies).sum() / tokens.sum().clamp(min=1)
            metrics["entropy"][-num_trained:] = [mean.item()]
        if trainer.temperature_schedule is not None:
            trainer.entropy_window.add(metrics["entropy"][-1], tokens.sum().item())


def _sums(mask: torch.Tensor, logps: torch.Tensor, entropies: torch.Tensor) -> torch.Tensor:
    """Rows, tokens, and the sums of entropies and of minus log-probs over the tokens, shape `(4,)`."""
    sums = [(values * mask).sum(dtype=torch.float32) for values in (entropies, -logps)]
    return torch.stack([mask.new_tensor(len(mask)).float(), mask.sum().float(), *sums])


def _log_engine_health(trainer, differences: list[torch.Tensor], ratios: list[torch.Tensor]) -> None:
    """
    Log how far vLLM, which sampled, is from the model that trains, over all processes.

    Args:
        trainer ([`E3GRPOTrainer`]): the trainer.
        differences (`list[torch.Tensor]`): absolute differences of the tokens' log-probs, NaN = unknown. Empty if no
            completions were compared.
        ratios (`list[torch.Tensor]`): importance sampling ratios of tokens or sequences. Empty without the correction.
    """
    for name, tensors in (("sampling_logp_difference", differences), ("importance_sampling_ratio", ratios)):
        if not tensors:
            continue
        values = torch.cat(tensors).float()
        values = values[~values.isnan()]
        smallest, largest = values.aminmax() if len(values) else (values.new_tensor(0.0),) * 2
        local = torch.stack([values.sum(), values.new_tensor(float(len(values))), smallest, largest])
        total, count, smallest, largest = trainer.accelerator.gather(local).view(-1, 4).unbind(dim=1)
        logged = {"mean": total.sum() / count.sum().clamp(min=1), "min": smallest.min(), "max": largest.max()}
        for statistic, value in logged.items():
            if (name, statistic) != ("sampling_logp_difference", "min"):
                trainer.add_metric(f"sampling/{name}/{statistic}", value.item())
