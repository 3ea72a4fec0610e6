"""An optimizer that goes on from a checkpoint, with the settings that the run has now."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.optim.lr_scheduler import LambdaLR


# Of a parameter group, what the arguments say. Some optimizers keep state of their own beside it.
_CONFIGURED = ("weight_decay", "betas", "eps", "initial_lr")


def takes_changes(trainer) -> bool:
    """Whether [`settings_kept`] can do what it says: DeepSpeed, for one, has loaded its optimizer long before."""
    return isinstance(trainer.lr_scheduler, LambdaLR) and not trainer.is_deepspeed_enabled


@contextmanager
def settings_kept(trainer) -> Iterator[None]:
    """
    Inside, optimizer and schedule are loaded from a checkpoint, which brings its learning rate, weight decay and betas
    along. Those of the run's own settings take their places, the learning rate where the schedule is by then.
    """
    if not takes_changes(trainer):
        yield
        return
    optimizer, lr_scheduler = trainer.optimizer, trainer.lr_scheduler
    configured = [{name: group[name] for name in _CONFIGURED if name in group} for group in optimizer.param_groups]
    yield
    for index, (group, own) in enumerate(zip(optimizer.param_groups, configured, strict=True)):
        group.update(own)
        lr_scheduler.base_lrs[index] = group["initial_lr"]
        # As LambdaLR computes it, to the last digit. `max_steps` may have changed too.
        group["lr"] = group["initial_lr"] * lr_scheduler.lr_lambdas[index](lr_scheduler.last_epoch)
        lr_scheduler.get_last_lr()[index] = group["lr"]  # what is logged
