"""Configuration of [`E3GRPOTrainer`]: the settings of E3, beside those of [`FastGRPOConfig`] and TRL."""

from dataclasses import dataclass, field
from typing import ClassVar

from .checks import COMBINATIONS, SETTINGS
from .grpo.config import FastGRPOConfig
from .method.budget import RolloutBudgetSchedule
from .method.budget_rules import ROUND_RULES, RULES, load_rule
from .method.temperature import TemperatureSchedule


@dataclass
class E3GRPOConfig(FastGRPOConfig):
    r"""
    Configuration class for the [`E3GRPOTrainer`].

    This class includes only the parameters that are specific to E3; their defaults are the paper's
    (https://huggingface.co/papers/2505.18573). All others are those of [`FastGRPOConfig`] and [`~trl.GRPOConfig`],
    with TRL's defaults: the paper's objective also needs `loss_type="grpo"`.

    Parameters:
        > Parameters that control the dynamic rollout budget

        rollout_allocation (`str`, *optional*, defaults to `"rank"`):
            How a batch's rollouts are split over its prompts. In all the total is constant and the bounds hold.

            - `"rank"`: by difficulty (Algorithm 1).
            - `"uniform"`: every prompt gets `num_generations`, as in TRL.
            - `"variance"`, `"knapsack"`, `"coba"`: by success rate ([`~e3_trl.method.budget_rules.RULES`]).
            - `"pilot"`: `num_generations_min` of each prompt first, then the rest of those that were not all right
              (https://huggingface.co/papers/2605.26606), from the first batch on and with two calls for completions.
              For text without tools.
            - `"vigor"`: the same first, then in three rounds the rest of those whose rewards vary most
              (https://huggingface.co/papers/2607.22002).
            - The dotted path of a function of what is known of the prompts
              ([`~e3_trl.method.difficulty.PromptStats`]) and the bounds ([`~e3_trl.method.budget_rules.Bounds`]) that
              returns `(B,)` integers.
        success_decay (`float`, *optional*, defaults to `1.0`):
            What a prompt's counts of rollouts and rewards are multiplied by after each pass. 1 = its mean reward over
            the whole run, as in the paper; less = older rollouts count less.
        success_prior (`float`, *optional*, defaults to `0.0`):
            Right and wrong rollouts that a prompt is taken to have had before its first. Above 0 its mean reward is
            that of a Beta posterior, so a prompt that was never solved is not taken for hopeless.
        num_generations_min (`int`, *optional*):
            Limit that \\( G_{min} \\), the fewest rollouts of a prompt, falls to. If `None`, half of `num_generations`
            and at least 2: 4 of 8, as in the paper.
        num_generations_max (`int`, *optional*):
            Limit that \\( G_{max} \\), the most rollouts of a prompt, rises to. If `None`, half as many again as
            `num_generations`: 12 of 8, as in the paper.
        num_generations_step (`int`, *optional*, defaults to `2`):
            How far either bound moves after each pass over the dataset, starting at `num_generations`.
        difficulty_column (`str`, *optional*):
            Column of the dataset with a starting difficulty in [0, 1], 1 = hardest. It stands for prompts that have
            not been sampled yet; with it, budgets differ from the first pass on, within bounds one step wide.
        difficulty_reward_func (`str`, *optional*):
            Name of the reward function, reward model (the last part of its name) or environment class whose reward is
            the correctness signal: it makes up a prompt's difficulty, and a rollout counts as correct above 0.5. If
            `None`, the first reward function.

        > Parameters that control what the model computes

        reuse_rollouts (`bool`, *optional*, defaults to `False`):
            Whether a prompt's completions begin with those of the pass before, as far as the policy of today would
            still write them, token after token, and only the rest is sampled (SPEC-RL,
            https://huggingface.co/papers/2509.23232); not those of prompts that were never solved. The beginnings are
            not distributed exactly as the policy is. For text without tools, sampled without `top_k`, `top_p`,
            `min_p`, `repetition_penalty`, `generation_kwargs` and structured outputs; not under ZeRO-3. A checkpoint
            grows by 8 bytes for each token of a pass.
        entropy_estimator (`str`, *optional*, defaults to `"exact"`):
            Entropy that is logged, and that the temperature schedule follows. `"exact"` = of the policy at each token,
            `"sampled"` = minus the log-prob of each token that was sampled, an unbiased estimate of its mean: rows
            that cannot change the gradient then need no forward pass where vLLM has given their log-probs. Not with
            `top_k`, `top_p`, `min_p` or `repetition_penalty`, with which tokens are not sampled from the policy.

        > Parameters that control the rewards of a batch

        advantage_scale (`str`, *optional*, defaults to `"std"`):
            What the difference of a reward and its group's mean is divided by: the group's `"std"` (Eq. 2), or its
            `"mean"`, as in MaxRL (https://huggingface.co/papers/2602.02710), which gives prompts that are seldom
            solved more weight. For rewards of 0 and 1, or others that are not negative. Gradients have another size
            with it, so it wants a learning rate of its own.
        length_bias_coef (`float`, *optional*, defaults to `0.0`):
            \\( \mu \\): a correct completion of \\( l \\) tokens loses \\( \mu l / (1 + \mu l) \\) of its reward if
            its prompt is easy. Difficulty is counted before, and dynamic sampling drops groups before. In the
            authors' code, with 0.001, not in the paper.
        length_bias_fraction (`float`, *optional*, defaults to `0.1`):
            Part of a batch's prompts, the easiest, that the length bias is for. Prompts that tie for the last places
            share them.
        dynamic_sampling (`bool`, *optional*, defaults to `False`):
            Whether groups whose rewards are all equal are dropped and further prompts sampled in their place, as in
            DAPO (https://huggingface.co/papers/2503.14476). For text without tools.
        max_resample_rounds (`int`, *optional*, defaults to `10`):
            How often a batch is sampled anew at most. Each round costs as many rollouts as the batch has.

        > Parameters of PREPO (https://huggingface.co/papers/2511.00794)

        prompt_selection_ratio (`float`, *optional*, defaults to `1.0`):
            Part of the prompts that is sampled, at least 1 / `num_generations`; 0.2 in PREPO. Each batch's prompts are
            chosen by perplexity under the current policy from 1 / `prompt_selection_ratio` times as many, low early
            in the run and high late. 1 = all are sampled. For text without tools. Perplexity follows a prompt's
            length and language too; the prompts that dynamic sampling adds are not chosen by it.
        prompt_selection (`str`, *optional*, defaults to `"perplexity"`):
            What they are chosen by: `"perplexity"`, or `"partly_solved"` = by the probability that some of their
            rollouts will be right and some wrong, predicted from the passes before (DPS,
            https://huggingface.co/papers/2603.10887), which costs no forward pass.
        entropy_weighting (`bool`, *optional*, defaults to `False`):
            Whether a completion's advantage is multiplied by its mean entropy relative to the batch's. For text.
            Differs from PREPO: with `beta > 0` the KL term is not weighted.

        > Parameters that control the temperature schedule

        temperature_schedule (`str`, *optional*, defaults to `"entropy"`):
            `"entropy"` = the temperature holds the policy's entropy at a target (Eq. 4), `"constant"` = as in TRL.
        temperature_target_entropy (`float`, *optional*):
            Target entropy in nats per token. If `None`, it is measured on the first `temperature_warmup_steps`
            batches.
        temperature_warmup_steps (`int`, *optional*, defaults to `1`):
            Number of batches that the target entropy is measured on.
        temperature_target_fraction (`float`, *optional*, defaults to `1.0`):
            The target is this part of the entropy that was measured. Below 1, entropy may fall part of the way.
        temperature_min (`float`, *optional*, defaults to `0.1`):
            The schedule goes no lower.
        temperature_max (`float`, *optional*, defaults to `2.0`):
            The schedule goes no higher.
        temperature_spread (`float`, *optional*, defaults to `0.0`):
            \\( s \\): a prompt of difficulty \\( k \\) is sampled, and its log-probs are computed, at \\( \tau (1 +
            s (k - 1/2)) \\), within `temperature_min` and `temperature_max`; at \\( \tau \\) until it has a
            difficulty. 0 = at \\( \tau \\), as in the paper, whose Limitations ask for this. For text without tools,
            sampled by transformers or a colocated vLLM, and LM heads without bias and softcap.
        annealing_start (`float`, *optional*, defaults to `0.6`):
            Fraction of the run's steps after which the target entropy falls (Eq. 5). `None` = it stays.
        annealing_factor (`float`, *optional*, defaults to `0.9`):
            \\( \eta \\): part of the target entropy that is left at the last step.
    """

    # Parameters that control the dynamic rollout budget
    rollout_allocation: str = field(
        default="rank",
        metadata={
            "help": "How a batch's rollouts are split over its prompts: 'rank' = by difficulty (Algorithm 1), "
            "'uniform' = every prompt gets `num_generations`, 'pilot' = part first, the rest where that was not all "
            f"right, 'vigor' = then in rounds where rewards vary most, another of {[*RULES]}, or the dotted path "
            "of a rule."
        },
    )
    success_decay: float = field(
        default=1.0,
        metadata={"help": "What a prompt's counts of rollouts and rewards are multiplied by after each pass."},
    )
    success_prior: float = field(
        default=0.0,
        metadata={"help": "Right and wrong rollouts that a prompt is taken to have had before its first."},
    )
    num_generations_min: int | None = field(
        default=None,
        metadata={
            "help": "Limit that the fewest rollouts of a prompt fall to, pass by pass. None = half of "
            "`num_generations`, and at least 2."
        },
    )
    num_generations_max: int | None = field(
        default=None,
        metadata={
            "help": "Limit that the most rollouts of a prompt rise to, pass by pass. None = half as many again as "
            "`num_generations`."
        },
    )
    num_generations_step: int = field(
        default=2, metadata={"help": "How far either bound moves after each pass, starting at `num_generations`."}
    )
    difficulty_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the dataset with a starting difficulty in [0, 1], 1 = hardest, for prompts that have "
            "not been sampled yet. With it, budgets differ from the first pass on."
        },
    )
    difficulty_reward_func: str | None = field(
        default=None,
        metadata={
            "help": "Name of the reward function, reward model or environment class whose reward is the correctness "
            "signal that makes up a prompt's difficulty. If None, the first reward function."
        },
    )

    # Parameters that control what the model computes
    reuse_rollouts: bool = field(
        default=False,
        metadata={
            "help": "Whether completions begin with those of the pass before, as far as today's policy would still "
            "write them, and only the rest is sampled."
        },
    )
    entropy_estimator: str = field(
        default="exact",
        metadata={
            "help": "Entropy that is logged and followed: 'exact' = of the policy at each token, 'sampled' = minus "
            "the log-prob of each sampled token.",
            "choices": ["exact", "sampled"],
        },
    )

    # Parameters that control the rewards of a batch
    advantage_scale: str = field(
        default="std",
        metadata={
            "help": "What a reward's difference to its group's mean is divided by: 'std' (Eq. 2), or 'mean', as in "
            "MaxRL, for rewards that are not negative.",
            "choices": ["std", "mean"],
        },
    )
    length_bias_coef: float = field(
        default=0.0,
        metadata={"help": "mu: a correct completion of l tokens of an easy prompt loses mu*l/(1+mu*l) of its reward."},
    )
    length_bias_fraction: float = field(
        default=0.1, metadata={"help": "Part of a batch's prompts, the easiest, that the length bias is for."}
    )
    dynamic_sampling: bool = field(
        default=False,
        metadata={
            "help": "Whether groups whose rewards are all equal are dropped and further prompts sampled in their "
            "place, as in DAPO."
        },
    )
    max_resample_rounds: int = field(
        default=10, metadata={"help": "How often dynamic sampling samples a batch anew at most."}
    )

    # Parameters of PREPO
    prompt_selection_ratio: float = field(
        default=1.0,
        metadata={
            "help": "Part of the prompts that is sampled, chosen by perplexity, low early in the run and high late. "
            "1 = all."
        },
    )
    prompt_selection: str = field(
        default="perplexity",
        metadata={
            "help": "What the prompts that are sampled are chosen by, where not all are: 'perplexity' (PREPO), or "
            "'partly_solved', as predicted from the passes before (DPS).",
            "choices": ["perplexity", "partly_solved"],
        },
    )
    entropy_weighting: bool = field(
        default=False,
        metadata={
            "help": "Whether a completion's advantage is multiplied by its mean entropy relative to the batch's."
        },
    )

    # Parameters that control the temperature schedule
    temperature_schedule: str = field(
        default="entropy",
        metadata={
            "help": "'entropy' = the temperature holds the policy's entropy at a target (Eq. 4), 'constant' = it "
            "stays at `temperature`.",
            "choices": ["entropy", "constant"],
        },
    )
    temperature_target_entropy: float | None = field(
        default=None,
        metadata={
            "help": "Target entropy in nats per token. If None, measured on the first `temperature_warmup_steps` "
            "batches."
        },
    )
    temperature_warmup_steps: int = field(
        default=1, metadata={"help": "Number of batches that the target entropy is measured on."}
    )
    temperature_target_fraction: float = field(
        default=1.0, metadata={"help": "The target is this part of the entropy that was measured."}
    )
    temperature_min: float = field(default=0.1, metadata={"help": "The temperature schedule goes no lower."})
    temperature_max: float = field(default=2.0, metadata={"help": "The temperature schedule goes no higher."})
    temperature_spread: float = field(
        default=0.0,
        metadata={"help": "s: a prompt of difficulty k has the temperature tau * (1 + s * (k - 1/2)). 0 = tau."},
    )
    annealing_start: float | None = field(
        default=0.6,
        metadata={"help": "Fraction of the run's steps after which the target entropy falls (Eq. 5). None = never."},
    )
    annealing_factor: float = field(
        default=0.9, metadata={"help": "Part of the target entropy that is left at the last step."}
    )

    fixed_settings: ClassVar[tuple[str, ...]] = (
        *FastGRPOConfig.fixed_settings, "prompt_selection_ratio",
    )  # fmt: skip
    _settings: ClassVar = [*FastGRPOConfig._settings, *SETTINGS]
    _combinations: ClassVar = [*FastGRPOConfig._combinations, *COMBINATIONS]

    def __post_init__(self):
        super().__post_init__()
        load_rule(self.rollout_allocation)
        if self.gives_budgets:
            schedule = self.make_budget_schedule()
            self.num_generations_min = schedule.num_generations_min  # what None stands for
            self.num_generations_max = schedule.num_generations_max
        if self.temperature_schedule == "entropy":
            try:
                self.make_temperature_schedule(vocab_size=3)
            except ValueError as error:
                own_names = (
                    "target_entropy",
                    "warmup_steps",
                    "target_fraction",
                )  # which here are temperature_target_entropy and so on
                raise ValueError("temperature_" * str(error).startswith(own_names) + str(error)) from error

    @property
    def gives_budgets(self) -> bool:
        """Whether prompts may get other numbers of rollouts than `num_generations`."""
        return self.rollout_allocation != "uniform"

    @property
    def predicts_solved(self) -> bool:
        """Whether it is predicted which prompts will be partly solved: for their choice, or a rule of the user's."""
        return self.prompt_selection == "partly_solved" or self.rollout_allocation not in {**RULES, **ROUND_RULES}

    @property
    def num_candidates(self) -> int:
        """Prompts that those of one generation batch are chosen from, themselves among them."""
        return round(self.generation_batch_size // self.num_generations / self.prompt_selection_ratio)

    def make_budget_schedule(self) -> RolloutBudgetSchedule:
        """The bounds of the rollout budget as configured; `ValueError` if they are out of order."""
        return RolloutBudgetSchedule(
            self.num_generations,
            self.num_generations_min,
            self.num_generations_max,
            self.num_generations_step,
            starts_ranked=self.difficulty_column is not None,
        )

    def make_temperature_schedule(self, vocab_size: int) -> TemperatureSchedule:
        """The temperature schedule as configured; `ValueError` if a setting is out of range."""
        return TemperatureSchedule(
            vocab_size=vocab_size,
            temperature=self.temperature,
            target_entropy=self.temperature_target_entropy,
            warmup_steps=self.temperature_warmup_steps,
            target_fraction=self.temperature_target_fraction,
            annealing_start=self.annealing_start,
            annealing_factor=self.annealing_factor,
            temperature_min=self.temperature_min,
            temperature_max=self.temperature_max,
        )
