"""Wrong calls of the two scripts: exit code 2, one line on stderr that names the option, no traceback, no file left."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsed.cli import main_dream, main_llada
from tests.helpers.tiny_folders import tiny_folder

ROOT = Path(__file__).parents[2]
MAIN = {"dream": main_dream, "llada": main_llada}

# script, words after it, the option that the line must name, a word of what would be right
# {dream} and {llada} are whole checkpoints; the other names in braces are made in `folder`
CALLS = [
    ("dream", "--select 1.5", "--select", "at most 1"),
    ("llada", "--select 0", "--select", "above 0"),
    ("dream", "--select nan", "--select", "nan"),
    ("llada", "--skip -0.1", "--skip", "between 0 and 1"),
    ("dream", "--skip 2", "--skip", "between 0 and 1"),
    ("dream", "--skip half", "--skip", "a number"),
    ("llada", "--block_size 20", "--block_size", "multiple of 16"),
    ("dream", "--block_size 0", "--block_size", "multiple of 16"),
    ("dream", f"--block_size {2**31}", "--block_size", "multiple of 16"),
    ("dream", "--block_size 32.5", "--block_size", "whole number"),
    ("dream", "--seq_len 0", "--seq_len", "at least 1"),
    ("llada", "--seq_len -32", "--seq_len", "at least 1"),
    ("dream", "--seq_len many", "--seq_len", "whole number"),
    ("llada", f"--seq_len {10**20} --block_length {10**20}", "--seq_len", "at most"),
    ("dream", "--steps 0", "--steps", "at least 1"),
    ("llada", "--steps 1e3", "--steps", "whole number"),
    ("llada", "--steps", "--steps", "expected one argument"),
    ("llada", "--block_length 0", "--block_length", "at least 1"),
    ("llada", "--seq_len 40", "--block_length", "divide the 40 new tokens"),
    ("llada", "--seq_len 96 --steps 32", "--steps", "3 blocks"),
    ("dream", "--block_length 33", "--block_length", "must divide the 128 new tokens, got 33"),
    ("dream", "--cache dual --steps 7 --block_length 4", "--steps", "a multiple of the 32 blocks"),
    ("llada", "--cache both", "--cache", "invalid choice"),
    ("llada", "--refresh 2", "--refresh", "needs a cache"),
    ("llada", "--cache dual --refresh -1", "--refresh", "whole number"),
    ("llada", "--threshold -0.1", "--threshold", "at least 0"),
    ("llada", "--threshold 0.9 --factor 1", "--factor", "not allowed with argument --threshold"),
    ("llada", "--factor 0", "--factor", "above 0"),
    ("dream", "--sampling-alg origin --threshold 0.9", "--threshold", "origin"),
    ("dream", "--early_stop", "--early_stop", "needs blocks"),
    ("llada", "--advise --cache dual", "--cache", "not allowed with argument --advise"),
    ("dream", "--sampling-alg best", "--sampling-alg", "maskgit_plus"),
    ("llada", "--sampling-alg entropy", "--sampling-alg", "low_confidence"),
    ("dream", "--temperature -1", "--temperature", "at least 0"),
    ("llada", "--temperature inf", "--temperature", "inf"),
    ("dream", "--top_p 0", "--top_p", "above 0"),
    ("dream", "--top_p 1.2", "--top_p", "at most 1"),
    ("dream", "--top_k -1", "--top_k", "at least 0"),
    ("llada", "--top_k 5", "--top_k", "unrecognized"),
    ("llada", "--cfg_scale -0.5", "--cfg_scale", "at least 0"),
    ("dream", "--cfg_scale 1", "--cfg_scale", "unrecognized"),
    ("dream", "--seed -1", "--seed", "at least 0"),
    ("llada", "--seed 99999999999999999999", "--seed", "at most"),
    ("dream", "--device tpu", "--device", "cpu"),
    ("llada", "--device cuda:99", "--device", "CUDA"),
    ("dream", "--dtype int8", "--dtype", "float32"),
    ("dream", "--backend cudnn", "--backend", "gather"),
    ("llada", "--backend triton --device cpu", "--backend", "CUDA"),
    ("dream", "--backend flash --device cpu", "--backend", "CUDA"),
    ("llada", "--backend flex --device cpu", "--backend", "CUDA"),
    ("dream", "--warmup -1", "--warmup", "at least 0"),
    ("llada", "--repeat 0", "--repeat", "at least 1"),
    ("llada", "--origin --compare", "--compare", "not allowed with argument --origin"),
    ("dream", "--origin --advise", "--advise", "not allowed with argument --origin"),
    ("llada", "--advise --compare", "--compare", "not allowed with argument --advise"),
    ("llada", "--advise --report {folder}/run.html", "--report", "not allowed with argument --advise"),
    ("dream", "--advise --repeat 3", "--repeat", "not allowed with argument --advise"),
    ("dream", "--advise --warmup 1", "--warmup", "not allowed with argument --advise"),
    ("llada", "--advise --show", "--show", "not allowed with argument --advise"),
    ("dream", "--show --quiet", "--quiet", "not allowed with argument --show"),
    ("dream", "--demo --model_path {dream}", "--model_path", "not allowed with argument --demo"),
    ("dream", "--prompt 4k --prompt_text hello", "--prompt_text", "not allowed with argument --prompt"),
    ("llada", "--prompt short_context --prompt_file {text}", "--prompt_file", "not allowed with argument --prompt"),
    ("llada", "--prompt_text hello --prompt_file {text}", "--prompt_file", "not allowed with argument --prompt_text"),
    ("dream", "--prompt 5k", "--prompt", "short_context"),
    ("dream", ["--prompt_text", "  \n"], "--prompt_text", "empty"),
    ("dream", ["--prompt_text", "broken \udcff"], "--prompt_text", "UTF-8"),
    ("llada", "--prompt_file {missing}", "--prompt_file", "No such file"),
    ("llada", "--prompt_file {folder}", "--prompt_file", "not an ordinary file"),
    ("dream", "--prompt_file {pipe}", "--prompt_file", "not an ordinary file"),
    ("llada", "--prompt_file /dev/zero", "--prompt_file", "not an ordinary file"),
    ("dream", "--prompt_file {endless}", "--prompt_file", "more than"),
    ("llada", "--prompt_file {empty}", "--prompt_file", "empty"),
    ("llada", "--prompt_file {latin1}", "--prompt_file", "UTF-8"),
    ("dream", "--raw", "--raw", "needs --prompt_text or --prompt_file"),
    ("llada", "--raw --prompt 4k", "--raw", "needs --prompt_text or --prompt_file"),
    ("dream", "--raw --chat {chat}", "--raw", "needs --prompt_text or --prompt_file"),
    ("llada", "--raw --prompt_text hello --system x", "--system", "not allowed with argument --raw"),
    ("dream", ["--raw", "--prompt_text", "  "], "--prompt_text", "empty"),
    ("dream", "--raw --prompt_text <|mask|>", "--prompt_text", "mask token"),
    ("dream", "--chat {chat} --system x", "--system", "not allowed with argument --chat"),
    ("dream", ["--system", " \n"], "--system", "empty"),
    ("llada", ["--system", "broken \udcff"], "--system", "UTF-8"),
    ("dream", ["--prompt", "4k", "--system", "word " * 2000], "--prompt", "too short"),
    ("dream", "--model_path {no_system} --system x", "--system", "no system role here"),
    ("dream", "--model_path {drops_system} --system x", "--system", "leaves out the system's message"),
    ("dream", "--model_path {no_system} --chat {chat}", "--chat", "without turns before the user's message it works"),
    ("dream", "--model_path {no_template} --system x", "--system", "has no chat template"),
    ("dream", "--model_path {broken_template} --system x", "--model_path", "chat template"),
    ("dream", "--prompt 4k --chat {chat}", "--chat", "not allowed with argument --prompt"),
    ("llada", "--chat {chat} --prompt_text hello", "--prompt_text", "not allowed with argument --chat"),
    ("llada", "--chat {missing}", "--chat", "No such file"),
    ("dream", "--chat {folder}", "--chat", "not an ordinary file"),
    ("dream", "--chat {pipe}", "--chat", "not an ordinary file"),
    ("llada", "--chat {endless}", "--chat", "more than"),
    ("llada", "--chat {latin1}", "--chat", "UTF-8"),
    ("dream", "--chat {text}", "--chat", "not JSON"),
    ("dream", "--chat {deep_chat}", "--chat", "not a chat"),
    ("llada", "--chat {chat} --json {chat}", "--json", "the file of --chat"),
    ("llada", "--chat {chat} --report {chat}", "--report", "the file of --chat"),
    ("dream", "--logits_eos_inf", "--logits_eos_inf", "unrecognized"),
    ("dream", "--confidence_eos_eot_inf", "--confidence_eos_eot_inf", "unrecognized"),
    ("dream", "--json {missing}/record.json", "--json", "no folder"),
    ("dream", "--json {folder}", "--json", "not an ordinary file"),
    ("dream", "--json ~nobody-of-that-name/record.json", "--json", "cannot write"),
    ("dream", f"--json {'a' * 300}.json", "--json", "too long"),
    ("llada", "--json /proc/record.json", "--json", "cannot write"),
    ("llada", "--json /dev/stdout", "--json", "not an ordinary file"),
    ("llada", "--prompt_file {text} --json {text}", "--json", "--prompt_file"),
    ("dream", "--prompt_file {link} --json {text}", "--json", "--prompt_file"),
    ("dream", ["--json", ""], "--json", "empty"),
    ("llada", "--report {missing}/run.html", "--report", "no folder"),
    ("dream", "--report {folder}", "--report", "not an ordinary file"),
    ("llada", "--prompt_file {text} --report {link}", "--report", "--prompt_file"),
    ("dream", "--json {folder}/new --report {folder}/new", "--report", "--json"),
    ("dream", ["--report", ""], "--report", "empty"),
    ("dream", ["--model_path", ""], "--model_path", "empty"),
    ("dream", "--model_path {missing}", "--model_path", "no such folder"),
    ("dream", "--model_path ~nobody-of-that-name/x", "--model_path", "not a readable folder"),
    ("dream", "--model_path {deep_config}", "--model_path", "JSON"),
    ("dream", "--model_path {huge_width}", "--model_path", "hidden_size"),
    ("dream", "--model_path {broken_template}", "--model_path", "chat template"),
    ("dream", "--model_path {mute_template}", "--model_path", "chat template"),
    ("dream", "--model_path {zero_template}", "--model_path", "chat template fails: ZeroDivisionError"),
    ("dream", "--model_path {mixed_template}", "--model_path", "chat template fails: TypeError"),
    ("dream", "--model_path {long_template}", "--model_path", "chat template fails: OverflowError"),
    ("dream", "--model_path {latin1_template}", "--model_path", "chat_template.jinja is not UTF-8"),
    ("dream", "--model_path {list_rope}", "--model_path", "rope_parameters"),
    ("dream", "--model_path {huge_theta}", "--model_path", "rope_theta"),
    ("dream", "--model_path {tall}", "--model_path", "num_hidden_layers"),
    ("dream", "--model_path {pipe_config}", "--model_path", "config.json is not an ordinary file"),
    ("dream", "--model_path {text}", "--model_path", "is a file"),
    ("dream", "--model_path {llada}", "--model_path", "llada_generation.py"),
    ("llada", "--model_path {dream}", "--model_path", "dream_generation.py"),
    ("llada", "--model_path {no_config}", "--model_path", "config.json"),
    ("dream", "--model_path {broken_config}", "--model_path", "JSON"),
    ("dream", "--model_path {other_type}", "--model_path", "gpt2"),
    ("dream", "--model_path {no_weights}", "--model_path", "model.safetensors"),
    ("dream", "--model_path {pickled}", "--model_path", "pytorch_model.bin"),
    ("dream", "--model_path {cut_off}", "--model_path", "safetensors"),
    ("dream", "--model_path {no_tokenizer}", "--model_path", "tokenizer"),
    ("dream", "--model_path {wrong_width}", "--model_path", "shape"),
    ("dream", "--speed 2", "--speed", "unrecognized"),
    ("llada", "--trust_remote_code", "--trust_remote_code", "unrecognized"),
    ("llada", "--seq 32", "--seq", "unrecognized"),
    ("llada", "hello", "hello", "unrecognized"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Good and broken checkpoints and text files."""
    root = tmp_path_factory.mktemp("inputs")
    tiny_folder(root / "llada", "llada")
    config = json.loads((tiny_folder(root / "dream", "dream") / "config.json").read_text())
    for name, removed in {
        "no_config": "config.json",
        "no_weights": "model.safetensors",
        "pickled": "model.safetensors",
        "pipe_config": "config.json",
        "no_tokenizer": "tokenizer.json",
    }.items():
        (tiny_folder(root / name, "dream") / removed).unlink()
    (root / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    os.mkfifo(root / "pipe_config" / "config.json")
    for name, text in {
        "broken_config": "{",
        "other_type": json.dumps(config | {"model_type": "gpt2"}),
        "deep_config": "[" * 100_000,
        "huge_width": json.dumps(config | {"hidden_size": 10**30}),
        "wrong_width": json.dumps(config | {"hidden_size": 128}),
        "list_rope": json.dumps(config | {"rope_parameters": [1]}),
        "huge_theta": json.dumps(config | {"rope_theta": 10**400}),
        "tall": json.dumps(config | {"num_hidden_layers": 200_000}),
    }.items():
        (tiny_folder(root / name, "dream") / "config.json").write_text(text)
    for name, template in {
        "broken_template": "{{ broken",
        "mute_template": "hello",
        "zero_template": "{{ 1/0 }}",
        "mixed_template": "{{ 'a' + 1 }}",
        "long_template": "{% for i in range(1000000000) %}x{% endfor %}",
        "latin1_template": "caf\xe9",
        "no_system": "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role here') }}"
        "{% endif %}{{ m['content'] }}{% endfor %}",
        "drops_system": "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}",
    }.items():
        (tiny_folder(root / name, "dream") / "chat_template.jinja").write_text(template, encoding="latin-1")
    (tiny_folder(root / "no_template", "dream") / "tokenizer_config.json").write_text("{}")
    weights = tiny_folder(root / "cut_off", "dream") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    (root / "text").write_text("What is a prime number?\n")
    (root / "empty").write_text(" \n")
    (root / "chat").write_text(json.dumps([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]))
    (root / "deep_chat").write_text("[" * 100_000)
    (root / "latin1").write_bytes("caf\xe9".encode("latin-1"))
    (root / "link").symlink_to(root / "text")
    os.mkfifo(root / "pipe")
    with (root / "endless").open("wb") as file:
        file.truncate(2**25)
    (root / "folder").mkdir()
    return root


def words_of(script, call, folder):
    """The call's words with the folder's paths in them, and a good model and record where the call names none."""
    paths = {path.name: path for path in folder.iterdir()} | {"missing": folder / "missing"}
    words = [word.format(**paths) for word in (call.split() if isinstance(call, str) else call)]
    if "--model_path" not in words and "--demo" not in words:
        words += ["--model_path", str(paths[script])]
    if "--json" not in words:
        words += ["--json", str(folder / "folder" / "record.json")]
    return words


@pytest.mark.parametrize(("script", "call", "option", "right"), CALLS, ids=[f"{c[0]} {c[1]}" for c in CALLS])
def test_a_wrong_call_is_one_line_and_exit_code_2(script, call, option, right, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    assert MAIN[script](words_of(script, call, folder)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and err.endswith("\n")
    assert ": error: " in err and "Traceback" not in err
    assert option in err and right in err
    assert sorted(folder.rglob("*")) == before


def test_mps_is_refused_where_there_is_none(folder, capsys):
    if torch.backends.mps.is_available():
        pytest.skip("this machine has an Apple GPU")
    assert main_dream(words_of("dream", "--device mps", folder)) == 2
    assert "--device" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to(folder, capsys, tmp_path):
    tmp_path.chmod(0o555)
    assert main_dream(words_of("dream", f"--json {tmp_path}/record.json", folder)) == 2
    assert "--json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "call", "line"),
    [
        (
            "llada",
            "--select 1.5",
            "llada_generation.py: error: argument --select: must be above 0 and at most 1, got 1.5\n",
        ),
        (
            "dream",
            "--model_path {no_config}",
            "dream_generation.py: error: argument --model_path: {no_config} has no config.json\n",
        ),
    ],
)
def test_the_scripts_print_that_line_and_nothing_else(script, call, line, folder):
    command = [sys.executable, str(ROOT / f"{script}_generation.py"), *words_of(script, call, folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == line.format(no_config=folder / "no_config")
