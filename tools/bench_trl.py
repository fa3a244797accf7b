"""TRL's GRPOTrainer as a contender of bench.py: stock model, the same prompts, exactly as many tokens, one AdamW step.

    pip install trl==1.16.0 accelerate datasets, beside requirements.txt; then bench.py finds it

Its update holds what lies between the responses and the end of the step: its rewards, its second preparation of the
pictures, the losses, the optimizer. The preparation before the responses is not counted.
"""

import tempfile

from datasets import Dataset, Features, Image, Value
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

import data
from formats import instances
from model import IMAGE_END, IMAGE_PAD, IMAGE_START
from tools import bench

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    f"{IMAGE_START}{IMAGE_PAD}{IMAGE_END}{{% else %}}{{{{ c.text }}}}{{% endif %}}{{% endfor %}}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Processor(Qwen3VLProcessor):
    """The stock one demands a video processor, and that torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template)


def turn(settings, samples, tokenizer, device, meter, banned, stop):
    """GRPOTrainer on the same prompts: text that its chat template turns into the same tokens."""

    class Trainer(GRPOTrainer):
        def _generate_single_turn(self, *words, **kwargs):
            with meter.phase("rollout"), bench.ending_at(self.model, settings, stop):
                out = super()._generate_single_turn(*words, **kwargs)
            self.update = meter.phase(
                "update"
            )  # all until the callback: rewards, losses, the optimizer
            self.update.__enter__()
            return out

    class EndOfStep(TrainerCallback):
        def on_step_end(self, *words, **kwargs):
            trainer.update.__exit__(None, None, None)

    text = [data.PROMPTS["lor"].replace("{Q}", instances.question_of(row)) for row in settings.rows]
    dataset = Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": words}] for words in text],
            "image": [instances.open_image(row) for row in settings.rows],
        },
        Features(
            {"prompt": [{"role": Value("string"), "content": Value("string")}], "image": Image()}
        ),
    )
    tokenizer.padding_side, count = "left", settings.prompts * settings.group
    micro = settings.micro or count
    with tempfile.TemporaryDirectory() as folder:  # TRL reads the reference model from there
        bench.make_model(
            settings, tokenizer, device, Qwen3VLForConditionalGeneration
        ).save_pretrained(folder)
        config = GRPOConfig(
            folder,
            use_cpu=device.type == "cpu",
            bf16=device.type == "cuda",
            gradient_checkpointing=False,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=count // micro,
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
            bench.freeze(Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype="auto")),
            lambda completion_ids, **kwargs: [sum(i % 2 for i in ids) for ids in completion_ids],
            config,
            train_dataset=dataset,
            callbacks=[EndOfStep()],
            processing_class=Processor(bench.make_tools(settings)[1], tokenizer, CHAT),
        )
        trainer.train()
