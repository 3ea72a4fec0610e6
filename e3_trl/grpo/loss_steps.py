"""The micro-steps of the loss: what is computed in one of them, and logged of all of a window together."""

import math
from collections.abc import Callable

import torch

from .importance import importance_sampling_ratio
from .micro_batches import needs_old_logps, planned_steps, shared_steps
from .scoring import answered, forward, is_planned, loss_mask, score


# What TRL logs per micro-batch as a mean over its tokens, of which rows that are left out have the value 0.
TOKEN_MEANS = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "cispo_clip_ratio", "kl")


class LossSteps:
    """
    TRL's loss, micro-step by micro-step. The forward pass comes before it, and TRL gets its outcome where it asks for
    log-probs: so the old log-probs and the importance of what vLLM sampled, for which TRL makes passes of their own,
    are in the micro-batch when the loss begins. And what is logged is over the tokens of a whole window: micro-batches
    of a plan have rows of different lengths, so the mean of their means is no mean.

    Args:
        trainer ([`FastGRPOTrainer`]): the trainer.

    Attributes:
        estimates_entropy (`bool`):
            Whether the entropy that is logged is the mean of minus the log-probs of the sampled tokens; else it is
            that of the policy at each token. Rows that are left out then need no forward pass where the engine gave
            their log-probs.
        entropy_listeners (`list[Callable[[float, float], None]]`):
            What is told each window's mean entropy in nats, and the number of its tokens.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.estimates_entropy = False
        self.entropy_listeners: list[Callable[[float, float], None]] = []
        self.reset()

    def reset(self) -> None:
        """Forget a window of which an interrupted run has left a part."""
        # Per micro-step: rows, tokens, sum of entropies, of -log-probs.
        self._trained: list[torch.Tensor] = []
        self._left_out: list[torch.Tensor] = []
        self._differences: list[torch.Tensor] = []
        self._ratios: list[torch.Tensor] = []

    def compute(self, model: torch.nn.Module, inputs: dict, trl_loss: Callable) -> torch.Tensor:
        """
        The loss of a micro-step, which may have no rows to train on, and rows that are scored for the log alone.

        Args:
            model (`torch.nn.Module`): the policy, as transformers' training loop hands it on.
            inputs (`dict`): the micro-batch.
            trl_loss (`Callable`): TRL's loss of model and micro-batch.

        Returns:
            `torch.Tensor`: the loss as if the micro-step had as many rows as TRL's.
        """
        if "left_out" in inputs:
            self._score_left_out(inputs["left_out"])
        loss = None
        if "completion_ids" in inputs:
            aux_loss = self.trainer.aux_loss_enabled
            outputs = forward(self.trainer, model, inputs, compute_entropy=True, compute_aux_loss=aux_loss)
            self._observe(inputs, *(output.detach() for output in outputs[:2]))
            with answered(self.trainer, lambda *args, **kwargs: outputs):
                loss = trl_loss(model, inputs)
        return self._end(loss, inputs.get("loss_scale", 1.0))

    def _score_left_out(self, rows: dict) -> None:
        """Those of an optimizer step after the first are compared with no engine: the policy is another by then."""
        mask = loss_mask(rows)
        if self.estimates_entropy and "sampling_per_token_logps" in rows:
            logps = torch.nan_to_num(rows["sampling_per_token_logps"])
            entropies = torch.zeros_like(logps)
        else:
            logps, entropies = score(self.trainer, rows)
            self._compare(rows, logps)
        self._left_out.append(_sums(mask, logps, entropies))

    def _observe(self, inputs: dict, logps: torch.Tensor, entropies: torch.Tensor) -> None:
        """Take the log-probs and entropies of shape `(B, T)` that the loss is made of next."""
        self._trained.append(_sums(loss_mask(inputs), logps, entropies))
        if not is_planned(self.trainer) or "old_per_token_logps" not in inputs:
            self.remember(inputs, logps)

    def remember(self, inputs: dict, logps: torch.Tensor) -> None:
        """
        Note the log-probs of rows under the policy that sampled them: for later steps, once it has changed, and for
        the importance of what vLLM sampled.
        """
        if needs_old_logps(self.trainer) and is_planned(self.trainer):
            inputs["old_per_token_logps"] = logps
        self._compare(inputs, logps)

    def _compare(self, inputs: dict, logps: torch.Tensor) -> None:
        """How far the engine's log-probs of the rows are from the policy's, if it is still the one that sampled."""
        trainer = self.trainer
        if "sampling_per_token_logps" not in inputs or "importance_sampling_ratio" in inputs:
            return
        if trainer.evaluation is None and trainer.state.global_step != trainer.sampled_step:
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

    def _end(self, loss: torch.Tensor | None, scale: float) -> torch.Tensor:
        """End the micro-step, the window's last with what is logged; a loss of `None` is of no rows."""
        trainer = self.trainer
        steps = planned_steps(trainer), shared_steps(trainer)
        ends_window, ends_step = ((trainer.window_step + 1) % number == 0 for number in steps)
        # A window that was planned before `micro_batching` changed may have no rows yet: they come.
        ends_window = ends_window and bool(self._trained)
        if trainer.evaluation is not None:
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
        return loss if scale == 1 else loss * scale

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
        if len(sums) > 1 or self.estimates_entropy:
            mean = (negative_logps if self.estimates_entropy else entropies).sum() / tokens.sum().clamp(min=1)
            metrics["entropy"][-num_trained:] = [mean.item()]
        for listener in self.entropy_listeners:
            listener(metrics["entropy"][-1], tokens.sum().item())


def _sums(mask: torch.Tensor, logps: torch.Tensor, entropies: torch.Tensor) -> torch.Tensor:
    """Rows, tokens, and the sums of entropies and of minus log-probs over the tokens, shape `(4,)`."""
    sums = [(values * mask).sum(dtype=torch.float32) for values in (entropies, -logps)]
    return torch.stack([mask.new_tensor(len(mask)).float(), mask.sum().float(), *sums])


def _log_engine_health(trainer, differences: list[torch.Tensor], ratios: list[torch.Tensor]) -> None:
    """
    Log how far vLLM, which sampled, is from the model that trains, over all processes.

    Args:
        trainer ([`FastGRPOTrainer`]): the trainer.
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
