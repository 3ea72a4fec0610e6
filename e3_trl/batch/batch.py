"""One generation batch: everything that is known of it between the choice of its prompts and its advantages."""

from dataclasses import dataclass, field

import numpy as np
import torch

from .prompt_ids import PROMPT_ID, read_examples, without_id


@dataclass
class Round:
    """
    One call for completions. A batch has one, with dynamic sampling or a pilot several.

    Args:
        prompt_ids (`np.ndarray` of shape `(N,)`): prompt of each row, over all processes.
        examples (`list[dict]`): this process's rows, without their ids.
        lengths (`torch.Tensor` of shape `(N,)`): tokens that the model wrote in each row, once it is sampled.
        rewards (`torch.Tensor` of shape `(N, num_funcs)`): of each reward function, NaN = none, once it is scored.
        rollouts (`list` of N pairs of arrays): with `reuse_rollouts`, each row's tokens and their log-probs.
        num_reused (`int`): how many of these tokens were not sampled anew.
    """

    prompt_ids: np.ndarray
    examples: list[dict]
    lengths: torch.Tensor | None = None
    rewards: torch.Tensor | None = None
    rollouts: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list, repr=False)
    num_reused: int = 0


@dataclass
class GenerationBatch:
    """
    A generation batch while it is sampled and scored. The trainer makes one when the batch begins, hands it to each
    step of its pipeline ([`~e3_trl.batch.steps`]), and drops it when it has the advantages, or after an exception.

    N rows are trained on; M are sampled, of which dynamic sampling discards some. Both count over all processes, in
    the order of their ranks.

    Args:
        index (`int`): number of the generation batch in the run.
        process_index (`int`): rank of this process.
        num_processes (`int`): processes that share the batch.
        rounds (`list[Round]`): the first holds the prompts that the batch begins with.
        group_ids (`np.ndarray` of shape `(N,)`):
            Group of each row that is trained on: its prompt's id, or with dynamic sampling that of the first round's
            group at its place.
        dataset (`datasets.Dataset`, *optional*):
            What prompt ids are indices into. `None` = they number the groups of the run.
        kept (`np.ndarray` of shape `(N,)`, *optional*): sampled rows that are trained on. `None` = all.
        shaped_rewards (`torch.Tensor` of shape `(N, num_funcs)`): what the advantages are made of.
        advantages (`torch.Tensor` of shape `(N,)`): the outcome.
    """

    index: int
    process_index: int
    num_processes: int
    rounds: list[Round]
    group_ids: np.ndarray
    dataset: object | None = field(default=None, repr=False)
    kept: np.ndarray | None = None
    shaped_rewards: torch.Tensor | None = field(default=None, repr=False)
    advantages: torch.Tensor | None = field(default=None, repr=False)

    @classmethod
    def begin(cls, index: int, inputs: list[dict], num_generations: int, accelerator, dataset) -> "GenerationBatch":
        """
        The batch of these rows.

        Args:
            index (`int`): number of the generation batch in the run.
            inputs (`list[dict]`): this process's rows. They carry ids unless they come from a stream, or from an
                environment that makes the prompts.
            num_generations (`int`): rows of a prompt, where they carry none.
            accelerator (`Accelerator`): the processes that share the batch.
            dataset (`datasets.Dataset`): where they come from.
        """
        examples = [without_id(row) for row in inputs]
        if PROMPT_ID in inputs[0]:
            ids = torch.tensor([row[PROMPT_ID] for row in inputs], device=accelerator.device)
            prompt_ids = accelerator.gather(ids).cpu().numpy()
        else:
            num_groups = len(inputs) * accelerator.num_processes // num_generations
            prompt_ids, dataset = np.repeat(index * num_groups + np.arange(num_groups), num_generations), None
        rounds = [Round(prompt_ids, examples)]
        return cls(index, accelerator.process_index, accelerator.num_processes, rounds, prompt_ids, dataset)

    def begin_with(self, prompt_ids: np.ndarray) -> None:
        """Begin with these rows, which N have, in place of those that the dataloader brought."""
        self.group_ids = prompt_ids
        self.rounds = [self.make_round(prompt_ids)]

    @property
    def indexed(self) -> bool:
        """Whether prompt ids are indices into the dataset."""
        return self.dataset is not None

    @property
    def round(self) -> Round:
        """The newest round."""
        return self.rounds[-1]

    @property
    def examples(self) -> list[dict]:
        """This process's rows, as the batch begins with them."""
        return self.rounds[0].examples

    @property
    def share(self) -> slice:
        """This process's rows among the N."""
        return self.share_of(self.group_ids)

    def share_of(self, rows: np.ndarray) -> slice:
        """This process's part of rows of all processes."""
        size = len(rows) // self.num_processes
        return slice(self.process_index * size, (self.process_index + 1) * size)

    @property
    def prompt_ids(self) -> np.ndarray:
        """The prompts that the batch begins with, each once, in their order."""
        return self.group_ids[np.flatnonzero(np.r_[True, self.group_ids[1:] != self.group_ids[:-1]])]

    @property
    def sampled_ids(self) -> np.ndarray:
        """Prompt of each row that was sampled, shape `(M,)`."""
        return np.concatenate([one.prompt_ids for one in self.rounds])

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens that the model wrote in each row that was sampled, shape `(M,)`."""
        return torch.cat([one.lengths for one in self.rounds])

    @property
    def rewards(self) -> torch.Tensor:
        """Rewards of each row that was sampled, shape `(M, num_funcs)`."""
        if self.round.rewards is None:
            raise RuntimeError(
                "_calculate_rewards is overridden without a call of super(), so the rewards did not arrive where they "
                "are counted. Override score_round, which may change what super().score_round returns."
            )
        return torch.cat([one.rewards for one in self.rounds])

    def of_kept(self, values):
        """Those of the values of M sampled rows that belong to the N that are trained on."""
        return values if self.kept is None else values[self.kept]

    def make_round(self, prompt_ids: np.ndarray) -> Round:
        """A round with these prompts of the dataset, one for each of its rows, of which all processes have as many."""
        mine = prompt_ids[self.share_of(prompt_ids)]
        return Round(prompt_ids, read_examples(self.dataset, mine, list(self.examples[0])))

    def sampled(self, lengths: torch.Tensor, accelerator) -> None:
        """The newest round is sampled, with these lengths of this process's rows."""
        self.round.lengths = accelerator.gather(lengths)
