"""A vision-language model, and resuming it in the middle of a generation window."""

import numpy as np
import pytest
import torch
import transformers
from conftest import logged
from datasets import Dataset
from PIL import Image
from test_micro_batches import assert_same_gradients, train
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from trl import GRPOConfig, GRPOTrainer

from e3_trl import read_rollouts
from e3_trl.runs import checkpoint as checkpoints


TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}:{% endfor %}"
)


@pytest.fixture(scope="module")
def vlm_path(tmp_path_factory) -> str:
    """An untrained LLaVA of some thousand parameters with a character tokenizer."""
    path = str(tmp_path_factory.mktemp("vlm"))
    vocab = {token: index for index, token in enumerate(["<pad>", "<eos>", "<image>", *"abcdefghijklmnop :"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("<image>|."), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.image_token, fast.image_token_id = "<image>", vocab["<image>"]
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(**size | {"num_hidden_layers": 2}, image_size=32, patch_size=16)
    text = transformers.Qwen2Config(
        **size,
        vocab_size=len(vocab),
        num_key_value_heads=1,
        eos_token_id=vocab["<eos>"],
        pad_token_id=vocab["<pad>"],
        bos_token_id=None,
        initializer_range=0.2,
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=vocab["<image>"], image_seq_length=4
    )
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(path)
    transformers.LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer=fast,
        patch_size=16,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
        image_token="<image>",
    ).save_pretrained(path)
    return path


def pictures(number: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(number)]


def image_column() -> Dataset:
    prompts = [[{"role": "user", "content": f"say {letter}"}] for letter in "abcdefghijklmnop"]
    return Dataset.from_dict({"prompt": prompts, "image": pictures(16)})


def early_letters(completions, **kwargs):
    return [sum(letter in "abcd" for letter in completion[0]["content"]) / 4 for completion in completions]


@pytest.fixture
def make_vlm_trainer(make_trainer, vlm_path):
    def make(*args, **overrides):
        settings = {"model": vlm_path, "reward_funcs": early_letters, "train_dataset": image_column(), "max_steps": 8}
        return make_trainer(*args, **settings | overrides)

    return make


@pytest.mark.slow
def test_losses_are_trls(make_vlm_trainer):
    uniform = {"rollout_allocation": "uniform", "temperature_schedule": "constant"}
    mine = make_vlm_trainer(**uniform)
    mine.train()
    trls = make_vlm_trainer(GRPOTrainer, GRPOConfig)
    trls.train()
    assert logged(mine, "loss") == logged(trls, "loss")
    assert max(map(abs, logged(mine, "loss"))) > 0


@pytest.mark.parametrize("settings", [{"num_iterations": 2, "beta": 0.1}, {"engine": True}], ids=str)
def test_gradients_of_trimmed_rows_are_those_of_stock(vlm_path, tmp_path, settings):
    prompts = [[{"role": "user", "content": "say " + "abc" * (index % 4)}] for index in range(16)]
    dataset = Dataset.from_dict({"prompt": prompts, "image": pictures(16)})
    settings = {
        "train_dataset": dataset,
        "reward_funcs": early_letters,
        "tokens": (3, 20),
        "loss_type": "grpo",
    } | settings
    expected, stock = train(vlm_path, tmp_path / "stock", GRPOTrainer, **settings)
    found, trainer = train(vlm_path, tmp_path / "e3", **settings)
    assert_same_gradients(found, expected)
    for name in ("prompt_ids", "completion_ids"):
        widths = {batch[name].size(1) for batch in trainer._buffered_inputs}
        assert min(widths) < max(batch[name].size(1) for batch in stock._buffered_inputs), name
    for name in ("mean", "min", "max"):
        name = f"sampling/importance_sampling_ratio/{name}"
        assert logged(trainer, name) == pytest.approx(logged(stock, name), rel=1e-4)


def test_budgets_and_temperature_follow_images_too(make_vlm_trainer):
    trainer = make_vlm_trainer(num_generations_step=2)
    trainer.train()
    assert len({row["rollouts"] for row in read_rollouts(trainer.args.output_dir)}) > 1
    assert len(set(logged(trainer, "temperature"))) > 4


WINDOW = {
    "per_device_train_batch_size": 4,
    "steps_per_generation": 4,
    "gradient_accumulation_steps": 1,
    "save_strategy": "steps",
    "max_steps": 12,
}


def test_a_checkpoint_that_transformers_does_not_load_is_refused(make_vlm_trainer):
    """It saves LLaVA under older names; its Trainer, and TRL's, then go on with the weights they began with."""
    make_vlm_trainer(**WINDOW | {"max_steps": 4}, save_steps=4).train()
    resumed = make_vlm_trainer(**WINDOW, save_steps=4)
    with pytest.raises(
        ValueError, match="checkpoint-4 holds weights by other names than the model's, such as 'langua"
    ):
        resumed.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("step", [4, 6], ids=["between two windows", "inside a window"])
@pytest.mark.slow
def test_a_resumed_run_is_the_same_once_its_weights_are_loaded(make_vlm_trainer, monkeypatch, step):
    """TRL's own samples anew inside a window; here the completions are in the checkpoint, with their pixels."""
    whole = make_vlm_trainer(output_dir="whole", save_steps=step, **WINDOW)
    whole.train()
    assert "pixel_values" in whole._buffered_inputs[0]
    assert whole._buffered_inputs[0]["num_images"] == [1] * 4
    checkpoint = f"{whole.args.output_dir}/checkpoint-{step}"

    def load(self, *args):
        saved = transformers.LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
        self.model.load_state_dict(saved.state_dict())

    monkeypatch.setattr(checkpoints, "check_weights", lambda *args: None)
    monkeypatch.setattr(GRPOTrainer, "_load_from_checkpoint", load)
    resumed = make_vlm_trainer(output_dir="resumed", save_steps=step, **WINDOW)
    resumed.train(resume_from_checkpoint=checkpoint)
    for name in ("loss", "reward", "temperature", "entropy"):
        assert logged(resumed, name) == logged(whole, name), name
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
