"""Chats, system turns and raw prompts: the tokens that the model reads, what the scripts say of them, and bad files."""

import json
import shlex

import pytest
import torch

from sparsed import llada_generate, load_model, load_tokenizer
from sparsed.chat import TurnsError, encode_chat, encode_raw, turns_of
from sparsed.cli import arguments, main_dream, main_llada, running
from sparsed.cli import main as main_module
from sparsed.cli.advice import command_of
from sparsed.cli.families import DREAM, LLADA
from sparsed.prompts import LENGTHS, build_prompt
from tests.helpers.tiny_folders import SPECIALS, special_id, tiny_folder
from tests.test_prompts import MAKERS

MAIN = {"dream": main_dream, "llada": main_llada}
SYSTEM = " Answer in one word. "
QUESTION = "Where is the key?\n"
CHAT = [
    {"role": "system", "content": SYSTEM},
    {"role": "user", "content": "Is there a key?"},
    {"role": "assistant", "content": "  There is."},
    {"role": "user", "content": QUESTION},
]
SHORT = "--device cpu --seq_len 16 --steps 4 --block_size 16 --block_length 16".split()


@pytest.fixture(params=MAIN)
def family(request):
    return request.param


@pytest.fixture
def call(family, tmp_path, capsys):
    """Run the family's script on a tiny checkpoint; returns (exit code, stdout, stderr, record)."""
    folder, file = tiny_folder(tmp_path / "model", family), tmp_path / "record.json"
    short = SHORT if family == "llada" else SHORT[:-2]

    def run(*words):
        file.unlink(missing_ok=True)
        code = MAIN[family](["--model_path", str(folder), *short, *map(str, words), "--json", str(file)])
        out, err = capsys.readouterr()
        return code, out, err, json.loads(file.read_text()) if file.exists() else None

    run.folder = folder
    return run


def rendered_ids(tokenizer, chat):
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture
def read(monkeypatch):
    """The prompts that the scripts give to the model, in turn."""
    seen = []
    monkeypatch.setattr(main_module, "check_prompt", lambda ids, *_: seen.append(ids[0].tolist()))
    return seen


# ------------------------------------------------------------------------------------------------------------ tokens


@pytest.mark.parametrize("maker", ["dream", "llada", "characters"])
@pytest.mark.parametrize("turns", [CHAT[1:], CHAT, [CHAT[0], CHAT[3]]], ids=len)
def test_a_chat_has_the_tokens_of_the_rendered_template(maker, turns):
    tokenizer = MAKERS[maker]()
    assert encode_chat(tokenizer, turns[-1]["content"], turns[:-1]) == rendered_ids(tokenizer, turns)


@pytest.mark.parametrize("maker", ["dream", "llada"])
def test_control_tokens_in_any_turn_stay_text(maker):
    tokenizer = MAKERS[maker]()
    control = set(tokenizer.get_added_vocab().values())
    typed = "a " + " ".join(tokenizer.get_added_vocab()) + " b"
    plain, marked = (encode_chat(tokenizer, "x", [{"role": "system", "content": text}]) for text in ("a b", typed))
    assert [token for token in marked if token in control] == [token for token in plain if token in control]
    assert typed in tokenizer.decode(marked)


@pytest.mark.parametrize("maker", ["dream", "llada", "characters"])
@pytest.mark.parametrize("preset", ["4k", "16k"])
def test_sized_presets_keep_their_length_with_a_system_turn(maker, preset):
    tokenizer = MAKERS[maker]()
    prompt = build_prompt(preset, tokenizer, CHAT[:1])
    assert len(prompt.input_ids) == LENGTHS[preset]
    assert prompt.input_ids == encode_chat(tokenizer, prompt.text, CHAT[:1])
    assert SYSTEM.strip() in tokenizer.decode(prompt.input_ids[:100])


def test_a_raw_prompt_is_encoded_as_the_tokenizer_does_it():
    tokenizer = MAKERS["dream"]()
    text = "<|im_start|>one  two<|endoftext|>\n"
    assert encode_raw(tokenizer, text) == tokenizer(text)["input_ids"]
    assert encode_raw(tokenizer, text)[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_a_raw_prompt_has_the_special_tokens_that_the_tokenizer_always_adds():
    from tokenizers.processors import TemplateProcessing

    tokenizer = MAKERS["characters"]()
    begin = tokenizer.convert_tokens_to_ids("<user>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<user> $A", special_tokens=[("<user>", begin)])
    assert encode_raw(tokenizer, "ab") == [begin, *encode_raw(MAKERS["characters"](), "ab")]
    assert encode_chat(tokenizer, "ab") == encode_chat(MAKERS["characters"](), "ab"), "the template has its own"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ messages[-1]['content'] }}", "leaves out the system's message"),
        ("{{ messages[-1]['content'] }}{{ messages[0]['content'] if messages|length > 1 }}", "another order"),
        (
            "{{ messages[0]['content'] * messages|length }}{{ messages[1]['content'] if messages|length > 1 }}",
            "repeats the system's message",
        ),
        (None, "no chat template"),
    ],
    ids=["left out", "moved", "twice", "none"],
)
def test_a_template_that_does_not_take_the_turns(template, says):
    tokenizer = MAKERS["characters"]()
    tokenizer.chat_template = template
    with pytest.raises(TurnsError, match=says):
        encode_chat(tokenizer, "x", CHAT[:1])
    encode_chat(tokenizer, "x")


# ------------------------------------------------------------------------------------------------------- the scripts


def test_a_system_turn_reaches_the_model(call, read):
    code, _, err, record = call("--prompt_text", QUESTION, "--system", SYSTEM)
    assert code == 0 and read == [rendered_ids(load_tokenizer(call.folder), [CHAT[0], CHAT[3]])]
    assert "prompt of your own after a system turn: " in err and record["arguments"]["system"] == SYSTEM


def test_a_preset_with_a_system_turn(call, read):
    code, _, err, record = call("--prompt", "4k", "--system", SYSTEM)
    assert code == 0 and len(read[0]) == record["runs"][0]["prompt_tokens"] == 4096
    assert "prompt 4k after a system turn: 4096 tokens" in err


def test_a_chat_reaches_the_model(call, read, tmp_path):
    file = tmp_path / "chat.json"
    file.write_text("\ufeff" + json.dumps(CHAT, ensure_ascii=False), encoding="utf-8")
    code, _, err, record = call("--chat", file)
    assert code == 0 and read == [rendered_ids(load_tokenizer(call.folder), CHAT)]
    assert "prompt of your own, the last turn of a chat: " in err and record["arguments"]["chat"] == str(file)


@pytest.mark.parametrize("way", ["text", "file"])
def test_a_raw_prompt_reaches_the_model(call, read, tmp_path, way):
    (tmp_path / "prompt").write_text("def add(a, b):")
    given = {"text": ("--prompt_text", "def add(a, b):"), "file": ("--prompt_file", tmp_path / "prompt")}[way]
    code, _, err, record = call("--raw", *given)
    assert code == 0 and read == [load_tokenizer(call.folder)("def add(a, b):")["input_ids"]]
    assert "prompt of your own, raw: 14 tokens" in err and record["arguments"]["raw"] is True


def test_without_the_flags_nothing_changes(call, read):
    _, _, err, record = call("--prompt_text", QUESTION)
    assert read == [rendered_ids(load_tokenizer(call.folder), CHAT[3:])] and "prompt of your own: " in err
    assert [record["arguments"][name] for name in ("raw", "system", "chat")] == [False, None, None]


@pytest.mark.parametrize("family", [DREAM, LLADA], ids=lambda family: family.name)
@pytest.mark.parametrize(
    "words", [["--prompt", "4k", "--system", "be brief"], ["--raw", "--prompt_text", "x y"], "chat"]
)
def test_an_advised_command_asks_the_same(family, words, tmp_path):
    (tmp_path / "chat").write_text(json.dumps(CHAT))
    words = ["--chat", str(tmp_path / "chat")] if words == "chat" else words
    given = arguments.parse(family, words)
    again = arguments.parse(family, shlex.split(command_of(given, 1, origin=False))[1:])
    assert (again.text, again.earlier, again.prompt, again.raw) == (given.text, given.earlier, given.prompt, given.raw)
    assert again.earlier or again.raw


@pytest.mark.parametrize("flag", ["logits_eos_inf", "confidence_eos_eot_inf"])
def test_lladas_settings_of_the_end_tokens(flag, tmp_path, monkeypatch):
    """The tokens are the library's with that setting, and others than without it."""
    folder = tiny_folder(tmp_path / "model", "llada")
    file, tokens = tmp_path / "record.json", {}
    model, ids = load_model(folder, device="cpu"), torch.tensor([encode_chat(load_tokenizer(folder), QUESTION)])
    lengths = {"gen_length": 16, "steps": 4, "block_length": 16}
    likely = llada_generate(model, ids, **lengths)[0, ids.shape[1]]
    with torch.no_grad():  # and now the end of the text is likelier still
        head = model.model.transformer["ff_out"].weight
        head[special_id("llada", "<|endoftext|>")] = 1.1 * head[likely]
    expected = {on: llada_generate(model, ids, **lengths, **{flag: on}) for on in (True, False)}
    monkeypatch.setattr(main_module, "load_model", lambda *_, **__: model)
    for on in (True, False):
        words = ["--model_path", str(folder), *SHORT, "--origin", "--prompt_text", QUESTION, "--json", str(file)]
        assert main_llada(words + [f"--{flag}"] * on) == 0
        record = json.loads(file.read_text())
        tokens[on] = record["runs"][0]["token_ids"]
        assert record["arguments"][flag] is on
    assert tokens == {on: out[0, ids.shape[1] :].tolist() for on, out in expected.items()}
    assert tokens[True] != tokens[False]


# ------------------------------------------------------------------------------------------------------ empty answers


def write(monkeypatch, written):
    """Have the sampler's answer be these tokens."""
    generate = running.generate

    def written_instead(job, sampler, clock):
        out = generate(job, sampler, clock)
        out[0, len(job.input_ids) :] = torch.tensor(written)
        return out

    monkeypatch.setattr(running, "generate", written_instead)


@pytest.mark.parametrize("kind", ["ends", "masks", "masks and an end"])
@pytest.mark.parametrize("quiet", [False, True])
def test_an_answer_of_ends_and_masks_is_said_to_be_empty(call, monkeypatch, kind, quiet, family):
    end, mask = special_id(family, "<|endoftext|>"), 255 + len(SPECIALS[family])
    written = {"ends": [end] * 16, "masks": [mask] * 16, "masks and an end": [mask] * 8 + [end] * 8}[kind]
    write(monkeypatch, written)
    code, out, err, record = call("--prompt_text", QUESTION, *["--quiet"] * quiet)
    assert (code, out, record["runs"][0]["answer_tokens"], record["runs"][0]["text"]) == (0, "\n", 0, "")
    assert err.count("warning: the answer is empty") == (not quiet) and (err == "") == quiet


def test_an_answer_with_text_is_not(call, monkeypatch):
    write(monkeypatch, load_tokenizer(call.folder)("a" * 16)["input_ids"])
    _, _, err, record = call("--prompt_text", QUESTION)
    assert "empty" not in err and record["runs"][0]["answer_tokens"] == 16


# --------------------------------------------------------------------------------------------------------- bad files

USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "not JSON: Expecting value at line 1, column 1"),
        ("[1,\n2", "not JSON: .* at line 2, column 2"),
        ("[" * 100_000, "not a chat"),
        ("9" * 5000, "not a chat"),
        (USER, "not a chat"),
        ("text", "not a chat"),
        ([], "not a chat"),
        ([USER, "x"], "turn 2 must be an object"),
        ([{"role": "user"}, USER], 'turn 1 must be an object with "role" and "content"'),
        ([{"content": "x"}], 'turn 1 must be an object with "role" and "content"'),
        ([USER | {"tool_calls": []}], "turn 1 .* nothing else"),
        ([USER | {"role": "tool"}], 'the "role" of turn 1 must be one of system, user, assistant'),
        ([USER | {"role": ["user"]}], 'the "role" of turn 1'),
        ([USER, USER | {"content": None}], 'the "content" of turn 2 must be a string'),
        ([USER | {"content": [{"type": "text"}]}], 'the "content" of turn 1 must be a string'),
        ([USER | {"content": " "}], "turn 1 is empty"),
        ([USER | {"content": "\ud800"}], "turn 1 is not valid UTF-8"),
        ([USER, USER | {"role": "assistant"}], "turn 2, the last one, must be the user's"),
        ([USER | {"role": "system"}], "turn 1, the last one, must be the user's"),
    ],
)
def test_a_bad_chat_says_what_is_wrong_and_where(content, says):
    text = content if isinstance(content, str) and content != "text" else json.dumps(content)
    with pytest.raises(ValueError, match=says) as error:
        turns_of(text)
    assert "\n" not in str(error.value)


def test_a_chat_of_very_many_turns_is_one_line(call, tmp_path):
    (tmp_path / "chat").write_text(json.dumps([USER] * 50_000))
    code, out, err, _ = call("--chat", tmp_path / "chat")
    assert (code, out, err.count("\n")) == (2, "", 1) and "argument --chat: " in err and "characters around" in err


def test_a_chat_is_split_into_the_earlier_turns_and_the_last():
    assert turns_of(json.dumps(CHAT)) == (CHAT[:-1], QUESTION)
