"""Model folders: what does not fit together is one line, no code of a folder is run, no weight is trusted.

python -m pytest -q tests/test_loading.py
"""

import json
import math
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import ROWS, make_config, make_model, make_processor, make_tokenizer
from transformers import Qwen3VLForConditionalGeneration

import data
from engine import shared_prefix
from engine.checkpoint import load_model
from formats.errors import UserError
from model import REGION_TOKEN, SPECIAL_TOKENS, RegionVLM, token_rules


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder as sft.py leaves one."""
    folder = tmp_path_factory.mktemp("good")
    tokenizer = make_tokenizer()
    for part in (make_model(tokenizer, dtype=torch.float32), tokenizer, make_processor()):
        part.save_pretrained(folder)
    load_model(str(folder))
    return folder


def edit(name, change):
    """A damage: change(content) of a JSON file."""

    def damage(folder):
        content = json.loads((folder / name).read_text())
        content = change(content) or content
        (folder / name).write_text(json.dumps(content))

    return damage


def part_of_config(part, **fields):
    return edit("config.json", lambda config: config[part].update(fields))


def weights(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return damage


def put(name, text):
    return lambda folder: (folder / name).write_text(text)


def remove(name):
    return lambda folder: (folder / name).unlink()


def cut(name):
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def only_a_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def an_index(weight_map):
    def damage(folder):
        (folder / "model.safetensors").unlink()
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


def code(folder):
    """A model of its own kind, with code that leaves a mark."""
    (folder / "evil.py").write_text(f"open({str(folder / 'mark')!r}, 'w').write('run')\n")
    maps = {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoTokenizer": ["evil.T", None]}
    edit("config.json", lambda c: c.update(model_type="mine", auto_map=maps))(folder)


def code_of_a_tokenizer(folder):
    (folder / "evil.py").write_text(f"open({str(folder / 'mark')!r}, 'w').write('run')\n")
    edit(
        "tokenizer_config.json",
        lambda c: c.update(tokenizer_class="Mine", auto_map={"AutoTokenizer": ["evil.T", None]}),
    )(folder)


NORM = "model.language_model.norm.weight"
HEAD = "lm_head.weight"
DAMAGES = {
    "no folder": shutil.rmtree,
    "no config": remove("config.json"),
    "a config that is no JSON": put("config.json", "{"),
    "a config that is a list": put("config.json", "[]"),
    "another kind of model": edit("config.json", lambda c: c.update(model_type="llama")),
    "no kind of model": edit("config.json", lambda c: c.pop("model_type") and c),
    "code": code,
    "quantized": edit("config.json", lambda c: c.update(quantization_config={"bits": 4})),
    "no layers": part_of_config("text_config", num_hidden_layers=0),
    "a width that is a text": part_of_config("text_config", hidden_size="32"),
    "a depth below zero": part_of_config("vision_config", depth=-1),
    "another width": part_of_config("text_config", intermediate_size=48),
    "more layers than weights": part_of_config("text_config", num_hidden_layers=5),
    "no weights": remove("model.safetensors"),
    "weights cut off": cut("model.safetensors"),
    "weights that are no weights": put("model.safetensors", "x" * 99),
    "only a pickle": only_a_pickle,
    "an index that is a list": an_index([]),
    "an index to nowhere": an_index({NORM: "gone.safetensors"}),
    "an index out of the folder": an_index({NORM: "../../../etc/passwd"}),
    "a weight less": weights(lambda w: w.pop(NORM)),
    "a weight of another shape": weights(lambda w: w.update({NORM: torch.ones(3)})),
    "a NaN": weights(lambda w: w[NORM].fill_(math.nan)),
    "an infinity": weights(lambda w: w[NORM][:1].fill_(math.inf)),
    "no tokenizer": remove("tokenizer.json"),
    "an empty tokenizer": put("tokenizer.json", "{}"),
    "a tokenizer cut off": cut("tokenizer.json"),
    "a tokenizer of another model": lambda folder: make_tokenizer(
        SPECIAL_TOKENS[::-1]
    ).save_pretrained(folder),
    "a tokenizer without <mask>": lambda folder: make_tokenizer(
        SPECIAL_TOKENS[:-1]
    ).save_pretrained(folder),
    "no processor": remove("preprocessor_config.json"),
    "a processor with other patches": edit(
        "preprocessor_config.json", lambda c: c.update(patch_size=16)
    ),
    "a processor that merges otherwise": edit(
        "preprocessor_config.json", lambda c: c.update(merge_size=1)
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_one_line(name, good, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked a question"))
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    DAMAGES[name](folder)
    with pytest.raises(UserError) as error:
        load_model(str(folder))
    line = str(error.value)
    assert line.startswith(f"--model {folder}: ") and line.count("--model") == 1
    assert "\n" not in line and len(line) < 300 + len(str(folder))
    assert not (folder / "mark").exists()


HARMLESS = {
    "an attention that is not there": edit(
        "config.json", lambda c: c.update(attn_implementation="mine", _attn_implementation="mine")
    ),
    "code that is not asked for": edit(
        "config.json", lambda c: c.update(auto_map={"AutoConfig": "evil.C"})
    ),
    "code of a tokenizer": code_of_a_tokenizer,
    "a training argument of the pickle kind": put("training_args.bin", "x"),
    "no generation config": remove("generation_config.json"),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_has_no_say_changes_nothing(name, good, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    HARMLESS[name](folder)
    for one, other in zip(
        load_model(str(folder))[0].parameters(), load_model(str(good))[0].parameters(), strict=True
    ):
        assert torch.equal(one, other)
    assert not (folder / "mark").exists()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare", [0, 40])
def test_a_stock_embedding_with_and_without_a_spare_row_for_the_mask(spare, tied, tmp_path):
    tokenizer = make_tokenizer(SPECIAL_TOKENS[:-1])  # stock: no <mask>
    config = make_config(tokenizer)
    config.text_config.vocab_size = len(tokenizer) + spare
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = tied
    stock = Qwen3VLForConditionalGeneration(config)
    for part in (stock, tokenizer, make_processor()):
        part.save_pretrained(tmp_path)
    ours, with_mask, processor = load_model(str(tmp_path))
    rows = ours.get_input_embeddings().weight
    before = stock.get_input_embeddings().weight
    assert len(rows) == max(len(before), len(with_mask)) and len(with_mask) == len(tokenizer) + 1
    assert torch.equal(rows[: len(before)], before)
    assert ours.lm_head.weight.shape == rows.shape
    assert (ours.lm_head.weight is rows) == tied
    sample = data.encode(ROWS[0], with_mask, processor, train=True)
    batch = data.collate([sample], with_mask)
    batch.pop("loss_mask")
    assert with_mask.convert_tokens_to_ids(REGION_TOKEN) in sample["prompt"]
    assert ours(**batch).logits.isfinite().all()
    ours.save_pretrained(tmp_path / "again")
    with_mask.save_pretrained(tmp_path / "again")
    processor.save_pretrained(tmp_path / "again")
    again, _, _ = load_model(str(tmp_path / "again"))
    assert torch.equal(again.get_input_embeddings().weight, rows)


def test_ids_that_are_no_token_are_never_sampled():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|hold|>"], special_tokens=True)
    tokenizer.add_tokens(["</think>"])  # an added token, but a part of responses
    config = make_config(tokenizer, region_token_id=tokenizer.convert_tokens_to_ids(REGION_TOKEN))
    config.text_config.vocab_size = len(tokenizer) + 30
    model = RegionVLM(config)
    stop, banned = token_rules(model, tokenizer, "cpu")
    spare = set(range(len(tokenizer), len(tokenizer) + 30))
    hold, think = tokenizer.convert_tokens_to_ids(["<|hold|>", "</think>"])
    assert spare | {hold} <= set(banned.tolist()) and think not in banned
    assert tokenizer.eos_token_id in stop and tokenizer.eos_token_id not in banned


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_model_whose_logits_are_not_finite_is_one_line(temperature, good):
    model, tokenizer, processor = load_model(str(good))
    torch.nn.init.constant_(model.model.language_model.norm.weight, math.nan)
    stop, banned = token_rules(model, tokenizer, "cpu")
    sample = data.encode(ROWS[0], tokenizer, processor, train=False)
    prompts = data.collate([sample], tokenizer)
    with pytest.raises(UserError, match="logits are not finite"):
        shared_prefix.rollout(model, prompts, 2, 3, stop, banned, temperature)
