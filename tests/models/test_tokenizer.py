"""load_tokenizer: the ids of the files, on both published layouts, with nothing of the checkpoint executed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sparsed.chat import encode_raw
from sparsed.models import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CORPUS = [
    "The quick brown fox, don't you know, jumps over 13 lazy dogs.\n\nIt isn't 2024 yet; naïve café façades!",
    "Question: where does Anna keep the red key? Answer: Anna keeps the red key in the old oak chest.",
]
TEXTS = [
    *CORPUS,
    "  leading, trailing  \t tabs\r\n\r\n and 1234567890 digits   ",
    "cafe\u0301 = café, 東京 🚀 ﬁne I'LL we've",
    "",
]
# in the order of the published vocabulary's end; the last two stand apart in its tokenizer_config.json
DREAM_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "<|beginoftext|>", "<|mask|>"]
DREAM_NAMES = {
    "bos_token": "<|beginoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "mask_token": "<|mask|>",
}
DREAM_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLADA_TOKENS = ["<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]", "<|mdm_mask|>", "<|eot_id|>"]
USER = [{"role": "user", "content": "where is the key?"}]


def write_json(file, values):
    file.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")


def train(special_tokens=()):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens(list(special_tokens))
    return backend


@pytest.fixture
def dream(tmp_path):
    """The files of a published Dream checkpoint: no tokenizer.json, a tokenizer class of its own."""
    backend = train()
    backend.model.save(str(tmp_path))
    first = backend.get_vocab_size()
    ids = {token: first + i for i, token in enumerate(DREAM_TOKENS)}
    write_json(tmp_path / "added_tokens.json", ids)
    write_json(
        tmp_path / "special_tokens_map.json",
        {name: {"content": token, "lstrip": False} for name, token in DREAM_NAMES.items()},
    )
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    write_json(
        tmp_path / "tokenizer_config.json",
        DREAM_NAMES
        | {
            "added_tokens_decoder": {
                str(index): {"content": token, "special": token != "<tool_call>"} | flags
                for token, index in reversed(ids.items())
            },
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"],
            "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
            "chat_template": DREAM_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "errors": "replace",
            "model_max_length": 8,
            "split_special_tokens": False,
            "tokenizer_class": "DreamTokenizer",
        },
    )
    (tmp_path / "tokenization_dream.py").write_text("raise SystemExit('remote code ran')\n")
    write_json(tmp_path / "config.json", {"model_type": "Dream"})
    return tmp_path


@pytest.fixture
def llada(tmp_path):
    """The files of a published LLaDA checkpoint: tokenizer.json, no mask_token, [CLS] and [gMASK] besides."""
    train(LLADA_TOKENS).save(str(tmp_path / "tokenizer.json"))
    write_json(
        tmp_path / "tokenizer_config.json",
        {
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "cls_token": "[CLS]",
            "gmask_token": "[gMASK]",
            "chat_template": "{{ bos_token }}{% for m in messages %}{{ m['content'] | trim }}<|eot_id|>{% endfor %}",
            "clean_up_tokenization_spaces": False,
            "fast_tokenizer": True,
            "merges_file": None,
            "model_max_length": 8,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "trust_remote_code": True,
        },
    )
    return tmp_path


def edit(file, **changes):
    values = json.loads(file.read_text()) | changes
    write_json(file, {key: value for key, value in values.items() if value is not ...})


def refused(folder, *named):
    with pytest.raises(ValueError) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    for part in named:
        assert part in str(caught.value), str(caught.value)


# ------------------------------------------------------------------------------------------------- Dream


def ids_of(folder):
    return json.loads((folder / "added_tokens.json").read_text())


@pytest.mark.parametrize("source", ["both", "added_tokens.json", "tokenizer_config.json"])
def test_dream_tokens_have_the_ids_of_the_files_and_parse_as_one(dream, source):
    ids = ids_of(dream)
    if source == "added_tokens.json":
        edit(dream / "tokenizer_config.json", added_tokens_decoder=...)
    if source == "tokenizer_config.json":
        (dream / "added_tokens.json").unlink()
    tokenizer = load_tokenizer(dream)
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in ids} == ids
    for token, index in ids.items():
        assert index in tokenizer.encode(f"the {token}key", add_special_tokens=False)
        assert tokenizer.decode([index]) == token
    assert len(tokenizer) == max(ids.values()) + 1
    assert (tokenizer.mask_token_id, tokenizer.bos_token_id) == (ids["<|mask|>"], ids["<|beginoftext|>"])
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == ids["<|endoftext|>"]


def test_dream_special_flags_decide_what_decoding_drops(dream):
    tokenizer, ids = load_tokenizer(dream), ids_of(dream)
    text = tokenizer.decode([ids["<tool_call>"], ids["<|im_end|>"], ids["<|mask|>"]], skip_special_tokens=True)
    assert text == "<tool_call>"


def stock_qwen2(folder):
    """The library's own Qwen2 tokenizer, whose constructor changed in version 5."""
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if hasattr(transformers, "Qwen2TokenizerFast") and transformers.__version__.startswith("4."):
        return transformers.Qwen2TokenizerFast(str(vocab), str(merges))
    pairs = [tuple(line.split(" ")) for line in merges.read_text(encoding="utf-8").splitlines()[1:] if line]
    return transformers.Qwen2Tokenizer(vocab=json.loads(vocab.read_text(encoding="utf-8")), merges=pairs)


@pytest.mark.parametrize("text", TEXTS)
def test_dream_ids_equal_the_stock_qwen2_tokenizers(dream, text):
    tokenizer = load_tokenizer(dream)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == stock_qwen2(dream).encode(text, add_special_tokens=False)
    assert tokenizer(text)["input_ids"] == ids  # nothing is put around a text
    assert tokenizer.decode(ids) == text.replace("e\u0301", "é")


def test_dream_chat_template(dream):
    tokenizer = load_tokenizer(dream)
    text = tokenizer.apply_chat_template(USER, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nwhere is the key?<|im_end|>\n<|im_start|>assistant\n"


def test_batches_are_padded_where_generation_wants_it(dream):
    tokenizer = load_tokenizer(dream)
    batch = tokenizer(["the key", "the old oak chest in the red"], padding=True)
    assert batch["input_ids"][0][0] == tokenizer.pad_token_id
    assert batch["attention_mask"][0][0] == 0 and batch["attention_mask"][0][-1] == 1


def test_chat_template_in_a_file_of_its_own_wins(dream):
    (dream / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    assert load_tokenizer(dream).apply_chat_template(USER, tokenize=False) == "where is the key?!"


def test_chat_template_in_a_list(dream):
    listed = [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}]
    edit(dream / "tokenizer_config.json", chat_template=listed)
    assert load_tokenizer(dream).apply_chat_template(USER, tokenize=False) == "yes"


# ------------------------------------------------------------------------------------------------- LLaDA


def test_llada_ids_equal_the_files(llada):
    tokenizer, backend = load_tokenizer(llada), Tokenizer.from_file(str(llada / "tokenizer.json"))
    for text in [*TEXTS, "a<|mdm_mask|>b<|eot_id|>[gMASK]"]:
        ids = backend.encode(text, add_special_tokens=False).ids
        assert tokenizer(text)["input_ids"] == tokenizer.encode(text, add_special_tokens=False) == ids
    assert tokenizer.get_vocab() == backend.get_vocab(with_added_tokens=True)
    assert tokenizer.mask_token is None and tokenizer.bos_token == "<|startoftext|>"
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == backend.token_to_id("<|endoftext|>")


def test_text_begins_with_the_bos_token_where_the_files_say_so(llada):
    plain = load_tokenizer(llada)("good")["input_ids"]
    edit(llada / "tokenizer_config.json", add_bos_token=True)
    tokenizer = load_tokenizer(llada)
    wanted = [tokenizer.bos_token_id, *plain]
    assert tokenizer("good")["input_ids"] == encode_raw(tokenizer, "good") == wanted
    assert tokenizer("good", add_special_tokens=False)["input_ids"] == plain, "a chat template writes its own"
    tokenizer.backend_tokenizer.save(str(llada / "tokenizer.json"))  # which now says so itself
    assert load_tokenizer(llada)("good")["input_ids"] == wanted


def test_llada_decoding_and_template(llada):
    tokenizer = load_tokenizer(llada)
    ids = tokenizer.encode("the key<|eot_id|><|endoftext|><|mdm_mask|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the key"
    text = tokenizer.apply_chat_template(USER, tokenize=False, add_generation_prompt=True)
    assert text == "<|startoftext|>where is the key?<|eot_id|>"


def test_tokenizer_json_alone_is_enough(llada):
    (llada / "tokenizer_config.json").unlink()
    assert load_tokenizer(llada).chat_template is None


def test_tokenizer_json_wins_over_the_vocabulary_files(dream):
    train(DREAM_TOKENS).save(str(dream / "tokenizer.json"))
    (dream / "vocab.json").write_text("broken")
    assert load_tokenizer(dream).mask_token_id == ids_of(dream)["<|mask|>"]


# ------------------------------------------------------------------------------------------------- quiet and safe


QUIET = """
import sys
from sparsed.chat import encode_raw
from sparsed.models import load_tokenizer
tokenizer = load_tokenizer(sys.argv[1])
tokenizer.apply_chat_template([{"role": "user", "content": "x " * 500}], tokenize=True, add_generation_prompt=True)
tokenizer("the key " * 500)
tokenizer.decode([1, 2, 3])
"""


@pytest.mark.parametrize("layout", ["dream", "llada"])
def test_no_remote_code_no_prompt_no_warning(request, layout):
    folder = request.getfixturevalue(layout)
    command = [sys.executable, "-c", QUIET, str(folder)]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_no_network_for_a_large_vocabulary(monkeypatch, tmp_path):
    """Version 5 looks large vocabularies up on the hub when it loads them by name."""

    def connect(*_):
        raise AssertionError("opened a connection")

    backend = Tokenizer(models.BPE(vocab={str(i): i for i in range(100_001)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    backend.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr("socket.socket.connect", connect)
    monkeypatch.setattr("socket.getaddrinfo", connect)
    assert len(load_tokenizer(tmp_path)) == 100_001


# ------------------------------------------------------------------------------------------------- wrong files


def test_missing_files(dream):
    for name in ("merges.txt", "vocab.json"):
        (dream / name).unlink()
        refused(dream, str(dream), "tokenizer.json", "merges.txt")
    refused(dream / "nothing", "no such folder")


JSON_FILES = ["vocab.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("content", ["", "[1", "[]", '"x"'])
def test_malformed_json_is_named(dream, name, content):
    (dream / name).write_text(content)
    refused(dream, name)


def test_malformed_tokenizer_json_and_merges(dream, llada):
    (llada / "tokenizer.json").write_text('{"version": "1.0"}')
    refused(llada, "tokenizer.json")
    (llada / "tokenizer.json").unlink()
    (dream / "merges.txt").write_text("#version: 0.2\nnothing-to merge-these\n")
    refused(dream, "vocab.json")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"added_tokens_decoder": {"9999": {"content": "<far>"}}}, ["'<far>'", "9999"]),
        ({"added_tokens_decoder": {"3": {"content": "<|mask|>"}}}, ["'<|mask|>'", "id 3"]),
        ({"added_tokens_decoder": {"x": {"content": "<far>"}}}, ["added_tokens_decoder"]),
        ({"added_tokens_decoder": {"5": {"text": "<far>"}}}, ["added_tokens_decoder"]),
        ({"added_tokens_decoder": []}, ["added_tokens_decoder"]),
        ({"mask_token": "<|unheard-of|>"}, ["mask_token", "<|unheard-of|>"]),
        ({"eos_token": 7}, ["eos_token", "7"]),
        ({"eos_token": {"text": "x"}}, ["eos_token"]),
        ({"chat_template": 7}, ["chat_template"]),
        ({"chat_template": ["x"]}, ["chat_template"]),
    ],
    ids=str,
)
def test_tokens_that_do_not_fit_are_named(dream, changes, named):
    edit(dream / "tokenizer_config.json", **changes)
    refused(dream, *named)
