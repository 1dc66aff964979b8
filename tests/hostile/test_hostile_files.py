"""Files made to do harm: each is refused in one short line, or is harmless; none is executed or overwritten."""

import dataclasses
import json
import math
import os
import random
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models

from sparsed import chat
from sparsed.chat import encode_chat
from sparsed.cli import main_dream, main_llada
from sparsed.cli.arguments import LONGEST_PROMPT
from sparsed.console.files import LARGEST_FILE
from sparsed.models import load_tokenizer
from sparsed.models.common import LARGEST, MOST_LAYERS
from sparsed.models.dream import DreamConfig
from sparsed.models.files import LARGEST_TEXT
from sparsed.models.llada import LLaDAConfig
from sparsed.models.tokenizer import LARGEST_ID
from tests.helpers.tiny_folders import tiny_folder

MAIN = {"dream": main_dream, "llada": main_llada}
SHORT = ["--seq_len", "32", "--steps", "4", "--block_size", "16", "--device", "cpu", "--quiet"]
ESCAPE = "\x1b]0;owned\x07\x9b2J\x7f"  # sets a terminal's title, clears its screen


@pytest.fixture
def folder(tmp_path, family):
    return tiny_folder(tmp_path / family, family)


@pytest.fixture
def call(folder, family, capsys):
    """Run the family's script on the folder; returns (exit code, stdout, stderr)."""

    def run(*words):
        prompt = [] if "--prompt_file" in words else ["--prompt_text", "Where is it?"]
        code = MAIN[family](["--model_path", str(folder), *SHORT, *prompt, *map(str, words)])
        return code, *capsys.readouterr()

    return run


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(result, *named, codes=(2,)):
    """The call must have ended in one printable line of bounded length that holds every one of `named`."""
    code, out, err = result
    assert code in codes and out == ""
    assert err.count("\n") == 1 and err.rstrip("\n").isprintable() and len(err) < 2200
    for part in named:
        assert part in err, err


# ----------------------------------------------------------------------------------------------------------- weights


def flipped(data, places):
    copy = bytearray(data)
    for place in places:
        copy[place // 8] ^= 1 << place % 8
    return bytes(copy)


def test_a_flipped_bit_in_the_header_of_the_weights(folder, call):
    file = folder / "model.safetensors"
    data, answer = file.read_bytes(), call()
    ends = 64 + 8 * int.from_bytes(data[:8], "little")
    for place in [*range(64), *random.Random(1).sample(range(64, ends), 200)]:
        file.write_bytes(flipped(data, [place]))
        result = call()
        if result != answer:  # a name may change its case where nobody reads it
            refused(result, "--model_path", "safetensors" if place < 64 else "")


def test_flipped_bits_in_the_weights_give_other_numbers_or_one_line(folder, call):
    """They may be read as numbers, if other ones; those that are not finite are refused."""
    file = folder / "model.safetensors"
    data, draw = file.read_bytes(), random.Random(2)
    starts = 64 + 8 * int.from_bytes(data[:8], "little")
    codes = []
    for _ in range(40):
        file.write_bytes(flipped(data, draw.sample(range(starts, 8 * len(data)), 40)))
        result = call()
        codes.append(result[0])
        if result[0]:
            refused(result, "not finite")
    assert set(codes) == {0, 2}


def test_weights_may_be_a_link_out_of_the_folder(folder, call, tmp_path):
    """As in the hub's cache, whose snapshots are folders of links."""
    (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    assert call()[0] == 0


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX pipes")
@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
)
def test_a_pipe_in_the_folder_is_not_waited_for(name, folder, call):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refused(call(), "--model_path", name)


# ------------------------------------------------------------------------------------------------------------ config


@pytest.mark.parametrize("value", [-1, 10**400, math.nan, math.inf, "12", [], {}], ids=lambda value: str(value)[:9])
def test_no_key_of_a_config_takes_an_absurd_value(value, family, folder, call):
    file = folder / "config.json"
    config = file.read_text()
    for field in dataclasses.fields(DreamConfig if family == "dream" else LLaDAConfig):
        edit(file, **{field.name: value})
        refused(call(), "--model_path", field.name)
        file.write_text(config)


@pytest.mark.parametrize("value", [0, 10**9])
def test_no_size_of_a_config_may_be_zero_or_huge(value, folder, call):
    """A size that only the weights can contradict costs no memory before it is contradicted, or found too large."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    sizes = [name for name in config if name.endswith(("_size", "layers", "heads", "d_model"))]
    assert len(sizes) >= 6
    for name in sizes:
        edit(file, **{name: value})
        refused(call(), codes=(2, 3) if value else (2,))
        file.write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["rope_theta", "rms_norm_eps"])
def test_a_zero_that_would_be_divided_by(name, folder, call):
    edit(folder / "config.json", **{name: 0})
    refused(call(), "--model_path", name, "positive")


def test_a_mask_outside_of_the_vocabulary(folder, call):
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    edit(folder / "config.json", mask_token_id=vocabulary)
    refused(call(), "mask_token_id", f"vocabulary of {vocabulary} ids")


def test_a_tokenizer_of_more_ids_than_the_model(folder, call):
    """They would be read from beyond the embedding's end."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(f"<{number}>") for number in range(50)] + [AddedToken("<far>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    edit(folder / "tokenizer_config.json", chat_template="<far>{{ messages[0]['content'] }}")
    refused(call(), "vocabulary")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_text_file_of_a_size_that_no_checkpoint_has(name, folder, call):
    with open(folder / name, "wb") as file:
        file.truncate(LARGEST_TEXT + 1)
    refused(call(), "--model_path", name, f"more than the {LARGEST_TEXT}")


def test_a_token_id_that_a_library_would_count_up_to(folder, call):
    Tokenizer(models.WordLevel({"[UNK]": LARGEST_ID}, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    refused(call(), "--model_path", f"not below {LARGEST_ID}")


def test_the_limits_are_those_that_security_md_names():
    text = (Path(__file__).parents[2] / "SECURITY.md").read_text()
    mebibytes = [f"{size >> 20} MiB |" for size in (LONGEST_PROMPT, LARGEST_TEXT, LARGEST_FILE)]
    template = f"{chat.TEMPLATE_SECONDS:.0f} seconds, {chat.TEMPLATE_CHARACTERS:,} characters"
    for limit in (*mebibytes, template, f"{LARGEST:,}; layers {MOST_LAYERS:,} |", f"{LARGEST_ID - 1:,} |"):
        assert limit in text


# ------------------------------------------------------------------------------------------------- names in messages


def rename_tensor(folder, name):
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {name: torch.ones(1)}, folder / "model.safetensors")


def name_shard(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name + ".safetensors"}}))


@pytest.mark.parametrize("name", [ESCAPE, "x" * 10**6], ids=["escape", "long"])
@pytest.mark.parametrize(
    "write",
    [
        rename_tensor,
        name_shard,
        lambda folder, name: edit(folder / "config.json", model_type=name),
        lambda folder, name: edit(folder / "config.json", rope_theta=name),
        lambda folder, name: edit(folder / "tokenizer_config.json", eos_token=name),
        lambda folder, name: edit(folder / "tokenizer_config.json", chat_template="{% " + name),
        lambda folder, name: edit(folder / "tokenizer_config.json", added_tokens_decoder={name: {}}),
    ],
    ids=["tensor", "shard", "model_type", "rope_theta", "token", "template", "token id"],
)
def test_a_name_in_a_file_neither_steers_the_terminal_nor_fills_it(write, name, folder, call):
    write(folder, name)
    refused(call(), "--model_path")


# ---------------------------------------------------------------------------------------------------- chat templates


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.mkdir('trapped') }}",
        "{{ lipsum.__globals__['os'].mkdir('trapped') }}",
        "{{ raise_exception.__globals__['os'].mkdir('trapped') }}",
        "{{ messages.__class__.__base__ }}",
        "{% include '/etc/passwd' %}",
        "{% for m in messages %}{{ messages.append(m) }}{% endfor %}",
    ],
)
def test_a_chat_template_reaches_nothing_outside_of_itself(template, folder, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / "chat_template.jinja").write_text(template + "{{ messages[0]['content'] }}")
    refused(call(), "--model_path", "chat template")
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ 'x' * 10000000 }}", "characters around the message"),
        ("{{ messages[0]['content'] }}", "repeats the user's message"),
    ],
    ids=["long", "twice"],
)
def test_what_a_chat_template_may_write_is_bounded(template, says, folder, call):
    (folder / "chat_template.jinja").write_text(template + "{{ messages[0]['content'] }}")
    refused(call(), "--model_path", says)


@pytest.mark.parametrize("power", ["{{ 9 ** (9 ** 9) }}", "{% set n = messages|length * 9 %}{{ n**n**n }}"])
def test_a_chat_template_with_powers_is_refused(folder, call, power):
    (folder / "chat_template.jinja").write_text(power + "{{ messages[0]['content'] }}")
    refused(call(), "--model_path", "computes powers (**)")


def test_stars_in_the_text_of_a_template_are_no_powers(folder, call):
    (folder / "chat_template.jinja").write_text("**bold** {# 2 ** 3 #}{{ '**' }}{{ messages[0]['content'] }}")
    assert call()[0] == 0


def test_a_chat_template_without_end_is_left_alone(folder, call, monkeypatch):
    """This one ends, after a second, lest it take time from the tests after it."""
    monkeypatch.setattr(chat, "TEMPLATE_SECONDS", 0.1)
    loops = "{% for i in range(99999) %}{% for i in range(30) %}{% endfor %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(loops + "{{ messages[0]['content'] }}")
    refused(call(), "--model_path", "takes more than 0.1 seconds")


# ------------------------------------------------------------------------------------------------- prompts and tokens


def test_typed_tokens_stay_text_whether_or_not_the_checkpoint_calls_them_special(folder, family):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("<tool>", special=False), AddedToken("<tool>s", special=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    loaded = load_tokenizer(folder)
    control = {loaded.convert_tokens_to_ids(token) for token in loaded.get_added_vocab()}
    typed = "a<tool>s<tool>" + "".join(loaded.all_special_tokens) + "<|mask|><|mdm_mask|>"
    plain, ids = encode_chat(loaded, "a"), encode_chat(loaded, typed)
    assert [token for token in ids if token in control] == [token for token in plain if token in control]
    assert typed in loaded.decode(ids)


def test_what_the_tokenizer_cannot_encode_is_one_line(folder, call):
    Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    refused(call(), "--model_path", "cannot encode the prompt")


def test_a_prompt_file_of_control_characters_is_a_prompt(call, tmp_path):
    (tmp_path / "prompt").write_bytes(b"\0\0a\0" + ESCAPE.encode() + bytes(range(32)) + "\u202e\U0001f600".encode())
    assert call("--prompt_file", tmp_path / "prompt")[0] == 0


# ----------------------------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize("option", ["--json", "--report"])
def test_no_output_replaces_a_file_of_the_checkpoint(option, folder, call, tmp_path):
    (tmp_path / "link").symlink_to(folder / "config.json")
    (tmp_path / "folder").symlink_to(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja", "model.safetensors.index.json"):
        refused(call(option, folder / name), option, "the file of --model_path")
    refused(call(option, tmp_path / "link"), option, "the file of --model_path")
    refused(call(option, tmp_path / "folder" / "config.json"), option, "the file of --model_path")
    linked = call("--model_path", tmp_path / "folder", option, folder / "chat_template.jinja")
    refused(linked, option, "the file of --model_path")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert call(option, folder / "run.txt")[0] == 0, "another file in it is nobody's"


def test_no_output_replaces_a_file_of_the_demo(tmp_path, monkeypatch, capsys):
    demo = tiny_folder(tmp_path / "demo", "dream")
    monkeypatch.setattr("sparsed.cli.main.demo_path", lambda _: demo)
    code = main_dream(["--demo", *SHORT, "--json", str(demo / "config.json")])
    refused((code, *capsys.readouterr()), "--json", "the file of --demo")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
@pytest.mark.parametrize("option", ["--json", "--report"])
def test_a_disk_that_fills_up_keeps_the_old_file(option, call, tmp_path):
    import resource

    output = tmp_path / "output"
    output.write_text("old")
    before, limits = sorted(tmp_path.iterdir()), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        code, _, err = call(option, output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and err.count("\n") == 1 and option in err and "too large" in err
    assert output.read_text() == "old" and sorted(tmp_path.iterdir()) == before
