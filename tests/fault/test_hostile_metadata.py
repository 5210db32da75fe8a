"""Models whose metadata means harm: templates that never end, configurations of absurd sizes."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import tiny_gguf, tiny_hf

PROGRAM = [sys.executable, "-c", "from edge.cli import main; main()"]
#: Address space beyond what the command needs: an allocation of an absurd size fails the test.
ADDRESS_BYTES = 3 << 30
TIMEOUT_S = 40

TEMPLATES = {
    "loop": "{% for i in range(10**9) %}{{ i }}{% endfor %}",
    "nested": "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}"
    "{% endfor %}",
    "silent": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x",
    "format": "{{ '%1000000000s' % 'x' }}",
    "format_method": "{{ '{:>1000000000}'.format('x') }}",
    "center": "{{ 'x' | center(10**10) }}",
    "center_method": "{{ 'x'.center(10**10) }}",
    "multiply": "{{ 'x' * 10**10 }}",
    "list": "{{ ([0] * 10**9) | length }}",
    "power": "{{ 10 ** 10 ** 10 }}",
    "replace": "{{ ('a' * 9999).replace('a', 'b' * 9999) }}",
    "grow": "{% set n = namespace(x='ab') %}{% for i in range(64) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "macro": "{% macro m(x) %}{{ m(x + 1) }}{% endmacro %}{{ m(0) }}",
    "attributes": "{{ messages.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "syntax": "{% for %}",
    "raises": "{{ raise_exception('no\\nsuch\\nrole') }}",
}


def limited(command: list[str], cache: Path, **more: Any) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_BYTES, ADDRESS_BYTES))

    return subprocess.run(
        command,
        env=os.environ | {"EDGE_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        preexec_fn=limit,
        **more,
    )


def check_one_line(done: subprocess.CompletedProcess[str], *kinds: str) -> str:
    assert done.returncode == 1, done
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert any(done.stderr.startswith(f"edge: {kind}: ") for kind in kinds), done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf(tmp_path_factory.mktemp("hostile") / "hf")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_hostile_template_of_the_user(name: str, folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(TEMPLATES[name])
    command = [*PROGRAM, "chat", str(folder), "--template", str(template), "-n", "2", "--context", "64"]
    check_one_line(limited(command, tmp_path, input="hello\n"), "TemplateError")


@pytest.mark.parametrize("name", ["loop", "silent", "format", "grow", "macro", "syntax"])
def test_a_hostile_template_inside_a_model(name: str, tmp_path: Path) -> None:
    source = tiny_gguf(tmp_path / "m.gguf", extra={"tokenizer.chat_template": TEMPLATES[name]})
    command = [*PROGRAM, "chat", str(source), "-n", "2", "--context", "64"]
    check_one_line(limited(command, tmp_path, input="hello\n"), "TemplateError")
    plain = limited([*PROGRAM, "run", str(source), "x", "-n", "2", "--context", "64"], tmp_path)
    assert plain.returncode == 0, plain.stderr  # who does not chat is not concerned


#: Values of config.json that no model has.
VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_size": (0, -64, 10**15, 2**63, "64", None, 64.5, float("nan"), [64], {}, True, 66),
    "vocab_size": (0, -1, 10**12, "320", float("inf")),
    "num_hidden_layers": (0, -1, 10**9, 2**64, "2", 1.5),
    "num_attention_heads": (0, -4, 3, 10**9, "4", float("nan")),
    "num_key_value_heads": (0, -2, 3, 5, 10**9),
    "head_dim": (0, -1, 7, 10**12, "16"),
    "intermediate_size": (0, -1, 10**15, "x"),
    "max_position_embeddings": (0, -1, 10**18, "128"),
    "rms_norm_eps": (-1.0, float("nan"), float("inf"), "1e-5"),
    "rope_theta": (0.0, -1.0, float("nan"), float("inf"), "10000"),
    "rope_scaling": ({"rope_type": "magic"}, {"rope_type": "linear", "factor": 0}, "linear", [1], 7),
    "hidden_act": ("nonsense", 7, None),
    "sliding_window": (-1, "x", 0.5),
    "tie_word_embeddings": ("maybe", 7),
}


def config_error(tmp_path: Path, run: Callable[..., Any], changes: dict[str, Any]) -> BaseException | None:
    source = tiny_hf(tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | changes))
    try:
        run(source, tmp_path / "out.edge")
    except BaseException as error:
        return error
    return None


CASES = [(key, value) for key, values in VALUES.items() for value in values]
#: Values another reading of the format may accept; they must then do no harm.
HARMLESS = {"rms_norm_eps", "sliding_window", "tie_word_embeddings", "max_position_embeddings", "hidden_act"}


@pytest.mark.parametrize("key, value", CASES, ids=str)
def test_absurd_values_in_config_json(key: str, value: Any, tmp_path: Path) -> None:
    from edge.errors import EdgeError, ModelFileError
    from flashload.machine import peak_rss_bytes
    from flashload.pack import pack

    before = peak_rss_bytes()
    error = config_error(tmp_path, pack, {key: value})
    assert peak_rss_bytes() - before < 64 << 20
    if error is None:
        assert key in HARMLESS, f"{key}={value!r} was accepted"
        return
    assert isinstance(error, EdgeError), repr(error)
    assert isinstance(error, ModelFileError)
    assert "\n" not in str(error) and len(str(error)) < 600
    assert not (tmp_path / "out.edge").exists()


@pytest.mark.parametrize("kind", ["alien", 7, None, ["llama"]], ids=str)
def test_models_of_no_known_family(kind: Any, tmp_path: Path) -> None:
    from edge.errors import ModelFileError
    from flashload.pack import pack

    error = config_error(tmp_path, pack, {"model_type": kind, "architectures": [kind]})
    assert isinstance(error, ModelFileError) and "\n" not in str(error)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "7",
        "null",
        "[" * 100_000,
        '{"model_type":' * 5000,
        "\xff\xfe",
        '{"a": 1' + "0" * 5000 + "}",
    ],
)
def test_a_config_that_is_none(text: str, tmp_path: Path) -> None:
    source = tiny_hf(tmp_path / "hf")
    (source / "config.json").write_text(text, encoding="latin-1")
    done = limited([*PROGRAM, "run", str(source), "x", "-n", "1"], tmp_path)
    check_one_line(done, "ModelFileError", "UnsupportedModelError")


#: Key of a GGUF file -> the bits of a 32-bit value no model has.
GGUF_VALUES = {
    "llama.embedding_length": (0, 65, 2**31, 2**32 - 1),
    "llama.block_count": (0, 2**31),
    "llama.attention.head_count": (0, 3, 2**32 - 1),
    "llama.attention.head_count_kv": (0, 3, 2**31),
    "llama.feed_forward_length": (0, 2**32 - 1),
    "llama.rope.dimension_count": (0, 7, 2**32 - 1),
    "llama.rope.freq_base": (0, 0x7FC00000, 0x7F800000, 0xBF800000),  # zero, NaN, infinity, -1
    "llama.attention.layer_norm_rms_epsilon": (0x7FC00000, 0xBF800000),
}


@pytest.mark.parametrize(
    "key, bits", [(key, bits) for key, all_bits in GGUF_VALUES.items() for bits in all_bits], ids=str
)
def test_absurd_values_in_a_gguf(key: str, bits: int, tmp_path: Path) -> None:
    from edge.errors import ModelFileError
    from flashload.machine import peak_rss_bytes
    from flashload.pack import pack

    source = tiny_gguf(tmp_path / "m.gguf")
    data = bytearray(source.read_bytes())
    at = (
        data.index(len(key).to_bytes(8, "little") + key.encode()) + 8 + len(key) + 4
    )  # after the value's type
    data[at : at + 4] = bits.to_bytes(4, "little")
    source.write_bytes(data)
    before = peak_rss_bytes()
    with pytest.raises(ModelFileError) as refusal:
        pack(source, tmp_path / "out.edge")
    assert "\n" not in str(refusal.value)
    assert peak_rss_bytes() - before < 64 << 20
    assert not (tmp_path / "out.edge").exists()


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 2**40}, {"num_hidden_layers": 2**31}, {"vocab_size": -5}], ids=str
)
def test_the_command_line_says_one_line(changes: dict[str, Any], tmp_path: Path) -> None:
    source = tiny_hf(tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | changes))
    done = limited([*PROGRAM, "run", str(source), "x", "-n", "1"], tmp_path)
    check_one_line(done, "ModelFileError", "UnsupportedModelError")
