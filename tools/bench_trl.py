"""TRL's GRPOTrainer as a contender of tools/bench.py: stock model, same prompts, as many tokens.

    pip install trl==1.16.0 accelerate datasets          # beside requirements.txt; the bench finds it

Its update holds all that lies between the responses and the end of the step: its rewards, its
second preparation of the pictures, the losses, one AdamW step. The preparation before the responses
is not counted.
"""

import tempfile

from datasets import Dataset, Features, Image, Value
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

import data
from formats.instances import open_image, question_of
from model import IMAGE_END, IMAGE_PAD, IMAGE_START
from tools import bench

# The chat of data.token_ids as a chat template: TRL writes the prompts by it, and gets the same tokens.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for c in m.content %}"
    f"{{% if c.type == 'image' %}}{IMAGE_START}{IMAGE_PAD}{IMAGE_END}"
    "{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Processor(Qwen3VLProcessor):
    """The stock one demands a video processor, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template)


def make_dataset(rows):
    """The bench's rows as TRL reads them."""
    prompts = []
    for row in rows:
        text = data.PROMPTS["lor"].replace("{Q}", question_of(row))
        prompts.append([{"role": "user", "content": text}])
    features = Features(
        {
            "prompt": [{"role": Value("string"), "content": Value("string")}],
            "image": Image(),
        }
    )
    images = [open_image(row) for row in rows]
    return Dataset.from_dict({"prompt": prompts, "image": images}, features)


def odd_tokens(completion_ids, **kwargs):
    """A reward that differs within a group."""
    return [sum(token % 2 for token in ids) for ids in completion_ids]


def turn(settings, samples, tokenizer, device, meter, banned, stop_ids):
    """GRPOTrainer on the bench's prompts, one step per list of samples."""

    class Trainer(GRPOTrainer):
        def _generate_single_turn(self, *words, **kwargs):
            with meter.phase("rollout"), bench.ending_at(self.model, settings, stop_ids):
                out = super()._generate_single_turn(*words, **kwargs)
            # All until the callback: rewards, losses, the optimizer.
            self.update = meter.phase("update")
            self.update.__enter__()
            return out

    class EndOfStep(TrainerCallback):
        def on_step_end(self, *words, **kwargs):
            trainer.update.__exit__(None, None, None)

    tokenizer.padding_side = "left"
    responses = settings.prompts * settings.group
    micro = settings.micro or responses
    image_processor = bench.make_tools(settings)[1]
    with tempfile.TemporaryDirectory() as folder:  # TRL reads the reference model from there
        stock = bench.make_model(settings, tokenizer, device, Qwen3VLForConditionalGeneration)
        stock.save_pretrained(folder)
        model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype="auto")
        config = GRPOConfig(
            folder,
            use_cpu=device.type == "cpu",
            bf16=device.type == "cuda",
            gradient_checkpointing=False,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=responses // micro,
            beta=0.01 * settings.kl,
            num_generations=settings.group,
            max_completion_length=settings.new_tokens,
            learning_rate=1e-6,
            generation_kwargs={"suppress_tokens": banned.tolist()},
            max_steps=len(samples),
            report_to=[],
            save_strategy="no",
            logging_steps=10**6,
            disable_tqdm=True,
            shuffle_dataset=False,
            seed=0,
        )
        trainer = Trainer(
            bench.freeze(model),
            odd_tokens,
            config,
            train_dataset=make_dataset(settings.rows),
            callbacks=[EndOfStep()],
            processing_class=Processor(image_processor, tokenizer, CHAT_TEMPLATE),
        )
        trainer.train()
