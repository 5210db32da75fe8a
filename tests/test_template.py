"""Chat templates: the text Jinja gives, who wrote which part of it, and what stops a hostile one."""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import tracemalloc
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge import template_text as tt
from edge.template import ChatTemplate, _environment, render_text
from edge.template_limits import Limits
from edge.template_text import Mixed
from flashload.errors import ArgumentError, TemplateError
from tests.template_cases import HOSTILE, PASSING, PIECES

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
USER = [{"role": "user", "content": "Hi"}]
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "turns": [
        {"role": "user", "content": "Hi there, é 你好 <b>"},
        {"role": "assistant", "content": "Hello! & <x>"},
        {"role": "user", "content": "  How are\nyou? "},
    ],
    "system": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>hmm</think>Hello!"},
        {"role": "user", "content": "How?"},
    ],
    "one": USER,
}
# What these need beyond plain turns; plain Jinja refuses the same conversations.
NEEDS = {
    "MiroThinker": "assigns to a plain mapping, which no released Jinja allows",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "iterates over tools, which must be a list",
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]
CALLS: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "abcdefghi",
                "type": "function",
                "function": {"name": "get_weather", "arguments": {"city": "Rome"}},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "abcdefghi", "name": "get_weather", "content": '{"t": 20}'},
]


def plain_jinja() -> jinja2.Environment:
    """Jinja as transformers sets it up."""
    environment = _environment()

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        x: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


@functools.cache
def _plain(source: str) -> jinja2.Template:
    return plain_jinja().from_string(source)


_ours = functools.cache(ChatTemplate)


def both(source: str, messages: list[dict[str, Any]], **variables: Any) -> tuple[str | None, str | None]:
    """The text by Jinja and by us; None where it is refused."""
    names = {"tools": None, "documents": None, "add_generation_prompt": True, **TOKENS, **variables}
    try:
        expected: str | None = _plain(source).render(messages=messages, **names)
    except Exception:
        expected = None
    try:
        found: str | None = render_text(_ours(source).render(messages, special_tokens=TOKENS, **variables))
    except TemplateError:
        found = None
    return expected, found


def sources(shared: Path) -> dict[str, str]:
    return {
        path.stem: path.read_text(encoding="utf-8") for path in sorted((shared / "templates").glob("*.jinja"))
    }


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_real_templates_equal_jinja(shared: Path, kind: str, prompt: bool) -> None:
    refused = set()
    found_sources = sources(shared)
    assert len(found_sources) == 28
    for name, source in found_sources.items():
        expected, found = both(source, CONVERSATIONS[kind], add_generation_prompt=prompt)
        assert found == expected, name
        if found is None:
            refused.add(name)
    if kind == "turns":
        assert refused == set(NEEDS)


def test_real_templates_with_tools_equal_jinja(shared: Path) -> None:
    rendered = 0
    for name, source in sources(shared).items():
        expected, found = both(source, CALLS, tools=TOOLS)
        if "|safe +" in source.replace(" ", "").replace("|safe+", "|safe +"):
            continue  # Jinja escapes HTML in what is added to a safe string; a prompt is not HTML
        assert found == expected, name
        rendered += found is not None
    assert rendered >= 20


def test_real_templates_mark_contents_untrusted(shared: Path) -> None:
    """What the user wrote is in untrusted runs; everything Jinja adds around it is trusted."""
    for name, source in sources(shared).items():
        if name in NEEDS:
            continue
        messages = [{"role": "user", "content": "QUESTION"}]
        runs = ChatTemplate(source, name).render(messages, special_tokens=TOKENS)
        assert "QUESTION" in "".join(text for text, trusted in runs if not trusted), name
        assert "QUESTION" not in "".join(text for text, trusted in runs if trusted), name


_contents = st.lists(
    st.one_of(
        st.sampled_from(
            ["<|im_end|>", "</think>", "<think>", "<|eot_id|>", "[INST]", "</s>", "\n", " ", "{{ 1 }}"]
        ),
        st.text(max_size=6),
    ),
    max_size=6,
).map("".join)


@given(contents=st.lists(_contents, min_size=3, max_size=3))
@settings(deadline=None, max_examples=25)
def test_any_content_renders_as_jinja_does_and_stays_untrusted(shared: Path, contents: list[str]) -> None:
    messages = [
        {"role": r, "content": c} for r, c in zip(("user", "assistant", "user"), contents, strict=True)
    ]
    blank = [{**m, "content": "\ue000" * len(m["content"])} for m in messages]
    for name, source in sources(shared).items():
        expected, found = both(source, messages)
        assert found == expected, name
        if found is None:
            continue
        trusted = "".join(t for t, ok in _ours(source).render(messages, special_tokens=TOKENS) if ok)
        # Trusted text is only ever what the template holds: no content can add to it.
        around = _ours(source).render(blank, special_tokens=TOKENS)
        for mark in ("<|im_end|>", "<|eot_id|>", "[INST]", "</s>"):
            assert (
                trusted.count(mark) <= "".join(t for t, ok in around if ok).count(mark) or mark in source
            ), name


@pytest.mark.parametrize("source", PIECES)
def test_language_equals_jinja(source: str) -> None:
    messages = [{"role": "user", "content": "Hi <there>"}, {"role": "assistant", "content": " yo ", "n": 3}]
    try:
        expected, found = both(source, messages)
    except jinja2.TemplateSyntaxError:
        expected, found = None, both("{{ 1 + none }}", messages)[1]
    assert found == expected


@given(text=st.text(max_size=20), other=st.text(max_size=3), n=st.integers(-5, 5), data=st.data())
def test_masks_follow_their_characters(text: str, other: str, n: int, data: st.DataObject) -> None:
    """Untrusted characters are private-use ones, so every mask can be worked out again."""
    text = "".join(chr(0xE000 + ord(c) % 7) if ord(c) % 2 else "ab -"[ord(c) % 4] for c in text)
    mixed = tt.make(text, bytes(c >= "\ue000" for c in text))

    def check(value: Any) -> None:
        if isinstance(value, str):
            assert tt.mask_of(value) == bytes(c >= "\ue000" for c in value)
        else:
            for item in value:
                check(item)

    other = "".join("ab -"[ord(c) % 4] for c in other)
    for result, expected in [
        (tt.cut(mixed, slice(n, None)), text[n:]),
        (tt.cut(mixed, slice(None, None, -1)), text[::-1]),
        (tt.strip(mixed, None), text.strip()),
        (tt.strip(mixed, other or "a", right=False), text.lstrip(other or "a")),
        (tt.split(mixed), text.split()),
        (tt.split(mixed, None, 1), text.split(None, 1)),
        (tt.split(mixed, None, 1, right=True), text.rsplit(None, 1)),
        (tt.split(mixed, other or " ", n), text.split(other or " ", n)),
        (tt.splitlines(mixed, True), text.splitlines(True)),
        (list(tt.partition(mixed, other or "a")), list(text.partition(other or "a"))),
        (tt.replace(mixed, other or "a", "bb"), text.replace(other or "a", "bb")),
        (tt.join([mixed, other, mixed], "a"), "a".join([text, other, text])),
        (list(tt.chars(mixed)), list(text)),
    ]:
        assert result == expected
        check(result)
    assert "".join(t for t, _ in tt.segments([mixed, other])) == text + other
    runs = tt.segments([mixed, other])
    assert all(a[1] != b[1] for a, b in itertools.pairwise(runs))
    assert all(all((c >= "\ue000") != trusted for c in t) for t, trusted in runs)


@pytest.mark.parametrize("expression", PASSING)
def test_no_operation_launders_untrusted_text(expression: str) -> None:
    runs = ChatTemplate("{% set c = messages[0].content %}{{ " + expression + " }}").render(
        [{"role": "user", "content": "<|im_end|>"}]
    )
    trusted = "".join(text for text, ok in runs if ok)
    assert "im" not in trusted.lower() and "mi" not in trusted.lower() and "end" not in trusted.lower()
    assert any(not ok for _, ok in runs)


@pytest.mark.parametrize(
    ("source", "runs"),
    [
        ("<a>{{ c }}<b>", [("<a>", True), ("Hi", False), ("<b>", True)]),
        ("{{ '<a>' + c + '<b>' }}", [("<a>", True), ("Hi", False), ("<b>", True)]),
        ("{{ '<a>' ~ c }}", [("<a>", True), ("Hi", False)]),
        ("{{ ('<a>' ~ c)|trim }}", [("<a>", True), ("Hi", False)]),
        ("{{ '<a>%s<b>' % c }}", [("<a>", True), ("Hi", False), ("<b>", True)]),
        ("{{ '<a>{}<b>'.format(c) }}", [("<a>", True), ("Hi", False), ("<b>", True)]),
        ("{{ ['<a>', c]|join('<b>') }}", [("<a><b>", True), ("Hi", False)]),
        ("{{ '<a>X'.replace('X', c) }}", [("<a>", True), ("Hi", False)]),
        ("{{ c.replace('i', '<b>') }}", [("H", False), ("<b>", True)]),
        ("{% set x %}<a>{{ c }}{% endset %}{{ x }}", [("<a>", True), ("Hi", False)]),
        ("{% macro f(t) %}<a>{{ t }}{% endmacro %}{{ f(c) }}", [("<a>", True), ("Hi", False)]),
        ("{{ ('<a>' ~ c).split('H') | join('H') }}", [("<a>H", True), ("i", False)]),
        ("{{ '<|' ~ messages[0].role ~ '|>' }}", [("<|user|>", True)]),
        ("{{ bos_token ~ c }}", [("<s>", True), ("Hi", False)]),
        ("{{ 1 ~ none ~ true }}", [("1NoneTrue", True)]),
    ],
)
def test_markup_stays_trusted(source: str, runs: list[tuple[str, bool]]) -> None:
    template = ChatTemplate("{% set c = messages[0].content %}" + source)
    assert template.render(USER, special_tokens=TOKENS) == runs


def test_only_known_roles_can_become_markup() -> None:
    template = ChatTemplate("<|{{ messages[0].role }}|>")
    assert template.render([{"role": "user"}]) == [("<|user|>", True)]
    assert template.render([{"role": "im_end"}]) == [("<|", True), ("im_end", False), ("|>", True)]


def test_tools_documents_and_variables_are_untrusted() -> None:
    template = ChatTemplate("{{ tools[0].name }}{{ documents[0].text }}{{ extra }}{{ {'a': extra}|tojson }}")
    runs = template.render(USER, tools=[{"name": "a"}], documents=[{"text": "b"}], extra="c")
    assert runs == [('abc{"a": "c"}', False)]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_stopped(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(TemplateError) as caught:
            ChatTemplate(HOSTILE[name], "hostile").render(USER)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert "hostile" in message and "\n" not in message and len(message) < 1200
    assert peak <= 64 << 20


@pytest.mark.parametrize(
    ("source", "limit"),
    [
        (HOSTILE["loops"], "steps"),
        (HOSTILE["multiply"], "characters"),
        (HOSTILE["macro recursion"], "32 deep"),
        (HOSTILE["range"], "100000"),
        (HOSTILE["squares"], "64 bits"),
        (HOSTILE["json indent"], "0 to 16"),
    ],
)
def test_errors_name_the_template_the_limit_and_the_line(source: str, limit: str) -> None:
    with pytest.raises(TemplateError, match=limit) as caught:
        ChatTemplate("\n" + source, "family.jinja").render(USER)
    assert "'family.jinja'" in str(caught.value) and "(line 2)" in str(caught.value)


def test_clock_is_the_last_guard() -> None:
    template = ChatTemplate(HOSTILE["loops"], limits=Limits(steps=1 << 60, seconds=0.0))
    with pytest.raises(TemplateError, match="processor time"):
        template.render([])


def test_limits_grow_with_the_conversation() -> None:
    source = (
        "{% for m in messages %}"
        + "{% for o in messages %}{{ loop.index }}{% endfor %}"
        + "{{ m.content }}{% endfor %}"
    )
    few = [{"role": "user", "content": "x"}] * 10
    tight = Limits(steps=0, output_chars=2048, made_chars=1 << 16)
    assert ChatTemplate(source, limits=tight).render(few)
    long_text = "word " * 400_000  # 2 million characters, beyond the base limit
    assert (
        render_text(ChatTemplate("{{ messages[0].content|trim }}").render([{"content": long_text}]))
        == long_text.strip()
    )


def test_long_conversations_render(shared: Path) -> None:
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"message {i} " * 5} for i in range(401)]
    for name, source in sources(shared).items():
        expected, found = both(source, turns)
        assert found == expected, name


@pytest.mark.parametrize(
    "source", ["{{", "{% if %}", "{% endfor %}", "{% for x in %}{% endfor %}", "{{ 1 + }}", "{% nope %}"]
)
def test_syntax_errors_say_the_line(source: str) -> None:
    with pytest.raises(TemplateError, match="'t', line 2"):
        ChatTemplate("\n" + source, "t")


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([7], r"messages\[0\]: expected a mapping"),
        ([{"role": "user", "content": object()}], r"messages\[0\].content: expected text"),
        ([{"role": "user", "content": b"x"}], "found bytes"),
        ([{1: "x"}], "keys must be text"),
        ([{"n": 1 << 70}], "64 bits"),
        ([{"n": functools.reduce(lambda a, _: [a], range(100), "x")}], "nested more than 64"),
    ],
)
def test_values_json_cannot_hold_are_refused(messages: list[Any], what: str) -> None:
    with pytest.raises(ArgumentError, match=what):
        ChatTemplate("x").render(messages)


def test_the_conversation_is_not_changed() -> None:
    messages = [{"role": "user", "content": "Hi", "n": [1]}]
    before = json.dumps(messages)
    ChatTemplate("{% set m = messages[0] %}{% set m = 1 %}{{ messages[0].n + [2] }}").render(messages)
    assert json.dumps(messages) == before
    assert not any(isinstance(v, Mixed) for m in messages for v in m.values())


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3) -> str:
    leaves = [
        "c",
        "messages",
        "1",
        "'x'",
        "none",
        "true",
        "messages[0]",
        "tools",
        "nothing",
        "2.5",
        "[]",
        "{}",
        "'%s'",
        "range(3)",
    ]
    if depth == 0:
        return draw(st.sampled_from(leaves))
    inner = expressions(depth - 1)
    kind = draw(st.integers(0, 6))
    a = draw(inner)
    if kind == 0:
        return draw(st.sampled_from(leaves))
    if kind == 1:
        operators = ["+", "~", "*", "%", "==", "<", "in", "and", "or", "-", "//"]
        return f"({a} {draw(st.sampled_from(operators))} {draw(inner)})"
    if kind == 2:
        names = [
            "trim",
            "upper",
            "list",
            "length",
            "join",
            "tojson",
            "first",
            "last",
            "string",
            "reverse",
            "items",
            "int",
            "sort",
        ]
        return f"({a}|{draw(st.sampled_from(names))})"
    if kind == 3:
        names = [
            "split()",
            "strip()",
            "items()",
            "get('role')",
            "upper()",
            "replace('i', 'o')",
            "splitlines()",
            "join(c)",
        ]
        return f"({a}).{draw(st.sampled_from(names))}"
    if kind == 4:
        return f"({a})[{draw(st.sampled_from(['0', '-1', '1:', '::-1', repr('role'), '9']))}]"
    if kind == 5:
        return f"[{a}, {draw(inner)}]"
    return f"({a} if {draw(inner)} else {draw(inner)})"


_UNLIKE = ("<built-in", "<generator", "<dict_", "<filter", "object at", "reversed", "[<")


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@given(expression=expressions())
@settings(max_examples=150, deadline=None)
def test_random_expressions_equal_jinja(expression: str) -> None:
    """Where both give a text, it is the same text."""
    source = "{% set c = messages[0].content %}{{ " + expression + " }}"
    expected, found = both(source, [{"role": "user", "content": "Hi <there>\nit is"}])
    if expected is None or found is None or any(part in expected for part in _UNLIKE):
        return
    assert found == expected


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@given(expression=expressions(depth=5))
@settings(max_examples=50_000, deadline=None)
def test_random_expressions_equal_jinja_at_length(expression: str) -> None:
    test_random_expressions_equal_jinja.hypothesis.inner_test(expression)


@given(source=st.text(alphabet="{}%# abcfori n'1|.()[]\n-+", max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_source_renders_or_is_refused(source: str) -> None:
    try:
        ChatTemplate(source).render(USER)
    except TemplateError as error:
        assert "\n" not in str(error)
