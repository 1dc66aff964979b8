"""The ids of special tokens, from whichever file of a checkpoint names them: none is made up, none is overlooked."""

import json

import pytest
import torch
from tokenizers import AddedToken, Tokenizer

from sparsed import chat, llada_generate, load_model, load_tokenizer
from sparsed.cli import main_dream, main_llada
from tests.helpers.checkpoints import refused, tiny_checkpoint
from tests.helpers.standins import EOS, tiny_llada
from tests.helpers.tiny_folders import BYTES, special_id, tiny_folder

MAIN = {"dream": main_dream, "llada": main_llada}
IDS = ("mask_token_id", "eos_token_id", "pad_token_id", "eot_token_id")


def edit(file, **changes):
    """Change keys of a JSON file; ... takes one away."""
    values = (json.loads(file.read_text()) if file.exists() else {}) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


@pytest.fixture
def folder(tmp_path, family):
    """A whole checkpoint whose config.json names no special id at all."""
    folder = tiny_folder(tmp_path / family, family)
    edit(folder / "config.json", **dict.fromkeys(IDS, ...))
    return folder


def loaded(folder):
    return load_model(folder, device="cpu").config


def stops(folder):
    return chat.stop_ids(loaded(folder), load_tokenizer(folder))


@pytest.mark.parametrize("written", [..., None], ids=["absent", "null"])
def test_ids_that_config_json_leaves_out_are_the_tokenizer_s(folder, family, written):
    edit(folder / "config.json", **dict.fromkeys(IDS, written))
    config = loaded(folder)
    assert config.mask_token_id == special_id(family, "<|mask|>" if family == "dream" else "<|mdm_mask|>")
    assert config.eos_token_id == config.pad_token_id == special_id(family, "<|endoftext|>")
    if family == "llada":
        assert config.eot_token_id == special_id(family, "<|eot_id|>")


def test_the_scripts_then_say_the_same(folder, family, tmp_path, capsys):
    words = ["--prompt_text", "Where is it?", "--seq_len", "32", "--steps", "4", "--block_size", "16"]
    words += ["--device", "cpu", "--quiet"]
    whole = tiny_folder(tmp_path / "whole", family)
    answers = []
    for path in (folder, whole):
        assert MAIN[family](["--model_path", str(path), *words, "--json", str(tmp_path / "record.json")]) == 0
        answers.append(json.loads((tmp_path / "record.json").read_text())["runs"][0])
    assert answers[0]["token_ids"] == answers[1]["token_ids"] and answers[0]["text"] == answers[1]["text"]


def test_the_first_file_that_names_an_id_wins_and_all_end_an_answer(folder, family):
    edit(folder / "generation_config.json", eos_token_id=[7, 8], pad_token_id=9, mask_token_id=10)
    config = loaded(folder)
    assert (config.mask_token_id, config.eos_token_id, config.pad_token_id) == (10, 7, 9)
    edit(folder / "config.json", eos_token_id=[11, 12], mask_token_id=13)
    config = loaded(folder)
    assert (config.mask_token_id, config.eos_token_id, config.pad_token_id) == (13, 11, 9)
    turn = special_id(family, "<|im_end|>" if family == "dream" else "<|eot_id|>")
    assert stops(folder) == {7, 8, 9, 11, 12, special_id(family, "<|endoftext|>"), turn}


def test_a_pad_that_the_tokenizer_alone_names_ends_an_answer(tmp_path):
    """DiffuCoder, whose config.json says <|endoftext|>."""
    folder = tiny_folder(tmp_path / "model", "dream", vocab_size=BYTES + 8)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("<|dlm_pad|>", special=True, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    edit(folder / "tokenizer_config.json", pad_token="<|dlm_pad|>")
    pad = tokenizer.token_to_id("<|dlm_pad|>")
    assert pad in stops(folder) and loaded(folder).pad_token_id == special_id("dream", "<|endoftext|>")
    assert chat.answer_length([65, 66, pad, 67], stops(folder)) == 2


@pytest.mark.parametrize("way", ["named", "<|mask|>", "<|mdm_mask|>", "<[MASK]>"])
def test_a_mask_is_known_by_its_name_or_by_its_text(tmp_path, way):
    folder = tiny_folder(tmp_path / "model", "dream")
    edit(folder / "config.json", mask_token_id=...)
    text = (folder / "tokenizer.json").read_text().replace("<|mask|>", "hole" if way == "named" else way)
    (folder / "tokenizer.json").write_text(text)
    if way == "named":
        refused(folder, "mask_token_id", "config.json", "generation_config.json", "tokenizer")
        edit(folder / "tokenizer_config.json", mask_token="hole")
    assert loaded(folder).mask_token_id == special_id("dream", "<|mask|>")


def test_without_a_mask_anywhere_the_line_says_where_it_belongs(dream_folder):
    edit(dream_folder / "config.json", mask_token_id=None)
    refused(dream_folder, str(dream_folder), "'mask_token_id'", "add the id to config.json")


def test_only_the_mask_must_be_there(family, tmp_path):
    folder = tiny_checkpoint(tmp_path / "model", family)
    edit(folder / "config.json", eos_token_id=..., pad_token_id=None, eot_token_id=...)
    config = loaded(folder)
    assert config.eos_token_id is config.pad_token_id is None and config.end_token_ids == ()
    assert getattr(config, "eot_token_id", None) is None


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", [-1, 1.5, True, "7", [], [7, None], [[7]], {}, 10**10], ids=str)
def test_what_is_no_id_is_named_with_its_file(dream_folder, file, value):
    edit(dream_folder / file, eos_token_id=value)
    refused(dream_folder, f"{file}: 'eos_token_id'", "whole number")


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_id_outside_of_the_vocabulary_is_named_with_its_file(dream_folder, file):
    """Unless another file has named the right one."""
    edit(dream_folder / "config.json", eos_token_id=...)
    edit(dream_folder / file, eos_token_id=151643)
    refused(dream_folder, f"{file}: 'eos_token_id' 151643 is outside the vocabulary of 97 ids")
    edit(dream_folder / "config.json", eos_token_id=EOS)
    assert loaded(dream_folder).eos_token_id == EOS


def test_the_gathered_ends_cannot_be_written_down(dream_folder):
    edit(dream_folder / "config.json", end_token_ids=None)
    refused(dream_folder, "'end_token_ids'")


def test_one_mask_only(dream_folder):
    edit(dream_folder / "config.json", mask_token_id=[96])
    refused(dream_folder, "config.json: 'mask_token_id'", "[96]")


def test_the_tokenizer_is_not_read_where_the_other_files_name_every_id(dream_folder):
    (dream_folder / "tokenizer.json").write_text("{")
    loaded(dream_folder)
    edit(dream_folder / "config.json", eos_token_id=None)
    refused(dream_folder, "tokenizer.json")


@pytest.mark.parametrize("option", ["logits_eos_inf", "confidence_eos_eot_inf"])
@pytest.mark.parametrize("missing", ["eos_token_id", "eot_token_id"])
def test_an_id_is_missed_only_by_the_option_that_needs_it(option, missing):
    model, ids = tiny_llada(**{missing: None}), torch.arange(12)[None]
    sizes = {"steps": 4, "gen_length": 4, "block_length": 4}
    assert torch.equal(llada_generate(model, ids, **sizes), llada_generate(tiny_llada(), ids, **sizes))
    if missing == "eot_token_id" and option == "logits_eos_inf":
        assert torch.equal(*(llada_generate(one, ids, **sizes, logits_eos_inf=True) for one in (model, tiny_llada())))
    else:
        with pytest.raises(ValueError, match=f"{option} needs the checkpoint's '{missing}'.*config.json"):
            llada_generate(model, ids, **sizes, **{option: True})
